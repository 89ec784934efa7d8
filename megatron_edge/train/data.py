"""Packed windows of tokens, and which of them each rank sees at each step.

In: the data group, a tokenizer, a window length. Out: `TrainingData`. Called by `jobs` and `train/loop.py`.

Documents follow one another without padding; a document that does not fit into the rest of a window continues in the
next one as a new segment. Attention and positions stay within a segment, the loss within a segment too.
Which windows make up a step follows from (seed, step) alone: resuming is calling with another step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from megatron_edge.contracts import BRANCH, InputError
from megatron_edge.train.text import Corpus, TokenisedDocument, content_hash, find_corpus, read_documents, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from megatron_edge.config import DataConfig

log = logging.getLogger("megatron_edge")

# Raise when the same input would be packed differently: cached windows of another layout are then not found.
LAYOUT = 1
_MASK64 = (1 << 64) - 1


class Batch(NamedTuple):
    """Windows of s tokens: every field [s] for one window, [b, s] for several.

    tokens int64; documents int32, the segment of each token, from 0 in each window; positions int64, from 0 in each
    segment; loss_mask bool, True where position i predicts token i + 1 of the same segment and that token counts (last
    position False); labels int64, the token that position i predicts, 0 where masked.
    """

    tokens: torch.Tensor
    documents: torch.Tensor
    positions: torch.Tensor
    loss_mask: torch.Tensor
    labels: torch.Tensor

    def split(self, size: int) -> list[Batch]:
        """Batches of `size` windows each, in order; the last may hold fewer."""
        return [Batch(*parts) for parts in zip(*(field.split(size) for field in self), strict=True)]


class Windows(NamedTuple):
    """All windows of a corpus, n of s tokens: tokens int32 [n, s], documents int32 [n, s], loss_mask bool [n, s]."""

    tokens: np.ndarray
    documents: np.ndarray
    loss_mask: np.ndarray


def attention_mask(documents: torch.Tensor) -> torch.Tensor:
    """documents [b, s] -> bool [b, 1, s, s], True where query i must NOT see key j (Megatron's convention); branches of
    a segment (contracts.BRANCH) see its trunk."""
    size = documents.shape[-1]
    query, key = documents[:, :, None], documents[:, None, :]
    other = (query != key) & (query % BRANCH != key)
    later = torch.ones(size, size, dtype=torch.bool, device=documents.device).triu(diagonal=1)
    return (other | later).unsqueeze(1)


def segment_starts(documents: torch.Tensor, most: int) -> torch.Tensor | None:
    """documents [b, s] -> int32 [most + 1]: where each segment of the b * s tokens, window after window, begins, then
    the number of tokens as often as is left. None where there are more than `most` segments, or branches."""
    flat = documents.flatten()
    begins = torch.ones_like(flat, dtype=torch.bool)
    begins[1:] = flat[1:] != flat[:-1]
    begins[:: documents.shape[1]] = True
    starts = begins.nonzero()[:, 0].int()
    if len(starts) > most or bool((flat >= BRANCH).any()):
        return None
    return torch.cat((starts, starts.new_full((most + 1 - len(starts),), flat.numel())))


def several_documents(documents: torch.Tensor) -> bool:
    """documents [b, s]: whether a window holds more than one segment (padding is a segment); else causality is all that
    attention needs."""
    return bool((documents != documents[:, :1]).any())


def pack(documents: Iterable[TokenisedDocument], seq_length_tokens: int, pad_token: int) -> Windows:
    """Documents in order -> windows; the rest of the last window is a segment of padding that counts nowhere."""
    size = seq_length_tokens
    tokens, counted, starts = [], [], []
    for document in documents:
        tokens.append(document.tokens)
        counted.append(document.counted)
        starts.append(np.arange(len(document.tokens)) == 0)
    num_tokens = sum(map(len, tokens))
    num_pad = -num_tokens % size
    tokens.append(np.full(num_pad, pad_token, dtype=np.int32))
    counted.append(np.zeros(num_pad, dtype=np.bool_))
    starts.append(np.arange(num_pad) == 0)

    start = np.concatenate(starts).reshape(-1, size)
    if len(start):
        start[:, 0] = True
    loss_mask = np.concatenate(counted).reshape(-1, size)
    # Position i predicts token i + 1: masks move one to the left, never over the start of a segment.
    loss_mask = np.pad((loss_mask & ~start)[:, 1:], ((0, 0), (0, 1)))
    segments = np.cumsum(start, axis=1, dtype=np.int32) - np.int32(1)
    return Windows(np.concatenate(tokens).astype(np.int32, copy=False).reshape(-1, size), segments, loss_mask)


def permutation(num: int, seed: int, epoch: int) -> np.ndarray:
    """The order int64 [num] in which epoch `epoch` visits the windows, a function of its arguments alone.

    Indices sorted by SplitMix64 (Steele, Lea, Flood 2014; constants of Vigna's public-domain splitmix64.c): unlike
    numpy's and torch's generators it is the same for every version of a library, so that old runs can be resumed.
    """
    base = _mix(np.array([seed & _MASK64], dtype=np.uint64))
    base = _mix(base + np.uint64(epoch))
    return np.argsort(_mix(base + np.arange(num, dtype=np.uint64)), kind="stable")


def _mix(state: np.ndarray) -> np.ndarray:
    """The output of SplitMix64 for each uint64 state; a bijection, so that distinct states never tie."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class PackedDataset:
    """Windows in a shuffled order without end: sample i is entry i % n of the permutation of epoch i // n."""

    def __init__(self, windows: Windows, seed: int) -> None:
        self.windows = windows
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.windows.tokens)

    @property
    def seq_length_tokens(self) -> int:
        return int(self.windows.tokens.shape[1])

    def window(self, indices: np.ndarray) -> Batch:
        """The windows `indices` [b] of the corpus's own order, [b, s] each."""
        tokens = torch.from_numpy(self.windows.tokens[indices].astype(np.int64))
        documents = torch.from_numpy(np.array(self.windows.documents[indices]))
        loss_mask = torch.from_numpy(np.array(self.windows.loss_mask[indices]))
        place = torch.arange(tokens.shape[1]).expand_as(tokens)
        starts = torch.ones_like(loss_mask)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        positions = place - torch.where(starts, place, 0).cummax(dim=1).values
        labels = tokens.roll(-1, dims=1).masked_fill_(~loss_mask, 0)
        return Batch(tokens, documents, positions, loss_mask, labels)

    def samples(self, begin: int, end: int) -> Batch:
        """Samples begin .. end - 1 of the endless order, [end - begin, s] each."""
        return self.window(np.array([self._index(i) for i in range(begin, end)], dtype=np.int64))

    def sample(self, index: int) -> Batch:
        """Sample `index` of the endless order, [s] each."""
        return Batch(*(field[0] for field in self.samples(index, index + 1)))

    def _index(self, sample: int) -> int:
        epoch, entry = divmod(sample, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self), self.seed, epoch)
        return int(self._order[entry])

    def calibration(self, num: int) -> Batch:
        """The first `num` samples, [num, s]: the same on every rank, as replicas must calibrate on the same data.

        Raises:
            InputError: the corpus has fewer windows.
        """
        if num > len(self):
            raise InputError(
                f"quant.calib_size={num}: the training text has {len(self)} windows of "
                f"{self.seq_length_tokens} tokens; allowed: at most {len(self)}"
            )
        return self.samples(0, num)

    def evaluation(self, eval_tokens: int) -> Batch:
        """Whole windows of at least `eval_tokens` tokens, spread evenly over the corpus; all where it has fewer.

        Independent of the seed, so that runs are compared on the same text.
        """
        num = -(-eval_tokens // self.seq_length_tokens)
        if num > len(self):
            log.warning(
                "data.eval_tokens=%d: the held-out text has %d; it is evaluated on all of them",
                eval_tokens,
                len(self) * self.seq_length_tokens,
            )
            num = len(self)
        return self.window(np.arange(num) * len(self) // max(num, 1))


@dataclass(frozen=True)
class BatchPlan:
    """Step t trains on samples t * global_batch .. (t + 1) * global_batch - 1, whatever the layout."""

    dataset: PackedDataset
    global_batch: int
    micro_batch: int

    def num_micro_batches(self, dp_size: int) -> int:
        """Raises InputError where the layout does not divide the global batch."""
        if self.global_batch <= 0 or self.global_batch % (self.micro_batch * dp_size):
            raise InputError(
                f"train.global_batch={self.global_batch}: must be a multiple of train.micro_batch "
                f"({self.micro_batch}) x data-parallel ranks ({dp_size})"
            )
        return self.global_batch // (self.micro_batch * dp_size)

    def micro_batches(self, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """The micro-batches, [micro_batch, s] each, of DP rank `dp_rank` at step `step` (from 0)."""
        share = self.num_micro_batches(dp_size) * self.micro_batch
        begin = step * self.global_batch + dp_rank * share
        return self.dataset.samples(begin, begin + share).split(self.micro_batch)


@dataclass(frozen=True)
class TrainingData:
    """`fingerprint` (sha256, hex) changes with the text, its split, the tokenizer and the window length, not with seed
    or paths: a run may only be resumed on data of the same fingerprint."""

    train: PackedDataset
    heldout: PackedDataset
    fingerprint: str


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    seq_length_tokens: int,
    seed: int,
    cache_dir: Path,
    run_once: Callable[[Callable[[], None]], None] = lambda build: build(),
) -> TrainingData:
    """Packed training and held-out windows, memory-mapped from `cache_dir`/<fingerprint>, built there if need be.

    Every rank calls this. `run_once` runs its argument on one rank and returns (or raises) on all of them when it is
    done; the default is for a single process. Every rank reads the files' bytes to know the fingerprint.

    Raises:
        InputError: a path or its contents, or too little text; see `train/text.py`.
    """
    if seq_length_tokens < 2:
        raise InputError(f"train.seq_length_tokens={seq_length_tokens}: must be at least 2")
    train = find_corpus(config.train, config.text_key, "data.train")
    heldout = find_corpus(config.heldout, config.text_key, "data.heldout") if config.heldout is not None else None
    if heldout is None and not 0 < config.heldout_fraction < 1:
        raise InputError(f"data.heldout_fraction={config.heldout_fraction}: must lie between 0 and 1")
    identity = {
        "layout": LAYOUT,
        "train": content_hash(train),
        "heldout": content_hash(heldout) if heldout else config.heldout_fraction,
        "tokenizer": tokenizer_hash(tokenizer),
        "seq_length_tokens": seq_length_tokens,
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    directory = cache_dir / fingerprint[:16]

    def build() -> None:
        if not directory.is_dir():
            _build(train, heldout, config.heldout_fraction, tokenizer, seq_length_tokens, directory)

    run_once(build)
    return TrainingData(
        PackedDataset(_load(directory, "train"), seed), PackedDataset(_load(directory, "heldout"), seed), fingerprint
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 (hex) of what turns text into ids; padding and truncation are left over from earlier calls."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    text = json.dumps([rules, tokenizer.chat_template, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def split_keys(sizes: dict[str, int], fraction: float) -> set[str]:
    """The keys to hold out: in the order of their hashes, each that still fits into `fraction` of the total size.

    Neither the order of the documents nor the seed matters. Where nothing fits, the smallest key is held out.
    """
    limit = fraction * sum(sizes.values())
    chosen: set[str] = set()
    taken = 0
    by_hash = sorted(sizes, key=lambda key: hashlib.sha256(key.encode()).digest())
    for key in by_hash:
        if taken + sizes[key] <= limit:
            chosen.add(key)
            taken += sizes[key]
    return chosen or {min(by_hash, key=lambda key: sizes[key])}


def _build(
    train: Corpus,
    heldout: Corpus | None,
    heldout_fraction: float,
    tokenizer: PreTrainedTokenizerFast,
    seq_length_tokens: int,
    directory: Path,
) -> None:
    """Reads, tokenises, splits, packs; `directory` appears complete or not at all."""
    log.info("reading and tokenising the text; kept in %s for the next time", directory)
    seen = list(tokenise(read_documents(train), tokenizer))
    if heldout is not None:
        unseen = list(tokenise(read_documents(heldout), tokenizer))
        num_shared = len({d.key for d in seen} & {d.key for d in unseen})
        if num_shared:
            log.warning("data.heldout: %d of its documents are training documents too", num_shared)
    else:
        sizes: dict[str, int] = {}
        for document in seen:
            sizes[document.key] = sizes.get(document.key, 0) + document.num_chars
        if len(sizes) < 2:
            raise InputError(
                f"data.train: {train.files[0]} holds 1 document, which cannot be split into training and held-out "
                "text; allowed: data.heldout=PATH, or documents told apart (two blank lines in a text file)"
            )
        held = split_keys(sizes, heldout_fraction)
        unseen = [document for document in seen if document.key in held]
        seen = [document for document in seen if document.key not in held]

    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for name, documents in (("train", seen), ("heldout", unseen)):
            windows = _pack_enough(documents, seq_length_tokens, int(tokenizer.eos_token_id), f"data.{name}")
            for field, array in windows._asdict().items():
                np.save(partial / f"{name}.{field}.npy", array)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _pack_enough(documents: list[TokenisedDocument], seq_length_tokens: int, pad_token: int, field: str) -> Windows:
    """`pack`, without the windows that hold nothing to learn (all prompt, or all padding but one token).

    Raises:
        InputError: less than one full window, or nothing to learn in any.
    """
    num_tokens = sum(len(document.tokens) for document in documents)
    if num_tokens < seq_length_tokens:
        raise InputError(
            f"{field}: {num_tokens} tokens in {len(documents)} documents are less than one window of "
            f"train.seq_length_tokens={seq_length_tokens}; allowed: more text, or at most {num_tokens}"
        )
    windows = pack(documents, seq_length_tokens, pad_token)
    useful = windows.loss_mask.any(axis=1)
    if not useful.any():
        raise InputError(
            f"{field}: none of {len(documents)} documents is long enough: no token of theirs that counts has a "
            f"predecessor in its window of train.seq_length_tokens={seq_length_tokens}"
        )
    log.info(
        "%s: %d documents, %d tokens, %d windows of %d (%d without anything to learn left out)",
        field,
        len(documents),
        num_tokens,
        int(useful.sum()),
        seq_length_tokens,
        int((~useful).sum()),
    )
    return windows if useful.all() else Windows(*(array[useful] for array in windows))


def _load(directory: Path, name: str) -> Windows:
    """Memory-mapped windows: the ranks of a host share one copy in its page cache."""
    try:
        fields = [np.load(directory / f"{name}.{field}.npy", mmap_mode="r") for field in Windows._fields]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{directory}: damaged token cache ({error}); remove the directory, it is built again"
        ) from None
    return Windows(*fields)
