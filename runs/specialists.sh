#!/usr/bin/env bash
# Specialists: a skill for a model that is trained already, as a small delta that cannot change the model.
#
# What it does   conversations with function calls, generated from this Python -> 4 new layers behind the quickstart's
#                frozen model -> how well they call functions they have never seen, in four JSON layouts -> the delta ->
#                a Hugging Face repo that finds its base by a pointer and a digest
# What it needs  what runs/quickstart.sh leaves in out/ and data/ (it is run first if that is not there)
# What it costs  about 18 minutes on 2 CPU cores after the quickstart, 15 of them training
#
# Run it again and finished steps are kept: the training resumes from its newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

RUN=out/stage_tool_quickstart
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

[ -d out/quickstart-hf ] || bash runs/quickstart.sh
if [ ! -f data/chat/manifest.json ]; then
  say "1/5 conversations: functions of this Python's standard library, arithmetic, text"
  python -m scripts.prepare_data chat embedded --out data/chat --val-percent 5 --greeting-copies
fi
say "2/5 training: 4 new layers; the 6 below run without gradient and stay as they are"
python -m scripts.train configs/stage_tool_quickstart.yaml
say "3/5 function calls: unseen functions, four layouts of JSON; then with constrained decoding"
python -m scripts.evaluate_tools "$RUN" --limit 100
python -m scripts.evaluate_tools "$RUN" --constrained --limit 50
say "4/5 the delta"
[ -d out/tool-delta ] || python -m scripts.delta save "$RUN" --out out/tool-delta
python -m scripts.delta verify out/tool-delta
say "5/5 a Hugging Face repo of the specialist alone, and its base's"
python -m scripts.export_hf out/quickstart --out out/quickstart-hf --dtype float32 --overwrite
python -m scripts.export_hf "$RUN" --parent out/quickstart-hf --out out/tool-hf --dtype float32 --overwrite
python -m scripts.try_export out/tool-hf --prompt "def read(self, path):"

say "done"
echo "talk to it   python -m scripts.chat $RUN"
echo "the delta    out/tool-delta"
echo "HF repo      out/tool-hf, which stands on out/quickstart-hf"
