"""Packing, sampling, splitting and the token cache, each against a plain-loop or hand-written reference."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from megatron_edge.config import DataConfig
from megatron_edge.contracts import InputError
from megatron_edge.train import data
from megatron_edge.train.data import BatchPlan, PackedDataset, TrainingData, Windows, load_data, pack, split_keys
from megatron_edge.train.text import TokenisedDocument
from tests.unit.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def config(**changes: Any) -> DataConfig:
    fields = {"train": None, "heldout": None, "text_key": "text", "heldout_fraction": 0.1, "eval_tokens": 256}
    return DataConfig(**{**fields, **changes})


# Packing


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[TokenisedDocument], int]:
    """Documents of distinct token values, so that a token's place in the corpus can be read off it."""
    lengths = draw(st.lists(st.integers(1, 25), min_size=1, max_size=12))
    chooser = random.Random(draw(st.integers(0, 99)))
    documents, first = [], 100
    for length in lengths:
        counted = np.array([chooser.random() < 0.7 for _ in range(length)])
        documents.append(TokenisedDocument(np.arange(first, first + length, dtype=np.int32), counted, "", length))
        first += length
    return documents, draw(st.integers(2, 12))


def packed_by_loop(documents: list[TokenisedDocument], size: int, pad: int) -> list[list[tuple[int, ...]]]:
    """Windows of (token, segment, position, mask, label), one token at a time."""
    stream = [(int(t), bool(c), n) for n, d in enumerate(documents) for t, c in zip(d.tokens, d.counted, strict=True)]
    stream += [(pad, False, -1)] * (-len(stream) % size)
    windows = []
    for begin in range(0, len(stream), size):
        window, segment, position = [], -1, 0
        for i in range(begin, begin + size):
            new = i == begin or stream[i][2] != stream[i - 1][2]
            segment, position = (segment + 1, 0) if new else (segment, position + 1)
            follows = i + 1 < begin + size and stream[i + 1][2] == stream[i][2] and stream[i + 1][1]
            window.append((stream[i][0], segment, position, int(follows), stream[i + 1][0] if follows else 0))
        windows.append(window)
    return windows


@settings(max_examples=60, deadline=None)
@given(corpora())
def test_packing_equals_a_plain_loop(case: tuple[list[TokenisedDocument], int]) -> None:
    documents, size = case
    windows = pack(documents, size, 7)
    batch = PackedDataset(windows, 0).window(np.arange(len(windows.tokens)))
    assert [field.dtype for field in batch] == [torch.int64, torch.int32, torch.int64, torch.bool, torch.int64]
    found = [[tuple(map(int, token)) for token in zip(*window, strict=True)] for window in zip(*batch, strict=True)]
    assert found == packed_by_loop(documents, size, 7)
    assert not batch.loss_mask[:, -1].any()


@settings(max_examples=40, deadline=None)
@given(corpora(), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_holds_every_token_once_and_in_order(
    case: tuple[list[TokenisedDocument], int], epoch: int, seed: int
) -> None:
    documents, size = case
    dataset = PackedDataset(pack(documents, size, 7), seed)
    samples = [dataset.sample(epoch * len(dataset) + i).tokens.tolist() for i in range(len(dataset))]
    by_place = [token for window in sorted(samples) for token in window if token != 7]  # windows in corpus order
    assert by_place == [int(token) for document in documents for token in document.tokens]


def test_attention_mask_is_causal_within_a_segment() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2]], dtype=torch.int32)
    mask = data.attention_mask(documents)
    assert mask.shape == (2, 1, 6, 6) and mask.dtype == torch.bool
    for b in range(2):
        for query in range(6):
            for key in range(6):
                allowed = key <= query and documents[b, query] == documents[b, key]
                assert bool(mask[b, 0, query, key]) is not bool(allowed)


# Sampling


def numbered(num: int, seed: int = 3) -> PackedDataset:
    """Window i holds the tokens 4 i .. 4 i + 3."""
    tokens = np.arange(num * 4, dtype=np.int32).reshape(num, 4)
    return PackedDataset(Windows(tokens, np.zeros_like(tokens), np.ones_like(tokens, dtype=np.bool_)), seed)


