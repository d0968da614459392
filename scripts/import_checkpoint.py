"""Make a nanochat checkpoint, or a state dict in its names, the first checkpoint of a run of your own."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from nanopoe.errors import entrypoint

if TYPE_CHECKING:
    from nanopoe.checkpoint.foreign import Foreign
    from nanopoe.checkpoint.importing import Row

EXAMPLES = """examples:
  python -m scripts.import_checkpoint base_checkpoints/d24 configs/bp_1p3b.yaml run_dir=out/d24 --dry-run
  python -m scripts.import_checkpoint base_checkpoints/d24 configs/bp_1p3b.yaml run_dir=out/d24 --step 20000
  python -m scripts.import_checkpoint poe/model_026430.pt configs/poe_1p3b.yaml run_dir=out/poe
  python -m scripts.import_checkpoint weights.safetensors configs/poe_3b.yaml --meta config.json run_dir=out/poe3b
  python -m scripts.import_checkpoint base_checkpoints/d24 configs/poe_1p3b.yaml run_dir=out/bp_to_poe
  python -m scripts.import_checkpoint old configs/bp_1p3b.yaml run_dir=out/old --allow-missing backout_lambda 'smear_*'

what is read    SOURCE is a folder with model_*.pt (its newest, or --step) and meta_*.json, or a file of weights with
                meta_*.json or config.json beside it. Tensors alone: a file that wants code to run is refused.
the experiment  CONFIG describes the model, where its data is, and how it would go on. What the JSON says must agree;
                what it cannot say is yours: poe_mode and the stages of a PoE model, and model.window_sizes of a
                nanochat in which S meant half of the context (here a quarter, up to a multiple of 128).
the weights     become fp32, exactly. Every name and shape must be the model's. What is missing is initialised as in a
                new model if --allow-missing names it; that changes what is computed, but for what begins at zero.
BP to PoE       is an experiment with poe_mode flat: the stages are cut into the same weights, and stage heads, with
                --allow-missing 'lm_head_stages.*', begin at zero. A PoE has no backout: without it the weights are
                another function than the BP was, so train them on before you use them.
the optimizer   is not taken: optim_*.pt is cut by rank and group in a way of its own. What goes on from an import
                (init_from, specialist.base) begins with an optimizer of its own.
the tokenizer   is the one CONFIG names. nanochat's tokenizer.pkl is not opened here, since a pickle can run code. If
                it is yours, write it anew, once, where nanopoe is installed:
  python -c 'import pickle; from nanopoe.tokenizer import Tokenizer; e = pickle.load(open("tokenizer.pkl", "rb")); \\
      Tokenizer(e._mergeable_ranks, e._pat_str).save("data/tokenizer")'
afterwards      evaluate, generate, export_hf, init_from and specialist.base take run_dir like any run. scripts.train
                does not go on in it: name it in init_from of another run, with optimizer false.
exit codes: 0 done, 2 the experiment does not describe it, 3 tokenizer, 4 no checkpoint, or other tensors, 7 storage"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.import_checkpoint", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of a nanochat checkpoint, or weights")
    parser.add_argument("config", metavar="CONFIG", help="experiment file of the model, see configs/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="changes to it")
    parser.add_argument("--step", type=int, help="which model_*.pt of a folder (default: the newest)")
    parser.add_argument("--meta", type=Path, metavar="FILE", help="its JSON, if that is not beside the weights")
    parser.add_argument("--allow-missing", nargs="+", default=[], metavar="NAME",
                        help="parameters to initialise where the source has none; patterns as of files")
    parser.add_argument("--ignore", nargs="+", default=[], metavar="KEY",
                        help="keys of the JSON's model_config that change nothing the model computes")
    parser.add_argument("--dry-run", action="store_true", help="show what becomes of every tensor; write nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_intermixed_args()


@entrypoint
def main() -> None:
    args = arguments()
    from nanopoe.config import load_experiment

    experiment = load_experiment(args.config, args.overrides)
    from nanopoe.checkpoint import importing
    from nanopoe.checkpoint.foreign import open_foreign

    importing.check_out(experiment)
    foreign = open_foreign(args.source, args.step, args.meta)
    importing.check_told(experiment, foreign, args.ignore)
    left = importing.unsaid(experiment.model, foreign)
    rows = importing.account(experiment.model, foreign.tensors, args.allow_missing)
    if args.dry_run:
        show(rows)
    if left:
        print(f"not said by {foreign.meta.name}, so as in the experiment: "
              f"{', '.join(f'{key}={value}' for key, value in left.items())}")
    importing.check_rows(rows, foreign.file)
    tokenizer = importing.load_tokenizer(experiment)
    if args.dry_run:
        print(f"step {foreign.step} would be imported to {experiment.out}")
        return
    path = importing.import_foreign(experiment, foreign, rows, tokenizer)
    tell(foreign, rows)
    print(f"step {foreign.step} imported to {path}")


def show(rows: list[Row]) -> None:
    """What becomes of every tensor, as a table."""
    from nanopoe.checkpoint.importing import kind_of
    from nanopoe.checkpoint.tables import print_table

    print_table(["tensor", "in the source", "in the model", ""],
                [[row.name, kind_of(row), row.wanted or "-", row.state] for row in rows])


def tell(foreign: Foreign, rows: list[Row]) -> None:
    """What was done with the tensors, and what was not taken."""
    kinds = Counter(str(row.dtype).removeprefix("torch.") for row in rows if row.state == "taken")
    print(f"{kinds.total()} tensors taken: {', '.join(f'{n} of {kind}' for kind, n in sorted(kinds.items()))}")
    new = [row.name for row in rows if row.state == "initialised"]
    if new:
        print(f"{len(new)} initialised: {', '.join(new)}")
    if foreign.optimizer:
        print(f"not taken: {', '.join(foreign.optimizer)}; what goes on from here has a new optimizer")


if __name__ == "__main__":
    main()
