"""Make parquet shards of text or conversations: from this Python, a folder, the hub, or a mixture of them.

A stopped command continues when it is started again: what is finished is in OUT.partial, and the result is the same.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

from nanopoe.config.mixture import load_mixture
from nanopoe.data.files import Folder
from nanopoe.data.filters import WriteOptions
from nanopoe.data.hub import Hub
from nanopoe.data.ingest import Origin, Shape
from nanopoe.data.origins import Job, Share, chat_origin, job_of, mixture_jobs
from nanopoe.data.parts import merge_all
from nanopoe.data.progress import progress
from nanopoe.data.stdlib import Stdlib
from nanopoe.data.write import write_dataset
from nanopoe.errors import ConfigError, entrypoint

EXAMPLES = """examples:
  python -m scripts.prepare_data stdlib --out data/stdlib
  python -m scripts.prepare_data folder ~/notes --out data/notes --max-chars 4096 --min-chars 100 --dedup
  python -m scripts.prepare_data hub HuggingFaceFW/fineweb-edu --config sample-10BT --out data/fineweb --max-mb 500
  python -m scripts.prepare_data mixture configs/data/frontier_v1.yaml --out data/frontier_v1 --max-mb 100000 \\
      --folder stack-v2=~/stack --workers 8
  python -m scripts.prepare_data chat glaive-function-calling-v2 --out data/glaive --greeting-copies
  python -m scripts.prepare_data chat embedded --out data/chat
  python -m scripts.prepare_data chat messages --folder ~/chats --out data/chats
