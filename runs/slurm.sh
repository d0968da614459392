# shellcheck shell=bash
# What runs/*.sbatch share: the batch shell's part of a job that saves before it is stopped, requeues itself, goes on.
# To be sourced. runs/slurm_node.sh is the part of each node.
#
# How the signal goes:  SLURM, 120 s before the end (--signal=B:USR1@120) -> this shell, whose trap runs at once, as it
# is in `wait` (during a foreground command a trap would run when that has ended) -> srun, which forwards it to its task
# on every node -> runs/slurm_node.sh -> the ranks. torchrun itself knows nothing of it, so its 30 s for ranks that are
# to end do not count. One rank that hears it is enough: all agree to stop after the same step.
# What follows:  the ranks save and leave with 75, torchrun turns that into 1, so RUN/status.json is what counts.

export PATH="$PWD/.venv/bin:$PATH"

train_under_slurm() {                       # CONFIG [OVERRIDE ..]; ends the job
  export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:?no GPUs in this job: submit with --gpus-per-node, or set GPUS}}
  python -m scripts.check_config "$@" --world-size "$((SLURM_JOB_NUM_NODES * GPUS))"
  local run before code=0 asked=''
  run=$(run_of "$@")
  before=$(life_of "$run")

  HEAD=${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST")}
  HEAD=${HEAD%%$'\n'*}                                            # the nodes meet at the first
  PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}                 # other jobs there have other numbers
  export HEAD PORT
  # NCCL says what failed, and nothing else.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Only where a node has several networks and the first one found is the wrong one: IFNAME=ib0 sbatch ..
  # Both: NCCL moves gradients, gloo coordinates saves and evaluations.
  if [ -n "${IFNAME:-}" ]; then export NCCL_SOCKET_IFNAME=$IFNAME GLOO_SOCKET_IFNAME=$IFNAME; fi

  # A node that ends first does not end the others (they may be writing), but after 90 s it does.
  srun --kill-on-bad-exit=0 --wait=90 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash runs/slurm_node.sh "$@" &
  local step=$!
  trap 'asked=USR1; kill -USR1 "$step"' USR1
  trap 'asked=TERM; kill -TERM "$step"' TERM
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do code=0; wait "$step" || code=$?; done     # a signal ends `wait`, not srun
  trap - USR1 TERM
  leave "$run" "$before" "$code" "$asked"
}

run_of() {                                  # CONFIG [OVERRIDE ..]: the run folder
  python -c 'import sys; from nanopoe.config import load_experiment
print(load_experiment(sys.argv[1], sys.argv[2:]).out)' "$@"
}

life_of() {                                 # RUN: which life RUN/status.json speaks of
  [ ! -f "$1/status.json" ] || python -c 'import json, sys
s = json.load(open(sys.argv[1] + "/status.json")); print(s["host"], s["pid"], s["time"])' "$1"
}

outcome_of() {                              # RUN: the exit code in RUN/status.json, "cut" if it had no time for one
  python -c 'import json, sys
code = json.load(open(sys.argv[1] + "/status.json"))["exit_code"]; print("cut" if code is None else code)' "$1"
}

leave() {                                   # RUN, LIFE BEFORE, EXIT CODE OF SRUN, SIGNAL: requeue, or end the job
  local outcome=none                                              # of this life
  [ "$(life_of "$1")" = "$2" ] || outcome=$(outcome_of "$1")      # a start that was refused wrote nothing
  case $outcome in
    0) echo "slurm: $1 is finished"; exit 0 ;;
    75) again "saved at ${4:-a signal}" ;;                          # preempted
    6 | cut) [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_LOST:-10}" ] || again "a rank or a node was lost" ;;
  esac
  echo "slurm: not requeued: exit code $3 of srun, $outcome of $1/status.json" >&2
  case $outcome in
    none | cut) exit "$(($3 ? $3 : 1))" ;;
    *) exit "$outcome" ;;
  esac
}

again() {                                   # WHY: into the queue; SLURM ends this job then
  echo "slurm: $1; job $SLURM_JOB_ID goes into the queue again, start $((${SLURM_RESTART_COUNT:-0} + 2) )"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
  echo "slurm: not requeued; submit it again to go on" >&2
  exit 75
}
