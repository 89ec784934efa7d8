"""A pretrained Hugging Face model, wherever it lies: found, checked, and read slice by slice.

In: `model.source` (a local directory, a *.gguf file, a hub name, or a file inside a pip package). Out: a ModelSource.
Rank 0 alone calls `resolve_source`, which may download; every rank calls `open_source` on the path that it gives.
No code of the model's is ever run: safetensors and GGUF only, trust_remote_code is never set.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_edge.contracts import InputError
from megatron_edge.model import torch_dist_source
from megatron_edge.model.download import ALLOWED_SOURCES, PICKLED, resolve_source
from megatron_edge.model.hf_config import (
    check_tensors,
    checked_config,
    expected_tensors,
    head_dim,
    rope_scaling,
    rope_theta,
)

__all__ = [
    "ModelSource",
    "head_dim",
    "load_tokenizer",
    "open_model",
    "open_source",
    "resolve_source",
    "rope_scaling",
    "rope_theta",
]


_FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class _Store(Protocol):
    """Tensors in files: what a format has to offer. `read` gets bounds that hold, `cols` is None for vectors."""

    files: list[Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str, rows: slice, cols: slice | None) -> torch.Tensor: ...


class SafetensorsStore:
    """The safetensors files of a Hugging Face directory: one file, or an index and its shards.

    Raises:
        InputError: no weights, pickled weights only, a damaged or missing file, an index that does not hold.
    """

    def __init__(self, directory: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._handle_of: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        weight_map = self._find_files(directory)
        for file in self.files:
            self._open(file)
        moved = [n for n, file in (weight_map or {}).items() if n not in self.shapes or self._file_of[n] != file]
        if moved:
            raise InputError(
                f"{directory / 'model.safetensors.index.json'}: {moved[0]} (one of {len(moved)}) is not in "
                f"{(weight_map or {})[moved[0]]}, where the index puts it; allowed: an index that fits its files"
            )

    def _find_files(self, directory: Path) -> dict[str, str] | None:
        """Set `files`; the index's weight_map where there is one. One whole file wins, as in transformers."""
        index = directory / "model.safetensors.index.json"
        loose = sorted(directory.glob("*.safetensors"))
        whole = directory / "model.safetensors"
        if not whole.is_file() and index.is_file():
            weight_map = _read_json(index).get("weight_map")
            names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) and weight_map else []
            if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
                raise InputError(f"{index}: weight_map is {str(weight_map)[:80]}; allowed: tensor names to file names")
            self.files = [directory / name for name in names]
            for file in self.files:
                if not file.is_file():
                    raise InputError(f"{index}: names {file.name}, which is not in {directory}; allowed: files there")
            return weight_map
        if whole.is_file() or len(loose) == 1:
            self.files = [whole if whole.is_file() else loose[0]]
            return None
        found = sorted(entry.name for entry in directory.iterdir())
        pickled = [name for name in found if name.endswith(PICKLED)]
        allowed = "allowed: model.safetensors, or model.safetensors.index.json and its shards"
        listing = f"found {', '.join(found[:8]) or 'nothing'}{', ...' if len(found) > 8 else ''}"
        if loose:
            raise InputError(
                f"{directory}: {len(loose)} *.safetensors and no model.safetensors.index.json; {listing}; {allowed}"
            )
        if pickled:
            raise InputError(
                f"{directory}: only pickled weights ({', '.join(pickled[:3])}), which can run code when they are read; "
                "allowed: safetensors only (load it with transformers and save_pretrained where you trust it)"
            )
        raise InputError(f"{directory}: no weights ({listing}); {allowed}")

    def _open(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(str(file), framework="pt", device="cpu")
            names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: truncated or corrupt ({error}), {file.stat().st_size} bytes; "
                "allowed: a complete safetensors file"
            ) from error
        for name in names:
            view = handle.get_slice(name)
            if view.get_dtype() not in _FLOAT_DTYPES:
                raise InputError(f"{file}: {name} has dtype {view.get_dtype()}; allowed: {', '.join(_FLOAT_DTYPES)}")
            if name in self.shapes:
                raise InputError(f"{file}: {name} is in {self._file_of[name]} too; allowed: each tensor once")
            self.shapes[name] = tuple(view.get_shape())
            self.dtypes[name] = _FLOAT_DTYPES[view.get_dtype()]
            self._handle_of[name], self._file_of[name] = handle, file.name

    def read(self, name: str, rows: slice, cols: slice | None) -> torch.Tensor:
        view = self._handle_of[name].get_slice(name)
        part = view[rows] if cols is None else view[rows, cols]
        # safetensors 0.8 gives views of one mapped storage: writing to one would change what the next read gives.
        return part.clone(memory_format=torch.contiguous_format)


