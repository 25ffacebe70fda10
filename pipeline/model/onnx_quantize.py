"""Quantization of the fused graph: all MatMuls, with the embedding and the head as one stored weight."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.quant_utils import QuantFormat

from pipeline.model import onnx_calibration, onnx_dynamic
from pipeline.model.gptq import HEAD_BLOCK, Rounded, gptq
from pipeline.model.onnx_merge import merge_gate_up

Rows = Sequence[tuple[list[int], int]]  # texts to calibrate on, as onnx_calibration.activations takes them
EMBEDDING = "embedding.weight"


AllRounded = Mapping[str, tuple[Rounded, int]]  # node name -> its rounded weight, and the bits
NatsLost = Callable[[AllRounded], dict[str, float]]
Tune = Callable[[AllRounded], dict[str, NDArray[np.float32]]]


@dataclass(frozen=True)
class Product:
    """A matrix product that was compared with others to decide which of them keep the finer form."""

    name: str  # layers.3.mlp.down_proj
    # gptq: nats per reply token that 4 bits cost, per million weights; dynamic: unevenness of its inputs
    sensitivity: float
    finer: bool  # gptq: it keeps 8 bits; dynamic: its inputs stay floats


def quantize(
    source: Path, out: Path, cfg: Any, rows: Rows, nats_lost: NatsLost | None = None, tune: Tune | None = None
) -> tuple[Counter[str], list[Product]]:
    """Write the graph at `source` with its weights in `cfg.bits` to `out`.

    Returns the number of weights by bits, and the products that were compared, the most sensitive first.

    `cfg` is a VariantConfig of the stage. `nats_lost` gives the cost of rounding each product, and is needed if some
    are to keep 8 bits; `tune` gives better scales for the weights that GPTQ rounded. Source of the operators:
    onnxruntime, docs/ContribOperators.md, MatMulNBits, DynamicQuantizeMatMul and GatherBlockQuantized.

    Raises RuntimeError if nothing was quantized, or if the embedding is not the head's weight.
    """
    model = onnx.load(source)
    compared: list[Product] = []
    if cfg.dynamic or cfg.algorithm == "gptq":
        seen = onnx_calibration.activations(source, rows, gram=cfg.algorithm == "gptq")
        if cfg.dynamic:
            compared = _make_dynamic(model, seen, cfg)
        if cfg.algorithm == "gptq":
            compared = _round_by_gptq(model, seen, cfg, nats_lost, tune)
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
    _share_embedding(quantized)
    merge_gate_up(quantized)
    _halve_scales(quantized.graph)
    _drop_unused(quantized.graph)
    counts = weights_by_bits(quantized)
    if not counts[str(cfg.bits)] + counts["8 dynamic"]:
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
    _add_embedding(out)
    return counts, compared


def _make_dynamic(model: onnx.ModelProto, seen: onnx_calibration.Activations, cfg: Any) -> list[Product]:
    """Make all MatMuls dynamic except the head and the `cfg.float_inputs` with the most uneven inputs."""
    after = onnx_dynamic.smooth(model, seen.largest, cfg.smoothing)
    body = [node for node in model.graph.node if node.op_type == "MatMul" and node.output[0] != "logits"]
    compared = _most_sensitive_first(
        {node.name: onnx_dynamic.unevenness(after[node.input[0]]) for node in body}, cfg.float_inputs
    )
    finer = {product.name for product in compared if product.finer}
    onnx_dynamic.to_dynamic(model, {node.name for node in body if _short(node.name) not in finer})
    return compared


def _most_sensitive_first(sensitivity: Mapping[str, float], finer: int) -> list[Product]:
    order = sorted(sensitivity, key=lambda name: sensitivity[name], reverse=True)
    return [Product(_short(name), sensitivity[name], at < finer) for at, name in enumerate(order)]


def _short(name: str) -> str:
    return name.removeprefix("/model/").removesuffix("/MatMul").replace("/", ".")


def _round_by_gptq(
    model: onnx.ModelProto,
    seen: onnx_calibration.Activations,
    cfg: Any,
    nats_lost: NatsLost | None,
    tune: Tune | None,
) -> list[Product]:
    """Round the `cfg.eight_bit_products` that lose most to 8 bits, the rest, always with the head, to `cfg.bits`."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node if node.op_type == "MatMul"}

    def rounded(node: onnx.NodeProto, bits: int) -> tuple[Rounded, int]:
        block_size = min(cfg.block_size, HEAD_BLOCK) if node.output[0] == "logits" else cfg.block_size
        weight = numpy_helper.to_array(tensors[node.input[1]])
        return gptq(weight, seen.gram[node.input[0]], bits, block_size), bits

    made = {name: rounded(node, cfg.bits) for name, node in nodes.items()}
    compared = []
    if cfg.eight_bit_products:
        if nats_lost is None:
            raise ValueError(f"eight_bit_products is {cfg.eight_bit_products}, but nothing says which lose most")
        lost = nats_lost(made)
        millions = {name: made[name][0].codes.size / 1e6 for name in lost}
        compared = _most_sensitive_first({name: lost[name] / millions[name] for name in lost}, cfg.eight_bit_products)
    finer = {product.name for product in compared if product.finer}
    made |= {name: rounded(node, 8) for name, node in nodes.items() if _short(name) in finer}
    for name, scales in (tune(made) if tune else {}).items():
        made[name] = replace(made[name][0], scales=scales), made[name][1]
    for name, node in nodes.items():
        kind = helper.tensor_dtype_to_np_dtype(tensors[node.input[1]].data_type)
        model.graph.initializer.extend(_pack(node, *made[name], kind, cfg.accuracy_level))
    return compared


