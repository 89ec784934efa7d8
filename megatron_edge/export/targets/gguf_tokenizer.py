"""The vocabulary of a GGUF file: what llama.cpp needs to split text exactly as the model's own tokenizer does.

In: a directory with tokenizer.json (and tokenizer_config.json, chat_template.jinja); out: `Words`, and the metadata
that they are in the file. Called by gguf.py.

llama.cpp knows byte-level BPE by the name of its pre-tokenizer, whose rules are in its own code (llama-vocab.cpp): only
those whose rules are found word for word in tokenizer.json are taken, another is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_edge.contracts import InputError
from megatron_edge.model.source import load_tokenizer

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name -> the steps of tokenizer.json's pre_tokenizer, and whether a whole word is looked up before merging.
PRE_TOKENIZERS: dict[str, tuple[list[tuple[str, Any]], bool]] = {
    "gpt-2": ([("ByteLevel", True)], False),
    "smollm": ([("Digits", True), ("ByteLevel", True)], False),
    "llama-bpe": ([("Split", _LLAMA3), ("ByteLevel", False)], True),
    "qwen2": ([("Split", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), ("ByteLevel", False)], False),
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Words:
    """`tokens` has one for each row of the embedding; `types` are llama.cpp's. `special` maps bos, eos, unk and pad to
    ids; `dropped` names what of the tokenizer the file has no place for."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: Any
    dropped: list[str]


def read(directory: Path, vocab_size: int) -> Words:
    """Raises InputError where there is no tokenizer.json, or llama.cpp cannot do what it says."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"export.targets: gguf needs {path}, which is missing; allowed: a model with tokenizer.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    model, tokenizer = content["model"], load_tokenizer(directory)
    pre = _pre_tokenizer(content, path)
    if not model["merges"]:
        raise InputError(f"export.targets: gguf: {path} has no merges, without which llama.cpp reads no BPE tokenizer")
    tokens, types = _tokens(content, path, vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    special = {name: number for name, number in ids.items() if number is not None}
    add_bos, add_eos = _added(tokenizer, special, path)
    normalizer, dropped = content.get("normalizer"), []
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise InputError(f"export.targets: gguf cannot carry the normalizer {normalizer} of {path}; allowed: none, NFC")
    if normalizer is not None:
        dropped.append("the tokenizer's NFC normalisation: llama.cpp takes text as it comes")
    return Words(pre, tokens, types, merges, special, add_bos, add_eos, tokenizer.chat_template, dropped)


def _pre_tokenizer(content: dict[str, Any], path: Path) -> str:
    """llama.cpp's name of the tokenizer's rules."""
    model, rules = content["model"], content.get("pre_tokenizer") or {}
    steps = [_step(rule) for rule in rules.get("pretokenizers", [rules])]
    plain = model.get("type") == "BPE" and not model.get("byte_fallback") and not model.get("dropout")
    for name, (known, whole_words) in PRE_TOKENIZERS.items():
        if plain and steps == known and bool(model.get("ignore_merges")) == whole_words:
            return name
    raise InputError(
        f"export.targets: gguf cannot carry the tokenizer of {path} (model {model.get('type')}, byte_fallback "
        f"{model.get('byte_fallback')}, ignore_merges {model.get('ignore_merges')}, pre_tokenizer {json.dumps(rules)}"
        f"): llama.cpp would split text otherwise; allowed: byte-level BPE as of {', '.join(PRE_TOKENIZERS)}"
    )


def _step(rule: dict[str, Any]) -> tuple[str, Any]:
    """(type, what decides) of one step; a setting that no known tokenizer has makes it another step."""
    kind = rule.get("type")
    if kind == "ByteLevel" and not rule.get("add_prefix_space"):
        return kind, rule.get("use_regex", True)
    if kind == "Digits":
        return kind, rule.get("individual_digits")
    if kind == "Split" and rule.get("behavior") == "Isolated" and not rule.get("invert"):
        return kind, rule["pattern"].get("Regex")
    return json.dumps(rule), None


def _tokens(content: dict[str, Any], path: Path, vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of each row of the embedding; rows that no word has are padding, as in llama.cpp's converter."""
    by_id = {number: (word, NORMAL) for word, number in content["model"]["vocab"].items()}
    for token in content.get("added_tokens", []):
        by_id[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    if max(by_id) >= vocab_size:
        raise InputError(f"export.targets: gguf: {path} has {max(by_id) + 1} tokens, the embedding {vocab_size} rows")
    rows = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(vocab_size)]
    return [word for word, _ in rows], [kind for _, kind in rows]


def _added(tokenizer: Any, special: dict[str, int], path: Path) -> tuple[bool, bool]:
    """Whether encoding puts BOS before a text, and EOS behind it: asked of the tokenizer itself."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    encoded = tokenizer("a", add_special_tokens=True).input_ids
    for add_bos in (False, True):
        for add_eos in (False, True):
            bos = [special.get("bos")] if add_bos else []
            eos = [special.get("eos")] if add_eos else []
            if encoded == bos + plain + eos:
                return add_bos, add_eos
    raise InputError(
        f"export.targets: gguf cannot carry what {path} puts around a text ({encoded} around {plain}); "
        "allowed: the BOS token before and the EOS token behind it"
    )


def add(writer: Any, words: Words) -> None:
    """Put `words` into a gguf.GGUFWriter's metadata."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for name, number in words.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    template = words.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
