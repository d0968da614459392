"""Specialists as deltas: write one from a run, describe it, verify it against its base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanopoe.errors import ConfigError, entrypoint

EXAMPLES = """examples:
  python -m scripts.delta save out/stage_tool --out deltas/tool                 the newest checkpoint, bfloat16
  python -m scripts.delta save out/stage_tool --step 2600 --out deltas/tool --dtype float32
  python -m scripts.delta show deltas/tool                                      what it is and what it stands on
  python -m scripts.delta verify deltas/tool --base out/poe_1p3b                hashes; that it moves nothing below
  python -m scripts.generate deltas/tool "def read("                            a delta is loaded like a run

A delta holds the new blocks, the additive head, the embeddings and the vectors r and c, and the digest of the model it
stands on. It is refused on any other. Its pointer to the base is relative: move both together, or give --base.
exit codes: 0 good, 2 a wrong command, 4 damaged, of another base, or its base is missing; the message names the file"""


@entrypoint
def main() -> None:
    args = arguments()

    from nanopoe.checkpoint.cascade import open_cascade, save_delta
    from nanopoe.checkpoint.delta import Delta
    from nanopoe.checkpoint.tables import compact, print_json, print_table, size_of

    if args.verb == "save":
        cascade = open_cascade(args.path, args.step, base=args.base)
        out = save_delta(cascade, args.out, args.dtype)
        delta = Delta(out)
        print(f"step {delta.step} of {delta.name}: {len(delta.tensors)} tensors, {size_of(delta.bytes)} in {out}")
    elif args.verb == "verify":
        cascade = open_cascade(args.path, base=args.base)
        if not cascade.links:
            raise ConfigError("is a base, not a specialist", args.path, "scripts.checkpoint verify looks at bases")
        print(f"{args.path}: ok, {' on '.join([*cascade.names[::-1], cascade.base.experiment.name])}")
    else:
        shown = description(Delta(args.path))
        if args.json:
            print_json(shown)
        else:
            print_table(["what", "is"], [[key, compact(value)] for key, value in shown.items()])


def description(delta: Any) -> dict[str, Any]:
    """What a delta is, as JSON-able data; its file is hashed."""
    elements = sum(int(tensor.bytes) for tensor in delta.tensors.values()) // delta.dtype.itemsize
    return {"name": delta.name, "step": delta.step, "layers": delta.model.specialists[-1].n_layer,
            "tensors": len(delta.tensors), "elements": elements, "bytes": delta.bytes, "dtype": str(delta.dtype)[6:],
            "digest": delta.digest, "stands on": delta.parent.name, "its digest": delta.parent.digest,
            "its folder": delta.parent.path, "its step": delta.parent.step, "base digest": delta.base,
            "tokenizer": delta.tokenizer}


def arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m scripts.delta", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=form)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="save|show|verify")
    for verb, what in (("save", "write the delta of a specialist's run"), ("show", "what a delta is"),
                       ("verify", "hash a delta, or a specialist's run, and all it stands on")):
        sub = verbs.add_parser(verb, help=what, description=what, epilog=EXAMPLES, formatter_class=form)
        sub.add_argument("path", type=Path, metavar="RUN" if verb == "save" else "DELTA")
        if verb != "show":
            sub.add_argument("--base", type=Path, help="folder of the base, if it is not where the specialist says")
        if verb == "save":
            sub.add_argument("--step", type=int, help="checkpoint (default: the newest)")
            sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
            sub.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="[bfloat16]")
        if verb == "show":
            sub.add_argument("--json", action="store_true", help="print JSON")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")
    return parser.parse_args()


if __name__ == "__main__":
    main()
