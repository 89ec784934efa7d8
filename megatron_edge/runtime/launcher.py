"""From a command line to a job: under python, torchrun or srun, with one configuration and one exit code for all ranks.

In: sys.argv and the environment. Out: `job(config, launch)` is called on every rank, after rank 0 alone has composed
the configuration with Hydra and handed it to the others through the rendezvous store, before any process group exists.
Called by the files in launch/. Exit codes: 0 done; 2 the user's input; 3 a check of verify failed; 4 training diverged;
5 a rank hung or was lost; 6 the disk refused; 75 stopped by a signal after saving; 1 is our bug. torchrun itself always
exits with 1 when a rank fails; its summary names the rank's own code.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_edge import checks, compose, log
from megatron_edge import config as configuration
from megatron_edge.config import RunConfig
from megatron_edge.contracts import (
    DISK_ERRORS,
    Diverged,
    InputError,
    ParallelPlan,
    RankLost,
    StoppedBySignal,
    VerificationFailed,
    WriteFailed,
)
from megatron_edge.runtime.rendezvous import Meeting
from megatron_edge.runtime.topology import fewest_ranks, plan_of

if TYPE_CHECKING:
    from torch.distributed import Store

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OUTCOMES: dict[type[Exception], tuple[int, str]] = {
    InputError: (2, "error"),
    VerificationFailed: (3, "failed"),
    Diverged: (4, "diverged"),
    RankLost: (5, "lost"),
    WriteFailed: (6, "disk"),
    StoppedBySignal: (75, "stopped"),
}


@dataclass(frozen=True)
class Processes:
    """This process among those that were started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


