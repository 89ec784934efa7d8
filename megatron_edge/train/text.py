"""From files to token ids: what comes in is a path of the data group (or None), what goes out is one
`TokenisedDocument` after another, in a fixed order. Called by `train/data.py`.

Rules for documents
- `.txt`, `.md`, `.rst` (each also with `.gz`), one file: documents end at a form feed or at two or more blank lines.
- a directory (searched recursively) or a glob pattern: each text file is one document, in the order of the paths.
- `.jsonl` (also `.jsonl.gz`), `.parquet`: one document per line or row, under the key `data.text_key`, else `messages`.
  A string is text; a list of {"role", "content"} is a conversation.
- nothing given: CPython's `pydoc_data.topics`, one document per topic.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_edge.contracts import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("megatron_edge")

TEXT_SUFFIXES = (".txt", ".md", ".rst")
ALLOWED = ".txt, .md, .rst or .jsonl (each also with .gz), .parquet, a directory or a glob pattern of these"
DEFAULT_CORPUS = "pydoc_data.topics"
MESSAGES_KEY = "messages"
_DOCUMENT_END = re.compile(r"\f|\n(?:[ \t]*\n){2,}")
# Shorter paragraphs ("Changed in version 3.9.") recur without being a copy of the section around them.
_SHARED_PARAGRAPH_CHARS = 60
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Document:
    """One text, or one conversation (a list of messages).

    `source` names the place for error messages; documents of one `key` never part at a train/held-out split.
    """

    content: str | list[dict[str, Any]]
    source: str
    key: str

    @property
    def num_chars(self) -> int:
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(message.get("content") or "") for message in self.content)


@dataclass(frozen=True)
class TokenisedDocument:
    """`tokens` int32 [n]; `counted` bool [n]: whether predicting this token is part of the loss."""

    tokens: np.ndarray
    counted: np.ndarray
    key: str
    num_chars: int


@dataclass(frozen=True)
class Corpus:
    """What one of data.train and data.heldout stands for. `files` in reading order; none: CPython's topics.

    `one_file`: the path named a file itself, so that a text file may hold several documents.
    """

    field: str
    text_key: str
    files: tuple[Path, ...] = ()
    one_file: bool = False


def find_corpus(path: str | None, text_key: str, field: str) -> Corpus:
    """Raises InputError where there is nothing at `path`, or nothing of an allowed kind."""
    if path is None:
        return Corpus(field, text_key)
    root = Path(path).expanduser()
    with _reading(root):
        if root.is_dir():
            candidates = sorted(p for p in root.rglob("*") if p.is_file())
        elif root.exists():
            candidates = [root]
        elif glob.has_magic(str(root)):
            candidates = sorted(Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file())
        else:
            raise InputError(f"{field}={path}: there is no such file or directory; allowed: {ALLOWED}")
    files = tuple(p for p in candidates if _kind(p))
    if not files:
        found = ", ".join(p.name for p in candidates[:5]) or "no files"
        raise InputError(f"{field}={path}: found {found}; allowed: {ALLOWED}")
    if len(files) < len(candidates):
        log.info("%s=%s: %d of %d files are read, the rest is no text", field, path, len(files), len(candidates))
    return Corpus(field, text_key, files, one_file=candidates == [root])


def content_hash(corpus: Corpus) -> str:
    """sha256 (hex) of everything that decides what `read_documents` yields. Names of files do not count, kinds do."""
    digest = hashlib.sha256(json.dumps([corpus.text_key, corpus.one_file]).encode())
    if not corpus.files:
        digest.update(json.dumps(_topics(), sort_keys=True).encode())
    for path in corpus.files:
        with _reading(path), path.open("rb") as stream:
            digest.update(_kind(path).encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_documents(corpus: Corpus) -> Iterator[Document]:
    """Every document that holds more than white space.

    Raises:
        InputError: naming the file, and the line or row, where something is empty, binary or lacks its key.
    """
    num_read = num_blank = 0
    for document in _read_files(corpus) if corpus.files else _read_topics():
        if isinstance(document.content, str) and not document.content.strip():
            num_blank += 1
            continue
        num_read += 1
        yield document
    if not num_read:
        size_bytes = sum(path.stat().st_size for path in corpus.files)
        raise InputError(
            f"{corpus.field}: {corpus.files[0]} is empty: {size_bytes} bytes in {len(corpus.files)} file(s), no text"
        )
    if num_blank:
        log.info("%s: %d blank documents are left out", corpus.field, num_blank)


def _kind(path: Path) -> str:
    """text | jsonl | parquet, or "" for what cannot be read."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return "parquet"
    name = name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return "jsonl"
    return "text" if name.endswith(TEXT_SUFFIXES) else ""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the system or gzip says about `path` into an InputError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def _read_files(corpus: Corpus) -> Iterator[Document]:
    for path in corpus.files:
        kind = _kind(path)
        if kind == "parquet":
            yield from _read_parquet(path, corpus.text_key)
        elif kind == "jsonl":
            yield from _read_jsonl(path, corpus.text_key)
        else:
            with _reading(path):
                data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
            text = _decode(data, str(path)).replace("\r\n", "\n").replace("\r", "\n")
            for part in _DOCUMENT_END.split(text) if corpus.one_file else [text]:
                yield Document(part.strip("\n"), str(path), _content_key(part.strip("\n")))


