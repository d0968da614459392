"""The model card: README.md of an exported repo. Its snippets run as they stand from the folder above the repo."""

from __future__ import annotations

from typing import Any

from nanopoe.config.layout import layout_of
from nanopoe.config.schema import ModelConfig
from nanopoe.export.card_tables import bounds_table, modes_table, score_table, stage_table

HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags:
- nanopoe
{tags}---

# {name}, step {step:,}

{what}

| | |
| --- | --- |
| parameters | {parameters:,} ({dtype}) |
| blocks x width | {blocks} x {width} |
| attention heads / key-value heads | {heads} / {kv_heads} |
| vocabulary | {vocab:,} |
| context | {context:,} tokens |
"""

WHAT_POE = """\
A Product-of-Experts language model. Its {blocks} blocks form {stages} stages; at the end of each one a head predicts
the next token, {locality}. So every stage is a
language model of its own, an expert, and the model's prediction is their normalised log-opinion pool: the geometric
mean of the experts' distributions. `logits` are the log-probabilities of that pool."""
LOCAL = "trained by its own loss alone: no gradient passes from one stage into an earlier one"
SUPERVISED = "with its own loss; gradients pass through all stages (deep supervision)"

WHAT_BP = """\
A decoder-only language model trained end to end with one loss at its end (backpropagation). It has no stages:
`stage=` and `prefix=` are refused."""

USE = """
## Use

Put `<|bos|>` before a prompt: every training document began with it, and the tokenizer adds nothing by itself.
`trust_remote_code=True` is needed for the tokenizer too, because it reads the model's configuration.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

repo = "{repo}"  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, dtype="auto")

inputs = tokenizer("<|bos|>The capital of France is", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

or

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{repo}", trust_remote_code=True, dtype="auto")
print(generate("<|bos|>The opposite of hot is", max_new_tokens=24)[0]["generated_text"])
```
"""

STAGES = """
### One stage, or the first few

A single expert, or the pool of the first n, runs only the blocks it needs:

```python
expert = model.generate(**inputs, max_new_tokens=24, stage=0)  # 0 to {last}
pool = model.generate(**inputs, max_new_tokens=24, prefix={some})  # 1 to {stages}
print(tokenizer.batch_decode([expert[0], pool[0]], skip_special_tokens=True))
log_probabilities = model(**inputs, stage={last}).logits
```

A cache belongs to the view that filled it. Engines that read only the trunk and `lm_head` do not see the pool.
"""

MIXED = """
A pool of chosen stages, here log p = (log p{first} + 3 log p{last}) / 4 but for its normalisation:

```python
mixed = model.generate(**inputs, max_new_tokens=24, weights={{{first}: 1.0, {last}: 3.0}})
print(tokenizer.decode(mixed[0], skip_special_tokens=True))
```
"""

SPECULATIVE = """
### Self-speculation

The first stage drafts, all stages verify what it wrote in one pass: the text of `generate`, sooner. With
`do_sample=True` (and `temperature`, `top_k`, `top_p`, `seed`) tokens are drawn from the full model's distribution.

```python
found = model.generate_speculative(**inputs, max_new_tokens=24, drafts="auto", return_dict_in_generate=True)
print(tokenizer.decode(found.sequences[0], skip_special_tokens=True))
print(found.statistics)  # rounds, accepted, drafted, acceptance, mean_accepted
print(found.stages)  # the stage that decided each new token
```
"""

WAND = """
### Adaptive depth

A token leaves at the first stage whose lead the later ones cannot undo: `bounds="lead"` is the most that they took of
a leading token's margin on the calibration text, `bounds="max"` the range of all that they changed there. `"lead_p99"`
and `"p99"` leave out one token in a hundred: sooner, and less sure. Where a later stage does more than that, the text
may differ from that of `generate`.

```python
found = model.generate_wand(**inputs, max_new_tokens=24, bounds="lead", return_dict_in_generate=True)
print(tokenizer.decode(found.sequences[0], skip_special_tokens=True))
print(found.statistics)  # tokens, exits at each stage, mean_depth
```

### Routing

Stage 0 answers where it is confident (`threshold`, here the calibrated one), the full model elsewhere; the text may
differ from that of `generate`.

```python
found = model.generate_routed(**inputs, max_new_tokens=24, return_dict_in_generate=True)
print(tokenizer.decode(found.sequences[0], skip_special_tokens=True), found.statistics)
```
"""

EXACT = """
All modes take batches with left padding, stop tokens and a `streamer` as `generate` does. What a token skips is caught
up before anything reads it, so nothing is approximated; only the order of sums differs, which in bfloat16 can decide
between two tokens that are all but equally probable.
"""

CHAT = """
## Chat template

`tokenizer.apply_chat_template` writes `<|user_start|>...<|user_end|><|assistant_start|>...<|assistant_end|>` after
`<|bos|>`; a system message becomes the head of the first user turn. This is a base model: the template is for tuning it
on conversations. Special strings inside a message become special tokens: remove them from untrusted text first.
"""


def card(m: ModelConfig, *, name: str, step: int, repo: str, dtype: str, parameters: int,
         evaluation: dict[str, Any] | None) -> str:
    """Markdown of the card. `evaluation` is the record of the step; what it does not hold is not in the card."""
    layout, poe, record = layout_of(m), m.poe_mode != "none", evaluation or {}
    what = WHAT_BP if not poe else WHAT_POE.format(
        blocks=m.n_layer, stages=layout.n_stages, locality=LOCAL if m.poe_mode == "flat" else SUPERVISED)
    text = HEAD.format(tags="- product-of-experts\n" if poe else "", name=name, step=step, what=what,
                       parameters=parameters, dtype=dtype, blocks=m.n_layer, width=m.n_embd, heads=m.n_head,
                       kv_heads=m.n_kv_head, vocab=m.vocab_size, context=m.sequence_len)
    if poe:
        text += stage_table(layout)
    text += score_table(layout, record) + bounds_table(record) + modes_table(layout, record) + USE.format(repo=repo)
    if poe:
        text += STAGES.format(last=layout.n_stages - 1, some=min(2, layout.n_stages), stages=layout.n_stages)
    if poe and layout.n_stages > 1:
        text += MIXED.format(first=0, last=layout.n_stages - 1) + SPECULATIVE
        text += (WAND if record.get("calibration") else "") + EXACT
    return text + CHAT
