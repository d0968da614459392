#!/usr/bin/env bash
# 1.3B: a Product of Experts of four stages on one node, from text on the hub to a Hugging Face repo.
#
# What it does   ClimbMix from the hub -> tokenizer of 32,768 -> configs/poe_1p3b.yaml on all GPUs of this node ->
#                evaluation of the kept checkpoints -> report -> a Hugging Face repo
# What it needs  .venv of `make setup` with a CUDA build of torch; 4 or 8 GPUs of 40 GB or more (38 GB are planned:
#                scripts.model_info); the network for the text (CC BY-NC 4.0), 150 GB for it, 60 GB for checkpoints
# What it costs  1.6e20 FLOPs: 350 hours of an A100 at 40 % of its peak, so 2 days on 8 or 4 on 4 (arithmetic, not a
#                measurement); before it some hours for the text, which need no GPU
#
# Run it again and finished steps are kept: the text goes on where it stopped, the training from its newest checkpoint,
# on another number of GPUs too. The control arm: CONFIG=configs/bp_1p3b.yaml bash runs/pretrain_1p3b.sh
# Overrides are passed on:                bash runs/pretrain_1p3b.sh checkpoint.every=500
# Ctrl-C, or SIGTERM to it: saves and stops. torchrun gives its ranks SHUTDOWN_S seconds for that.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

CONFIG=${CONFIG:-configs/poe_1p3b.yaml}
DATA=data/climbmix                          # as the config says
GPUS=${GPUS:-$(nvidia-smi -L | wc -l)}      # ranks: one per GPU
TEXT_MB=${TEXT_MB:-135000}                  # 27.7 billion tokens of 4.8 bytes
WORKERS=${WORKERS:-8}                       # processes that read text
# A save at a signal waits for the step (seconds) and writes 14 GB: give it more than torchrun's 30 s. What yours takes
# is told by every "checkpoint" line.
SHUTDOWN_S=${SHUTDOWN_S:-300}
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}       # NCCL says what failed, and nothing else

python -m scripts.check_config "$CONFIG" "$@" --world-size "$GPUS"
RUN=$(python -c 'import sys; from nanopoe.config import load_experiment
print(load_experiment(sys.argv[1], sys.argv[2:]).out)' "$CONFIG" "$@")

if [ ! -f "$DATA/climbmix/manifest.json" ]; then
  say "1/5 text: ${TEXT_MB} MB of ClimbMix"
  python -m scripts.prepare_data mixture configs/data/climbmix.yaml --out "$DATA" --max-mb "$TEXT_MB" \
    --workers "$WORKERS"
fi
if [ ! -f "$DATA/tokenizer/tokenizer.json" ]; then
  say "2/5 tokenizer: 32,768 tokens"
  python -m scripts.train_tokenizer --data "$DATA/climbmix" --vocab-size 32768 --max-mb 2000 --out "$DATA/tokenizer"
fi
say "3/5 training on $GPUS GPUs"
torchrun --standalone --nproc-per-node="$GPUS" --shutdown-timeout="$SHUTDOWN_S" -m scripts.train "$CONFIG" "$@"
say "4/5 evaluation, report"
torchrun --standalone --nproc-per-node="$GPUS" -m scripts.evaluate "$RUN" --steps all
python -m scripts.report "$RUN" --out "$RUN/report"
say "5/5 export to Hugging Face"
python -m scripts.export_hf "$RUN" --out "$RUN-hf" --overwrite

say "done"
echo "report   $RUN/report/report.html"
echo "HF repo  $RUN-hf"
