"""Write a checkpoint as a Hugging Face repo that stock transformers loads (trust_remote_code=True)."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanopoe.errors import entrypoint

EXAMPLES = """examples:
  python -m scripts.export_hf out/quickstart --out out/quickstart/hf                 the newest checkpoint, bfloat16
  python -m scripts.export_hf out/poe_1p3b --step 5000 --out hub/poe-1p3b --overwrite
  python -m scripts.export_hf out/quickstart --out hub/exact --dtype float32         the weights as they are
  python -m scripts.export_hf out/tool --out hub/tool --parent hub/poe-1p3b          a specialist: its delta alone
  python -m scripts.export_hf out/tool --out hub/tool --parent me/poe-1p3b@4f2a91c   .. on a base that is on the Hub
  python -m scripts.export_hf out/tool --out hub/tool-whole --merged                 .. with all that it stands on
  python -m scripts.export_hf deltas/tool --out hub/tool --parent hub/poe-1p3b       a delta is taken like its run

The card shows the scores of RUN/evaluation/step_NNNNNNNN.json where scripts.evaluate has written it; the model's
generate_wand and generate_routed read what was calibrated there."""


@entrypoint
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.export_hf", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of a specialist's delta")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the newest)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--parent", metavar="DIR|ORG/NAME@REVISION",
                        help="of a specialist: the export it stands on, of the same dtype; only the delta is written")
    parser.add_argument("--merged", action="store_true",
                        help="of a specialist: one model with all that it stands on")
    parser.add_argument("--base", type=Path, metavar="RUN",
                        help="of a specialist: the run it stands on, if that is not where the specialist says")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in DIR")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()

    from nanopoe.export.run import export_run

    out, step = export_run(args.run, args.out, step=args.step, dtype=args.dtype, parent=args.parent,
                           merged=args.merged, base=args.base, overwrite=args.overwrite)
    print(f"step {step} exported to {out}")


if __name__ == "__main__":
    main()
