"""The model card: README.md of an exported repo. Its snippets run as they stand from the folder above the repo."""

from __future__ import annotations

from typing import Any

from nanopoe.config.layout import Layout, layout_of
from nanopoe.config.schema import ModelConfig

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

CHAT = """
## Chat template

`tokenizer.apply_chat_template` writes `<|user_start|>...<|user_end|><|assistant_start|>...<|assistant_end|>` after
`<|bos|>`; a system message becomes the head of the first user turn. This is a base model: the template is for tuning it
on conversations. Special strings inside a message become special tokens: remove them from untrusted text first.
"""


def card(m: ModelConfig, *, name: str, step: int, repo: str, dtype: str, parameters: int,
         evaluation: dict[str, Any] | None) -> str:
    """Markdown of the card. `evaluation` is what nanopoe.train.evaluate returns; without it there are no scores."""
    layout, poe = layout_of(m), m.poe_mode != "none"
    what = WHAT_BP if not poe else WHAT_POE.format(
        blocks=m.n_layer, stages=layout.n_stages, locality=LOCAL if m.poe_mode == "flat" else SUPERVISED)
    text = HEAD.format(tags="- product-of-experts\n" if poe else "", name=name, step=step, what=what,
                       parameters=parameters, dtype=dtype, blocks=m.n_layer, width=m.n_embd, heads=m.n_head,
                       kv_heads=m.n_kv_head, vocab=m.vocab_size, context=m.sequence_len)
    if poe:
        text += stage_table(layout)
    text += score_table(layout, evaluation) + USE.format(repo=repo)
    if poe:
        text += STAGES.format(last=layout.n_stages - 1, some=min(2, layout.n_stages), stages=layout.n_stages)
    return text + CHAT


def stage_table(layout: Layout) -> str:
    """The blocks of each stage."""
    heads = "shared head and its own" if layout.stage_heads else "shared head"
    rows = [f"| {k} | {layout.stage_layers(k)[0]} to {layout.stage_layers(k)[-1]} | {heads} |"
            for k in range(layout.n_stages)]
    return "\n".join(["", "## Stages", "", "| stage | blocks | predicts with |", "| --- | --- | --- |", *rows, ""])


def score_table(layout: Layout, evaluation: dict[str, Any] | None) -> str:
    """Bits per byte (lower is better) and top-1 accuracy of every view that was evaluated; "" without any."""
    bpb, accuracy = (evaluation or {}).get("bpb"), (evaluation or {}).get("accuracy") or {}
    if not evaluation or not bpb:
        return ""
    rows = [("all stages" if bpb.get("stages") else "model", bpb["full"], accuracy.get("full"))]
    for kind, label in (("stages", "stage {}"), ("prefixes", "first {}")):
        hits = accuracy.get(kind) or [None] * layout.n_stages
        first = 0 if kind == "stages" else 1
        rows += [(label.format(k + first), score, hit)
                 for k, (score, hit) in enumerate(zip(bpb.get(kind) or [], hits, strict=False))]
    lines = [f"| {label} | {score:.4f} | {'' if hit is None else f'{hit:.4f}'} |" for label, score, hit in rows]
    held_out = f"Held-out text, {evaluation['tokens']:,} tokens. " if evaluation.get("tokens") else ""
    note = held_out + "Weights and arithmetic in float32. Bits per byte: lower is better."
    return "\n".join(["", "## Evaluation", "", note, "",
                      "| prediction of | bits per byte | top-1 accuracy |", "| --- | --- | --- |", *lines, ""])
