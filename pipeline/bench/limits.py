"""Limits that a machine's arithmetic and memory bandwidth set, to draw beside what was measured.

They are lower bounds of time and memory: they leave out norms, softmax, sampling and activations, and assume that every
kernel reaches the rate of a large product. A model is described by its config.json, its head tied to the embedding.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

SIDE = 2048  # of the square matrices that are multiplied
CACHE_BYTES = 4  # per value in the KV cache: float32


@dataclass(frozen=True)
class Machine:
    """Measured with as many threads as the models get."""

    bandwidth_bytes_per_s: float  # when reading
    float32_operations_per_s: float  # in float32 products: attention, and the weights of fused-fp32
    int8_operations_per_s: float  # in int8 products: the weights of int8, and of int4, which are unpacked to int8

    def weights_operations_per_s(self, variant: str) -> float:
        return self.float32_operations_per_s if variant == "fused-fp32" else self.int8_operations_per_s


@dataclass(frozen=True)
class Architecture:
    layers: int
    hidden: int
    inner: int  # of the MLP
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Architecture":
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            config["num_hidden_layers"],
            hidden,
            config["intermediate_size"],
            heads,
            config["num_key_value_heads"],
            config.get("head_dim") or hidden // heads,
            config["vocab_size"],
        )

    @property
    def body_weights(self) -> int:
        """Weights of the products that every token goes through."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head_weights(self) -> int:
        """Weights of the product that only tokens whose successor is predicted go through."""
        return self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        return self.body_weights + self.head_weights

    @property
    def cache_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * CACHE_BYTES

    def attention_operations(self, behind: int, new: int) -> int:
        """Of `new` tokens that attend to `behind` earlier ones and causally to each other: scores, weighted sums."""
        seen = new * behind + new * (new + 1) // 2
        return 4 * self.layers * self.heads * self.head_dim * seen


def prefill_s(shape: Architecture, machine: Machine, variant: str, behind: int, new: int) -> float:
    """A multiplication and an addition per weight and token; the head for the last token only; and attention."""
    weights = 2 * (shape.body_weights * new + shape.head_weights) / machine.weights_operations_per_s(variant)
    return weights + shape.attention_operations(behind, new) / machine.float32_operations_per_s


def decode_s(shape: Architecture, machine: Machine, model_bytes: int, behind: int, steps: int) -> float:
    """Each step reads once all weights, and the keys and values of all earlier tokens."""
    cached = steps * behind + steps * (steps + 1) // 2
    return (steps * model_bytes + cached * shape.cache_bytes_per_token) / machine.bandwidth_bytes_per_s


@dataclass(frozen=True)
class Lengths:
    """Lengths of a call's parts, in tokens."""

    prefix: int  # in the KV cache already
    asked: int
    new: int


def call_s(shape: Architecture, machine: Machine, variant: str, model_bytes: int, lengths: Lengths) -> float:
    """Prefill (the longer of its arithmetic and reading the weights once), and then a token per step."""
    first = max(
        prefill_s(shape, machine, variant, lengths.prefix, lengths.asked), model_bytes / machine.bandwidth_bytes_per_s
    )
    return first + decode_s(shape, machine, model_bytes, lengths.prefix + lengths.asked, lengths.new - 1)


def memory_bytes(shape: Architecture, model_bytes: int, lengths: Lengths) -> int:
    """The weights and the KV cache."""
    return model_bytes + (lengths.prefix + lengths.asked + lengths.new) * shape.cache_bytes_per_token


@dataclass(frozen=True)
class Asked:
    """What a call needs of the model, counted; mean over calls."""

    steps: float
    tokens: float  # processed, drafts included
    kept: float  # how many of these went through the head


def calls_per_s(
    shape: Architecture, machine: Machine, variant: str, model_bytes: int, asked: Asked, together: int
) -> dict[str, float]:
    """Limits by bandwidth (a step reads the weights once for `together` calls) and by arithmetic (each call its own).

    The lower of the two holds. Only the weights count: attention and the KV cache are left out.
    """
    operations = 2 * (shape.body_weights * asked.tokens + shape.head_weights * asked.kept)
    return {
        "bandwidth": together * machine.bandwidth_bytes_per_s / (asked.steps * model_bytes),
        "arithmetic": machine.weights_operations_per_s(variant) / operations,
    }


def product_operations_per_s(kind: str, threads: int) -> float:
    """Multiplications and additions; best of ten products of square matrices in ONNX Runtime. `kind`: float32, int8."""
    from onnx import helper, numpy_helper  # here, so that processes whose memory is measured do not import it

    operator, one, other, out = {
        "float32": ("MatMul", np.float32, np.float32, np.float32),
        "int8": ("MatMulInteger", np.uint8, np.int8, np.int32),
    }[kind]
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [SIDE, SIDE])
        for name, dtype in (("one", one), ("out", out))
    ]
    weight = numpy_helper.from_array(np.ones((SIDE, SIDE), other), "other")  # constant, as a model's: packed beforehand
    node = helper.make_node(operator, ["one", "other"], ["out"])
    graph = helper.make_graph([node], "product", [values[0]], [values[1]], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    square = {"one": np.ones((SIDE, SIDE), one)}
    times = []
    for _ in range(10):
        start = time.perf_counter()
        session.run(None, square)
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(times)
