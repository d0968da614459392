"""Windowed attention against its definition: values, gradients, work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nanopoe.model import windows
from nanopoe.model.attention import attend
from nanopoe.model.windows import BLOCK, FLEX_BLOCK, window_mask


def naive(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    scores = q @ k.mT / q.size(-1) ** 0.5
    return scores.masked_fill(~window_mask(q.size(2), k.size(2), window, q.device), -torch.inf).softmax(-1) @ v


def inputs(heads: int, kv_heads: int, queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(2, queries, heads, 16), (2, keys, kv_heads, 16), (2, keys, kv_heads, 16)]
    return [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


CASES = [(BLOCK, BLOCK, 5), (3 * BLOCK, 3 * BLOCK, BLOCK), (200, 200, 70), (2 * BLOCK + 1, 2 * BLOCK + 1, 1),
         (7, 90, 20), (100, 290, 64), (BLOCK + 1, 100, 98), (2, 3, 1), (130, 130, 128), (130, 130, 129), (96, 96, 32)]


@pytest.mark.parametrize("form", ["attend", "blocks of SDPA"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("queries, keys, window", CASES)
def test_values_and_gradients_are_the_definitions(queries: int, keys: int, window: int, kv_heads: int,
                                                  form: str) -> None:
    ours, theirs = inputs(4, kv_heads, queries, keys), inputs(4, kv_heads, queries, keys)
    y = attend(*ours, window) if form == "attend" else windows._sdpa_in_blocks(*ours, window, 16 ** -0.5)
    expected = naive(*theirs, window)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((y * weights).sum(), ours), torch.autograd.grad((expected * weights).sum(), theirs)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    if window > 1:
        assert not torch.allclose(y, naive(*theirs, window - 1), atol=1e-3)                  # control


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_is_given_the_same_windows(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, which runs on a CPU without gradient."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(windows, "_compiled_flex", lambda: flex_attention)
    for length in (2 * FLEX_BLOCK, 2 * FLEX_BLOCK + 1):                                      # the second is not for it
        q, k, v = (x.detach() for x in inputs(4, kv_heads, length, length))
        torch.testing.assert_close(windows._flex(q, k, v, 100, 16 ** -0.5), naive(q, k, v, 100), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = inputs(1, 1, 70, 75, torch.float64)
    few = [x[:1, :, :, :2].detach().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, 66), few)


def test_bf16_is_as_near_as_its_inputs_allow() -> None:
    exact = inputs(2, 2, 200, 200)
    rounded = [x.detach().bfloat16() for x in exact]
    y = attend(*rounded, 50)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), naive(*(x.float() for x in rounded), 50), rtol=2 ** -8, atol=1e-3)


def test_work_grows_with_the_window_not_the_context() -> None:
    def flops(T: int, window: int) -> int:
        with FlopCounterMode(display=False) as counted:
            q, k, v = inputs(2, 2, T, T)
            attend(q, k, v, window).sum().backward()
        return counted.get_total_flops()

    pairs = (512 + BLOCK) * 2 * 2 * 2 * 16 * 7              # of a query: keys x (b, H, 2, D) x (2 + 5) products
    for T in (1024, 4096):
        assert flops(T, 512) <= pairs * T
    assert flops(4096, 512) > 3.9 * flops(1024, 512)               # control: it counts