def _pack(node: onnx.NodeProto, rounded: Rounded, bits: int, kind: Any, accuracy_level: int) -> list[onnx.TensorProto]:
    """Make `node` a MatMulNBits; returns its two new tensors. `kind`: the scales' dtype, equal to the activations'."""
    inputs, outputs = rounded.codes.shape
    blocks = len(rounded.scales)
    codes = rounded.codes.T.reshape(outputs, blocks, inputs // blocks)
    packed = codes[:, :, ::2] | (codes[:, :, 1::2] << 4) if bits == 4 else codes
    weight, scale = f"{node.input[1]}_Q{bits}", f"{node.input[1]}_scales"
    made = helper.make_node(
        "MatMulNBits",
        [node.input[0], weight, scale],
        list(node.output),
        name=node.name,
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=inputs // blocks,
        accuracy_level=accuracy_level,
    )
    node.CopyFrom(made)
    return [
        numpy_helper.from_array(np.ascontiguousarray(packed), weight),
        numpy_helper.from_array(np.ascontiguousarray(rounded.scales.T.astype(kind)).reshape(-1), scale),
    ]


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


def _share_embedding(model: onnx.ModelProto) -> None:
    """Look the embedding up in the head's quantized weight, instead of storing it again in float."""
    graph = model.graph
    head = next((node for node in graph.node if node.output[0] == "logits"), None)
    embed = next((node for node in graph.node if node.op_type == "Gather" and "embed_tokens" in node.name), None)
    transpose = next((node for node in graph.node if embed and node.output[0] == embed.input[0]), None)
    if head is None or head.op_type != "MatMulNBits" or embed is None or transpose is None:
        raise RuntimeError("the graph's embedding is not its head's weight: it cannot be stored once")
    attributes = {attribute.name: attribute.i for attribute in head.attribute}
    vocabulary, hidden = attributes["N"], attributes["K"]
    bits, block_size = attributes["bits"], attributes["block_size"]
    blocks = math.ceil(hidden / block_size)
    scales = next(tensor for tensor in graph.initializer if tensor.name == head.input[2])
    if hidden % block_size and scales.data_type == TensorProto.FLOAT16:
        raise ValueError(
            f"block_size {block_size} does not divide the {hidden} channels of the embedding: CUDA would gather it "
            "wrongly (onnxruntime#32663)"
        )
    _reshape_initializer(scales, [vocabulary, blocks])
    inputs = [EMBEDDING, embed.input[1], head.input[2]]
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
        bits=bits,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    at = list(graph.node).index(embed)
    graph.node.remove(embed)
    graph.node.insert(at, gather)
    graph.node.remove(transpose)


def _add_embedding(path: Path) -> None:
    """Give the head's weight in the file beside the graph a second name and the shape (vocabulary, bytes).

    ONNX Runtime then reads only the rows that are looked up; a Reshape in the graph would copy the whole weight.
    """
    model = onnx.load(path, load_external_data=False)
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    weight = onnx.TensorProto()
    weight.CopyFrom(next(tensor for tensor in model.graph.initializer if tensor.name == head.input[1]))
    weight.name = EMBEDDING
    weight.dims[:] = [weight.dims[0], math.prod(weight.dims[1:])]
    model.graph.initializer.append(weight)
    onnx.save(model, path)


def _halve_scales(graph: onnx.GraphProto) -> None:
    """Store the blocks' scales in float16, as GGUF does; ONNX Runtime casts them to float32 when it loads the graph."""
    of_blocks = {node.input[2] for node in graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")}
    for scale in [t for t in graph.initializer if t.name in of_blocks and t.data_type == TensorProto.FLOAT]:
        name, stored = scale.name, f"{scale.name}_fp16"
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale).astype(np.float16), stored))
        graph.node.insert(0, helper.make_node("Cast", [stored], [name], name=f"{name}/Cast", to=TensorProto.FLOAT))


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _reshape_initializer(tensor: onnx.TensorProto, shape: list[int]) -> None:
    values = numpy_helper.to_array(tensor).reshape(shape)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def weights_by_bits(model: onnx.ModelProto) -> Counter[str]:
    """How many weights the graph has in each form: "4", "8", "8 dynamic", and "32" or "16" if not quantized."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    half = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gather"):
            for name in node.input:
                counts["16" if name in half else "32"] += sizes.get(name, 0)
        elif node.op_type == "DynamicQuantizeMatMul":
            counts["8 dynamic"] += sizes[node.input[1]]
        elif node.op_type == "MatMulNBits":
            found = {attribute.name: attribute.i for attribute in node.attribute}
            counts[str(found.get("bits", 4))] += found["K"] * found["N"]
    return counts