def _read_jsonl(path: Path, text_key: str) -> Iterator[Document]:
    with _reading(path), gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            source = f"{path}, line {number}"
            text = _decode(line, source)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{source}: not JSON ({error}); each line must be one JSON object") from None
            yield _document(record, text_key, source)


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _reading(path), pyarrow.parquet.ParquetFile(path) as table:
            columns = [name for name in dict.fromkeys((text_key, MESSAGES_KEY)) if name in table.schema_arrow.names]
            if not columns:
                raise InputError(
                    f"{path}: columns {table.schema_arrow.names}; data.text_key={text_key!r} or "
                    f"{MESSAGES_KEY!r} must be one of them"
                )
            number = 0
            for batch in table.iter_batches(columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield _document(record, text_key, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable parquet file: {error}") from None


def _document(record: Any, text_key: str, source: str) -> Document:
    """The document that a JSON object or a parquet row holds."""
    if not isinstance(record, dict):
        raise InputError(f"{source}: found a {type(record).__name__}; each line must be one JSON object")
    content = record.get(text_key)
    if content is None:
        content = record.get(MESSAGES_KEY)
    if content is None:
        raise InputError(
            f"{source}: keys {sorted(record)}; data.text_key={text_key!r} or {MESSAGES_KEY!r} must be one of them"
        )
    if isinstance(content, list):
        content = [_message(message, source) for message in content]
        if not any(message["role"] == "assistant" for message in content):
            raise InputError(f"{source}: no message has the role 'assistant': there is nothing to learn from")
    elif not isinstance(content, str):
        raise InputError(f"{source}: found a {type(content).__name__}; allowed: a string, or a list of messages")
    return Document(content, source, _content_key(content, source))


def _message(message: Any, source: str) -> dict[str, Any]:
    """`message` without its null fields (parquet gives every row all the fields), checked."""
    found = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    has_content = isinstance(found.get("content"), str) or ("content" not in found and found.get("tool_calls"))
    if not isinstance(found.get("role"), str) or not has_content:
        raise InputError(f"{source}: a message must be an object with strings 'role' and 'content', found {message!r}")
    return found


def _decode(data: bytes, source: str) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        raise InputError(f"{source}: binary: a NUL byte at offset {nul}; allowed: UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text: {error.reason} at offset {error.start}") from None


def _content_key(content: str | list[dict[str, Any]], source: str = "") -> str:
    """sha256 (hex): equal documents share a key and so the side of a split."""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, ensure_ascii=False)
    try:
        return hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError as error:
        raise InputError(f"{source}: not text: {error.reason} (half of a surrogate pair)") from None


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return dict(topics)


def _read_topics() -> Iterator[Document]:
    """One document per topic, by name.

    Topics quote each other: `compound` holds all of `try`, `specialnames` all of `customization`; 40% of the characters
    occur more than once. Topics that share a paragraph get one key, so that held-out text is not in the training text.
    """
    topics = _topics()
    group = {name: name for name in topics}
    first_with: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) < _SHARED_PARAGRAPH_CHARS:
                continue
            ours, theirs = group[name], group[first_with.setdefault(words, name)]
            if ours != theirs:
                merged = min(ours, theirs)
                group = {topic: merged if g in (ours, theirs) else g for topic, g in group.items()}
    for name in sorted(topics):
        yield Document(topics[name], f"{DEFAULT_CORPUS}[{name!r}]", group[name])


