"""runtime.float8: products of blocks in 8 bits. A CPU computes them too, so all but their speed is seen here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanopoe.config import experiment_from_dict
from nanopoe.config.schema import ObjectiveConfig
from nanopoe.dist import World
from nanopoe.errors import ConfigError
from nanopoe.model.float8 import BACKWARD, FORWARD, check_float8, float8_linear, scaled
from nanopoe.model.gpt import Linear, enter_block
from nanopoe.model.stages import backward_stages
from nanopoe.train import loop
from nanopoe.train.build import Run, use_float8
from tests.models import live_model
from tests.ranks import experiment_dict, model_config

ALONE = World(0, 1, torch.device("cpu"))


def error(mine: Tensor, exact: Tensor) -> float:
    return float((mine - exact).detach().norm() / exact.detach().norm())


def results(linear: Any, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """Value and gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = linear(x, weight)
    return [y, *torch.autograd.grad(y, (x, weight), dy)]


def test_values_and_gradients_have_the_bits_of_their_types() -> None:
    """Three bits behind the point forward, two backward: relative rounding errors of 2^-4 and 2^-3 at most."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=generator) for shape in ((4, 32, 64), (48, 64), (4, 32, 48)))
    exact = results(torch.nn.functional.linear, 1e3 * x, 1e-5 * weight, 1e-7 * dy)      # scales are no matter
    for mine, wanted, most in zip(results(float8_linear, 1e3 * x, 1e-5 * weight, 1e-7 * dy), exact,
                                  (2**-4, 2**-3, 2**-3), strict=True):
        assert mine.shape == wanted.shape and mine.dtype == torch.float32
        assert 1e-3 < error(mine, wanted) < most
    y = float8_linear(x.bfloat16(), weight)
    assert y.dtype == torch.bfloat16 and error(y.float(), x @ weight.T) < 2**-4


def test_what_8_bits_can_say_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (32, 16), (48, 16), (32, 48)
    x, weight, dy = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    for tensor, most in ((x, 448.0), (weight, 448.0), (dy, 57344.0)):
        tensor[0, 0] = most                                            # so that the scale is 1
    for mine, wanted in zip(results(float8_linear, x, weight, dy), results(torch.nn.functional.linear, x, weight, dy),
                            strict=True):
        assert torch.equal(mine, wanted)


def test_gradients_have_the_wider_range() -> None:
    """Of 2^-24 beside 1 a gradient keeps something, and a value nothing."""
    x, dy = torch.eye(16), torch.eye(16)
    x[0, 0] = dy[0, 0] = 2.0**24
    y, dx, _ = results(float8_linear, x, torch.eye(16), dy)
    assert torch.equal(dx.diagonal(), dy.diagonal())
    assert y[0, 0] == 2.0**24 and not y[1:].any()


@pytest.mark.parametrize("dtype", [FORWARD, BACKWARD])
def test_scales(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1e-6, -3e-6])
    eight, scale = scaled(x, dtype)
    assert float(eight.float().abs().max()) == torch.finfo(dtype).max
    torch.testing.assert_close(eight.float() * scale, x, rtol=2**-3, atol=0)
    assert not scaled(torch.zeros(3), dtype)[0].float().any()
    for bad in (float("nan"), float("inf")):                           # must not be made finite on the way
        eight, scale = scaled(torch.tensor([1.0, bad]), dtype)
        assert not (eight.float() * scale).isfinite().all()


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_a_model(recompute: bool) -> None:
    """Near the exact ones, and the same in one compiled graph. Only large matrices of blocks are in 8 bits."""
    model = live_model(model_config())
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        backward_stages(model, ids, ids.roll(-1, 1), ObjectiveConfig(kind="ce", alpha=0.0, rho=None), 1 / 128)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients()
    use_float8(model)
    eight = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.float8}
    assert eight == {f"transformer.h.{i}.{name}" for i in range(4) for name in (
        "attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    model.recompute = recompute
    mine = gradients()
    assert 0.005 < error(mine["transformer.h.0.mlp.c_fc.weight"], exact["transformer.h.0.mlp.c_fc.weight"]) < 0.25
    torch._dynamo.reset()
    model.compiled, model.compiled_for = torch.compile(enter_block, fullgraph=True, backend="aot_eager"), (4, 32)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, mine[name], rtol=1e-3, atol=1e-5)
    model.eval()
    with torch.no_grad():                                              # what has no gradient is exact
        assert torch.equal(model(ids), live_model(model_config())(ids))


def test_a_run_learns_with_it(data: Path, tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> Run:
        return loop.train(experiment_from_dict(experiment_dict(data, tmp_path / name, **changes), "test"), ALONE)

    exact, mine = run("exact"), run("mine", **{"runtime.float8": True})
    assert "in float8" in mine.compute.reason and "float8" not in exact.compute.reason
    name = "transformer.h.0.mlp.c_fc.weight"
    assert 0 < error(mine.model.state_dict()[name], exact.model.state_dict()[name]) < 0.5
    again = run("mine", resume={"step": 7})                                     # a run may go on without
    assert any("computed in float32+float8 up to here, from here in float32" in text for text in again.warnings)


def test_what_it_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    changes = {"runtime.float8": True, "model.intermediate_size": 100}
    with pytest.raises(ConfigError, match=r"model\.intermediate_size: .* multiples of 16, this makes one of 100"):
        experiment_from_dict(experiment_dict(data, tmp_path, **changes), "test")
    experiment_from_dict(experiment_dict(data, tmp_path, **{**changes, "runtime.float8": False}), "test")   # control
    check_float8(ALONE.device)

    def old(*inputs: Any, **options: Any) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", old)
    with pytest.raises(ConfigError, match=r"runtime\.float8: this cpu has no 8-bit products: .*; use false"):
        check_float8(ALONE.device)
