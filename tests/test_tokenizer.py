"""The tokenizer: round trips, specials at the end and never in text, strict files, strings that break regex engines."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.errors import DataError
from nanopoe.tokenizer import PATTERN, SPECIALS, Tokenizer, cut_long_runs

TEXT = [Path(argparse.__file__).read_text(encoding="utf-8"), "Grüße, 世界! 😀 naïve café\n" * 20]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXT, 1000)


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path / "tok")
    return tmp_path / "tok"


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i < tokenizer.bos_id for i in ids)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.decode([*ids, tokenizer.bos_id]) != text                # control


def test_merges_were_learned(tokenizer):
    text = TEXT[0][:5000]
    assert len(tokenizer.encode(text)) < 0.5 * len(text.encode())
    plain = Tokenizer({bytes([i]): i for i in range(256)})                    # control: bytes alone compress nothing
    assert len(plain.encode(text)) == len(text.encode())


def test_special_strings_in_text_are_text(tokenizer):
    for name, special in tokenizer.special_ids.items():
        ids = tokenizer.encode(f"a {name} b")
        assert special not in ids
        assert tokenizer.decode(ids) == f"a {name} b"
        assert tokenizer.decode([special]) == name                           # control: the id itself is that token
        assert tokenizer.token_bytes[special] == 0


def test_special_ids_of_the_published_vocabulary():
    tokens = [bytes([i]) for i in range(256)] + [bytes(p) for p in itertools.product(range(256), repeat=2)]
    big = Tokenizer({token: i for i, token in enumerate(tokens[:32768 - 9])})
    assert big.vocab_size == 32768
    assert list(big.special_ids) == list(SPECIALS)
    assert list(big.special_ids.values()) == list(range(32759, 32768))
    assert (big.bos_id, big.special_ids["<|assistant_end|>"]) == (32759, 32763)
    assert big.token_bytes.dtype == np.int64
    assert big.token_bytes.shape == (32768,)


def test_save_and_load(tokenizer, saved):
    again = Tokenizer.load(saved)
    assert sorted(p.name for p in saved.iterdir()) == ["ranks.tiktoken", "tokenizer.json"]
    assert again.digest == tokenizer.digest
    assert again.encode(TEXT[1]) == tokenizer.encode(TEXT[1])
    assert Tokenizer.train(TEXT, 1000).digest == tokenizer.digest            # training is deterministic
    assert Tokenizer.train(TEXT, 999).digest != tokenizer.digest             # control


def _edit_json(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer.json"
    head = json.loads(path.read_text())
    for key, value in changes.items():
        head[key] = value
        if value is None:
            del head[key]
    path.write_text(json.dumps(head))


DAMAGE = {
    "ranks truncated": ("ranks.tiktoken", lambda f: (f / "ranks.tiktoken").write_bytes(
        (f / "ranks.tiktoken").read_bytes()[:-9])),
    "ranks altered": ("ranks.tiktoken", lambda f: (f / "ranks.tiktoken").write_bytes(
        (f / "ranks.tiktoken").read_bytes().replace(b" 300\n", b" 301\n"))),
    "ranks missing": ("ranks.tiktoken", lambda f: (f / "ranks.tiktoken").unlink()),
    "json missing": ("tokenizer.json", lambda f: (f / "tokenizer.json").unlink()),
    "json truncated": ("tokenizer.json", lambda f: (f / "tokenizer.json").write_text(
        (f / "tokenizer.json").read_text()[:-30])),
    "json no object": ("tokenizer.json", lambda f: (f / "tokenizer.json").write_text("[" * 100_000)),
    "pattern altered": ("tokenizer.json", lambda f: _edit_json(f, pattern=PATTERN.replace("{1,2}", "{1,3}"))),
    "specials altered": ("tokenizer.json", lambda f: _edit_json(f, specials={"<|bos|>": 3})),
    "size altered": ("tokenizer.json", lambda f: _edit_json(f, vocab_size=1001)),
    "key missing": ("tokenizer.json", lambda f: _edit_json(f, digest=None)),
    "key unknown": ("tokenizer.json", lambda f: _edit_json(f, extra=1)),
    "other version": ("tokenizer.json", lambda f: _edit_json(f, format_version=2)),
    "wrong type": ("tokenizer.json", lambda f: _edit_json(f, vocab_size="1000")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_and_named(saved, name):
    Tokenizer.load(saved)                                                     # control: it loads before
    file, damage = DAMAGE[name]
    damage(saved)
    with pytest.raises(DataError, match=file) as error:
        Tokenizer.load(saved)
    assert "\n" not in str(error.value)


def test_parts_of_two_tokenizers_do_not_load(saved, tmp_path):
    other = tmp_path / "other"
    Tokenizer.train(TEXT, 900).save(other)
    shutil.copy(other / "ranks.tiktoken", saved / "ranks.tiktoken")
    with pytest.raises(DataError, match=r"ranks.tiktoken"):
        Tokenizer.load(saved)
    Tokenizer.load(other)                                                     # control


def test_too_little_text_and_too_small_vocabulary():
    with pytest.raises(DataError, match="more text"):
        Tokenizer.train(["ab ab"], 1000)
    with pytest.raises(DataError, match="at least 265"):
        Tokenizer.train(TEXT, 264)
    assert Tokenizer.train(["ab ab"], 266).vocab_size == 266                  # control: one merge is there


def test_ranks_must_be_contiguous():
    ranks = {bytes([i]): i for i in range(256)}
    Tokenizer(dict(ranks))                                                    # control
    with pytest.raises(DataError, match="without gaps"):
        Tokenizer({**ranks, b"ab": 257})
    del ranks[b"\xff"]
    with pytest.raises(DataError, match="255"):
        Tokenizer(ranks)


@pytest.mark.parametrize("text", ["a" * 10**6, "^" * 10**6, "\n" * 10**6, "7" * 10**6, "😀" * 10**5,
                                  " " * 1_200_000, " " * 1_200_000 + "x", "\u3000\t" * 600_000 + "\nx"])
def test_huge_runs(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_huge_run_breaks_the_bare_encoder(tokenizer, capfd):
    text = " " * 1_200_000 + "x"
    with pytest.raises(BaseException, match="StackOverflow"):                 # control: why runs are cut
        tokenizer._encoding.encode_ordinary(text)
    capfd.readouterr()
    Tokenizer.train([*TEXT, text], 400)                                       # training is safe too


def test_cutting_changes_only_long_runs():
    short = ("word " * 9 + " " * 99_000) * 3
    assert list(cut_long_runs(short)) == [short]
    long = "a" + " " * 250_000 + "b"
    pieces = list(cut_long_runs(long))
    assert "".join(pieces) == long
    assert len(pieces) == 3


@pytest.mark.parametrize("text", ["", "plain 123 text", "<|bos|> is text <|user_end|>", "\ud800 lone", "é中\U0001f600",
                                  "a" + " " * 250_000 + "b" * 10])
def test_arrays_are_the_lists(tokenizer, text):
    ids = tokenizer.encode_array(text)
    assert ids.dtype == np.uint32 and ids.tolist() == tokenizer.encode(text)
    assert tokenizer.bos_id not in ids


def test_unknown_id(tokenizer):
    with pytest.raises(DataError, match="outside the vocabulary of 1000"):
        tokenizer.decode([5, 1000])
    with pytest.raises(DataError, match="-1"):
        tokenizer.decode([-1])
    assert tokenizer.decode([999]) == "<|output_end|>"                        # control
