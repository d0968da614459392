"""Byte-level BPE: trained by rustbpe, encoded by tiktoken, kept as JSON and text (no pickle).

The nine special tokens take the last ids of the vocabulary (SPEC 8). They are control tokens only: their strings
in ordinary text are encoded as ordinary text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from nanopoe.errors import DataError, StorageError

FORMAT_VERSION = 1
SPECIALS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
            "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
# GPT-4 style pre-tokens; numbers in groups of at most two digits, as nanochat does for small vocabularies
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")
N_BYTES = 256
FILES = _JSON, _RANKS = "tokenizer.json", "ranks.tiktoken"         # all that a saved tokenizer is
_MAX_JSON, _MAX_RANKS = 1 << 20, 1 << 28                 # bytes read before anything is parsed

# The pattern backtracks over white space; a run of a million characters overflows the stack of the regex engine.
# Longer runs are encoded in pieces, which changes no id of any text without such a run.
_RUN_LIMIT = 100_000
_WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_RUN = re.compile(f"[{_WHITE_SPACE}]{{1024,}}+")


class Tokenizer:
    """Text to ids in [0, vocab_size) and back.

    Attributes: `pattern` the pre-token regex; `mergeable_ranks` bytes -> id, ids 0..vocab_size-10; `special_ids`
    name -> id; `vocab_size`; `bos_id`.
    """

    def __init__(self, mergeable_ranks: dict[bytes, int], pattern: str = PATTERN):
        check_ranks(mergeable_ranks)
        self.pattern = pattern
        self.mergeable_ranks = mergeable_ranks
        self.vocab_size = len(mergeable_ranks) + len(SPECIALS)
        self.special_ids = {name: len(mergeable_ranks) + i for i, name in enumerate(SPECIALS)}
        self.bos_id = self.special_ids["<|bos|>"]
        self._encoding = tiktoken.Encoding("nanopoe", pat_str=pattern, mergeable_ranks=mergeable_ranks,
                                           special_tokens=self.special_ids)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn vocab_size - 9 byte pairs and bytes from `texts`; deterministic in the texts and their order.

        Raises DataError if vocab_size cannot hold the bytes or the texts have too few distinct merges.
        """
        n_ranks = vocab_size - len(SPECIALS)
        if n_ranks < N_BYTES:
            raise DataError(f"a vocabulary of {vocab_size} cannot hold {N_BYTES} bytes and {len(SPECIALS)} specials",
                            "tokenizer", f"ask for at least {N_BYTES + len(SPECIALS)}")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator((piece for text in texts for piece in cut_long_runs(text)), n_ranks,
                                    pattern=PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) < n_ranks:
            raise DataError(f"the text has merges for {len(ranks) + len(SPECIALS)} tokens, asked for {vocab_size}",
                            "tokenizer", "give more text or a smaller vocabulary")
        return cls(ranks)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, no BOS. Lone surrogates become U+FFFD; every other text round-trips."""
        if len(text) <= _RUN_LIMIT:
            return self._encoding.encode_ordinary(text)
        return [i for piece in cut_long_runs(text) for i in self._encoding.encode_ordinary(piece)]

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as (n,) uint32, which skips a list of Python integers; other threads run meanwhile."""
        if len(text) > _RUN_LIMIT:
            return np.concatenate([self._array(piece) for piece in cut_long_runs(text)])
        return self._array(text)

    def _array(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:                           # a lone surrogate: encode_ordinary replaces it
            return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; specials by name, bytes that are no UTF-8 as U+FFFD. DataError on an unknown id."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token id {i} is outside the vocabulary of {self.vocab_size}", "tokenizer",
                                "decode with the tokenizer the ids were made with")
        return self._encoding.decode(list(ids), errors="replace")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of each token, 0 for specials (the weights of BPB, SPEC 7)."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self.mergeable_ranks.items():
            sizes[rank] = len(token)
        return sizes

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of pattern, specials and ranks: equal if and only if the tokenizers are equal."""
        return _digest(self.pattern, self.special_ids, hashlib.sha256(self._ranks_text()).hexdigest())

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and ranks.tiktoken into `folder` (made if missing), the JSON last; or StorageError."""
        folder = Path(folder)
        ranks = self._ranks_text()
        head = {"format_version": FORMAT_VERSION, "pattern": self.pattern, "vocab_size": self.vocab_size,
                "specials": self.special_ids, "ranks_sha256": hashlib.sha256(ranks).hexdigest(),
                "digest": self.digest}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / _RANKS, ranks)
            _write(folder / _JSON, (json.dumps(head, indent=2) + "\n").encode())
        except OSError as error:
            raise StorageError(f"cannot be written ({error.strerror or error})", folder,
                               "free space or choose another folder") from error

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read what `save` wrote; DataError naming the file if anything is missing, altered or truncated."""
        head_path, ranks_path = Path(folder) / _JSON, Path(folder) / _RANKS
        head, raw = _read_head(head_path), _read(ranks_path, _MAX_RANKS)
        if hashlib.sha256(raw).hexdigest() != head["ranks_sha256"]:
            raise DataError(f"does not have the SHA-256 that {_JSON} records", ranks_path, _RETRAIN)
        tokenizer = cls(_parse_ranks(raw, ranks_path), head["pattern"])
        wrong = [key for key, value in (("vocab_size", tokenizer.vocab_size), ("specials", tokenizer.special_ids),
                                        ("digest", tokenizer.digest)) if head[key] != value]
        if wrong:
            raise DataError(f"{', '.join(wrong)} not as the ranks and the pattern give it", head_path, _RETRAIN)
        return tokenizer

    def _ranks_text(self) -> bytes:
        ordered = sorted(self.mergeable_ranks, key=self.mergeable_ranks.__getitem__)
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ordered))


_RETRAIN = "restore the folder or train the tokenizer again with scripts.train_tokenizer"


def check_ranks(ranks: dict[bytes, int]) -> None:
    """DataError unless the ids are exactly 0..n-1 and every single byte has one (so that any text encodes)."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"ranks are not 0..{len(ranks) - 1} without gaps", "tokenizer", _RETRAIN)
    missing = [i for i in range(N_BYTES) if bytes([i]) not in ranks]
    if missing:
        raise DataError(f"{len(missing)} single bytes have no id, the first is {missing[0]}", "tokenizer", _RETRAIN)


