# What a Slurm job of this project does, for sourcing in a batch script: run_ranks launch/qat.py key=value ...
#
# Every rank is a task of srun, which meet at the first node. On the signal before the time limit (#SBATCH --signal=B:USR1@120),
# on preemption and on scancel --signal, the ranks save and leave with 75; the job is then queued again, and the same
# command goes on in the same run directory. A job that was cancelled is not.
#
# Environment: PYTHON (python), SRUN_OPTIONS (such as --container-image=...), MAX_REQUEUES (20).
# Returns the ranks' exit code (README: Exit codes); 75 where the job is queued again: SLURM then starts it anew.

_told=""
LEFT_TO_SLURM=""  # set where the code is not how the job ends: it starts anew, or was cancelled
_tell_ranks() {  # their own handlers save; srun itself would end them at once on SIGTERM
    _told=1
    scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null || true  # steps only, not this script
}

run_ranks() {
    local code state
    trap _tell_ranks USR1 TERM
    # In the background, since a trap waits for a command in the foreground to end.
    srun --kill-on-bad-exit=0 ${SRUN_OPTIONS:-} "${PYTHON:-python}" "$@" &
    local ranks=$!
    while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done
    wait "$ranks"
    code=$?
    [ "$code" -ne 0 ] || return 0
    # Queueing again works on a cancelled job too, and would undo it. "COMPLETING": it was cancelled, or Slurm itself has
    # begun to end it or to queue it again.
    state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    if [ "$state" != RUNNING ]; then
        LEFT_TO_SLURM=1
        echo "not queued again from here: job $SLURM_JOB_ID is $state (exit code $code)" >&2
        return "$code"
    fi
    if { [ "$code" -eq 75 ] || [ -n "$_told" ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_REQUEUES:-20}" ]; then
        echo "queued again: job $SLURM_JOB_ID was stopped (exit code $code), start $((${SLURM_RESTART_COUNT:-0} + 2)) follows" >&2
        scontrol requeue "$SLURM_JOB_ID" && LEFT_TO_SLURM=1 && return 75
    fi
    return "$code"
}
