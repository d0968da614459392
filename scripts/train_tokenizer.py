"""Train a byte-level BPE vocabulary on parquet shards and report its bytes per token on held-out text."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from nanopoe.data.progress import progress
from nanopoe.data.shards import Source, open_source
from nanopoe.errors import ConfigError, DataError, entrypoint
from nanopoe.tokenizer import FILES, Tokenizer

EXAMPLES = """examples:
  python -m scripts.train_tokenizer --data data/stdlib --vocab-size 4096 --out data/tokenizer
  python -m scripts.train_tokenizer --data shards --files 'shard_0000[0-5].parquet' --vocab-size 32768 \\
      --held-out shards/shard_00006.parquet --out data/tokenizer"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.train_tokenizer", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of shards, or one with train/ and val/")
    parser.add_argument("--files", help="glob of the shards to train on [*.parquet]")
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens, the nine specials included")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--max-mb", type=float, help="train on so many MB of text")
    parser.add_argument("--held-out", type=Path, help="folder or one shard to measure on [DATA/val if it is there]")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def texts(source: Source, max_bytes: float) -> Iterator[str]:
    """Documents of `source` in file order until `max_bytes` of text."""
    size = 0
    with progress("tokenizer") as show:
        for number, text in enumerate(source.texts()):
            size += len(text.encode())
            if size > max_bytes:
                return
            show(number, size)
            yield text


def bytes_per_token(tokenizer: Tokenizer, held_out: Source) -> float:
    """UTF-8 bytes of the held-out text over its tokens."""
    size = tokens = 0
    for text in held_out.texts():
        size += len(text.encode())
        tokens += len(tokenizer.encode(text))
    return size / tokens


def check_out(out: Path, overwrite: bool) -> None:
    """DataError unless `out` is missing or holds at most a tokenizer: a whole one only with `overwrite`."""
    if out.exists() and not out.is_dir():
        raise DataError("is not a folder", out, "choose another --out")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if {name.removeprefix(".tmp-") for name in held} - set(FILES):
        raise DataError("is not empty and not a tokenizer", out, "choose another --out")
    if held >= set(FILES) and not overwrite:             # less than all is what an interrupted run has left
        raise DataError("is not empty", out, "choose another --out or pass --overwrite")


@entrypoint
def main() -> None:
    args = arguments()
    if args.max_mb is not None and not args.max_mb > 0:
        raise ConfigError(f"must be above 0, got {args.max_mb:g}", "--max-mb")
    check_out(args.out, args.overwrite)
    split = args.data / "train"
    source = open_source("train", split if split.is_dir() else args.data, args.files)
    held_out_path = args.held_out or (args.data / "val" if (args.data / "val").is_dir() else None)
    held_out = None                                     # opened before the work, so that a wrong path costs no time
    if held_out_path is not None:
        folder, files = (held_out_path.parent, held_out_path.name) if held_out_path.is_file() else (held_out_path, None)
        held_out = open_source("held-out", folder, files)
    start = time.monotonic()
    limit = float("inf") if args.max_mb is None else args.max_mb * 1e6
    tokenizer = Tokenizer.train(texts(source, limit), args.vocab_size)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens, trained in {time.monotonic() - start:.1f} s")
    if held_out is not None:
        print(f"bytes per token on {held_out_path}: {bytes_per_token(tokenizer, held_out):.3f}")


if __name__ == "__main__":
    main()