class ModelSource:
    """A checked pretrained model on local disk.

    Attributes:
        path: the directory or *.gguf file of the weights.
        kind: "safetensors", "gguf" or "torch_dist".
        hf_config: config.json, checked and completed, with the classic keys (see model.hf_config.checked_config).
        described_by: the directory of config.json and tokenizer; `path` but for a torch_dist checkpoint.
    """

    def __init__(
        self, path: Path, kind: str, hf_config: dict[str, Any], store: _Store, described_by: Path | None = None
    ) -> None:
        self.path, self.kind, self.hf_config, self._store = path, kind, hf_config, store
        self.described_by = described_by or path
        self._shapes = expected_tensors(hf_config)

    def names(self) -> list[str]:
        """Hugging Face tensor names in the model's order; no lm_head where it is tied."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """What `read` returns: the file's own float type, fp32 for GGUF."""
        return self._store.dtypes[name]

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        """A slice of one tensor; no more than it is read from disk.

        Args:
            rows, cols: half-open ranges over dimensions 0 and 1, without step; None for all.
        """
        shape = self._shapes[name]
        if len(shape) == 1 and cols is not None:
            raise IndexError(f"{name} has one dimension, cols={cols}")
        bounds = [_bounds(name, wanted, size) for wanted, size in zip((rows, cols), shape, strict=False)]
        return self._store.read(name, bounds[0], bounds[1] if len(shape) == 2 else None)

    def fingerprint(self) -> str:
        """sha256 over the config, the tensors' names and shapes, and the bytes of the weight files; not their place."""
        described = {
            "config": self.hf_config,
            "tensors": [[name, list(shape), str(self.dtype(name))] for name, shape in self._shapes.items()],
            "files": [[file.name, file.stat().st_size, _sha256_of(file)] for file in self._store.files],
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> Any:
        """The model's fast transformers tokenizer, with its chat template (loaded once).

        Raises:
            InputError: none there, or one with ids beyond the embedding.
        """
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from megatron_edge.model.gguf_source import GgufStore

        tokenizer = self._store.tokenizer() if isinstance(self._store, GgufStore) else load_tokenizer(self.described_by)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= self.hf_config["vocab_size"]:
            raise InputError(
                f"{self.path}: the tokenizer's largest id is {largest}; "
                f"allowed: less than vocab_size, {self.hf_config['vocab_size']}"
            )
        return tokenizer

    def save_tokenizer(self, directory: Path) -> None:
        """Write tokenizer files, chat template and generation config into an existing directory.

        `AutoTokenizer.from_pretrained(directory)` then gives the ids of `tokenizer()`, in transformers 4 and 5.
        """
        tokenizer, home = self.tokenizer(), self.described_by
        present = _TOKENIZER_FILES if (home / "tokenizer.json").is_file() else ()
        if not present:
            tokenizer.save_pretrained(str(directory))
        for name in (*present, "generation_config.json"):
            if (home / name).is_file():
                shutil.copyfile(home / name, directory / name)
        settings_path = directory / "tokenizer_config.json"
        settings = _read_json(settings_path) if settings_path.is_file() else dict(tokenizer.special_tokens_map)
        for key in ("backend", "is_local", "local_files_only", "name_or_path"):  # of the loading, not of the tokenizer
            settings.pop(key, None)
        if isinstance(settings.get("extra_special_tokens"), list):  # transformers 4 takes a list under this name only
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        # tokenizer.json as it is: other classes of transformers 5 rebuild it (GPT2Tokenizer drops SmolLM2's digits).
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if not present:
            settings["model_max_length"] = self.hf_config["max_position_embeddings"]
        _write_json(settings_path, settings)
        special = dict(tokenizer.special_tokens_map)
        if tokenizer.extra_special_tokens:
            special["additional_special_tokens"] = [str(token) for token in tokenizer.extra_special_tokens]
        generation = {key: self.hf_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name, content in (("special_tokens_map.json", special), ("generation_config.json", generation)):
            if not (directory / name).is_file():
                _write_json(directory / name, {key: value for key, value in content.items() if value is not None})

    def save_config(self, directory: Path, dtype: torch.dtype) -> None:
        """Write config.json for weights stored in `dtype`, in the classic style that every runtime reads."""
        _write_json(directory / "config.json", {**self.hf_config, "torch_dtype": str(dtype).removeprefix("torch.")})


def open_model(model: Any) -> ModelSource:
    """The model that a configuration's `model` group names (source, revision, hf_config), downloaded where it has to
    be. Raises InputError, as `resolve_source` and `open_source`."""
    described_by = None if model.hf_config is None else resolve_source(model.hf_config, None)
    return open_source(resolve_source(model.source, model.revision), described_by)


def open_source(path: Path, described_by: Path | None = None) -> ModelSource:
    """Open a model directory, *.gguf file or Megatron checkpoint and check config, names, shapes and files; reads no
    weights.

    Args:
        described_by: directory with the config.json and tokenizer of a Megatron checkpoint, if they are not in it.

    Raises:
        InputError: naming the path, what was found and what is allowed.
    """
    path = Path(path)
    if torch_dist_source.is_torch_dist(path):
        return _open_torch_dist(path, described_by)
    if described_by is not None:
        raise InputError(
            f"model.hf_config={str(described_by)!r}: {path} has its own config.json; allowed: null, but for a Megatron "
            "checkpoint"
        )
    if path.is_file() and path.suffix == ".gguf":
        from megatron_edge.model.gguf_source import GgufStore

        gguf = GgufStore(path)
        return _checked(path, "gguf", gguf.hf_config, gguf)
    if path.suffix in PICKLED and path.is_file():
        raise InputError(
            f"{path}: pickled weights can run code when they are read; allowed: safetensors only, or *.gguf"
        )
    if not path.is_dir():
        raise InputError(
            f"{path}: {'not a model' if path.exists() else 'no such file or directory'}; {ALLOWED_SOURCES}"
        )
    others = sorted(file.name for file in path.glob("*.gguf"))
    if others and not any(path.glob("*.safetensors")):
        raise InputError(f"{path}: no safetensors, but {others[0]}; allowed: model.source={path / others[0]}")
    store = SafetensorsStore(path)
    return _checked(path, "safetensors", _read_json(path / "config.json"), store)


def _open_torch_dist(path: Path, described_by: Path | None) -> ModelSource:
    home = described_by or torch_dist_source.described_by(path)
    if home is None or not (home / "config.json").is_file():
        raise InputError(
            f"model.hf_config={None if home is None else str(home)!r}: {path} is a Megatron checkpoint, which says "
            "neither architecture nor tokenizer; allowed: a directory (or hub name) with config.json and tokenizer.json"
        )
    config = checked_config(_read_json(home / "config.json"), str(home / "config.json"))
    store = torch_dist_source.TorchDistStore(path, config)
    check_tensors(config, store.shapes, str(path))
    return ModelSource(store.directory, "torch_dist", config, store, home)


def _checked(path: Path, kind: str, raw: dict[str, Any], store: _Store) -> ModelSource:
    config = checked_config(raw, f"{path / 'config.json' if kind == 'safetensors' else path}")
    check_tensors(config, store.shapes, str(path))
    return ModelSource(path, kind, config, store)


def load_tokenizer(directory: Path) -> Any:
    """The fast transformers tokenizer of a model's or artifact's directory. Raises InputError where there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = directory / "tokenizer_config.json"
    if settings.is_file() and _read_json(settings).get("auto_map"):
        raise InputError(f"{settings}: auto_map: this tokenizer runs code of its own; allowed: a plain fast tokenizer")
    whole = (directory / "tokenizer.json").is_file()
    try:
        # tokenizer.json is the truth: AutoTokenizer 5.23 may rebuild it from its vocabulary by the named class's rules.
        return (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(str(directory))
    except Exception as error:  # tokenizers raises bare Exceptions, transformers half a dozen kinds
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{directory}: no readable tokenizer ({first_line}); allowed: tokenizer.json") from error


def _bounds(name: str, wanted: slice | None, size: int) -> slice:
    start = 0 if wanted is None or wanted.start is None else wanted.start
    stop = size if wanted is None or wanted.stop is None else wanted.stop
    if not 0 <= start < stop <= size or (wanted is not None and wanted.step not in (None, 1)):
        raise IndexError(f"{name}: {wanted} is outside a dimension of {size}")
    return slice(start, stop)


def _sha256_of(file: Path) -> str:
    status = file.stat()
    return _sha256_of_version(str(file), status.st_mtime_ns, status.st_size)


@functools.lru_cache
def _sha256_of_version(file: str, mtime_ns: int, size_bytes: int) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{file}: missing; allowed: a directory as Hugging Face's save_pretrained writes it"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); allowed: a JSON object") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds a {type(content).__name__}; allowed: a JSON object")
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
