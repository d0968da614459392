"""DistMuonAdamW: coverage of groups, sharded equal to unsharded bit for bit, state that any world size can read."""

from __future__ import annotations

import gc
import hashlib
import weakref

import pytest
import torch

from nanopoe.config.schema import OptimConfig
from nanopoe.dist import World
from nanopoe.optim import DistMuonAdamW, Group, build_groups
from nanopoe.optim.kernels import adamw_, muon_, orthogonalize, second_moment_shape
from tests.ranks import run_ranks

# 5 matrices of one shape and a lone one do not divide by 4 ranks, nor do 127 or 2 or 1 rows
SHAPES = {**{f"square{i}": (24, 24) for i in range(5)}, "tall": (64, 16), "wide": (12, 40),
          "rows": (127, 8), "few": (2, 5), "vector": (7,), "scalar": (1,)}
MUON = tuple(n for n in SHAPES if n.startswith(("square", "tall", "wide")))
ADAM = tuple(n for n in SHAPES if n not in MUON)


def groups() -> list[Group]:
    return [Group("matrices", "muon", 0.02, 0.1, MUON), Group("rest", "adamw", 0.1, 0.01, ADAM, (0.8, 0.95))]


def parameters(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return h.hexdigest()


def steps(world: World, n: int, change: str = "") -> str:
    """Digest of the parameters after n steps with gradients that all ranks share."""
    params = parameters()
    optimizer = DistMuonAdamW(params, groups(), world.rank, world.size, numerics="strict")
    for step in range(n):
        generator = torch.Generator().manual_seed(100 + step)
        for name, p in params.items():
            grad = torch.randn(SHAPES[name], generator=generator)
            p.grad = (grad + (name == change)) / world.size              # dividing by 1, 2, 4 is exact
        optimizer.take()
        optimizer.reduce()
        optimizer.update(1.0 - 0.1 * step, 0.85 + 0.02 * step, 1.0)
    assert all(p.grad is None for p in params.values())
    return digest(dict(params))


def test_sharded_equals_unsharded_bitwise() -> None:
    alone = steps(World(0, 1, torch.device("cpu")), 5)
    for size in (2, 4):
        assert run_ranks(steps, size, 5) == [alone] * size
    assert run_ranks(steps, 2, 5, "rows") != [alone] * 2               # control: one other gradient, other weights


def micro_steps(world: World, numerics: str, n: int, change: int | None = None) -> tuple[str, list[str]]:
    """Digest after n steps of 12 micro-batches by real autograd, and which gradients were whole after a backward."""
    params = parameters()
    optimizer = DistMuonAdamW(params, groups(), world.rank, world.size, numerics=numerics, shared=["rows", "vector"])
    left: set[str] = set()
    for step in range(n):
        for g in range(world.rank, 12, world.size):
            generator = torch.Generator().manual_seed(1000 * step + g + 7 * (g == change))
            for again in (False, True):                                  # two backward calls reach the shared ones
                own = {k: v for k, v in params.items() if not again or k in ("rows", "vector")}
                sum((p * torch.randn(p.shape, generator=generator)).sum() for p in own.values()).backward()
            left |= {k for k, p in params.items() if p.grad is not None}
            optimizer.take()
            left |= {f"{k} after take" for k, p in params.items() if p.grad is not None}
        optimizer.reduce()
        optimizer.update(1.0, 0.9, 1.0)
    return digest(dict(params)), sorted(left)


def test_strict_numerics_do_not_depend_on_the_world_size() -> None:
    alone = run_ranks(micro_steps, 1, "strict", 4)[0]
    assert alone[1] == ["rows", "vector"], "every other gradient has left when the backward returns"
    for size in (2, 3, 4):
        assert run_ranks(micro_steps, size, "strict", 4) == [alone] * size
    assert run_ranks(micro_steps, 3, "fast", 4)[0][0] != alone[0]                        # control: the order shows
    assert run_ranks(micro_steps, 3, "strict", 4, 5)[0][0] != alone[0]                   # control: one micro-batch


def held(world: World) -> list[int]:
    """[bytes of gradients that outlive a micro-batch, the most whole gradients in flight, bytes of all parameters]."""
    import nanopoe.optim.dist_muon_adamw as module

    module.FLIGHT_BYTES = 4096
    params = parameters()
    optimizer = DistMuonAdamW(params, groups(), world.rank, world.size)
    most = 0
    for _ in range(2):
        for p in params.values():                                        # one backward each: hooks fire in this order
            p.sum().backward()
            whole = {f.grad.untyped_storage().data_ptr(): f.grad.untyped_storage().nbytes() for f in optimizer.flights}
            most = max(most, sum(whole.values()))
        optimizer.take()
    optimizer.reduce()
    kept = sum(s.grad.untyped_storage().nbytes() for b in optimizer.parcels for s in b.own if s.grad is not None)
    optimizer.discard()
    return [kept, most, sum(p.nbytes for p in params.values())]


def test_only_the_shard_accumulates() -> None:
    everyone = run_ranks(held, 4)
    total = everyone[0][2]
    assert sum(kept for kept, _, _ in everyone) == total                 # no rank keeps the rest of a gradient alive
    assert all(kept <= 0.4 * total for kept, _, _ in everyone)
    assert all(0 < most <= 4096 + 2 * 64 * 16 * 4 for _, most, _ in everyone)
    assert run_ranks(held, 1)[0][:2] == [total, 0]                       # control: alone, all of it is the shard


def test_an_optimizer_is_freed_and_another_takes_over() -> None:
    """A hook that held the optimizer would keep it, its state and the parameters for ever."""
    params = parameters()
    first = DistMuonAdamW(params, groups())
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    second = DistMuonAdamW(params, groups())
    sum(p.sum() for p in params.values()).backward()
    second.take()
    assert float(second.reduce()) == pytest.approx(sum(p.numel() for p in params.values()))
    second.discard()
    assert all(s.grad is None for b in second.parcels for s in b.own)
    with second.deaf():
        params["rows"].sum().backward()
    assert params["rows"].grad is not None                               # control: nobody took it


def sharded_state(world: World) -> list[tuple[str, str, int, list[float]]]:
    params = parameters()
    optimizer = DistMuonAdamW(params, groups(), world.rank, world.size)
    owned = sum(t.numel() for b in optimizer.parcels for t in b.state.values())
    for name, p in params.items():
        p.grad = torch.full(SHAPES[name], 0.5) + torch.arange(p.numel()).view(SHAPES[name]) / world.size
        p.grad = p.grad / world.size if world.size == 1 else p.grad
    optimizer.take()
    optimizer.reduce()
    optimizer.update(1.0, 0.9, 1.0)
    parts = [(p.param, p.slot, p.row0, p.tensor.flatten().tolist()) for p in optimizer.state_parts()]
    return [("", "", owned, []), *parts]


def test_state_is_sharded_and_covers_every_row_once() -> None:
    everyone = run_ranks(sharded_state, 4)
    alone = run_ranks(sharded_state, 1)[0]
    owned = [parts[0][2] for parts in everyone]
    assert sum(owned) == alone[0][2] and max(owned) <= 0.3 * alone[0][2]
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for parts in everyone:
        for name, slot, row0, values in parts[1:]:
            per_row = 1 if len(SHAPES[name]) == 1 else SHAPES[name][1]
            height = len(values) // per_row if slot.startswith("exp") else 0
            rows.setdefault((name, slot), []).append((row0, height))
    assert len(rows) == 2 * len(SHAPES)
    for (name, slot), pieces in rows.items():
        if slot.startswith("exp"):
            end = 0
            for row0, height in sorted(pieces):
                assert row0 == end
                end += height
            assert end == SHAPES[name][0]
        else:
            assert len(pieces) == 1, name                              # a matrix has one owner


def test_loaded_state_continues_bitwise() -> None:
    def run(reload_at: int | None, lose: str = "") -> str:
        params = parameters()
        optimizer = DistMuonAdamW(params, groups())
        for step in range(6):
            if step == reload_at:
                saved = {(p.param, p.slot): p.tensor.clone() for p in optimizer.state_parts()}
                if lose:
                    saved[lose, "exp_avg_sq"].zero_()
                optimizer = DistMuonAdamW(params, groups())
                optimizer.load_state(lambda n, slot, low, high, s=saved: s[n, slot][low:high], steps=step)
            generator = torch.Generator().manual_seed(step)
            for name, p in params.items():
                p.grad = torch.randn(SHAPES[name], generator=generator)
            optimizer.take()
            optimizer.reduce()
            optimizer.update(1.0, 0.9, 1.0)
        return digest(dict(params))

    assert run(None) == run(3)
    assert run(None) != run(3, lose="rows")


def test_every_parameter_in_exactly_one_group() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="vector"):
        DistMuonAdamW(params, [groups()[0], Group("rest", "adamw", 0.1, 0.0, ADAM[:2] + ADAM[3:])])
    with pytest.raises(ValueError, match="rows"):
        DistMuonAdamW(params, [*groups(), Group("again", "adamw", 0.1, 0.0, ("rows",))])
    DistMuonAdamW(params, groups())


