"""Statistics of the inputs of each matrix product of a graph, over some prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from pipeline.model.agreement import feed

Values = NDArray[np.float32]


@dataclass
class Activations:
    largest: dict[str, Values]  # tensor name -> (channels,), largest absolute values
    gram: dict[str, NDArray[np.float64]]  # tensor name -> (channels, channels), X transposed times X


def activations(source: Path, rows: Sequence[tuple[list[int], int]], gram: bool) -> Activations:
    """Statistics of the inputs of all MatMuls of the graph at `source`.

    `rows`: tokens, and how many of the first of them (0, or a shared prefix) not to count. Such a prefix is computed
    once for all rows that have it.
    """
    model = onnx.load(source, load_external_data=False)
    names = sorted({node.input[0] for node in model.graph.node if node.op_type == "MatMul"})
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    watched = source.with_name("watched.onnx")  # beside the weights, which it refers to
    onnx.save(model, watched)
    try:
        session = onnxruntime.InferenceSession(str(watched), providers=["CPUExecutionProvider"])
    finally:
        watched.unlink()
    pasts = [found.name for found in session.get_inputs() if found.name.startswith("past_key_values")]
    kept: dict[tuple[int, ...], dict[str, Any]] = {}
    found = Activations({}, {})
    for row, start in rows:
        prefix = tuple(row[:start])
        if start and prefix not in kept:
            presents = [name.replace("past_key_values", "present") for name in pasts]
            kept[prefix] = dict(zip(pasts, session.run(presents, feed(session, row[:start])), strict=True))
        for name, value in zip(names, session.run(names, feed(session, row[start:], kept.get(prefix))), strict=True):
            seen = value.reshape(-1, value.shape[-1])
            largest = np.abs(seen).max(0)
            found.largest[name] = np.maximum(found.largest.get(name, largest), largest)
            if gram:
                single = seen.astype(np.float32)  # enough for one text; the sum over all is in float64
                found.gram[name] = found.gram.get(name, 0.0) + (single.T @ single).astype(np.float64)
    return found
