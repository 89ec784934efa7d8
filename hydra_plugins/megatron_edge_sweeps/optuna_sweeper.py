"""hydra/sweeper=optuna: a search with Optuna 4 over what the command line sweeps (hydra-optuna-sweeper wants Optuna 2).

In: the choices, ranges and intervals of the command line. Out: optuna.json (the trials), the study in optuna.db (a
repeated search goes on in it), and the jobs, which a launcher of ours runs. Optuna is imported only when a search
begins: the package is an extra (pip install -e .[search]).
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from megatron_edge.config import expected
from megatron_edge.contracts import InputError
from megatron_edge.log import METRICS_FILE, read_metrics
from megatron_edge.runtime.sweep import Job, objectives

OBJECTIVES = ("heldout_loss", "bytes")
OPTUNA_FILE, STUDY_FILE = "optuna.json", "optuna.db"
WARM_UP_STEPS, FIRST_TRIALS = 2, 3  # no trial is pruned before these


class OptunaSweeper(Sweeper):
    def __init__(
        self, trials: int, objectives: Sequence[str], at_once: int, enqueue_grid: bool, prune: bool, seed: int
    ) -> None:
        self.objectives = list(objectives)
        if not self.objectives or not set(self.objectives) <= set(OBJECTIVES):
            raise expected("hydra.sweeper.objectives", self.objectives, f"a list of {', '.join(OBJECTIVES)}")
        if trials < 1 or at_once < 1:
            raise expected("hydra.sweeper.trials and at_once", (trials, at_once), "at least 1 each")
        if prune and self.objectives != ["heldout_loss"]:
            raise expected("hydra.sweeper.prune", True, "false with these objectives; true with [heldout_loss] alone")
        if prune and at_once > 1:
            raise expected("hydra.sweeper.at_once", at_once, "1 with hydra.sweeper.prune=true")
        self.trials, self.at_once, self.enqueue_grid, self.prune, self.seed = trials, at_once, enqueue_grid, prune, seed

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.directory = Path(config.hydra.sweep.dir)
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if self.prune and not getattr(self.launcher, "watches", False):
            raise expected("hydra.sweeper.prune", True, "false with this launcher; true with hydra/launcher=torchrun")

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Asks for trials, at_once together, until there are `trials` of them, and tells Optuna what became of each."""
        optuna = _optuna()
        overrides = OverridesParser.create().parse_overrides(arguments)
        space = {o.get_key_element(): _distribution(optuna, o) for o in overrides if o.is_sweep_override()}
        fixed = [o.input_line for o in overrides if not o.is_sweep_override()]
        if not space:
            raise InputError("hydra/sweeper=optuna: nothing is swept; allowed: key=a,b  key=interval(low,high)  ...")
        study = self._study(optuna)
        complete, pruned = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # of a search that was stopped
            study.enqueue_trial(trial.params)
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if self.enqueue_grid:
            for point in _grid(overrides):
                study.enqueue_trial(point, skip_if_exists=True)
        finished = study.get_trials(states=[complete, pruned])
        known = [[*fixed, *_arguments(trial)] for trial in finished if trial.state == complete]
        returned = [self.launcher.launch(known, initial_job_idx=0)] if known else []  # which skips them
        done = len(finished)
        while done < self.trials:
            asked = [study.ask(space) for _ in range(min(self.at_once, self.trials - done))]
            done += len(asked)
            if self.prune:
                self.launcher.watch = _Pruning(asked[0]).reason
            batch = self.launcher.launch(
                [[*fixed, *_arguments(trial)] for trial in asked], initial_job_idx=len(returned)
            )
            returned.append(batch)
            jobs = [one.return_value for one in batch]
            for trial, job in zip(asked, jobs, strict=True):
                if not _stopped(job):  # else it stays open, and the next search begins with it
                    self._tell(optuna, study, trial, job)
            self._write(optuna, study)
            if any(map(_stopped, jobs)):
                break
        self._write(optuna, study)
        return returned

    def _study(self, optuna: Any) -> Any:
        self.directory.mkdir(parents=True, exist_ok=True)
        return optuna.create_study(
            study_name="+".join(self.objectives),
            storage=f"sqlite:///{(self.directory / STUDY_FILE).resolve()}",
            directions=["minimize"] * len(self.objectives),
            sampler=optuna.samplers.TPESampler(seed=self.seed),
            pruner=optuna.pruners.MedianPruner(FIRST_TRIALS, WARM_UP_STEPS)
            if self.prune
            else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )

    def _tell(self, optuna: Any, study: Any, trial: Any, job: Job) -> None:
        found = objectives(job)
        trial.set_user_attr("job", job.name)
        trial.set_user_attr("run_dir", job.run_dir)
        values = [found.get(name, math.nan) for name in self.objectives]
        if (job.reason or "").startswith("pruned"):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif all(math.isfinite(value) for value in values):
            study.tell(trial, values)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def _write(self, optuna: Any, study: Any) -> None:
        """optuna.json: every trial with its values, and which are the front (of one objective: the best)."""
        complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
        best = {trial.number for trial in study.best_trials} if complete else set()
        trials = [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "parameters": trial.params,
                "values": dict(zip(self.objectives, trial.values or [], strict=False)),
                "of_grid": "fixed_params" in trial.system_attrs,
                "best": trial.number in best,
                **trial.user_attrs,
            }
            for trial in study.trials
            if trial.state != optuna.trial.TrialState.WAITING
        ]
        text = json.dumps({"objectives": self.objectives, "trials": trials}, indent=1)
        (self.directory / OPTUNA_FILE).write_text(text + "\n")


class _Pruning:
    """Reports a running trial's training loss, step by step, and says when it is to be stopped."""

    def __init__(self, trial: Any) -> None:
        self.trial, self.told = trial, 0

    def reason(self, job: Job) -> str | None:
        for record in read_metrics(Path(job.run_dir) / METRICS_FILE):
            loss = record.get("loss_nats_per_token")
            if record["step"] <= self.told or loss is None:
                continue
            self.told = record["step"]
            self.trial.report(loss, self.told)
            if self.trial.should_prune():
                return f"pruned: training loss {loss:.4f} at step {self.told} is above the other trials' median"
        return None


def _stopped(job: Job) -> bool:
    """By a signal to the search, or by who cancelled it on Slurm."""
    return job.status == "cancelled" and not (job.reason or "").startswith("pruned")


def _optuna() -> Any:
    """Raises InputError where Optuna is not installed."""
    try:
        import optuna
    except ImportError:
        raise InputError("hydra/sweeper=optuna: Optuna is not installed; allowed: pip install -e .[search]") from None
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna


def _distribution(optuna: Any, override: Override) -> Any:
    """Optuna's distribution of what Hydra's sweep syntax says."""
    value, distributions = override.value(), optuna.distributions
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    choices = [str(one) for one in override.sweep_string_iterator()]
    return distributions.CategoricalDistribution(choices)


def _grid(overrides: Sequence[Override]) -> list[dict[str, str]]:
    """Every combination of the choices; what is an interval is left open."""
    discrete = [o for o in overrides if o.is_sweep_override() and not o.is_interval_sweep()]
    names = [o.get_key_element() for o in discrete]
    values = [[str(one) for one in o.sweep_string_iterator()] for o in discrete]
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*values)]


def _arguments(trial: Any) -> list[str]:
    return [f"{name}={value}" for name, value in trial.params.items()]
