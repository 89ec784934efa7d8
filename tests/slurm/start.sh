#!/usr/bin/env bash
# A real Slurm on this machine, without systemd: start.sh DIRECTORY [NODES [CPUS]]. Debian or Ubuntu, as root.
#
# Installs slurmctld, slurmd and munge where they are missing (13 MB), and starts in DIRECTORY: a munged with a key of
# its own, slurmctld, and NODES slurmd, each under a host name, port and loopback address of its own. Partitions: low
# (default) and high, which preempts jobs of low (they get 30 s, then are queued again).
# Afterwards: export SLURM_CONF=DIRECTORY/slurm.conf. stop.sh DIRECTORY ends all of it.
set -euo pipefail
directory=$(realpath -m "$1") nodes=${2:-2} cpus=${3:-4}
host=$(hostname -s)
port=$((20000 + $$ % 10000))

if ! command -v slurmctld slurmd munged srun >/dev/null; then
    apt-get install -y --no-install-recommends slurmd slurmctld slurm-client munge >/dev/null
fi

wait_for() {
    for _ in $(seq 300); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done
    echo "not so within 30 s: $*; see $directory/log" >&2
    return 1
}

umask 022
mkdir -p "$directory"/{state,spool,log,run,munge}
export SLURM_CONF=$directory/slurm.conf
head -c 1024 /dev/urandom >"$directory/munge/key"
chmod 600 "$directory/munge/key"
munged --force --key-file="$directory/munge/key" --socket="$directory/munge/socket" --pid-file="$directory/run/munged.pid" \
    --log-file="$directory/log/munged.log" --seed-file="$directory/munge/seed"

# cred_expire: a job that is queued again waits that long; proctrack and task plugins: no cgroups needed.
cat >"$SLURM_CONF" <<X
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$directory/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$port
SlurmctldPidFile=$directory/run/slurmctld.pid
SlurmdPidFile=$directory/run/slurmd.%n.pid
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool/%n
SlurmctldLogFile=$directory/log/slurmctld.log
SlurmdLogFile=$directory/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=30
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.[11-$((10 + nodes))] Port=[$((port + 1))-$((port + nodes))] CPUs=$cpus RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
X

{
    echo "127.0.0.1 localhost $host"
    for ((node = 1; node <= nodes; node++)); do echo "127.0.0.$((10 + node)) n$node"; done
} >"$directory/hosts"
slurmctld
wait_for scontrol ping
for ((node = 1; node <= nodes; node++)); do
    mkdir -p "$directory/spool/n$node"
    unshare --uts --mount sh -c "hostname n$node && mount --bind $directory/hosts /etc/hosts && exec slurmd -N n$node"
done
wait_for sh -c "[ \$(sinfo -h -N -p low -t idle -o %N | wc -l) = $nodes ]"
sinfo
