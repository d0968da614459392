"""The exported tokenizer and its chat template: token for token ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.data.conversations import parse_conversation, prompt_of
from nanopoe.data.render import encode_pieces, pieces, render_prompt
from nanopoe.errors import DataError
from nanopoe.export.hub_tokenizer import merge_pairs
from nanopoe.tokenizer import SPECIALS, Tokenizer
from tests.exports import (
    ROOT,
    Exports,
)

# -- tokenizer ----------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).with_name("golden_conversations.json")
TEXTS = [
    "", " ", "\n", "\r\n\r\n  x", "a", "def f(x):\n\treturn x ** 2  # comment\n\n\n", "1 12 123 1234567890 3.14e-10",
    "I'm they'LL we've \u017f'S don't", "caf\u00e9 cafe\u0301 \u4f60\u597d\u4e16\u754c \u0928\u092e\u0938\u094d\u0924",
    "\u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001d54f",
    "\ufeff\x00\x1f\x7f\u2028\u3000 \u0085", "<|bos|>hello<|assistant_end|> <|no_such|>",
    "   \t\t \n \n\n   end   ", "x" * 20_000, " " * 9_000 + "y" + "\n" * 9_000, "ab" * 10_000,
    "https://example.org/a?b=c&d=%20#e", '{"key": [1, 2.5, null], "k": "\\u00e9"}',
]


@pytest.fixture(scope="module")
def hub_tokenizer(exports: Exports) -> Any:
    return exports.hub_tokenizer


def test_tokens_equal_ours(tokenizer: Tokenizer, hub_tokenizer: Any) -> None:
    sources = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("nanopoe/**/*.py"))]
    for text in [*TEXTS, *sources]:
        theirs = hub_tokenizer(text, split_special_tokens=True)["input_ids"]
        assert theirs == tokenizer.encode(text), text[:60]
        assert hub_tokenizer.decode(theirs) == text
    assert len(hub_tokenizer("abc abc")["input_ids"]) < 7                        # control: merges do happen


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text(alphabet=" \t\n\r'sdtrlvem1230aA\u00e9\u4e2d.,<|bos>", max_size=60)))
def test_tokens_equal_ours_on_any_text(tokenizer: Tokenizer, hub_tokenizer: Any, text: str) -> None:
    theirs = hub_tokenizer(text, split_special_tokens=True)["input_ids"]
    assert theirs == tokenizer.encode(text)
    assert hub_tokenizer.decode(theirs) == text


@pytest.mark.slow
def test_tokens_equal_ours_on_the_corpus(corpus: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer as HubTokenizer

    from nanopoe.export.hub_tokenizer import hub_tokenizer as convert

    texts = pq.read_table(sorted(corpus.glob("*.parquet"))[-1]).column("text").to_pylist()[:1500]
    ours = Tokenizer.train(texts[:300], 4096)
    convert(ours).save(str(tmp_path / "tokenizer.json"))
    theirs = HubTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    tokens = 0
    for text in texts:
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text)
        tokens += len(ids)
    assert tokens > 100_000


def test_special_tokens(tokenizer: Tokenizer, hub_tokenizer: Any) -> None:
    ids = hub_tokenizer("<|bos|>hello<|user_end|>")["input_ids"]
    assert ids == [tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.special_ids["<|user_end|>"]]
    assert hub_tokenizer("hello")["input_ids"] == tokenizer.encode("hello")      # nothing is added
    assert hub_tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert hub_tokenizer.decode(ids) == "<|bos|>hello<|user_end|>"
    assert [hub_tokenizer.convert_tokens_to_ids(name) for name in SPECIALS] == list(tokenizer.special_ids.values())
    assert len(hub_tokenizer) == tokenizer.vocab_size
    assert hub_tokenizer.bos_token_id == hub_tokenizer.eos_token_id == hub_tokenizer.pad_token_id == tokenizer.bos_id
    padded = hub_tokenizer(["<|bos|>hello", "<|bos|>x"], padding=True)
    assert padded["attention_mask"][1][0] == 0 and padded["attention_mask"][0][0] == 1


def test_a_vocabulary_bpe_cannot_make_is_refused(tokenizer: Tokenizer) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    assert list(merge_pairs({**ranks, b"ab": 256, b"abc": 257})) == [(b"a", b"b"), (b"ab", b"c")]
    with pytest.raises(DataError, match="cannot be reached"):
        list(merge_pairs({**ranks, b"abc": 256}))


def test_chat_template(tokenizer: Tokenizer, hub_tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": [{"type": "text", "text": "Bye"}]}]
    text = hub_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == ("<|bos|><|user_start|>Be brief.\n\nHi<|user_end|><|assistant_start|>Hello.<|assistant_end|>"
                    "<|user_start|>Bye<|user_end|><|assistant_start|>")
    encoded = hub_tokenizer.apply_chat_template(chat[:3], return_assistant_tokens_mask=True, return_dict=True)
    marked = [i for i, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert marked == [*tokenizer.encode("Hello."), tokenizer.special_ids["<|assistant_end|>"]]
    for wrong in ([chat[2]], [chat[1], chat[1]], [chat[1], chat[0]]):
        with pytest.raises(Exception, match="expected a message of role"):
            hub_tokenizer.apply_chat_template(wrong, tokenize=False)


def named(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the OpenAI API has it."""
    return [{"type": "function", "function": one} for one in calls]


