"""Constrained decoding: whatever the scores say, a call is valid JSON for its functions, and ends within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nanopoe.data.conversations import Function, call_json, parse_conversation, to_json
from nanopoe.data.ingest import Raw
from nanopoe.data.render import LAYOUTS, ONE_LINE, parse_reply
from nanopoe.errors import ConfigError
from nanopoe.infer.batch import Batch
from nanopoe.infer.constrain import CallConstraint, CallStats, Row
from nanopoe.infer.depth import Routed, Wand
from nanopoe.infer.engine import Engine
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.speculative import Speculative
from nanopoe.infer.text import ends
from nanopoe.tokenizer import Tokenizer
from tests.models import three_stages

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
TEXT = Tokenizer.train(['{"name": "add", "arguments": {"x": 12, "name": "arguments"}}\n        ok } ]'] * 9, 290)
ID = BYTES.special_ids
START, END, DONE = ID["<|python_start|>"], ID["<|python_end|>"], ID["<|assistant_end|>"]


def function(name: str, required: Sequence[str] = (), **properties: Any) -> Function:
    return Function(name=name, parameters={"type": "object", "properties": properties, "required": list(required)})


ADD = function("add", ["x"], x={"type": "integer"}, y={"type": "number"})
ADDED = function("add_all", ["values"], values={"type": "array", "items": {"type": "boolean"}}, note={})
SAY = function("say", ["text", "tone"], text={"type": "string"}, tone={"enum": ["soft", "loud"]},
               deep={"type": "object", "properties": {"s": {"type": ["string", "null"]}}, "required": ["s"]})
NOW = Function(name="now", parameters={})
TYPES = {"x": int, "y": (int, float), "values": list, "text": str, "tone": str, "deep": dict}


def valid(call: Any) -> bool:
    """As the schemas above have it, by hand."""
    needed = {"add": {"x"}, "add_all": {"values"}, "say": {"text", "tone"}, "now": set()}[call.name]
    known = {"add": {"x", "y"}, "add_all": {"values", "note"}, "say": {"text", "tone", "deep"}, "now": set()}[call.name]
    a = call.arguments
    return (needed <= set(a) <= known and all(isinstance(a[key], TYPES[key]) for key in a if key in TYPES)
            and a.get("tone", "soft") in ("soft", "loud") and all(type(v) is bool for v in a.get("values", [])))


def walk(tools: Sequence[Function] | None, budget: int, seed: int, tokenizer: Tokenizer = BYTES,
         pull: float = 0.0) -> tuple[list[int], CallStats]:
    """Random scores in place of a model, `pull` on the start of a call; the turn may end where it can."""
    generator, stats = torch.Generator().manual_seed(seed), CallStats()
    bound = {} if tools is None else {0: Row(CallConstraint(tools, tokenizer), [ID["<|bos|>"]], stats)}
    batch = Batch([[1]], budget, Sampling(), {tokenizer.special_ids["<|assistant_end|>"]}, torch.device("cpu"), bound)
    while batch.live:
        scores = torch.randn(1, tokenizer.vocab_size, generator=generator) * 3
        scores[0, tokenizer.special_ids["<|python_start|>"]] += pull
        scores[0, tokenizer.special_ids["<|output_start|>"]] -= 99         # results are for others to write
        batch.push(0, batch.choose(scores, [0])[0], 0)
    return batch.texts[0][1:], stats


@pytest.mark.parametrize("tokenizer", [BYTES, TEXT], ids=["bytes", "merges"])
def test_random_scores_write_valid_calls_only(tokenizer: Tokenizer) -> None:
    names, calls, hurried = set(), 0, 0
    for seed in range(30):
        reply, stats = walk([ADD, ADDED, SAY, NOW], 300, seed, tokenizer, pull=20.0)
        found = parse_reply(tokenizer, reply)
        assert len(found.calls) == stats.opened == stats.closed > 0 and stats.cut == 0
        assert not [fault for fault in found.faults if "a call that is none" in fault or "without an end" in fault]
        assert all(valid(call) for call in found.calls), found.calls
        names |= {call.name for call in found.calls}
        calls, hurried = calls + len(found.calls), hurried + stats.hurried
    assert names == {"add", "add_all", "say", "now"}
    assert calls > 60 and hurried > 0                             # several in a turn, and some had to be ended
    unbound, _ = walk(None, 300, 0, tokenizer, pull=20.0)          # the control: the same scores without a constraint
    assert tokenizer.special_ids["<|python_start|>"] in unbound and not parse_reply(tokenizer, unbound).calls


def test_a_call_ends_within_the_budget_or_is_not_opened() -> None:
    shortest = CallConstraint([SAY], BYTES).shortest
    assert shortest is not None and 40 < len(shortest) < 80
    for budget in range(1, len(shortest) + 30):
        reply, stats = walk([SAY], budget, budget, pull=99.0)
        assert stats.cut == 0 and len(parse_reply(BYTES, reply).calls) == stats.closed
        assert (stats.opened > 0) == (budget > len(shortest))
        assert START not in reply or reply.index(START) == 0
    assert stats.hurried == stats.opened == 1


def test_what_stands_within_a_call_is_the_functions_own() -> None:
    """Every prefix of a valid call goes on; other text, control tokens and an early end do not."""
    constraint = CallConstraint([ADD, ADDED], BYTES)
    text = BYTES.encode('{"name": "add", "arguments": {"x": 3}}')
    matcher = constraint.new_matcher()
    for token in text:
        mask = constraint.mask(matcher)
        assert mask[token] and mask.sum() < 120 and not mask[256:].any()
        assert matcher.consume_token(token)
    assert constraint.mask(matcher).nonzero().tolist() == [[END]]  # nothing else after it, not even white space
    for wrong in ('{"name": "nope"', '{"name": "add", "arguments": {}', '{"name": "add", "arguments": {"x": 1.5',
                  '{"name": "add", "arguments": {"x": 1, "z"', '{"arguments"', '{"name": "add",   ', "\n\n", "[",
                  '{"name": "add_all", "arguments": {"values": [1', '{"name": "add", "arguments": {"x": 03'):
        assert constraint.new_matcher().validate_tokens(BYTES.encode(wrong)) < len(wrong), wrong


def test_every_embedded_call_in_every_layout_is_allowed(embedded: list[Raw]) -> None:
    checked = 0
    for raw in embedded[::97]:
        conversation = parse_conversation(raw.text, raw.where)
        constraint = CallConstraint(conversation.tools, TEXT) if conversation.tools else None
        for call in [call for m in conversation.messages for call in m.tool_calls or ()]:
            assert constraint is not None
            for layout in (ONE_LINE, *LAYOUTS):
                ids = TEXT.encode(to_json(call_json(call), "test", **layout))
                matcher = constraint.new_matcher()
                assert matcher.validate_tokens(ids) == len(ids), call
                assert matcher.consume_tokens(ids) and constraint.mask(matcher)[TEXT.special_ids["<|python_end|>"]]
                checked += 1
    assert checked > 80


def test_schemas_with_shared_definitions_and_open_arguments() -> None:
    shared = Function(name="f", parameters={"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}},
                                            "$defs": {"P": {"type": "integer"}}})
    opened = Function(name="g", parameters={"type": "object", "properties": {}, "additionalProperties": True})
    constraint = CallConstraint([shared, opened], BYTES)

    def goes(text: str) -> bool:
        return constraint.new_matcher().validate_tokens(BYTES.encode(text)) == len(text)

    assert goes('{"name":"f","arguments":{"p":3}}') and not goes('{"name":"f","arguments":{"p":"')
    assert goes('{"name":"g","arguments":{"any":[1]}}') and not goes('{"name":"f","arguments":{"any":')


@pytest.mark.parametrize(("parameters", "words"), [
    ({"type": "dict"}, "Invalid type: dict"),
    ({"type": "object", "properties": {"a": {"type": "string", "format": "weird"}}}, "Unknown format: weird"),
    ({"type": "object", "properties": {"a": {"not": {}}}}, "Unimplemented keys"),
    ({"type": "object", "properties": {"a": {"$ref": "http://somewhere/x"}}}, "not present"),
    ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}, "required": ["a"]},
     "nsatisfiable"),
])
def test_a_schema_the_library_cannot_take_is_one_line_that_names_the_function(parameters: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        CallConstraint([ADD, Function(name="odd", parameters=parameters), SAY], BYTES)
    assert refused.value.where == "function odd" and "\n" not in refused.value.render()


# -- with a model -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(three_stages(vocab_size=BYTES.vocab_size))


OPEN = [ID["<|bos|>"], *BYTES.encode("go"), START]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3), Sampling(0.8, top_k=5, top_p=0.9,
                                                                                  repetition_penalty=1.3)])
def test_rows_with_other_functions_in_one_batch(engine: Engine, sampling: Sampling) -> None:
    tools = [[ADD], [SAY, ADDED], [NOW], [ADDED]]
    constraint = [CallConstraint(some, BYTES) for some in tools]

    def replies(constraint: list[CallConstraint | None] | None) -> tuple[list[list[int]], Any]:
        generation = engine.stream([OPEN] * 4, max_new_tokens=150, sampling=sampling, stop=ends(BYTES),
                                   constraint=constraint)
        texts: list[list[int]] = [[] for _ in tools]
        for row, token, _ in generation:
            texts[row].append(token)
        return texts, generation

    texts, generation = replies([*constraint])
    for some, text in zip(tools, texts, strict=True):
        first = parse_reply(BYTES, [START, *text]).calls[0]
        assert first.name in {tool.name for tool in some} and valid(first)
    assert generation.calls.cut == 0 and generation.calls.opened >= 4
    mixed, _ = replies([None, *constraint[1:]])                    # a row without one, among others
    free, generation = replies(None)
    assert mixed[1:] == texts[1:] and mixed[0] == free[0] != texts[0]
    assert generation.calls is None and not parse_reply(BYTES, [START, *free[0]]).calls


def test_free_text_is_as_without_a_constraint(engine: Engine) -> None:
    prompts = [[ID["<|bos|>"], *BYTES.encode(text)] for text in ("abc", "xyz", "12")]
    for sampling in (Sampling(), Sampling(1.0, seed=1)):
        options: dict[str, Any] = {"max_new_tokens": 60, "sampling": sampling, "stop": ends(BYTES)}
        free = engine.generate(prompts, **options)
        bound = engine.generate(prompts, **options, constraint=[CallConstraint([ADD], BYTES)] * 3)
        for a, b in zip(free, bound, strict=True):
            until = min([a.index(START)] if START in a else [len(a)])
            assert a[:until] == b[:until]
    assert any(free)


def test_a_prompt_may_end_inside_a_call_of_the_functions_only(engine: Engine) -> None:
    constraint = [CallConstraint([ADD, SAY], BYTES)]
    begun = [*OPEN, *BYTES.encode('{"name": "say", "arguments": {"text": "a')]
    [rest] = engine.generate([begun], max_new_tokens=90, stop=ends(BYTES), constraint=constraint)
    found = parse_reply(BYTES, [*begun[3:], *rest])
    assert found.calls[0].name == "say" and valid(found.calls[0]) and found.calls[0].arguments["text"][0] == "a"
    closed = [*OPEN, *BYTES.encode('{"name": "elsewhere"}'), END]
    assert engine.generate([closed], max_new_tokens=3, constraint=constraint)
    with pytest.raises(ConfigError, match="an open call that is none of add, say"):
        engine.generate([[*OPEN, *BYTES.encode('{"name": "x')]], max_new_tokens=3, constraint=constraint)


def test_ends_say_which_token_ended_a_row(engine: Engine) -> None:
    generation = engine.stream([OPEN, OPEN[:-1]], max_new_tokens=80, stop={END, *range(97, 123)}, sampling=Sampling(),
                               constraint=[CallConstraint([NOW], BYTES), None])
    texts: list[list[int]] = [[], []]
    for row, token, _ in generation:
        texts[row].append(token)
    assert [len(text) < 80 for text in texts] == [end is not None for end in generation.ends]
    assert generation.ends[0] is not None and generation.ends[0] not in texts[0]


@pytest.mark.parametrize("mode", [Wand((1.0, 1.0)), Routed(1.0), Speculative()])
def test_a_constraint_needs_plain_decoding(engine: Engine, mode: Any) -> None:
    with pytest.raises(ConfigError, match="a constraint needs plain decoding"):
        engine.stream([OPEN], max_new_tokens=9, mode=mode, constraint=[CallConstraint([ADD], BYTES)])


def test_bad_constraints(engine: Engine) -> None:
    foreign = [CallConstraint([ADD], TEXT)]
    for constraint, words in (([], "0 constraints for 1 prompts"), (foreign, "the model has 265")):
        with pytest.raises(ConfigError, match=words):
            engine.stream([OPEN], max_new_tokens=9, constraint=constraint)
    with pytest.raises(ConfigError, match="no functions"):
        CallConstraint([], BYTES)
