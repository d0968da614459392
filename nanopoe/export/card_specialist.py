"""The model card of a specialist, as a stage repo or merged. Its snippets run as they stand from the folder above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanopoe.config.schema import ModelConfig

HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
{base}tags:
- nanopoe
- specialist
---

# {name}, step {step:,}

A specialist: {blocks} blocks and a head, trained on {below} while that stayed as it was. Without it
(`head_mode="base"`) the logits of the base are those it has alone, bit for bit, on any prompt without chat tokens.

| | |
| --- | --- |
| parameters in this repo | {parameters:,} ({dtype}) |
| blocks | {base_blocks} of the base, {chain} |
| width | {width} |
| vocabulary | {vocab:,} |
| context | {context:,} tokens |
"""

PARENT = """
`delta.safetensors` holds what is new. `from_pretrained` reads the rest from `{repo}`{revision}, checks that it is the
model this one was trained on (SHA-256 {digest}...), and runs no code from there. `save_pretrained` of the loaded model
writes a repo that stands alone.
"""

USE = """
## Use

`trust_remote_code=True` is needed for the tokenizer too, because it reads the model's configuration.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

repo = "{repo}"  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, dtype="auto")

messages = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

### The base, and both

```python
inputs = tokenizer("<|bos|>The capital of France is", return_tensors="pt")
base = model.generate(**inputs, max_new_tokens=24, do_sample=False, head_mode="base")
both = model.generate(**inputs, max_new_tokens=24, do_sample=False, head_mode="dual")  # their pool, equal weights
print(tokenizer.batch_decode([base[0], both[0]], skip_special_tokens=True))
```

{others}`stage=`, `prefix=` and `weights=` mean the stages of the base. A cache belongs to the view that filled it.
"""

OTHERS = """`specialist=` takes a name, here one of {names}, or its number; the default is the last.
"""

TOOLS = """
## Tool calling

Functions are given as JSON schemas. A call is JSON between `<|python_start|>` and `<|python_end|>`; its result goes
back as a message of the role `tool`.

```python
import json
import re

tools = [{
    "name": "get_weather",
    "description": "The current weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}]
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
inputs = tokenizer.apply_chat_template(
    messages, tools=tools, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:])
calls = []
for text in re.findall(r"<\\|python_start\\|>(.*?)<\\|python_end\\|>", answer, re.DOTALL):
    try:
        calls.append(json.loads(text))
    except ValueError as error:
        print(f"not a call: {text!r} ({error})")
print(calls or answer)

if calls:  # [{"name": "get_weather", "arguments": {"city": "Paris"}}]
    messages.append({"role": "assistant", "content": "", "tool_calls": calls})
    messages += [{"role": "tool", "content": '{"celsius": 18}'} for call in calls]
    inputs = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""

CHAT = """
## Chat template

`tokenizer.apply_chat_template` writes conversations as this model was trained on them: a system message and the tools
become the head of the first user turn, calls and results stand inside the turn of the assistant. Special strings inside
a message become special tokens: remove them from untrusted text first.
"""


def score_table(record: Mapping[str, Any]) -> str:
    """Bits per byte and top-1 accuracy of the last specialist, of the base, and of both; "" where there are none."""
    found = record.get("specialists")
    if not found:
        return ""
    rows = [("specialist", *(found[key]["specialist"][-1] for key in ("bpb", "accuracy"))),
            ("base", record["bpb"]["full"], record["accuracy"]["full"]),
            ("both (`dual`)", *(found[key]["dual"][-1] for key in ("bpb", "accuracy")))]
    note = (f"Held-out data of this specialist, {record['targets']:,} targets. Weights and arithmetic in float32. Bits "
            "per byte: lower is better.")
    return "\n".join(["", "## Evaluation", "", note, "", "| prediction of | bits per byte | top-1 accuracy |",
                      "| --- | --- | --- |", *(f"| {name} | {bpb:.4f} | {hits:.4f} |" for name, bpb, hits in rows), ""])


def specialist_card(m: ModelConfig, *, name: str, step: int, repo: str, dtype: str, parameters: int,
                    names: Sequence[str], parent: Mapping[str, Any] | None, tools: bool,
                    evaluation: Mapping[str, Any] | None) -> str:
    """Markdown of the card of a model with specialists `names`; `parent` as in config.json, None if it stands alone.
    `evaluation` is the record of the step; without one there are no scores."""
    counts = [shape.n_layer for shape in m.specialists]
    above = m.specialists[-1].parent
    on_hub = parent is not None and "revision" in parent
    text = HEAD.format(
        base=f"base_model: {parent['repo']}\nbase_model_relation: finetune\n" if parent and on_hub else "",
        name=name, step=step, blocks=counts[-1], below="a base model" if above is None else f"`{names[above]}`",
        parameters=parameters, dtype=dtype, base_blocks=m.n_layer, width=m.n_embd, vocab=m.vocab_size,
        chain=", ".join(f"{n} of {one}" for n, one in zip(counts, names, strict=True)), context=m.sequence_len)
    if parent:
        text += PARENT.format(repo=parent["repo"], digest=parent["digest"][:12],
                              revision=f", revision `{parent['revision']}`" if on_hub else "")
    text += score_table(evaluation or {})
    others = OTHERS.format(names=", ".join(f"`{one}`" for one in names)) if len(names) > 1 else ""
    return text + USE.format(repo=repo, others=others) + (TOOLS if tools else "") + CHAT
