"""Text of an exported model by stock transformers, and its views of one stage or a few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanopoe.model import GPT
from nanopoe.model.pool import aggregate
from tests.exports import (
    KINDS,
    POE,
    Exports,
    gap,
    greedy,
    load,
    slow_greedy,
    some_ids,
)

# -- generation ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_cache_and_no_cache_and_ours_agree(exports: Exports, kind: str) -> None:
    ours, theirs, _ = exports(kind)
    ids = some_ids(2, 120)                           # the 128-token windows fill up on the way
    never = theirs.generation_config.eos_token_id
    expected = slow_greedy(ours, ids, 24, never)
    assert len(set(expected[0].tolist())) > 8        # control: no loop that would hide errors
    assert torch.equal(greedy(theirs, ids), expected)
    assert torch.equal(greedy(theirs, ids, use_cache=False), expected)
    assert torch.equal(greedy(theirs, ids, cache_implementation="static"), expected)
    other = greedy(theirs, some_ids(2, 120, seed=9))
    assert not torch.equal(other, expected)          # control


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_and_chunks(exports: Exports, attention: str) -> None:
    from transformers import DynamicCache

    ours, _, out = exports("heads")
    model = load(out, attn_implementation=attention)
    ids = some_ids(1, 160)
    with torch.no_grad():
        expected = ours(ids)
        assert gap(model(ids).logits, expected) <= 1e-4
        cache = DynamicCache(config=model.config)
        pieces = [model(part, past_key_values=cache).logits for part in ids.split([1, 130, 2, 27], dim=1)]
        assert gap(torch.cat(pieces, dim=1), expected) <= 1e-4
        assert gap(model(ids, logits_to_keep=3).logits, expected[:, -3:]) <= 1e-4
        attentions = model(ids, output_attentions=True).attentions
    assert (attentions[1] is not None) == (attention == "eager") and len(attentions) == 5
    with torch.no_grad():                            # control: a lost chunk is noticed
        assert gap(model(ids[:, 130:]).logits, expected[:, 130:]) > 1e-2


@pytest.mark.parametrize("kind", ["bp", "heads"])
def test_left_padding_changes_nothing(exports: Exports, kind: str) -> None:
    _, theirs, _ = exports(kind)
    pad = theirs.generation_config.pad_token_id
    lengths = [140, 9, 60]
    rows = [some_ids(1, n, seed=n) for n in lengths]
    width = max(lengths)
    batch = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    alone = torch.cat([greedy(theirs, row, n=12) for row in rows])
    assert torch.equal(greedy(theirs, batch, n=12, attention_mask=mask), alone)
    assert torch.equal(greedy(theirs, batch, n=12, attention_mask=mask, cache_implementation="static"), alone)
    assert not torch.equal(greedy(theirs, batch, n=12), alone)                   # control: without the mask
    with torch.no_grad():                            # and in a plain forward, positions come from the mask
        together, single = theirs(batch, attention_mask=mask).logits, theirs(rows[1]).logits
    assert gap(together[1, -9:], single[0]) <= 1e-4


@pytest.mark.parametrize("kind", ["bp", "heads"])
def test_beams_and_sampling(exports: Exports, kind: str) -> None:
    _, theirs, _ = exports(kind)
    ids = some_ids(2, 30)
    beams = greedy(theirs, ids, n=10, num_beams=3)
    assert torch.equal(beams, greedy(theirs, ids, n=10, num_beams=3, use_cache=False))
    assert not torch.equal(beams, greedy(theirs, ids, n=10))                     # control: the search does something

    def sample(seed: int, **kwargs: Any) -> Tensor:
        torch.manual_seed(seed)
        return theirs.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=True, **kwargs)

    assert torch.equal(sample(3), sample(3)) and torch.equal(sample(3), sample(3, use_cache=False))
    assert not torch.equal(sample(3), sample(4))                                 # control
    assert sample(3, num_return_sequences=2, repetition_penalty=1.2).shape[0] == 4


def test_bos_is_not_taken_for_padding(exports: Exports) -> None:
    from transformers import GenerationMixin

    _, theirs, _ = exports("shared")
    bos = theirs.generation_config.bos_token_id
    ids = torch.cat([torch.tensor([[bos]]), some_ids(1, 20)], dim=1)
    options: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, pad_token_id=bos, eos_token_id=3)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(theirs.generate(ids, **options), expected)
    assert torch.equal(theirs.generate(input_ids=ids, **options), expected)
    trapped: Any = GenerationMixin.generate(theirs, ids, **options)              # control: transformers by itself
    assert not torch.equal(trapped, expected)


def test_training_gradients_and_checkpointing(exports: Exports) -> None:
    *_, out = exports("heads")
    model = load(out).train()
    ids = some_ids(2, 40)
    loss = model(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert gap(loss.detach(), expected.detach()) <= 1e-5
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(dict(model.named_parameters())) - set(plain) == {"model.backout_lambda"}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or gap(p.grad, plain[name]) <= 1e-5, name
    assert any(float(g.abs().max()) > 1e-3 for g in plain.values())              # control: there was something to equal


# -- one stage, a prefix ------------------------------------------------------------------------------------------

def view_of(ours: GPT, stages: range) -> Callable[[Tensor], Tensor]:
    """Log-probabilities of the pooled `stages`, by our model."""
    def logits(ids: Tensor) -> Tensor:
        states = ours.boundary_states(ids)
        return aggregate([ours.stage_logits(states[k], k).log_softmax(-1) for k in stages])
    return logits


@pytest.mark.parametrize("kind", POE)
def test_stages_and_prefixes(exports: Exports, kind: str) -> None:
    ours, theirs, _ = exports(kind)
    K = ours.layout.n_stages
    ids = some_ids(2, 120)
    never = theirs.generation_config.eos_token_id
    texts = []
    for name, index, stages in [*(("stage", k, range(k, k + 1)) for k in range(K)),
                                *(("prefix", n, range(n)) for n in range(1, K + 1))]:
        view = {name: index}
        with torch.no_grad():
            assert gap(theirs(ids, **view).logits, view_of(ours, stages)(ids)) <= 1e-4, view
        texts.append(greedy(theirs, ids, n=14, **view))
        assert torch.equal(texts[-1], slow_greedy(view_of(ours, stages), ids, 14, never)), view
    assert torch.equal(texts[K], texts[0])                                       # prefix 1 is stage 0
    assert torch.equal(texts[-1], greedy(theirs, ids, n=14))                     # prefix K is the full pool
    assert len({tuple(text.flatten().tolist()) for text in texts}) > K           # control: views differ


@pytest.mark.parametrize("view, blocks", [({}, 4), ({"stage": 0}, 2), ({"stage": 1}, 3), ({"prefix": 1}, 2),
                                          ({"prefix": 2}, 3), ({"prefix": 3}, 4)])
def test_a_view_runs_only_what_it_needs(exports: Exports, view: dict[str, int], blocks: int) -> None:
    _, theirs, _ = exports("heads")
    ran: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(theirs.model.layers)]
    heads = [head.register_forward_hook(lambda *_: ran.append(-1)) for head in theirs.lm_head_stages]
    try:
        theirs.generate(some_ids(1, 5), max_new_tokens=1, **view)
    finally:
        for hook in [*hooks, *heads]:
            hook.remove()
    assert [i for i in ran if i >= 0] == list(range(blocks + 1))                 # layer 0 is the lookup
    assert ran.count(-1) == (1 if "stage" in view else view.get("prefix", 3))


def test_views_that_do_not_exist_are_refused(exports: Exports) -> None:
    from transformers import DynamicCache

    _, bp, _ = exports("bp")
    _, poe, _ = exports("heads")
    ids = some_ids(1, 5)
    for view in ({"stage": 0}, {"prefix": 1}):
        with pytest.raises(ValueError, match="only full is valid"):
            bp.generate(ids, max_new_tokens=2, **view)
    for view, message in (({"stage": 3}, "stages 0 to 2"), ({"stage": -1}, "stages 0 to 2"),
                          ({"prefix": 0}, "1 to 3 stages"), ({"prefix": 4}, "1 to 3 stages"),
                          ({"stage": 0, "prefix": 1}, "exclude each other"), ({"stages": 1}, "not used by the model")):
        with pytest.raises(ValueError, match=message):
            poe.generate(ids, max_new_tokens=2, **view)
    with pytest.raises(ValueError, match="input_ids"):
        poe(inputs_embeds=torch.zeros(1, 2, 64))
    cache = DynamicCache(config=poe.config)
    with torch.no_grad():
        poe(ids, past_key_values=cache, stage=0)
        poe(ids, past_key_values=cache, prefix=1)    # control: the same depth goes on
        with pytest.raises(ValueError, match="start with a new cache"):
            poe(ids, past_key_values=cache)


@pytest.mark.slow
def test_early_exit_prompt_lookup_and_compiled_graph(exports: Exports) -> None:
    _, theirs, _ = exports("shared")
    ids = some_ids(1, 30)
    options: dict[str, Any] = dict(max_new_tokens=24, do_sample=False)
    expected = theirs.generate(ids, **options)
    assert expected.shape[1] > 40
    assert torch.equal(theirs.generate(ids, assistant_early_exit=3, **options), expected)
    assert torch.equal(theirs.generate(ids, prompt_lookup_num_tokens=3, **options), expected)
    with torch.no_grad():
        compiled = torch.compile(theirs, fullgraph=True, backend="aot_eager")
        assert gap(compiled(ids, use_cache=False).logits, theirs(ids).logits) <= 1e-4
        assert gap(compiled(ids, use_cache=False).logits, theirs(ids.flip(1)).logits) > 1e-2       # control
