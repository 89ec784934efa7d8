"""Readers and chat masks against hand-written references; every refusal by its message."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from megatron_edge.contracts import InputError
from megatron_edge.train.data import PackedDataset, pack
from megatron_edge.train.text import Document, content_hash, find_corpus, read_documents, tokenise, tokenise_chat
from tests.unit.tiny_tokenizer import tiny_tokenizer

# Drops earlier answers, as templates of reasoning models drop earlier thoughts.
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}{% if loop.last or message['role'] != 'assistant' %}"
    "{{ '<s>' + message['role'] + ':' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A mutable sequence."},
    {"role": "user", "content": "And a tuple?"},
    {"role": "assistant", "content": "An immutable one."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def contents(path: str | Path, text_key: str = "text") -> list[Any]:
    return [document.content for document in read_documents(find_corpus(str(path), text_key, "data.train"))]


# Readers


def test_text_file_ends_documents_at_form_feeds_and_two_blank_lines(tmp_path: Path) -> None:
    body = "one\n\nstill one\n\n\ntwo\r\n\r\n \r\n\r\nthree\ffour\n\n\n\n\n  indented\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + body.encode())
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(body.encode()))
    expected = ["one\n\nstill one", "two", "three", "four", "  indented"]
    assert contents(tmp_path / "a.txt") == expected
    assert contents(tmp_path / "b.md.gz") == expected


def test_directory_and_pattern_give_one_document_per_text_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b1\n\n\n\nb2")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "c"}\n\n{"text": "d"}\n')
    (tmp_path / "image.png").write_bytes(b"\0")
    assert contents(tmp_path) == ["a", "b1\n\n\n\nb2", "c", "d"]
    assert contents(tmp_path / "*.txt") == ["b1\n\n\n\nb2"]


def test_jsonl_and_parquet_hold_text_and_messages(tmp_path: Path) -> None:
    rows = [{"body": "plain", "messages": None}, {"messages": TALK}, {"body": None, "messages": TALK[:2]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert contents(tmp_path / name, text_key="body") == ["plain", TALK, TALK[:2]]


def test_parquet_null_fields_are_no_part_of_a_message(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": "f()"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": [TALK[0], call]}]), tmp_path / "a.parquet")
    assert contents(tmp_path / "a.parquet") == [[TALK[0], call]]


BAD_FILES: list[tuple[str, bytes | None, str]] = [
    ("missing.txt", None, "no such file or directory; allowed: .txt"),
    ("image.png", b"\x89PNG", r"found image.png; allowed: .txt"),
    ("empty.txt", b"", r"empty.txt is empty: 0 bytes"),
    ("blank.jsonl", b"\n \n", r"blank.jsonl is empty: 3 bytes"),
    ("binary.txt", b"text\0text", r"binary.txt: binary: a NUL byte at offset 4"),
    ("binary.jsonl", b'{"text": "a"}\n\0\0', r"binary.jsonl, line 2: binary"),
    ("latin1.txt", "é".encode("latin-1"), r"latin1.txt: not UTF-8 text: .* at offset 0"),
    ("broken.txt.gz", b"not gzip", r"broken.txt.gz: cannot be read: Not a gzipped file"),
    ("torn.txt.gz", gzip.compress(b"abc" * 99)[:-9], r"torn.txt.gz: cannot be read: "),
    ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', r"bad.jsonl, line 3: not JSON .*must be one JSON object"),
    ("deep.jsonl", b"[" * 100_000, r"deep.jsonl, line 1: not JSON"),
    ("list.jsonl", b"[1]\n", r"list.jsonl, line 1: found a list; each line must be one JSON object"),
    ("key.jsonl", b'{"txt": "a", "id": 1}\n', r"line 1: keys \['id', 'txt'\]; data.text_key='text' or 'messages'"),
    ("type.jsonl", b'{"text": 3}\n', r"line 1: found a int; allowed: a string, or a list of messages"),
    ("surrogate.jsonl", b'{"text": "\\ud800"}\n', r"line 1: not text: .*surrogate"),
    ("role.jsonl", b'{"messages": [{"content": "a"}]}\n', r"line 1: a message must be an object with strings 'role'"),
    ("null.jsonl", b'{"messages": [{"role": "user"}]}\n', r"line 1: a message must be an object with strings 'role'"),
    ("mute.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', r"no message has the role 'assistant'"),
    ("a.parquet", b"PAR1 no", r"a.parquet: not a readable parquet file"),
]


@pytest.mark.parametrize(("name", "body", "message"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_file_is_refused_by_name(tmp_path: Path, name: str, body: bytes | None, message: str) -> None:
    if body is not None:
        (tmp_path / name).write_bytes(body)
    with pytest.raises(InputError, match=message) as caught:
        contents(tmp_path / name)
    assert name in str(caught.value)


def test_parquet_without_the_column_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"title": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: columns \['title'\]; data.text_key='text'"):
        contents(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["empty directory", "nothing*.txt"])
def test_nothing_to_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty directory").mkdir()
    with pytest.raises(InputError, match=r"found no files; allowed: .txt"):
        find_corpus(str(tmp_path / name), "text", "data.train")


def test_content_hash_tells_kinds_and_keys_apart_not_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "b.txt", "a.jsonl", "sub/a.txt"):
        (tmp_path / name).write_text('{"text": "a"}\n')

    def found(path: str, text_key: str = "text") -> str:
        return content_hash(find_corpus(str(tmp_path / path), text_key, "data.train"))

    assert found("a.txt") == found("b.txt") == found("sub/a.txt")
    different = [found("a.txt"), found("a.jsonl"), found("a.jsonl", "body"), found("sub"), found(".")]
    assert len(set(different)) == len(different)


# Token ids and chat masks


def test_text_is_encoded_as_the_tokenizer_does_and_ends_with_one_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["hello world", "ends</s>", "x"]
    documents = list(tokenise((Document(t, "", t) for t in texts), tokenizer))
    for found, content in zip(documents, texts, strict=True):
        expected = [*tokenizer.backend_tokenizer.encode(content.removesuffix("</s>")).ids, tokenizer.eos_token_id]
        assert found.tokens.tolist() == expected
        assert found.counted.all()


def test_text_keeps_the_tokenizers_own_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    with_bos = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    plain = next(iter(tokenise([Document("hello", "", "")], tokenizer))).tokens
    assert next(iter(tokenise([Document("hello", "", "")], with_bos))).tokens.tolist() == [0, *plain]


def test_no_eos_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no EOS token"):
        list(tokenise([Document("a", "", "")], endless))


def test_chat_counts_exactly_what_the_assistant_says(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = [
        ("<s>system\nHelp.</s>\n<s>user\nWhat is a list?</s>\n<s>assistant\n", False),
        ("A mutable sequence.</s>", True),
        ("\n<s>user\nAnd a tuple?</s>\n<s>assistant\n", False),
        ("An immutable one.</s>", True),
        ("\n", False),
    ]
    expected_ids: list[int] = []
    expected_counted: list[bool] = []
    for piece, counts in pieces:
        ids = tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids
        expected_ids += ids
        expected_counted += [counts] * len(ids)
    tokens, counted = tokenise_chat(TALK, tokenizer, "talk")
    assert tokens.tolist() == expected_ids
    assert counted.tolist() == expected_counted
    assert tokens.tolist() == tokenizer.apply_chat_template(TALK, return_dict=False)


def test_packed_chat_predicts_the_answer_from_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    document = next(iter(tokenise([Document(TALK, "talk", "")], tokenizer)))
    num = len(document.tokens)
    windows = PackedDataset(pack([document], num, 1), 0).window(np.arange(1))
    targets = windows.labels[windows.loss_mask]
    assert tokenizer.decode(targets) == "A mutable sequence.</s>An immutable one.</s>"
    assert int(windows.loss_mask.sum()) == int(document.counted.sum())


def test_template_without_the_prefix_property_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    forgetful = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", chat_template=FORGETFUL_TEMPLATE
    )
    with pytest.raises(InputError, match=r"talk.jsonl, line 7: the chat template renders the first 1 messages"):
        tokenise_chat(TALK, forgetful, "talk.jsonl, line 7")
    tokens, counted = tokenise_chat(TALK[:2], forgetful, "")
    assert forgetful.decode(tokens[counted]) == "A mutable sequence.</s>"


def test_a_token_across_the_edge_of_an_answer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """The text has the prefix property, the tokens have not: "Ans" + "wer" is one token where the two meet."""
    merging = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    word = max((t for t in tokenizer.get_vocab() if t.isalpha() and t.isascii()), key=len)
    assert len(word) > 3
    parts = [{"role": "user", "content": word[:2]}, {"role": "assistant", "content": word[2:]}]
    with pytest.raises(InputError, match="renders the first 1 messages alone otherwise"):
        tokenise_chat(parts, merging, "")


def test_conversations_that_a_template_cannot_take_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="</s>",
        chat_template="{{ raise_exception('roles must alternate') }}",
    )
    with pytest.raises(InputError, match="line 1: the chat template refuses the conversation: roles must alternate"):
        tokenise_chat(TALK, strict, "line 1")
    with pytest.raises(InputError, match="must not begin with the assistant"):
        tokenise_chat(TALK[1:], tokenizer, "")
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(InputError, match="messages need a chat template"):
        tokenise_chat(TALK, without, "")
