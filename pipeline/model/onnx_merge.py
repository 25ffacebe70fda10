"""Fewer operators per step: gate_proj and up_proj have the same input, so one product can compute both."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

# The axis of the outputs in each input but the first of these operators (onnxruntime, docs/ContribOperators.md).
OUTPUT_AXES = {"DynamicQuantizeMatMul": (1, 0), "MatMulNBits": (0, 0, 0)}


def merge_gate_up(model: onnx.ModelProto) -> int:
    """Merge the pairs with the same operator and form; returns their number. The graph computes the same as before."""
    graph = model.graph
    by_name = {node.name: node for node in graph.node}
    pairs = [
        (node, by_name[name])
        for node in graph.node
        if (name := node.name.replace("/gate_proj/", "/up_proj/")) != node.name and name in by_name
    ]
    merged = 0
    for gate, up in pairs:
        if _form(gate) == _form(up) and gate.op_type in OUTPUT_AXES and gate.input[0] == up.input[0]:
            _merge(graph, gate, up)
            merged += 1
    return merged


def _form(node: onnx.NodeProto) -> tuple[str, int, dict[str, int]]:
    return node.op_type, len(node.input), {attribute.name: attribute.i for attribute in node.attribute}


def _merge(graph: onnx.GraphProto, gate: onnx.NodeProto, up: onnx.NodeProto) -> None:
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    names, outputs = [], 0
    for one, other, axis in zip(gate.input[1:], up.input[1:], OUTPUT_AXES[gate.op_type], strict=False):
        parts = [numpy_helper.to_array(tensors[name]) for name in (one, other)]
        names.append(one.replace("gate_proj", "gate_up_proj"))
        graph.initializer.append(numpy_helper.from_array(np.concatenate(parts, axis), names[-1]))
        outputs = outputs or parts[0].shape[axis]
    name, output = gate.name.replace("gate_proj", "gate_up_proj"), gate.output[0].replace("gate_proj", "gate_up_proj")
    made = helper.make_node(gate.op_type, [gate.input[0], *names], [output], name=name, domain=gate.domain)
    for attribute in gate.attribute:
        made.attribute.append(attribute)
        if attribute.name == "N":
            made.attribute[-1].i = 2 * outputs
    sizes = f"{name}.sizes"
    graph.initializer.append(numpy_helper.from_array(np.array([outputs, outputs], np.int64), sizes))
    split = helper.make_node("Split", [output, sizes], [gate.output[0], up.output[0]], name=f"{name}/Split", axis=-1)
    _replace(graph, (gate, up), (made, split))


def _replace(graph: onnx.GraphProto, old: Sequence[onnx.NodeProto], new: Sequence[onnx.NodeProto]) -> None:
    at = list(graph.node).index(old[0])
    for node in old:
        graph.node.remove(node)
    for offset, node in enumerate(new):
        graph.node.insert(at + offset, node)