def test_rates_scale_as_published() -> None:
    """SPEC 9 for the 1.3B model: twice the reference batch, sixfold reference size, width 1536."""
    names = ["lm_head.weight", "transformer.wte.weight", "value_embeds.1.weight", "resid_lambdas", "x0_lambdas",
             "smear_gate.weight", "smear_lambda", "transformer.h.0.attn.c_q.weight"]
    optim = OptimConfig(matrix_lr=0.02, embedding_lr=0.3, unembedding_lr=0.008, scalar_lr=0.5, weight_decay=0.28,
                        reference_batch_tokens=2**19, reference_scaling_params=110_100_912)
    found = {g.name: g for g in build_groups(names, optim, 1536, 2**20, 729_810_624)}
    root2 = 2**0.5
    assert found["matrices"].lr == pytest.approx(0.02 * root2)
    assert found["matrices"].weight_decay == pytest.approx(0.28 * root2 * 110_100_912 / 729_810_624)
    assert found["heads"].lr == pytest.approx(0.008)                    # sqrt(768/1536) * sqrt(2)
    assert found["wte"].lr == pytest.approx(0.3) and found["value_embeds"].lr == pytest.approx(0.15)
    assert found["resid_lambdas"].lr == pytest.approx(0.005 * root2)
    assert found["x0_lambdas"].lr == pytest.approx(0.5 * root2) and found["smear_backout"].lr == 0.2
    with pytest.raises(AssertionError, match="nowhere"):
        build_groups(["nowhere.weight"], optim, 1536, 2**20, 1)


