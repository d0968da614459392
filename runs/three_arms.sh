#!/usr/bin/env bash
# Three arms: backprop, a Product of Experts of local losses, and one whose stages correct the pool, on the same data.
#
# What it does   trains configs/small_bp.yaml (one loss through all layers), configs/small_poe.yaml (alpha 0: each stage
#                its own cross-entropy, no gradient between stages) and the latter with residual_logop (each stage is
#                also trained on what the pool of the stages before it lacks), a head per stage there; evaluates
#                the last checkpoint of each; one report with all three beside each other
# What it needs  .venv of `make setup`; no network, no GPU, 2 GB of memory
# What it costs  10 and 14 minutes on 2 CPU cores for the first two, the third about as long as the second, and some
#                minutes for text and evaluation; 1 GB in out/ and data/
#
# Same seed, same trunk at the start, same tokens in the same order: what differs is the loss. Run it again and finished
# steps are kept. Overrides go to all arms: bash runs/three_arms.sh schedule.cycles.0.steps=150 evaluation.tokens=8192
# Other folders: OUT=out/short bash runs/three_arms.sh ..
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

DATA=data/stdlib
OUT=${OUT:-out}
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

arm() {                                     # NAME CONFIG [OVERRIDE ..]
  local name=$1 config=$2
  shift 2
  python -m scripts.train "$config" "name=$name" "run_dir=$OUT/$name" "$@"
  python -m scripts.evaluate "$OUT/$name" --no-speed
}

if [ ! -f "$DATA/manifest.json" ]; then
  say "1/5 text: the sources and documentation of this Python's standard library"
  python -m scripts.prepare_data stdlib --out "$DATA" --max-chars 4096 --val-percent 4
fi
if [ ! -f "$DATA/tokenizer/tokenizer.json" ]; then
  say "2/5 tokenizer: 4,096 tokens"
  python -m scripts.train_tokenizer --data "$DATA/train" --held-out "$DATA/val" --vocab-size 4096 \
    --out "$DATA/tokenizer"
fi
say "3/5 backprop: one loss behind the last layer"
arm small_bp configs/small_bp.yaml "$@"
say "4/5 Product of Experts: a loss per stage, no gradient between them"
arm small_poe configs/small_poe.yaml "$@"
say "5/5 the same with residual_logop: a stage is trained on what the pool before it lacks"
arm small_logop configs/small_poe.yaml objective.kind=residual_logop objective.rho=0.5 model.stage_heads=true "$@"
python -m scripts.report "$OUT/small_bp" "$OUT/small_poe" "$OUT/small_logop" --out "$OUT/three_arms"

say "done"
echo "all three side by side   $OUT/three_arms/report.html"
