"""Look at checkpoints: list, verify, digest, compare, describe."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from nanopoe.errors import CheckpointError, entrypoint

EXAMPLES = """examples:
  python -m scripts.checkpoint ls out/quickstart
  python -m scripts.checkpoint verify out/quickstart --all          every byte against its checksum
  python -m scripts.checkpoint digest out/quickstart --step 200     equal if and only if logically equal
  python -m scripts.checkpoint diff out/a out/b                     the newest of both; world sizes do not matter
  python -m scripts.checkpoint show out/quickstart/checkpoints/step_00000200 --tensors

PATH is a run folder (its newest checkpoint, or --step) or a step folder. An empty file KEEP in a step folder keeps it
from rotation.
exit codes: 0 good or equal, 1 different (diff), 2 wrong arguments, 4 damaged or not there; the message names the file;
  7 the disk does not let it be read"""


def arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m scripts.checkpoint", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=form)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ls|verify|digest|diff|show")
    for verb, what in (("ls", "the checkpoints of a run"), ("verify", "hash every file"),
                       ("digest", "one hash of all that is learned"), ("diff", "where two checkpoints differ"),
                       ("show", "what a checkpoint is")):
        sub = verbs.add_parser(verb, help=what, description=what, epilog=EXAMPLES, formatter_class=form)
        for name in ("a", "b") if verb == "diff" else ("path",):
            sub.add_argument(name, type=Path, metavar="RUN" if verb == "ls" else name.upper())
        if verb != "ls":
            sub.add_argument("--step", type=int, help="of a run folder (default: the newest)")
        if verb == "verify":
            sub.add_argument("--all", action="store_true", help="every step of a run folder")
        if verb == "show":
            sub.add_argument("--tensors", action="store_true", help="list every tensor")
        if verb in ("ls", "diff", "show"):
            sub.add_argument("--json", action="store_true", help="print JSON")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")
    return parser.parse_args()


def verify(args: argparse.Namespace) -> None:
    from nanopoe.checkpoint import inspect, tables

    errors: list[CheckpointError] = []
    for done in inspect.verify_all(args.path, args.step, args.all):
        tables.print_verified(done)
        errors += [] if done.error is None else [done.error]
    if errors:
        raise errors[0]


@entrypoint
def main() -> int:
    args = arguments()
    from nanopoe.checkpoint import compare, inspect, tables
    from nanopoe.checkpoint.store import open_path

    if args.verb == "ls":
        found = inspect.list_folders(args.path)
        if args.json:
            tables.print_json([asdict(item) for item in found])
        else:
            tables.print_list(found)
    elif args.verb == "verify":
        verify(args)
    elif args.verb == "digest":
        print(compare.digest(open_path(args.path, args.step)))
    elif args.verb == "diff":
        result = compare.compare(open_path(args.a, args.step), open_path(args.b, args.step))
        if args.json:
            tables.print_json(tables.comparison_json(result))
        else:
            tables.print_comparison(result)
        return 1 if result.differences else 0
    else:
        checkpoint = open_path(args.path, args.step)
        shown, tensors = inspect.describe(checkpoint), inspect.tensor_rows(checkpoint) if args.tensors else []
        if args.json:
            tables.print_json({**shown, **({"tensors": tensors} if args.tensors else {})})
        else:
            tables.print_description(shown, tensors)
    return 0


if __name__ == "__main__":
    main()