def test_adamw_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(20, 6, generator=generator))
    q, m, v = p.detach().clone(), torch.zeros(20, 6), torch.zeros(20, 6)
    reference = torch.optim.AdamW([p], lr=0.03, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for step in range(1, 8):
        p.grad = torch.randn(20, 6, generator=generator)
        reference.step()
        adamw_(q, p.grad, m, v, step, 0.03, (0.8, 0.95), 1e-10, 0.1)
    torch.testing.assert_close(q, p.detach(), rtol=1e-5, atol=1e-6)
    adamw_(q, p.grad, m, v, 8, 0.03, (0.8, 0.95), 1e-10, 0.1)
    assert not torch.allclose(q, p.detach())


@pytest.mark.parametrize("shape", [(16, 16), (40, 12), (12, 40)])
def test_orthogonalize(shape: tuple[int, int]) -> None:
    """Singular values near 1 and the singular vectors of the (row-equilibrated) input: U V^T, nearly."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = orthogonalize(x, torch.float32)
    equal_rows = x / x.norm(dim=-1, keepdim=True)
    u, _, vt = torch.linalg.svd(equal_rows, full_matrices=False)
    values = torch.linalg.svdvals(y)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.4
    assert float(y.norm()) == pytest.approx(min(shape) ** 0.5, rel=1e-5)
    assert float((y * (u @ vt)).sum() / (y.norm() * (u @ vt).norm())) > 0.98
    assert float(torch.linalg.svdvals(x).max()) > 1.5                   # control: the input was far from it


def test_cautious_decay_and_tall_rate() -> None:
    """Weight decay touches only entries whose update agrees with their sign; a tall matrix moves sqrt(m/n) further."""
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(6, 6, generator=generator) for _ in range(2))

    def moved(decay: float, p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        p = p.clone()
        second = torch.zeros(second_moment_shape(*p.shape))
        muon_(p, g, torch.zeros_like(p), second, 0.1, 0.0, 0.9, decay, torch.float32)
        return p

    plain, decayed = moved(0.0, start, grad), moved(0.5, start, grad)
    agrees = (start - plain) * start > 0
    assert 0 < int(agrees.sum()) < 36
    torch.testing.assert_close(plain[~agrees], decayed[~agrees])
    torch.testing.assert_close(decayed[agrees], (plain - 0.05 * start)[agrees])
    tall = torch.randn(24, 6, generator=generator)
    step = (moved(0.0, tall, tall) - tall).norm() / (moved(0.0, start, start) - start).norm()
    assert float(step) == pytest.approx(2.0, rel=0.05)
