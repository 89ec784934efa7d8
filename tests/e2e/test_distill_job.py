"""train=qad and train=lora_qat from the model to a verified artifact; stopped and started again, the former ends as if
nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.e2e.launches import Finished, checkpoints, hashes, last_step, metrics, refusal, run, run_all, start
from tests.e2e.tiny_model import write_tiny_model

pytestmark = pytest.mark.timeout(400)

STEPS = 8
EXACT = ("step", "loss_nats_per_token", "gradient_norm", "kl_nats_per_token", "label_loss_nats_per_token")


@pytest.fixture(scope="module")
def arguments(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    teacher = write_tiny_model(tmp_path_factory.mktemp("teacher"))  # as the student: what differs is quantised
    return (
        "+scenario=gateway", "train=qad", f"model.source={tiny_model}", f"train.teacher={teacher}",
        f"train.steps={STEPS}", "train.checkpoint_every_steps=0", "train.precision=fp32", "train.seq_length_tokens=64",
        "data.eval_tokens=512", "train.learning_rate=3e-4", "train.distill_temperature=1.5", "threads=1",
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Finished]]:
    """Whole; stopped and continued, its teacher moved; continued with another teacher. One process each."""
    scratch = tmp_path_factory.mktemp("runs")
    whole, parts = scratch / "whole", scratch / "parts"

    def stopped() -> Finished:
        with start("qat", *arguments, f"run_dir={parts}", directory=scratch / "stopped") as running:
            running.until(lambda: last_step(parts) >= 2)
            running.process.send_signal(signal.SIGTERM)
            return running.wait()

    one = run_all(
        {"whole": lambda: run("qat", *arguments, f"run_dir={whole}", directory=scratch / "w"), "stopped": stopped}
    )
    saved = checkpoints(parts)[-1]
    assert 0 < saved < STEPS, one["stopped"].stderr
    teacher = Path(next(a for a in arguments if a.startswith("train.teacher=")).removeprefix("train.teacher="))
    kept = {file.name: file.read_bytes() for file in teacher.iterdir()}
    write_tiny_model(teacher, seed=5)  # other weights under the same path
    other = run("qat", *arguments, f"run_dir={parts}", directory=scratch / "other")
    for name, content in kept.items():
        (teacher / name).write_bytes(content)
    lora = [a for a in arguments if not a.startswith(("train=", "train.teacher", "train.distill", "train.learning"))]
    lora += ["train=lora_qat", "train.learning_rate=1e-2", f"run_dir={scratch / 'lora'}"]
    last = run_all(
        {
            "parts": lambda: run("qat", *arguments, f"run_dir={parts}", directory=scratch / "resumed"),
            "lora": lambda: run("qat", *lora, directory=scratch / "l"),
        }
    )
    return {
        "whole": (whole, one["whole"]),
        "other": (parts, other),
        "parts": (parts, last["parts"]),
        "lora": (scratch / "lora", last["lora"]),
    }


def test_the_student_nears_its_teacher_and_the_artifact_is_proven(runs: dict[str, tuple[Path, Finished]]) -> None:
    directory, done = runs["whole"]
    assert done.returncode == 0 and not done.noise, done.stderr
    records = metrics(directory)
    kl = [record["kl_nats_per_token"] for record in records]
    assert [record["loss_nats_per_token"] for record in records] == kl, "no labels in it"
    assert 0 < kl[-1] < 0.9 * kl[0], kl
    assert json.loads((directory / "verify.json").read_text())["ok"] is True
    (stage,) = json.loads((directory / "plan.json").read_text())["training"]
    assert stage["teacher_bytes"] > stage["weights_bytes"]


def test_stopped_and_continued_it_ends_the_same(runs: dict[str, tuple[Path, Finished]]) -> None:
    (whole, _), (parts, resumed) = runs["whole"], runs["parts"]
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = ([{k: r[k] for k in EXACT} for r in metrics(path)] for path in (parts, whole))
    assert ours == theirs and len(ours) == STEPS
    for part in ("artifact", "reference"):
        assert hashes(parts / part) == hashes(whole / part)


def test_another_teacher_under_the_same_path_is_refused(runs: dict[str, tuple[Path, Finished]]) -> None:
    assert runs["other"][1].returncode == 2
    assert "train.teacher: " in refusal(runs["other"][1])


def test_adapters_train_and_their_artifact_is_proven(runs: dict[str, tuple[Path, Finished]]) -> None:
    directory, done = runs["lora"]
    assert done.returncode == 0 and not done.noise, done.stderr
    losses = json.loads((directory / "reference" / "reference.json").read_text())["losses"]
    assert losses["trained"] < losses["ptq"] - 0.05, losses
    assert json.loads((directory / "verify.json").read_text())["ok"] is True