def cut_long_runs(text: str) -> Iterator[str]:
    """Pieces whose concatenation is `text`, none with more than 100,000 white-space characters in a row."""
    start = 0
    if len(text) > _RUN_LIMIT:
        for run in _LONG_RUN.finditer(text):
            for cut in range(run.start() + _RUN_LIMIT, run.end(), _RUN_LIMIT):
                yield text[start:cut]
                start = cut
    yield text[start:]


def _digest(pattern: str, specials: dict[str, int], ranks_sha256: str) -> str:
    canonical = json.dumps([FORMAT_VERSION, pattern, specials, ranks_sha256], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_head(path: Path) -> dict:
    try:
        head = json.loads(_read(path, _MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", path, _RETRAIN) from error
    types = {"format_version": int, "pattern": str, "vocab_size": int, "specials": dict, "ranks_sha256": str,
             "digest": str}
    if not isinstance(head, dict) or set(head) != set(types):
        raise DataError(f"keys must be exactly {', '.join(types)}", path, _RETRAIN)
    wrong = [key for key, kind in types.items() if type(head[key]) is not kind]
    if wrong:
        raise DataError(f"wrong type of {', '.join(wrong)}", path, _RETRAIN)
    if head["format_version"] != FORMAT_VERSION:
        raise DataError(f"format_version {head['format_version']}, this program reads {FORMAT_VERSION}", path, _RETRAIN)
    if _digest(head["pattern"], head["specials"], head["ranks_sha256"]) != head["digest"]:
        raise DataError("altered: pattern, specials or ranks_sha256 do not give the recorded digest", path, _RETRAIN)
    return head


def _parse_ranks(raw: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            token, rank = line.split(b" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"line {number} is not 'base64 rank'", path, _RETRAIN) from error
    return ranks


def _read(path: Path, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", path,
                        "name a folder written by scripts.train_tokenizer") from error
    if len(raw) > limit:
        raise DataError(f"larger than the {limit:,} bytes a tokenizer file may have", path, _RETRAIN)
    return raw


def _write(path: Path, raw: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(raw)
    temporary.replace(path)
