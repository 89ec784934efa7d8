#!/usr/bin/env bash
# Ends what start.sh started in DIRECTORY: its jobs, then its daemons by their pid files.
directory=$(realpath "$1")
export SLURM_CONF=$directory/slurm.conf
timeout 10 scancel --user="$(id -un)" 2>/dev/null
for _ in $(seq 100); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
for file in "$directory"/run/slurmd.*.pid "$directory"/run/slurmctld.pid "$directory"/run/munged.pid; do
    [ -f "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
done
