"""GPTQ (arXiv:2210.17323): rounds weights channel by channel, each error compensated in the channels still to come.

There is one scale per block of input channels. Channels with the largest inputs come first, when most others are left
to compensate for them. As this order mixes blocks, scales are computed from the original weights.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEAD_BLOCK = 32  # the head is also the embedding, and loses most with larger blocks (docs/experiments.md)
DAMPING = 0.01  # fraction of the mean diagonal, as in the paper
SHRINK = tuple(1 - step / 20 for step in range(9))  # scales to try: clipping an outlier can cost less than coarse steps


@dataclass
class Rounded:
    codes: NDArray[np.uint8]  # (inputs, outputs); zero is 2 ** (bits - 1)
    scales: NDArray[np.float32]  # (blocks, outputs)
    error: float  # squared error of the product with the inputs, as a fraction of its squared sum


def gptq(weight: NDArray[np.float32], gram: NDArray[np.float64], bits: int, block_size: int) -> Rounded:
    """`weight` is (inputs, outputs); `gram`, (inputs, inputs), is X transposed times X of its inputs X.

    Raises ValueError if block_size does not divide the inputs.
    """
    inputs, outputs = weight.shape
    require_blocks(inputs, block_size)
    weight, importance = weight.astype(np.float32), np.diag(gram)
    blocks = [slice(start, start + block_size) for start in range(0, inputs, block_size)]
    scales = np.stack([best_scale(weight[block], bits, importance[block]) for block in blocks])
    order = np.argsort(-importance, kind="stable")
    factor = _factor(gram[np.ix_(order, order)])
    left = weight[order]
    codes = np.empty((inputs, outputs), np.uint8)
    for block in blocks:
        rows, here, later = left[block], factor[block, block], factor[block, block.stop :]
        errors = np.empty_like(rows)
        for at, channel in enumerate(order[block]):
            scale = scales[channel // block_size]
            codes[channel] = encode(rows[at], scale, bits)
            errors[at] = (rows[at] - decode(codes[channel], scale, bits)) / here[at, at]
            rows[at + 1 :] -= np.outer(here[at, at + 1 :], errors[at])
        left[block.stop :] -= later.T @ errors
    lost = weight - decode(codes, scales.repeat(block_size, 0), bits)
    return Rounded(codes, scales, float(_products(lost, gram) / max(_products(weight, gram), 1e-30)))


def nearest(weight: NDArray[np.float32], bits: int, block_size: int) -> NDArray[np.float32]:
    """`weight` (inputs, outputs) on a grid that `gptq`, given the same bits and blocks, finds again without loss.

    Raises ValueError if block_size does not divide the inputs.
    """
    require_blocks(len(weight), block_size)
    found = np.empty_like(weight)
    for start in range(0, len(weight), block_size):
        block = slice(start, start + block_size)
        scale = best_scale(weight[block], bits, np.ones(block_size)).astype(np.float16).astype(np.float32)
        scale[scale == 0] = 1  # if all weights are zero, or nearly
        found[block] = decode(encode(weight[block], scale, bits), scale, bits)
    return found


def require_blocks(inputs: int, block_size: int) -> None:
    if inputs % block_size:
        raise ValueError(f"block_size {block_size} does not divide the {inputs} inputs of a weight")


def _products(weight: NDArray[np.float32], gram: NDArray[np.float64]) -> float:
    """The squared sum of the inputs' product with `weight`."""
    return float(np.sum((gram.astype(np.float32) @ weight) * weight, dtype=np.float64))


def decode(codes: Any, scale: Any, bits: int) -> NDArray[np.float32]:
    return np.asarray((codes.astype(np.float32) - 2 ** (bits - 1)) * scale)


def encode(values: Any, scale: Any, bits: int) -> NDArray[np.uint8]:
    zero = 2 ** (bits - 1)
    return np.asarray(np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1).astype(np.uint8))


def best_scale(rows: NDArray[np.float32], bits: int, importance: NDArray[np.float64]) -> NDArray[np.float32]:
    """Per column, the scale with the least squared error, weighted by each row's `importance`.

    The value furthest from zero gets the lowest code, as the range of codes is longer on that side.
    """
    zero = 2 ** (bits - 1)
    furthest = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
    scale = furthest / -zero
    scale = np.where(np.abs(scale) < 1e-9, np.float32(1e-9), scale)
    weight = importance[:, None].astype(np.float32)
    tried = []
    for shrink in SHRINK:
        rounded = decode(encode(rows, shrink * scale, bits), shrink * scale, bits)
        tried.append((weight * (rows - rounded) ** 2).sum(0))
    return np.asarray(scale * np.array(SHRINK, np.float32)[np.argmin(tried, 0)], np.float32)


def _factor(gram: NDArray[np.float64]) -> NDArray[np.float32]:
    """Upper Cholesky factor of the inverse of the damped `gram`."""
    diagonal = np.diag(gram).copy()
    damped = gram + np.diag(np.where(diagonal == 0, 1.0, 0.0) + DAMPING * diagonal.mean())
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
