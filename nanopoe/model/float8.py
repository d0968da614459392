"""Matrix products of blocks in 8-bit floats, for GPUs that have them (arXiv 2209.05433).

Each tensor has one scale, made of its largest absolute value when it is used; e4m3 for what goes forward, e5m2, of the
wider range, for gradients. Sums are in fp32, and so are the weights that the optimizer sees and their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanopoe.errors import ConfigError

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def float8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I) and weight (O, I) -> (..., O) in the dtype of x. Rows of x, I and O are multiples of 16."""
    return Float8Product.apply(x.reshape(-1, x.size(-1)), weight).unflatten(0, x.shape[:-1])


class Float8Product(torch.autograd.Function):
    """x (N, I) times weight (O, I) -> (N, O). Of x and weight their 8-bit forms are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (x8, x_scale), (w8, w_scale) = scaled(x, FORWARD), scaled(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return product(x8, x_scale, w8, w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        dy8, dy_scale = scaled(grads[0], BACKWARD)
        return (product(dy8, dy_scale, w8.t(), w_scale, grads[0].dtype),
                product(dy8.t(), dy_scale, x8.t(), x_scale, torch.float32))


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as x8 * scale, the largest at the end of the range of `dtype`; scale () fp32. Not finite stays not finite."""
    most = torch.finfo(dtype).max
    scale = x.detach().abs().amax().float().clamp(min=1e-12) / most
    return (x.float() / scale).clamp(-most, most).to(dtype), scale


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """a (M, K) times b (N, K) -> (M, N). `fast` adds up with fewer bits inside a Hopper's cores: not for gradients."""
    return torch._scaled_mm(a.contiguous(), b.contiguous().t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype,
                            use_fast_accum=fast)


def check_float8(device: torch.device) -> None:
    """ConfigError if the device has no such products. A CPU computes them in another type: right, but slowly."""
    try:
        eight, one = torch.ones(16, 16, device=device).to(FORWARD), torch.ones((), device=device)
        product(eight, one, eight, one, torch.float32)
    except RuntimeError as error:                          # NotImplementedError is one
        raise ConfigError(f"this {device.type} has no 8-bit products: {str(error).splitlines()[0]}", "runtime.float8",
                          "they need an NVIDIA GPU, Ada or Hopper or newer; use false") from error
