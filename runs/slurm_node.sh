#!/usr/bin/env bash
# One node's part of a SLURM job (runs/slurm.sh starts it by srun, once on each): torchrun, and signals to its ranks.
# Arguments are those of scripts.train. From the environment: HEAD, PORT, GPUS, SLURM_JOB_ID, SLURM_JOB_NUM_NODES.
set -uo pipefail

# torchrun has no handler for SIGUSR1 and would die of it, where SLURM sends it to every process of a step. What a shell
# ignores, its children ignore: torchrun too. The ranks take it all the same, with a handler of their own.
trap '' USR1
torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$GPUS" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$PORT" -m scripts.train "$@" &
agent=$!
trap 'pkill -USR1 -P "$agent"' USR1         # the ranks are torchrun's children
trap 'kill -TERM "$agent"' TERM             # scancel, the end of the time: torchrun passes it on, and waits for 30 s
code=0
wait "$agent" || code=$?
while kill -0 "$agent" 2>/dev/null; do code=0; wait "$agent" || code=$?; done
exit "$code"
