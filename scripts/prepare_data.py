"""Make parquet shards from the Python installation, a folder, or a dataset of the hub."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from nanopoe.data.ingest import folder_documents, hub_documents, stdlib_documents
from nanopoe.data.progress import progress
from nanopoe.data.write import WriteOptions, write_dataset
from nanopoe.errors import ConfigError, entrypoint

EXAMPLES = """examples:
  python -m scripts.prepare_data stdlib --out data/stdlib
  python -m scripts.prepare_data folder ~/notes --out data/notes --max-chars 4096
  python -m scripts.prepare_data hub HuggingFaceFW/fineweb-edu --config sample-10BT --out data/fineweb --max-mb 500"""


def arguments() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder to make: train/, val/, manifest.json")
    common.add_argument("--max-mb", type=float, help="stop after so many MB of text")
    common.add_argument("--val-percent", type=float, default=2.0, help="documents that go to val/, by hash [2]")
    common.add_argument("--max-chars", type=int, default=8192, help="longer documents are cut [8192]")
    common.add_argument("--seed", type=int, default=0, help="of the shuffle; the split does not depend on it [0]")
    common.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(prog="python -m scripts.prepare_data", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("stdlib", parents=[common], help="documentation and sources of this Python; no network")
    folder = kinds.add_parser("folder", parents=[common], help="txt, md, rst, py, jsonl[.gz|.zst], parquet files")
    folder.add_argument("path", type=Path)
    hub = kinds.add_parser("hub", parents=[common], help="a dataset id, streamed")
    hub.add_argument("dataset")
    for name in ("--revision", "--config"):
        hub.add_argument(name)
    hub.add_argument("--split", default="train")
    for sub in (folder, hub):
        sub.add_argument("--column", default="text", help="of jsonl, parquet or the dataset [text]")
    return parser.parse_args()


@entrypoint
def main() -> None:
    args = arguments()
    if not 0 < args.val_percent < 100 or args.max_chars < 1 or (args.max_mb is not None and not args.max_mb > 0):
        raise ConfigError("--val-percent must lie between 0 and 100, --max-chars and --max-mb above 0", "command line")
    if args.kind == "stdlib":
        documents, source = stdlib_documents(), {"kind": "stdlib"}
    elif args.kind == "folder":
        documents, source = folder_documents(args.path, args.column), {"kind": "folder", "name": args.path.name}
    else:
        wanted = {"revision": args.revision, "split": args.split, "config": args.config, "column": args.column}
        documents, source = hub_documents(args.dataset, **wanted), {"kind": "hub", "dataset": args.dataset, **wanted}
    limit = None if args.max_mb is None else int(args.max_mb * 1e6)
    options = WriteOptions(seed=args.seed, val_share=args.val_percent / 100, max_chars=args.max_chars,
                           max_bytes=limit, overwrite=args.overwrite)
    start = time.monotonic()
    with progress(args.kind, limit) as show:
        manifest = write_dataset(documents, args.out, source, options, show)
    for name, split in manifest["splits"].items():
        print(f"{args.out / name}: {split['documents']:,} documents, {split['text_bytes'] / 1e6:.1f} MB of text, "
              f"{len(split['shards'])} shards")
    print(f"done in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
