"""Export from checkpoints of any layout: the bytes are those that whole tensors give, interrupted or not, in little
memory; and what is wrong with a checkpoint is named."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_edge.config import from_yaml
from megatron_edge.contracts import InputError, ParallelPlan, StoppedBySignal, WriteFailed
from megatron_edge.export import compress as compressing
from megatron_edge.export.gather import CheckpointTensors
from megatron_edge.jobs import delivery
from megatron_edge.runtime.launcher import Launch
from tests.e2e.launches import flip_byte, hashes
from tests.unit.whole_export import check_artifact
from tools.layout_parity import layout_plan
from tools.random_checkpoint import SIZES, make_run, write_source

CHECKPOINT = Path("checkpoints") / "step_00000001"
INT4 = ("quant=int4", "quant.group_size=64", "quant.embedding=int8", "kv=fp8", "export.targets=[]")
CASES = {  # model, recipe, layouts
    "int4": ("tiny", INT4, ("TP2PP2", "TP4", "PP4")),
    "nvfp4": ("tiny", ("quant=nvfp4", "quant.head=fp8", "export.targets=[]"), ("TP2", "PP2")),
    "int8": ("tiny", ("quant=int8_sq", "kv=nvfp4", "export.targets=[]"), ("TP4PP2",)),
    "none": ("tiny", ("quant=none", "export.targets=[]"), ("TP2",)),
    "experts": ("tiny_experts", (*INT4, "quant.group_size=32"), ("EP2", "EP4PP2")),
}


LAUNCH = Launch(0, 1, 0, 1, 2, ParallelPlan(), None)


def export(config: Any) -> dict[str, str]:
    delivery.export(config, LAUNCH)
    return hashes(Path(config.run_dir) / "artifact")


def run_of(directory: Path, case: str, layout: str, *arguments: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    source = directory / "model"
    if not source.exists():
        write_source(source, SIZES[CASES[case][0]])
    made, _ = make_run(directory / layout, source, layout_plan(layout), [*CASES[case][1], *arguments], dtype)
    return made


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even a tiny model's tensors have several."""
    monkeypatch.setattr(compressing, "BLOCK_BYTES", 20_000)


# ---------------------------------------------------------------- the same bytes, whatever the layout


@pytest.mark.parametrize("case", CASES)
def test_every_layout_gives_the_bytes_that_whole_tensors_give(case: str, tmp_path: Path) -> None:
    layouts = CASES[case][2]
    found = {layout: export(run_of(tmp_path, case, layout)) for layout in layouts}
    assert all(files == found[layouts[0]] for files in found.values())
    config = from_yaml((tmp_path / layouts[0] / "config.yaml").read_text())
    check_artifact(tmp_path / layouts[0] / "artifact" / "canonical", tmp_path / layouts[0] / CHECKPOINT, config)


# ---------------------------------------------------------------- interrupted and taken up again


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """A signal from outside while the tensor number `after` is under way."""

    def until(items: Any, what: str, total: int) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == after:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(compressing, "track", until)
        yield