@pytest.mark.parametrize("entry", json.loads(GOLDEN.read_text("utf-8")), ids=lambda entry: entry["name"])
def test_chat_template_is_our_rendering(tokenizer: Tokenizer, hub_tokenizer: Any, entry: dict[str, Any]) -> None:
    """Whole conversations with their targets, and every prompt in them, with tools and calls in either notation."""
    value = json.loads(entry["conversation"])
    conversation = parse_conversation(entry["conversation"], "x")
    escaped = any(name in entry["conversation"] for name in SPECIALS)    # texts that name special tokens: not ours
    row = encode_pieces(tokenizer, pieces(conversation, "x"))
    ids, marks = np.where(row < 0, ~row, row).tolist(), (row >= 0).astype(int).tolist()
    messages, tools = value["messages"], value.get("tools")
    other = [{**m, "tool_calls": named(m["tool_calls"])} if "tool_calls" in m else m for m in messages]
    for said, passed in ((messages, tools), (other, tools and named(tools))):
        found = hub_tokenizer.apply_chat_template(said, tools=passed, return_assistant_tokens_mask=True,
                                                  return_dict=True)
        assert (found["input_ids"] == ids) == (not escaped)
        assert (found["assistant_masks"] == marks) == (not escaped)
        if tools and not escaped:                                        # control: tools and calls matter
            assert hub_tokenizer.apply_chat_template(said, return_dict=True)["input_ids"] != ids
    prompts = [n for n in range(1, len(messages)) if messages[n]["role"] == "assistant"]
    for n in prompts:
        prompt = prompt_of({**value, "messages": messages[:n]}, "x")
        found = hub_tokenizer.apply_chat_template(messages[:n], tools=tools, add_generation_prompt=True,
                                                  return_dict=True)["input_ids"]
        assert (found == render_prompt(tokenizer, prompt)) == (not escaped)
    assert prompts


def get_weather(city: str, days: int = 1) -> str:
    """The weather of a city.

    Args:
        city: Its name.
        days: How many.
    """
    return f"{city} {days}"


def test_chat_template_takes_functions_and_refuses_what_is_no_conversation(tokenizer: Tokenizer, hub_tokenizer: Any
                                                                           ) -> None:
    ask = {"role": "user", "content": "Rain?"}
    text = hub_tokenizer.apply_chat_template([ask], tools=[get_weather], tokenize=False)
    head = json.loads(text.split("functions:\n")[1].split("\n\nRain?")[0])
    assert head[0]["name"] == "get_weather" and list(head[0]) == ["name", "description", "parameters"]
    assert head[0]["parameters"]["required"] == ["city"]
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    result = {"role": "tool", "content": "1"}
    for wrong, message in (([ask, call, ask], "role tool, got user"), ([ask, call, result, result], "role assistant"),
                           ([ask, result], "role assistant, got tool"),
                           ([ask, {**call, "tool_calls": [{"name": "f", "arguments": "{}"}]}], "must be an object")):
        with pytest.raises(Exception, match=message):
            hub_tokenizer.apply_chat_template(wrong, tokenize=False)
    assert hub_tokenizer.apply_chat_template([ask, call, result], tokenize=False, add_generation_prompt=True).endswith(
        '<|python_start|>{"name": "f", "arguments": {}}<|python_end|><|output_start|>1<|output_end|>')
