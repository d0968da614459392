"""The fused head and loss against the form that holds the logits: time and memory of all heads of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopoe.config import Experiment
from nanopoe.config.schema import ObjectiveConfig
from nanopoe.dist import World
from nanopoe.errors import ConfigError
from nanopoe.model import GPT
from nanopoe.model.gpt import capped_logits, norm
from nanopoe.model.head import head_backward, head_chunks
from nanopoe.train.bench import clock, peak_bytes, timing
from nanopoe.train.build import build_model
from nanopoe.train.compute import choose_compute

CE = ObjectiveConfig(kind="ce", alpha=0.0, rho=None)


def bench_head(experiment: Experiment, world: World, steps: int = 5) -> dict[str, Any]:
    """Cross-entropy and its gradients of the K heads on random states of one micro-batch, one head after the other.

    `fused` is what training does, `materialised` autograd on all (B*T, V) logits of a head; they alternate, medians in
    seconds, `bytes` the most that one head's pass allocates beside weights and states. `loss_gap` and `gradient_gap`
    are relative differences of the last head's. A trainer that holds K heads' logits at once needs K times as much as
    `materialised` does here.
    """
    if experiment.model.specialists:
        raise ConfigError("has specialists", experiment.name, "name the experiment of a base")
    compute = choose_compute(experiment.runtime, world, world.size, experiment.data.document_mask)
    model = build_model(experiment, world, compute, None)
    m, K = experiment.model, model.layout.n_stages
    shape = (experiment.batch.device_batch_size, m.sequence_len)
    generator = torch.Generator(world.device).manual_seed(0)
    targets = torch.randint(m.vocab_size, shape, generator=generator, device=world.device)
    x = torch.randn(*shape, m.n_embd, generator=generator, device=world.device).to(compute.dtype)
    with torch.no_grad():                                    # logits of some size, not those of a fresh model
        model.lm_head.weight.normal_(0.0, m.n_embd**-0.5, generator=generator)
    arms: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
        "fused": lambda k: fused(model, x, k, targets), "materialised": lambda k: materialised(model, x, k, targets)}
    found: dict[str, dict[str, Any]] = {name: {"bytes": peak_bytes(world, arm)} for name, arm in arms.items()}
    (loss, gradient), (other_loss, other) = (arm(K - 1) for arm in arms.values())
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(steps):
        for name in list(arms) if i % 2 else list(arms)[::-1]:
            start = clock(world)
            for k in range(K):
                arms[name](k)
            seconds[name].append(clock(world) - start)
    for name, figures in found.items():
        figures |= timing(seconds[name])
    work = 6 * K * targets.numel() * m.vocab_size * m.n_embd
    return {"experiment": experiment.name, "device": f"{world.device} {compute.device_name}",
            "dtype": str(compute.dtype)[6:], "compute": compute.reason, "heads": K, "rows": targets.numel(),
            "vocab_size": m.vocab_size, "arms": found,
            "time_ratio": found["fused"]["seconds"] / found["materialised"]["seconds"],
            "memory_ratio": found["fused"]["bytes"] / found["materialised"]["bytes"],
            "mfu": work / found["fused"]["seconds"] / compute.peak_flops,
            "loss_gap": float((loss - other_loss).abs() / other_loss),
            "gradient_gap": float((gradient - other).float().norm() / other.float().norm())}


def fused(model: GPT, x: Tensor, k: int, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss sum, gradient into x); the heads' gradients are computed and let go of."""
    chunks = head_chunks(targets, model.config.vocab_size)
    loss, _, gradient = head_backward(model, x, k, targets, chunks, None, CE, 1 / targets.numel())
    model.zero_grad()
    return loss, gradient


def materialised(model: GPT, x: Tensor, k: int, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same by autograd, logits (B*T, V) and all."""
    states = x.detach().requires_grad_()
    logits = capped_logits(norm(states), model.head_weight(k)).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    del logits
    (loss / targets.numel()).backward()
    model.zero_grad()
    assert states.grad is not None
    return loss.detach(), states.grad