def tokenise(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[TokenisedDocument]:
    """Token ids of each document, in order.

    Text is encoded as the tokenizer itself does (with its BOS where it has one) and ends with EOS; every token counts.
    A conversation is what the chat template renders, nothing added; only what the assistant says counts.

    Raises:
        InputError: the tokenizer has no EOS or no chat template, or the template cannot tell what the assistant says.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("model.source: the tokenizer has no EOS token: documents could not be told apart")
    stream = iter(documents)
    while batch := list(islice(stream, _BATCH_DOCUMENTS)):
        texts = [document.content for document in batch if isinstance(document.content, str)]
        encoded = iter(tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else [])
        for document in batch:
            if isinstance(document.content, str):
                ids = next(encoded)
                tokens = np.array(ids if ids and ids[-1] == eos else [*ids, eos], dtype=np.int32)
                counted = np.ones(len(tokens), dtype=np.bool_)
            else:
                tokens, counted = tokenise_chat(document.content, tokenizer, document.source)
            yield TokenisedDocument(tokens, counted, document.key, document.num_chars)


def tokenise_chat(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation's tokens int32 [n] and, bool [n], which of them the assistant says.

    Templates seldom mark generation, so the spans come from rendering prefixes: an answer is what lies between the
    conversation before it with the generation prompt, and the conversation up to and with it. The tokens of both must
    be prefixes of the whole conversation's. What the template writes after the answer's EOS is nobody's speech.

    Raises:
        InputError: no template, a template that refuses the conversation, or one without the prefix property.
    """
    if not tokenizer.chat_template:
        raise InputError(f"{source}: messages need a chat template, and the tokenizer of model.source has none")
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prefixes = [prefix for index in turns for prefix in ((messages[:index], True), (messages[: index + 1], False))]
    texts = [_render(part, prompted, tokenizer, source) for part, prompted in [(messages, False), *prefixes]]
    # The template has written the special tokens already.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    whole, *parts = encoded
    for (prefix, _), ids in zip(prefixes, parts, strict=True):
        if whole[: len(ids)] != ids:
            raise InputError(
                f"{source}: the chat template renders the first {len(prefix)} messages alone otherwise than within "
                f"the conversation, so the assistant's tokens cannot be told; give {{'text': ...}} instead"
            )
    tokens = np.array(whole, dtype=np.int32)
    counted = np.zeros(len(tokens), dtype=np.bool_)
    for begin, end in zip(map(len, parts[::2]), map(len, parts[1::2]), strict=True):
        eos_at = np.flatnonzero(tokens[begin:end] == tokenizer.eos_token_id)
        counted[begin : begin + int(eos_at[-1]) + 1 if len(eos_at) else end] = True
    return tokens, counted


def _render(messages: list[dict[str, Any]], prompted: bool, tokenizer: PreTrainedTokenizerFast, source: str) -> str:
    from jinja2 import TemplateError

    if not messages:  # templates and transformers both look at messages[0]
        raise InputError(f"{source}: a conversation must not begin with the assistant")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted))
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(f"{source}: the chat template refuses the conversation: {error}") from None