def mixed_by_ints(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_permutation_is_splitmix_order_for_ever() -> None:
    assert mixed_by_ints(1234567) == 6457827717110365317  # the published first output for this seed
    for seed, epoch, num in ((0, 0, 50), (7, 3, 33), (2**31 - 1, 1, 8)):
        base = mixed_by_ints((mixed_by_ints(seed) + epoch) % 2**64)
        expected = sorted(range(num), key=lambda i: mixed_by_ints((base + i) % 2**64))
        assert data.permutation(num, seed, epoch).tolist() == expected
    assert data.permutation(10, 1, 0).tolist() != data.permutation(10, 1, 1).tolist()
    assert data.permutation(10, 1, 0).tolist() != data.permutation(10, 2, 0).tolist()


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_every_layout_and_every_resume_sees_the_same_samples(micro_batch: int) -> None:
    whole = [BatchPlan(numbered(11), 12, 12).micro_batches(step, 0, 1)[0].tokens for step in range(4)]
    for dp in (1, 2, 3, 6):
        for step in (3, 0, 2, 1):  # a fresh plan for each step, in any order: there is no state but the step
            ranks = [BatchPlan(numbered(11), 12, micro_batch).micro_batches(step, rank, dp) for rank in range(dp)]
            assert all(len(batches) == 12 // (dp * micro_batch) for batches in ranks)
            parts = [batch.tokens for batches in ranks for batch in batches]
            assert all(part.shape == (micro_batch, 4) for part in parts)
            assert torch.equal(torch.cat(parts), whole[step])
    seen = torch.cat(whole)[:44, 0] // 4
    assert all(sorted(seen[e * 11 : e * 11 + 11].tolist()) == list(range(11)) for e in range(4))


def test_layout_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(InputError, match=r"train.global_batch=8: must be a multiple of train.micro_batch \(2\) x .*3"):
        BatchPlan(numbered(11), 8, 2).micro_batches(0, 0, 3)


def test_calibration_is_the_start_of_the_training_order() -> None:
    dataset = numbered(11)
    assert dataset.calibration(5).tokens[:, 0].tolist() == (data.permutation(11, 3, 0)[:5] * 4).tolist()
    with pytest.raises(InputError, match=r"quant.calib_size=12: the training text has 11 windows of 4 tokens"):
        dataset.calibration(12)


def test_evaluation_is_spread_and_free_of_the_seed(caplog: pytest.LogCaptureFixture) -> None:
    assert numbered(10, seed=1).evaluation(17).tokens[:, 0].tolist() == [0, 8, 16, 24, 32]
    assert torch.equal(numbered(10, seed=1).evaluation(17).tokens, numbered(10, seed=2).evaluation(17).tokens)
    with caplog.at_level(logging.WARNING, logger="megatron_edge"):
        assert len(numbered(3).evaluation(99).tokens) == 3
    assert "data.eval_tokens=99: the held-out text has 12" in caplog.text


# Loading


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in text.split("\n\n") if len(" ".join(part.split())) >= 60}


def stream(dataset: PackedDataset, eos: int) -> list[list[int]]:
    """The documents, EOS cut off, that the windows hold in corpus order."""
    documents: list[list[int]] = [[]]
    for token in dataset.windows.tokens.reshape(-1).tolist():
        if token == eos:
            documents.append([])
        else:
            documents[-1].append(token)
    return [document for document in documents if document]


def test_default_corpus_is_split_by_topic_without_shared_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = load_data(config(), tokenizer, 64, 1, tmp_path)
    sides = [
        [tokenizer.decode(tokens) for tokens in stream(dataset, tokenizer.eos_token_id)]
        for dataset in (loaded.train, loaded.heldout)
    ]
    assert sorted(sides[0] + sides[1]) == sorted(topics.values())
    shared = {p for text in sides[0] for p in paragraphs(text)} & {p for text in sides[1] for p in paragraphs(text)}
    assert not shared
    assert 0.08 < sum(map(len, sides[1])) / sum(map(len, topics.values())) <= 0.1


def test_split_depends_on_names_alone() -> None:
    names = {f"document {i}": 10 + i % 7 for i in range(200)}
    backwards = dict(reversed(list(names.items())))
    held = split_keys(names, 0.2)
    assert held == split_keys(backwards, 0.2)
    assert 0.19 * sum(names.values()) < sum(names[name] for name in held) <= 0.2 * sum(names.values())
    assert split_keys({"a": 50, "b": 3, "c": 60}, 0.01) == {"b"}


def test_given_text_is_split_by_its_contents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"Document number {i} speaks of {i * i} things." for i in range(40)]
    held = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / f"{name}.txt").write_text("\n\n\n".join(order))
        loaded = load_data(config(train=str(tmp_path / f"{name}.txt")), tokenizer, 16, 1, tmp_path / "cache")
        held.append({tokenizer.decode(tokens) for tokens in stream(loaded.heldout, tokenizer.eos_token_id)})
        train = [tokenizer.decode(tokens) for tokens in stream(loaded.train, tokenizer.eos_token_id)]
        assert train == [text for text in order if text not in held[-1]]
    assert held[0] == held[1] and 0 < len(held[0]) < 5