@dataclass(frozen=True)
class Launch:
    """What a job learns from its launch.

    `store` is the rendezvous store, for `init_process_group(store=, rank=, world_size=)`; None for one process.
    `threads` is the number of CPU threads that this process was given.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    threads: int
    plan: ParallelPlan
    store: Store | None


Job = Callable[[RunConfig, Launch], int | None]
Prepare = Callable[[RunConfig, ParallelPlan], RunConfig]


def launch(
    job: Job,
    *,
    prepare: Prepare | None = None,
    reads_run: bool = False,
    trains: bool = False,
    any_world: bool = False,
) -> NoReturn:
    """Compose, check, share, call `job` on every rank, and exit with the code that the outcome stands for.

    Args:
        job: its return value is the exit code; None is 0.
        prepare: further checks on rank 0, before the others get the configuration that it returns.
        reads_run: the job reads run_dir (or reference): that run's config.yaml is the base under the arguments.
        trains: the global batch must be divisible between the ranks, and run_dir be writable.
        any_world: the job only plans: the layout need not fit the started processes.
    """
    processes = Processes(rank=int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))))
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    arguments = [a for a in sys.argv[1:] if not a.startswith("-")]
    meeting: Meeting | None = None
    try:
        processes = read_processes(os.environ)
        if "-h" in flags or "--help" in flags:
            sys.stdout.write(help_text() if processes.rank == 0 else "")
            _leave(0, processes)
        if flags and processes.world_size == 1:
            _check_flags(flags, processes)
            _leave(_run_sweep(sys.argv[0], arguments, reads_run), processes)
        meeting = Meeting(processes.rank, processes.world_size)

        def composed(begun: bool) -> str:
            _check_flags(flags, processes)
            return _compose(arguments, processes, prepare, reads_run, trains, any_world, begun)

        config = configuration.from_yaml(meeting.share(composed))
        plan = plan_of(config.parallel, fewest_ranks(config.parallel) if any_world else processes.world_size)
        threads = _set_threads(config.threads, processes)
        log.setup(processes.rank, processes.world_size).info(
            "%s  %d CPU thread(s) in each of %d process(es)",
            f"sweep {config.sweep}" if config.sweep else f"run_dir {config.run_dir}",
            threads,
            processes.world_size,
        )
        code = job(config, Launch(**vars(processes), threads=threads, plan=plan, store=meeting.store))
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001  the one place that makes any outcome an exit code
        code = _report(error, processes, meeting)
    _leave(code or 0, processes)


def _check_flags(flags: list[str], processes: Processes) -> None:
    """Raises InputError for a flag that there is not, and for a sweep in several processes."""
    for flag in flags:
        if flag not in ("-m", "--multirun"):
            raise InputError(
                f"{flag}: unknown; allowed are --help, -m (--multirun), key=value, group=option, +scenario=name"
            )
        if processes.world_size > 1:
            raise InputError(
                f"{flag} with {processes.world_size} processes: a sweep starts its own torchruns; "
                "allowed is plain `python launch/...py -m ...`"
            )


def _compose(
    arguments: list[str],
    processes: Processes,
    prepare: Prepare | None,
    reads_run: bool,
    trains: bool,
    any_world: bool,
    begun: bool,
) -> str:
    """On rank 0: the checked configuration as YAML. `begun`: an earlier start of this job came past here."""
    config = compose.compose_over_run(arguments) if reads_run else compose.compose(arguments)
    if begun and config.resume == "never":
        config = replace(config, resume="auto")  # what it forbids was cleared then; what is there now is this job's
    checks.check_config(config)
    if config.parallel.auto and not (trains or any_world):
        raise InputError("parallel=auto: chooses a layout for training; allowed here are the degrees themselves")
    plan = plan_of(config.parallel, fewest_ranks(config.parallel) if any_world else processes.world_size)
    if trains:
        if not config.parallel.auto:  # else `prepare` chooses the layout
            checks.check_batches(config, plan)
        checks.check_run_dir(config)
    if prepare is not None:
        log.setup(processes.rank, processes.world_size)
        config = prepare(config, plan)
    return configuration.to_yaml(config)


def read_processes(environment: MutableMapping[str, str]) -> Processes:
    """Rank and world from torchrun's variables, else srun's, else one process.

    srun's are written into `environment` under torchrun's names (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT), which is where torch looks.
    """
    if "RANK" not in environment and _is_srun(environment):
        environment.update(_slurm_variables(environment))
    if "RANK" not in environment:
        return Processes()
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank = int(environment.get("LOCAL_RANK", rank))
    return Processes(rank, world_size, local_rank, int(environment.get("LOCAL_WORLD_SIZE", world_size)))


def _is_srun(environment: MutableMapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS too, but it is no step: python in it is one process.
    step = "SLURM_STEP_ID" in environment or environment.get("ENVIRONMENT") != "BATCH"
    return "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment and step


def _slurm_variables(environment: MutableMapping[str, str]) -> dict[str, str]:
    world_size = environment.get("SLURM_STEP_NUM_TASKS", environment["SLURM_NTASKS"])
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_NTASKS_PER_NODE", world_size))
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", environment["SLURM_PROCID"]),
        "LOCAL_WORLD_SIZE": per_node.split("(")[0].split(",")[0],  # "2(x3),1": nodes may differ, the first decides
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment),
        # Below the ephemeral range; from the job and its step, because several jobs may share a node.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(15000 + (job * 16 + step) % 15000),
    }
    return found


def _first_host(environment: MutableMapping[str, str]) -> str:
    """The host of rank 0. srun may have been typed on a login node, so SLURM_LAUNCH_NODE_IPADDR is the last resort."""
    if environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")) == "1":
        return "127.0.0.1"  # node names need not resolve
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        if "SLURM_LAUNCH_NODE_IPADDR" in environment:
            return environment["SLURM_LAUNCH_NODE_IPADDR"]
        raise InputError(
            f"SLURM_JOB_NODELIST={nodes!r}: scontrol cannot expand it; allowed is to set MASTER_ADDR to the first host"
        ) from None


def _set_threads(threads: int, processes: Processes) -> int:
    """Set and return the CPU threads of this process; also for its children, and over torchrun's OMP_NUM_THREADS=1."""
    if threads == 0:
        import psutil

        usable = len(os.sched_getaffinity(0))
        threads = max(1, min(psutil.cpu_count(logical=False) or usable, usable) // processes.local_world_size)
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    if "torch" in sys.modules:  # it has read the environment already
        sys.modules["torch"].set_num_threads(threads)
    return threads


def _report(error: BaseException, processes: Processes, meeting: Meeting | None) -> int:
    """Say what happened, once over all ranks, and return the exit code."""
    meeting = meeting or Meeting(processes.rank, 1)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        error = WriteFailed(f"{error}; with room for it the same command continues from the last checkpoint")
    for kind, (code, label) in OUTCOMES.items():
        if isinstance(error, kind):
            if meeting.is_first(f"{label}/{hashlib.sha256(str(error).encode()).hexdigest()}"):
                sys.stderr.write(f"{label}: {error}\n")
                sys.stderr.flush()
            if kind not in (RankLost, VerificationFailed):  # which not all ranks come to
                meeting.leave_together()
            return code
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write(f"interrupted: rank {processes.rank}\n")
        return 130
    where = f"[rank {processes.rank} of {processes.world_size}] "
    if meeting.is_first("crash"):
        sys.stderr.write("".join(f"{where}{line}" for line in _traceback_lines(error)))
    else:  # most likely because the first one is gone
        time.sleep(1)  # the first one speaks and leaves first: torchrun calls what it sees ended first the root cause
        sys.stderr.write(f"{where}ended after another rank's failure: {type(error).__name__}\n")
    return 1


def _traceback_lines(error: BaseException) -> list[str]:
    return "".join(traceback.format_exception(error)).splitlines(keepends=True)


def _leave(code: int, processes: Processes) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if processes.world_size > 1:
        # Collectives with ranks that are gone would keep the interpreter from ending; and threads of torch that still
        # wait may abort one that ends well (seen under srun: "terminate called without an active exception").
        if not code:
            atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)


def _run_sweep(script: str, arguments: list[str], reads_run: bool) -> int:
    """Hydra's multirun over `arguments`, each job in processes of its own; the exit code of the sweep."""
    from megatron_edge.runtime import sweep

    directory, returned = compose.multirun(script, arguments, reads_run)
    jobs = [job for batch in returned for job in batch]
    sweep.show(jobs, directory)
    page = Path(script).with_name("report.py")
    if page.is_file() and any(sweep.objectives(job) for job in jobs):  # it draws, which nothing here does
        subprocess.run([sys.executable, str(page), f"sweep='{directory}'"], check=False)
    return sweep.exit_code(jobs)


def help_text() -> str:
    """Groups with their options, and every leaf with its type and meaning."""
    lines = ["Arguments: group=option  group.field=value  +scenario=name  -m (sweep: a=1,2)  --help", "", "Groups:"]
    for group in (*configuration.GROUPS, "scenario"):
        named = f"  {group + '=':12}{' | '.join(compose.options(group))}"
        lines += textwrap.wrap(named, 120, subsequent_indent=" " * 14, break_on_hyphens=False)
    lines += ["", "Fields:"]
    for name, field in compose.leaves().items():
        kind = str(field.type).replace("Literal[", "[").replace("', '", "|").replace("'", "")
        lines.append(f"  {name:34}  {kind:26}  {field.metadata.get('doc', '')}".rstrip())
    return "\n".join(lines) + "\n"
