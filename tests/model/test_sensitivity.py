"""One backward pass says of each product what a run with only its weights rounded says."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.model import base, scale_tuning, sensitivity, shared_prefix
from pipeline.model.gptq import gptq
from pipeline.toolcall.conversation import Request

NODES = [
    f"/model/layers.{layer}/{part}/MatMul"
    for layer in range(2)
    for part in ("attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
]


def test_it_is_what_rounding_each_product_alone_costs(tiny_base: Path, apples: list[Request]) -> None:
    model, tokenizer = base.load_tuned(tiny_base)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)  # as it is made, it says nearly the same of every token
    rounded = {}
    for at, node in enumerate(NODES):
        weight = torch.cat([module.weight.detach() for module in scale_tuning.modules_of(model, node)]).T.numpy()
        bits = 4 + at % 3  # so that they differ: of such a model no product matters more than another
        rounded[node] = gptq(weight, np.eye(len(weight)), bits, 32), bits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sensitivity.nats_lost(model, rounded, apples, tokenizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.keys() == set(NODES)

    examples = scale_tuning.examples_of(apples, tokenizer)
    steps = shared_prefix.steps(examples, 1500, random.Random(0))
    batches = [shared_prefix.pack([examples[at] for at in step]) for step in steps]
    exact = said(model, batches)
    measured = {}
    for node in NODES:
        modules = scale_tuning.modules_of(model, node)
        parts = torch.split(scale_tuning.values_of(*rounded[node]), [module.out_features for module in modules])
        kept = [module.weight.data for module in modules]
        for module, part in zip(modules, parts, strict=True):
            module.weight.data = part
        measured[node] = functional.kl_div(said(model, batches), exact, reduction="batchmean", log_target=True).item()
        for module, values in zip(modules, kept, strict=True):
            module.weight.data = values
    # What works on its own token to the end is foretold; what other tokens attend to, only roughly.
    for node in NODES[6:]:
        assert found[node] == pytest.approx(measured[node], rel=0.06)
    for node in NODES[:5]:
        assert 1 / 3 < found[node] / measured[node] < 1.5


def said(model: Any, batches: list[dict[str, Any]]) -> torch.Tensor:
    """Log-likelihoods (reply tokens, vocabulary)."""
    with torch.inference_mode():
        hidden = torch.cat([scale_tuning.foretelling(model, batch) for batch in batches])
        return functional.log_softmax(hidden @ model.get_input_embeddings().weight.T, -1)
