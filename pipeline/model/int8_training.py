"""Training with int8 matrix products: on a CPU with VNNI, four times as many operations per second as in float32.

Weights stay float32. A linear layer rounds its input and its weight to int8 once, with one scale per token and one per
output. The weight's gradient is computed from the rounded input. Its sum runs over tokens, so their scales are
multiplied into the output's gradient before that is rounded (after torchao's int8 mixed-precision training). The
input's gradient is not rounded: errors would grow from layer to layer, and in the same number of steps the model
learned much less (docs/experiments.md).
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Rounded = tuple[torch.Tensor, torch.Tensor]  # int8, and the scale to multiply it by


class Int8Products(TorchFunctionMode):
    """While active, linear layers without a bias compute in int8. For one model: it caches rounded frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[torch.Tensor, Rounded] | None = None
        self._frozen: dict[int, Rounded] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear or (len(args) > 2 and args[2] is not None):
            return func(*args, **(kwargs or {}))
        x, weight = args[0], args[1]
        with torch.no_grad():
            if self._last is None or self._last[0] is not x:  # query, key and value have one input
                self._last = x, rounded(x.reshape(-1, x.shape[-1]), 1)
            if weight.requires_grad:
                weight8 = rounded(weight, 1)
            elif id(weight) in self._frozen:
                weight8 = self._frozen[id(weight)]
            else:
                weight8 = self._frozen[id(weight)] = rounded(weight, 1)
        return _Linear.apply(x, weight, *self._last[1], *weight8)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, *both: torch.Tensor) -> torch.Tensor:
        x8, x_scale, w8, w_scale = both
        ctx.save_for_backward(weight, x8, x_scale)
        y = torch._int_mm(x8, w8.t()).float().mul_(x_scale).mul_(w_scale.t())
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, x8, x_scale = ctx.saved_tensors
        to_x = grad @ weight if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            g8, scale = rounded(grad.reshape(-1, grad.shape[-1]) * x_scale, 0)
            to_weight = torch._int_mm(g8.t(), x8).float().mul_(scale.t())
        return to_x, to_weight, None, None, None, None


def rounded(x: torch.Tensor, dim: int) -> Rounded:
    """`x` in int8, and its scales: one for all values along `dim`."""
    scale = torch.maximum(x.amax(dim, keepdim=True), -x.amin(dim, keepdim=True)).clamp_(min=1e-30).div_(127)
    return (x * (1 / scale)).round_().to(torch.int8), scale
