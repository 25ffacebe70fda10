"""Weight-only quantization of the fused graph: all MatMuls, and the embedding, stored once."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.quant_utils import QuantFormat


def quantize(source: Path, out: Path, cfg: Any) -> Counter[int]:
    """Write the graph at `source` with its weights in `cfg.bits` to `out`; counts weights by bits.

    `cfg` has bits, algorithm, block_size, symmetric and accuracy_level. Source of the operators: onnxruntime,
    docs/ContribOperators.md, MatMulNBits and GatherBlockQuantized.

    Raises RuntimeError where nothing was quantized, or where the embedding is not the head's weight.
    """
    model = onnx.load(source)
    quantizer = nbits.MatMulNBitsQuantizer(
        model,
        bits=cfg.bits,
        block_size=cfg.block_size,
        is_symmetric=cfg.symmetric,
        accuracy_level=cfg.accuracy_level,
        algo_config=_algorithm(cfg),
    )
    quantizer.process()
    quantized = quantizer.model.model
    _share_embedding(quantized, cfg)
    counts = weights_by_bits(quantized)
    if not counts[cfg.bits]:
        raise RuntimeError(f"nothing was quantized to {cfg.bits} bits; weights by bits: {dict(counts)}")
    onnx.save(
        quantized,
        out,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=f"{out.name}.data",
        size_threshold=1024,
        convert_attribute=False,
    )
    return counts


def _algorithm(cfg: Any) -> Any:
    if cfg.algorithm == "k_quant":
        return nbits.KQuantWeightOnlyQuantConfig()
    return nbits.DefaultWeightOnlyQuantConfig(
        block_size=cfg.block_size,
        is_symmetric=cfg.symmetric,
        accuracy_level=cfg.accuracy_level,
        quant_format=QuantFormat.QOperator,
        bits=cfg.bits,
    )


def _share_embedding(model: onnx.ModelProto, cfg: Any) -> None:
    """Gather the embedding from the head's quantized weight, instead of keeping it in float beside it."""
    graph = model.graph
    head = next((node for node in graph.node if node.output[0] == "logits"), None)
    embed = next((node for node in graph.node if node.op_type == "Gather" and "embed_tokens" in node.name), None)
    transpose = next((node for node in graph.node if embed and node.output[0] == embed.input[0]), None)
    if head is None or head.op_type != "MatMulNBits" or embed is None or transpose is None:
        raise RuntimeError("the graph's embedding is not its head's weight: it cannot be stored once")
    attributes = {attribute.name: attribute.i for attribute in head.attribute}
    vocabulary, hidden = attributes["N"], attributes["K"]
    blocks = math.ceil(hidden / cfg.block_size)
    shape = helper.make_tensor(
        "embedding.shape", TensorProto.INT64, [2], [vocabulary, blocks * cfg.block_size * cfg.bits // 8]
    )
    scales = next(tensor for tensor in graph.initializer if tensor.name == head.input[2])
    _reshape_initializer(scales, [vocabulary, blocks])
    inputs = ["embedding.weight", embed.input[1], head.input[2]]
    if len(head.input) > 3 and head.input[3]:
        points = next(tensor for tensor in graph.initializer if tensor.name == head.input[3])
        _reshape_initializer(points, [vocabulary, -1])
        inputs.append(head.input[3])
    gather = helper.make_node(
        "GatherBlockQuantized",
        inputs,
        list(embed.output),
        name=embed.name,
        domain="com.microsoft",
        bits=cfg.bits,
        block_size=cfg.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    weight = helper.make_node("Reshape", [head.input[1], shape.name], ["embedding.weight"], name="embedding")
    graph.initializer.append(shape)
    at = list(graph.node).index(embed)
    graph.node.remove(embed)
    graph.node.insert(at, gather)
    graph.node.insert(at, weight)
    graph.node.remove(transpose)
    left = next((tensor for tensor in graph.initializer if tensor.name == transpose.input[0]), None)
    if left is not None:
        graph.initializer.remove(left)


def _reshape_initializer(tensor: onnx.TensorProto, shape: list[int]) -> None:
    values = numpy_helper.to_array(tensor).reshape(shape)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def weights_by_bits(model: onnx.ModelProto) -> Counter[int]:
    """How many weights the graph's matrix products keep in each number of bits (32 for a plain MatMul)."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    counts: Counter[int] = Counter()
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gather"):
            counts[32] += sum(sizes.get(name, 0) for name in node.input)
        elif node.op_type == "MatMulNBits":
            found = {attribute.name: attribute.i for attribute in node.attribute}
            counts[found.get("bits", 4)] += found["K"] * found["N"]
    return counts