def test_given_heldout_text_is_not_split(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("The one document for training.")
    (tmp_path / "b.txt").write_text("The other document, held out.")
    both = config(train=str(tmp_path / "a.txt"), heldout=str(tmp_path / "b.txt"))
    loaded = load_data(both, tokenizer, 8, 1, tmp_path / "cache")
    sides = [stream(dataset, tokenizer.eos_token_id) for dataset in (loaded.train, loaded.heldout)]
    assert [tokenizer.decode(side[0]) for side in sides] == [(tmp_path / n).read_text() for n in ("a.txt", "b.txt")]
    assert "training documents too" not in caplog.text
    load_data(config(train=both.train, heldout=both.train), tokenizer, 8, 1, tmp_path / "cache")
    assert "1 of its documents are training documents too" in caplog.text
    with pytest.raises(InputError, match=r"holds 1 document, which cannot be split .* allowed: data.heldout=PATH"):
        load_data(config(train=both.train), tokenizer, 8, 1, tmp_path / "cache")


def test_too_little_text_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("a\n\n\nb")
    one = config(train=str(tmp_path / "a.txt"), heldout=str(tmp_path / "a.txt"))
    with pytest.raises(
        InputError, match=r"data.train: 4 tokens in 2 documents .* train.seq_length_tokens=5; .* most 4"
    ):
        load_data(one, tokenizer, 5, 1, tmp_path / "cache")
    with pytest.raises(InputError, match=r"train.seq_length_tokens=1: must be at least 2"):
        load_data(one, tokenizer, 1, 1, tmp_path / "cache")


def test_windows_without_anything_to_learn_are_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [{"role": "user", "content": "why " * 50}, {"role": "assistant", "content": "Because it is so."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    both = config(train=str(tmp_path / "a.jsonl"), heldout=str(tmp_path / "a.jsonl"))
    size = 8
    answer = len(tokenizer.encode("Because it is so.</s>"))
    num_tokens = len(tokenizer.apply_chat_template(talk, return_dict=False))
    end = num_tokens - 1  # the template's line feed after the answer
    windows = {i // size for i in range(end - answer, end) if i % size}  # its first token predicts nothing
    loaded = load_data(both, tokenizer, size, 1, tmp_path / "cache")
    assert len(loaded.train) == len(windows) < num_tokens // size
    assert loaded.train.windows.loss_mask.any(axis=1).all()
    assert loaded.train.windows.loss_mask.sum() == sum(1 for i in range(end - answer, end) if i % size)

    silent = tiny_tokenizer()
    silent.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match=r"data.train: none of 1 documents is long enough"):
        load_data(both, silent, size, 1, tmp_path / "cache")


def same(a: TrainingData, b: TrainingData) -> bool:
    pairs = ((a.train, b.train), (a.heldout, b.heldout))
    return all(np.array_equal(x, y) for p, q in pairs for x, y in zip(p.windows, q.windows, strict=True))


def test_cache_is_built_once_and_mapped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    first = load_data(config(), tokenizer, 64, 1, tmp_path)
    (directory,) = tmp_path.iterdir()
    assert directory.name == first.fingerprint[:16]
    written = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    builds: list[object] = []
    second = load_data(config(), tokenizer, 64, 2, tmp_path, builds.append)  # as a rank that leaves it to another
    assert len(builds) == 1 and same(first, second) and second.fingerprint == first.fingerprint
    assert isinstance(second.train.windows.tokens, np.memmap)
    load_data(config(), tokenizer, 64, 2, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == written


def test_fingerprint_follows_contents_not_paths(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"Document number {i} speaks of {i * i} things." for i in range(40)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n\n\n".join(texts))
    tokenizer("left over padding", padding="max_length", max_length=9)

    def fingerprint(name: str, seq_length_tokens: int = 16, which: Any = tokenizer, **changes: Any) -> str:
        changed = config(train=str(tmp_path / f"{name}.txt"), **changes)
        return load_data(changed, which, seq_length_tokens, 1, tmp_path / "cache").fingerprint

    other = tiny_tokenizer()
    assert fingerprint("a") == fingerprint("b") == fingerprint("a", which=other)
    other.chat_template = None
    different = [fingerprint("a"), fingerprint("a", 17), fingerprint("a", heldout_fraction=0.2)]
    different += [fingerprint("a", heldout=str(tmp_path / "b.txt")), fingerprint("a", which=other)]
    (tmp_path / "b.txt").write_text("\n\n\n".join(texts)[:-1])
    different.append(fingerprint("b"))
    assert len(set(different)) == len(different)


def test_failed_build_leaves_nothing_and_damage_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"Document number {i}." for i in range(9)]
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts))
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(InputError, match=r"data.heldout: 2 tokens"):  # after the training windows were written
        load_data(
            config(train=str(tmp_path / "a.txt"), heldout=str(tmp_path / "b.txt")), tokenizer, 8, 1, tmp_path / "cache"
        )
    assert not list((tmp_path / "cache").iterdir())
    loaded = load_data(config(train=str(tmp_path / "a.txt")), tokenizer, 8, 1, tmp_path / "cache")
    path = tmp_path / "cache" / loaded.fingerprint[:16] / "train.tokens.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=f"{path.parent}: damaged token cache"):
        load_data(config(train=str(tmp_path / "a.txt")), tokenizer, 8, 1, tmp_path / "cache")
