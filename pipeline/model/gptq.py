"""Rounding of weights one input channel after the other, each error made up for in the channels to come.

GPTQ, arXiv:2210.17323, with a scale per block of input channels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

DAMPING = 0.01  # of the mean diagonal, as in the paper
SHRINK = tuple(1 - step / 20 for step in range(9))  # scales to try: a cut outlier can cost less than a coarse rest


def gptq(
    weight: NDArray[np.float32], gram: NDArray[np.float64], bits: int, block_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes (inputs, outputs), whose zero is 2 ** (bits - 1), and scales (blocks, outputs).

    `weight` is (inputs, outputs); `gram` (inputs, inputs) is X transposed times X of what it is multiplied with.

    Raises ValueError where block_size does not divide the inputs.
    """
    inputs, outputs = weight.shape
    if inputs % block_size:
        raise ValueError(f"block_size {block_size} does not divide the {inputs} inputs of a weight")
    factor = _factor(gram)
    left = weight.astype(np.float32).copy()
    codes = np.empty((inputs, outputs), np.uint8)
    scales = np.empty((inputs // block_size, outputs), np.float32)
    for start in range(0, inputs, block_size):
        end = start + block_size
        rows = left[start:end]
        scales[start // block_size] = scale = best_scale(rows, bits, np.diag(gram)[start:end])
        errors = np.empty_like(rows)
        for at in range(block_size):
            channel = start + at
            codes[channel] = code = encode(rows[at], scale, bits)
            rounded = (code.astype(np.float32) - 2 ** (bits - 1)) * scale
            errors[at] = (rows[at] - rounded) / factor[channel, channel]
            rows[at + 1 :] -= np.outer(factor[channel, channel + 1 : end], errors[at])
        left[end:] -= factor[start:end, end:].T @ errors
    return codes, scales


def encode(values: Any, scale: Any, bits: int) -> NDArray[np.uint8]:
    zero = 2 ** (bits - 1)
    return np.asarray(np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1).astype(np.uint8))


def best_scale(rows: NDArray[np.float32], bits: int, importance: NDArray[np.float64]) -> NDArray[np.float32]:
    """Per column, that of the least squared error, weighted by each row's `importance`.

    The value furthest from zero takes the code at the longer end of the range.
    """
    zero = 2 ** (bits - 1)
    furthest = np.take_along_axis(rows, np.abs(rows).argmax(0)[None], 0)[0]
    scale = furthest / -zero
    scale = np.where(np.abs(scale) < 1e-9, np.float32(1e-9), scale)
    weight = importance[:, None].astype(np.float32)
    tried = []
    for shrink in SHRINK:
        rounded = (encode(rows, shrink * scale, bits).astype(np.float32) - zero) * (shrink * scale)
        tried.append((weight * (rows - rounded) ** 2).sum(0))
    return np.asarray(scale * np.array(SHRINK, np.float32)[np.argmin(tried, 0)])


def _factor(gram: NDArray[np.float64]) -> NDArray[np.float32]:
    """Upper Cholesky factor of the inverse of `gram`, damped."""
    diagonal = np.diag(gram).copy()
    damped = gram + np.diag(np.where(diagonal == 0, 1.0, 0.0) + DAMPING * diagonal.mean())
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
