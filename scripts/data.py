"""Look at data: verify, stats and sample of what scripts.prepare_data wrote; audit of what a run has read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nanopoe.errors import ConfigError, DataError, entrypoint, report

EXAMPLES = """examples:
  python -m scripts.data verify data/stdlib                 every byte against the manifest
  python -m scripts.data verify data/frontier_v1 --json     of all sources of a mixture
  python -m scripts.data stats data/stdlib --tokenizer data/stdlib/tokenizer
  python -m scripts.data stats data/chat --tokenizer out/base/tokenizer --sequence-len 2048
  python -m scripts.data sample data/stdlib/val -n 3 --seed 7
  python -m scripts.data audit out/small_poe                of a run with logging.audit

FOLDER is a dataset (with manifest.json), a folder of datasets (a mixture), or for stats and sample one of shards.
exit codes: 0 good, 3 damaged, incomplete, or not there; a line names each shard and what is wrong with it"""
VERBS = {"verify": "shards against the manifest: size, SHA-256, rows, page checksums, UTF-8",
         "stats": "documents, bytes, lengths in characters and tokens", "sample": "some documents, by seed",
         "audit": "prove that a run has read each document of an epoch once"}


def arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m scripts.data", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=form)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    for verb, what in VERBS.items():
        sub = verbs.add_parser(verb, help=what, description=what, epilog=EXAMPLES, formatter_class=form)
        sub.add_argument("folder", type=Path, metavar="RUN" if verb == "audit" else "FOLDER")
        if verb == "stats":
            sub.add_argument("--tokenizer", type=Path, help="folder of a tokenizer, to count its tokens too; those of "
                                                            "conversations as they are rendered")
            sub.add_argument("--sequence-len", type=int, metavar="T", help="also count what is longer than a row of T")
        if verb == "sample":
            sub.add_argument("-n", type=int, default=5, help="documents [5]")
            sub.add_argument("--seed", type=int, default=0, help="[0]")
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")
    return parser.parse_args()


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def verify(args: argparse.Namespace) -> int:
    from nanopoe.data.inspect import verify

    shards, good, rows = [], 0, 0
    for checked in verify(args.folder):
        shards.append({"shard": str(checked.path), "rows": checked.rows,
                       "error": None if checked.error is None else checked.error.what})
        if checked.error is None:
            good, rows = good + 1, rows + checked.rows
        elif not args.json:
            report(checked.error)
    if args.json:
        print_json(shards)
    else:
        print(f"{args.folder}: {good} of {len(shards)} shards are as the manifest says, {rows:,} documents")
    return 0 if good == len(shards) else DataError.exit_code


def stats(args: argparse.Namespace) -> int:
    from nanopoe.data.inspect import stats
    from nanopoe.tokenizer import Tokenizer

    if args.sequence_len is not None and (args.tokenizer is None or args.sequence_len < 1):
        raise ConfigError(f"is {args.sequence_len}", "--sequence-len", "give 1 or more, and a --tokenizer")
    found = stats(args.folder, args.tokenizer and Tokenizer.load(args.tokenizer), args.sequence_len)
    if args.json:
        print_json(found)
        return 0
    for name, split in found.items():
        print(f"{name}: {split['documents']:,} documents in {split['shards']} shards, "
              f"{split['text_bytes'] / 1e6:.1f} MB of text")
        for what in ("characters", "tokens"):
            if what in split:
                print(f"  {what:10} " + ", ".join(f"{key} {value:,.0f}" for key, value in split[what].items()))
        if "bytes_per_token" in split:
            print(f"  {split['bytes_per_token']:.3f} bytes per token")
        if "longer_than_a_row" in split:
            print(f"  {split['longer_than_a_row']:,} documents are longer than a row of {args.sequence_len:,}")
    return 0


def sample(args: argparse.Namespace) -> int:
    from nanopoe.data.inspect import sample

    if args.n < 1:
        raise ConfigError(f"must be 1 or more, got {args.n}", "-n")
    found = sample(args.folder, args.n, args.seed)
    if args.json:
        print_json([{"where": where, "text": text} for where, text in found])
        return 0
    for where, text in found:
        print(f"== {where}, {len(text):,} characters")
        print(text if not text.startswith('{"messages"') else json.dumps(json.loads(text), indent=2,
                                                                          ensure_ascii=False))
        print()
    return 0


def audit(args: argparse.Namespace) -> int:
    from nanopoe.data.audit import check_audit

    result = check_audit(args.folder)
    if args.json:
        print_json({"problems": result.problems, "report": result.report()})
    else:
        print(result.report())
    return DataError.exit_code if result.problems else 0


@entrypoint
def main() -> int:
    args = arguments()
    return {"verify": verify, "stats": stats, "sample": sample, "audit": audit}[args.verb](args)


if __name__ == "__main__":
    main()
