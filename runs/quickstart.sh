#!/usr/bin/env bash
# Quickstart: from nothing to a trained, evaluated, exported Product-of-Experts model that generates.
#
# What it does   real text from this Python's own standard library -> tokenizer -> a PoE model with three stages ->
#                bits per byte of every stage -> loss curves -> a Hugging Face repo -> text from the pool and one stage
# What it needs  .venv of `make setup`, or else its packages for the python on PATH; no network, no GPU, 2 GB of memory
# What it costs  under 10 minutes on 2 CPU cores, installation included; 60 MB in out/ and data/
#
# Run it again and finished steps are kept: the training resumes from its newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

DATA=data/stdlib
RUN=out/quickstart
HUB=out/quickstart-hf
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

if [ ! -f "$DATA/manifest.json" ]; then
  say "1/6 text: the sources and documentation of this Python's standard library"
  python -m scripts.prepare_data stdlib --out "$DATA" --max-chars 4096 --val-percent 4
fi
if [ ! -f "$DATA/tokenizer/tokenizer.json" ]; then
  say "2/6 tokenizer: 4,096 tokens"
  python -m scripts.train_tokenizer --data "$DATA/train" --held-out "$DATA/val" --vocab-size 4096 --out "$DATA/tokenizer"
fi
say "3/6 training: three stages, each with its own loss, no gradient between them"
python -m scripts.train configs/quickstart.yaml
say "4/6 evaluation: every stage is a model, every prefix is a model, the pool of all is the model"
python -m scripts.evaluate "$RUN"
python -m scripts.report "$RUN" --out "$RUN/report"
say "5/6 export to Hugging Face"
python -m scripts.export_hf "$RUN" --out "$HUB" --dtype float32 --overwrite
say "6/6 generation with transformers alone"
python -m scripts.try_export "$HUB" --prompt "def read(self, path):" --prompt "Return a list of" --temperature 0.8

say "done"
echo "report      $RUN/report/report.html"
echo "evaluation  $(ls "$RUN"/evaluation/*.md | tail -n 1)"
echo "metrics     $RUN/metrics.jsonl"
echo "checkpoints $RUN/checkpoints"
echo "HF repo     $HUB"
echo "next        change configs/quickstart.yaml, or read the README's recipes"