@pytest.mark.parametrize("damage", ["nothing", "spool", "shard", "journal"])
def test_an_interrupted_export_goes_on(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_of(tmp_path, "int4", "TP2PP2", "export.shard_bytes=300000")
    with interrupted(monkeypatch, 20), pytest.raises(StoppedBySignal, match="the same command continues"):
        export(config)
    artifact = tmp_path / "TP2PP2" / "artifact"
    building = artifact / ".canonical.building"
    assert not (artifact / "canonical").exists()
    if damage == "spool":
        flip_byte(next(building.glob("*.spool")), -1)
    elif damage == "shard":
        flip_byte(sorted(building.glob(".shard-*.safetensors"))[-1], -1)
    elif damage == "journal":
        flip_byte(building / ".journal.jsonl", -9)
    elsewhere = run_of(tmp_path, "int4", "TP4", "export.shard_bytes=300000")
    with caplog.at_level("INFO", logger="megatron_edge"):
        monkeypatch.setattr(delivery.log, "propagate", True)
        resumed = export(config)
    (said,) = [record.getMessage() for record in caplog.records if "are there already" in record.getMessage()]
    assert 0 < int(said.split(" ")[0]) <= 20 - (damage != "nothing"), said
    assert resumed == export(elsewhere)
    assert [path.name for path in artifact.iterdir()] == ["canonical"]


def test_another_recipe_does_not_go_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of(tmp_path, "none", "TP2")
    with interrupted(monkeypatch, 20), pytest.raises(StoppedBySignal):
        export(config)
    other = replace(config, export=replace(config.export, shard_bytes=300_000))
    assert len([name for name in export(other) if name.endswith(".safetensors")]) > 5


def test_a_finished_export_is_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of(tmp_path, "int4", "TP4")
    before = export(config)
    artifact = tmp_path / "TP4" / "artifact" / "canonical"
    written = artifact.stat().st_ino
    assert export(config) == before and artifact.stat().st_ino == written
    flip_byte(artifact / "model-00001-of-00001.safetensors", -1)
    assert export(config) == before and artifact.stat().st_ino != written


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of a file, which the kernel refuses in the same way; Python ignores its signal."""
    config = run_of(tmp_path, "int4", "TP4")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(
            WriteFailed, match=r"canonical cannot be written: .*File too large.*the same command goes on"
        ):
            export(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert export(config) == export(run_of(tmp_path, "int4", "PP4"))


# ---------------------------------------------------------------- what is wrong with a checkpoint


def test_damage_is_named_before_anything_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_of(tmp_path, "int4", "TP4")
    flip_byte(tmp_path / "TP4" / "checkpoints" / "step_00000001" / "__2_0.distcp", 5000)
    with pytest.raises(InputError, match="no intact checkpoint to export"):
        export(config)
    assert not (tmp_path / "TP4" / "artifact").exists()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    run_of(directory, "int4", "TP4")
    return directory / "TP4" / "checkpoints" / "step_00000001"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "__1_0.distcp").unlink(), r"__1_0\.distcp: decoder\.\S+ cannot be read .*No such file"),
        (lambda path: os.truncate(path / "__1_0.distcp", 100_000), r"__1_0\.distcp: .* cannot be read"),
        (lambda path: os.truncate(path / ".metadata", 100), r"\.metadata: not readable"),
        (lambda path: (path / ".metadata").unlink(), r"\.metadata: not readable .*No such file"),
    ],
)
def test_files_that_are_not_whole(damage: Any, message: str, shards: Path, tmp_path: Path) -> None:
    """What the manifest's hashes would miss, were they of these files."""
    shutil.copytree(shards, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(InputError, match=message):
        source = CheckpointTensors(tmp_path / "copy")
        for name in sorted(source.names()):
            source.whole([name]).all()


def test_tensors_that_are_not_there(shards: Path) -> None:
    source = CheckpointTensors(shards)
    with pytest.raises(InputError, match=r"no tensor decoder\.layers\.9\.mlp\.linear_fc2\.weight in this checkpoint"):
        source.parameter("decoder.layers.9.mlp.linear_fc2.weight")
    source._tensors["output_layer.weight"].chunks.pop()
    with pytest.raises(InputError, match=r"320000 elements of output_layer\.weight are in no file"):
        source.parameter("output_layer.weight")


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    config = run_of(tmp_path, "int4", "TP4")
    larger = json.loads((tmp_path / "model" / "config.json").read_text()) | {"vocab_size": 5120}
    write_source(tmp_path / "larger", larger)
    changed = replace(config, model=replace(config.model, source=str(tmp_path / "larger")))
    with pytest.raises(
        InputError, match=r"embedding\.word_embeddings\.weight is \[5000, 256\]; allowed .*\[5120, 256\]"
    ):
        export(changed)
    assert not list((tmp_path / "TP4" / "artifact").iterdir())


# ---------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding of 215 MB, and its targets: anonymous memory stays far below it."""
    monkeypatch.setattr(compressing, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"] | {"vocab_size": 210_000, "tie_word_embeddings": True})
    config = run_of(tmp_path, "int4", "PP2", "export.targets=[compressed_tensors,hf]", dtype=torch.float32)
    peak, done = 0, threading.Event()

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    before, watcher = anonymous(), threading.Thread(target=watch)
    watcher.start()
    delivery.export(config, LAUNCH)
    done.set()
    watcher.join()
    print(f"\n  {(peak - before) / 1e6:.0f} MB of anonymous memory for a table of 215 MB")
    assert 0 < peak - before < 60_000_000