on machine i of 4, then once:
  python -m scripts.prepare_data hub open-web-math/open-web-math --out data/math --part i/4
  python -m scripts.prepare_data merge --out data/math"""


def arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m scripts.prepare_data", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=form)
    kinds = parser.add_subparsers(dest="kind", required=True)
    common = common_arguments()
    texts = argparse.ArgumentParser(add_help=False)
    texts.add_argument("--max-chars", type=int, default=8192, help="longer documents are cut [8192]")
    columns = argparse.ArgumentParser(add_help=False)
    columns.add_argument("--column", default="text", help="of jsonl, json, parquet or the dataset [text]")
    columns.add_argument("--transcript", action="store_true", help="the column is a list of turns: User: ..")
    columns.add_argument("--license", help="for the manifest [what the hub says]")

    def add(name: str, what: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return kinds.add_parser(name, parents=[common, *parents], help=what, description=what, epilog=EXAMPLES,
                                formatter_class=form)

    add("stdlib", "documentation and sources of this Python; no network", texts)
    folder = add("folder", "txt, md, rst, py, jsonl[.gz|.zst], json (arrays), parquet files", texts, columns)
    folder.add_argument("path", type=Path)
    hub = add("hub", "a dataset id, streamed", texts, columns)
    hub.add_argument("dataset")
    for name, what in (("--revision", "commit or branch [the newest]"), ("--config", "of the dataset"),
                       ("--files", "pattern of its files, read without its config")):
        hub.add_argument(name, help=what)
    hub.add_argument("--split", default="train")
    mixture = add("mixture", "every source of a mixture file into OUT/<name>, by its share of --max-mb", texts)
    mixture.add_argument("file", type=Path)
    mixture.add_argument("--folder", action="append", default=[], metavar="NAME=PATH",
                         help="read this source from a folder instead; may be given for several")
    chat = add("chat", "conversations of a dataset, or of your files, by the name of its adapter")
    chat.add_argument("adapter", help="of nanopoe/data/adapters.py, such as messages; or embedded, made here")
    chat.add_argument("--folder", type=Path, help="of jsonl, json or parquet files [the dataset of the hub]")
    chat.add_argument("--revision", help="commit or branch of the dataset [the newest]")
    chat.add_argument("--greeting-copies", action="store_true",
                      help="train: a copy of a conversation that opens with a greeting, in another case")
    merge = kinds.add_parser("merge", help="one dataset of all parts in OUT, or in each of its folders")
    merge.add_argument("--out", type=Path, required=True)
    merge.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def common_arguments() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder to make: train/, val/, manifest.json")
    common.add_argument("--max-mb", type=float, help="stop after so many MB of text")
    common.add_argument("--val-percent", type=float, default=2.0, help="documents that go to val/, by hash [2]")
    common.add_argument("--min-chars", type=int, default=0, help="shorter documents are left out and counted")
    common.add_argument("--skip-over-chars", type=int, help="longer documents are left out and counted, not cut")
    common.add_argument("--dedup", action="store_true",
                        help="leave out documents whose text came before; takes about 100 MB for a million documents")
    common.add_argument("--skip-bad", type=int, default=0, metavar="N",
                        help="leave out up to N rows that are no document (empty, null, not UTF-8, ..) [0: stop]")
    common.add_argument("--shard-mb", type=float, default=64.0, help="text that is shuffled and written together [64]")
    common.add_argument("--seed", type=int, default=0, help="of the shuffle; the split does not depend on it [0]")
    common.add_argument("--workers", type=int, default=1, help="processes that read; the result is the same [1]")
    common.add_argument("--part", metavar="I/N", help="only part I of N of the files, into OUT/part-I-of-N; see merge")
    common.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return common


def options_of(args: argparse.Namespace) -> WriteOptions:
    """What the command line says of the texts. ConfigError for numbers out of their range."""
    chat = args.kind == "chat"
    counts = (args.min_chars, args.skip_bad, args.workers - 1, (args.skip_over_chars or 1) - 1,
              0 if chat else args.max_chars - 1)
    if not 0 < args.val_percent < 100 or min(counts) < 0 or not args.shard_mb > 0 or \
            (args.max_mb is not None and not args.max_mb > 0) or args.skip_over_chars == 0:
        raise ConfigError("--val-percent must lie between 0 and 100, --max-chars, --skip-over-chars, --max-mb, "
                          "--shard-mb and --workers above 0, --min-chars and --skip-bad not below 0", "command line")
    return WriteOptions(
        seed=args.seed, val_share=args.val_percent / 100, max_chars=None if chat else args.max_chars,
        min_chars=args.min_chars, skip_over_chars=args.skip_over_chars, dedup=args.dedup,
        max_bytes=None if args.max_mb is None else int(args.max_mb * 1e6), shard_bytes=max(1, int(args.shard_mb * 1e6)),
        column="conversation" if chat else "text", greeting_copies=chat and args.greeting_copies,
        skip_bad=args.skip_bad, overwrite=args.overwrite)


def part_of(text: str | None) -> Share | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"is {text!r}", "--part", "write it as 1/4 to 4/4")
    return int(found[1]), int(found[2])


def jobs_of(args: argparse.Namespace) -> list[Job]:
    options, part = options_of(args), part_of(args.part)
    if args.kind == "mixture":
        wrong = [text for text in args.folder if not re.fullmatch(r"[^=]+=.+", text)]
        if wrong:
            raise ConfigError(f"is {wrong[0]!r}", "--folder", "write it as NAME=PATH")
        folders = {name: Path(path).expanduser() for name, _, path in (text.partition("=") for text in args.folder)}
        return mixture_jobs(load_mixture(args.file), folders, args.out, options, part)
    origin: Origin
    if args.kind == "stdlib":
        origin = Stdlib()
    elif args.kind == "chat":
        origin = chat_origin(args.adapter, args.folder, args.revision)
    else:
        shape = Shape(args.column, args.transcript)
        origin = Folder(args.path, shape, args.license) if args.kind == "folder" else \
            Hub(args.dataset, args.revision, args.config, args.split, args.files, shape, args.license)
    return [job_of(args.kind, origin, args.out, options, part)]


def tell(out: Path, manifest: dict, limit: int | None = None) -> None:
    """What was written, and what was left out."""
    total = sum(split["text_bytes"] for split in manifest["splits"].values())
    for name, split in manifest["splits"].items():
        print(f"{out / name}: {split['documents']:,} documents, {split['text_bytes'] / 1e6:.1f} MB of text, "
              f"{len(split['shards'])} shards")
    left = {**manifest["counts"]["skipped"], **manifest["counts"]["bad"]}
    if left:
        print(f"{out}: left out " + ", ".join(f"{n:,} {reason}" for reason, n in left.items()))
    if limit is not None and total < 0.99 * limit:
        print(f"{out}: {total / 1e6:.1f} of {limit / 1e6:.1f} MB, all there is")


@entrypoint
def main() -> None:
    args = arguments()
    start = time.monotonic()
    if args.kind == "merge":
        for out, manifest in merge_all(args.out).items():
            tell(out, manifest)
        return
    for job in jobs_of(args):
        units = job.origin.units()
        sizes = [unit.size for unit in units]
        size = None if None in sizes else sum(size or 0 for size in sizes)
        with progress(job.name, job.options.max_bytes, size) as show:
            manifest = write_dataset(job.origin, job.out, job.options, units=units, workers=args.workers,
                                     progress=show)
        tell(job.out, manifest, job.options.max_bytes)
    print(f"done in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
