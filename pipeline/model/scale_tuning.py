"""Tuning of the scales of rounded weights on training requests, so that the model predicts what it did before.

The codes stay fixed. Each block's scale learns a factor that lowers the KL divergence, on reply tokens, of the rounded
model from the model in full precision (after EfficientQAT's second phase, arXiv:2407.11062).
"""

import logging
import math
import random
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.nn.utils import parametrize
from tqdm import tqdm

from pipeline.model import shared_prefix
from pipeline.model.gptq import Rounded, decode
from pipeline.toolcall import prompt
from pipeline.toolcall.conversation import Request

log = logging.getLogger(__name__)

LEARNING_RATE = 2e-3  # for factors that begin at 1
TOKENS = 1500  # per step
REQUESTS = 30  # to read per step: more than fit in one


class Factors(torch.nn.Module):
    """A weight (outputs, inputs) as a function of its blocks' factors (outputs, blocks), stored minus 1."""

    def __init__(self, values: torch.Tensor, blocks: int) -> None:
        super().__init__()
        self.register_buffer("values", values.view(len(values), blocks, -1))

    def forward(self, factors: torch.Tensor) -> torch.Tensor:
        values: Any = self.values
        return (values * (1 + factors)[:, :, None].to(values.dtype)).flatten(1)


def tune(
    model: Any, rounded: Mapping[str, tuple[Rounded, int]], requests: Sequence[Request], tokenizer: Any, steps: int
) -> dict[str, NDArray[np.float32]]:
    """Scales (blocks, outputs) of all in `rounded` but the head, after `steps` steps, which repeat requests if need be.

    `rounded`: node name in the fused graph -> rounded weight and bits. `model`: the fine-tuned model; unusable after.
    """
    torch.manual_seed(0)
    model.set_attn_implementation(shared_prefix.ATTENTION)
    model.requires_grad_(False)
    examples = examples_of(requests, tokenizer)
    rows = shared_prefix.steps(examples, TOKENS, random.Random(0))
    batches = [shared_prefix.pack([examples[at] for at in row]) for row in rows][:steps]
    vocabulary, head = shared_prefix.short_head(model, examples)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        wanted = [functional.log_softmax((foretelling(model, batch) @ head.T).float(), -1) for batch in batches]
    _round_embedding(model, *rounded[HEAD])
    head = model.get_input_embeddings().weight.detach()[vocabulary]
    factors = {name: _make_tunable(model, name, *found) for name, found in rounded.items() if name != HEAD}
    optimizer = torch.optim.Adam([factor for found in factors.values() for factor in found], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    losses = []
    pairs = islice(cycle(zip(batches, wanted, strict=True)), steps)
    for batch, aim in tqdm(pairs, desc="tuning scales", total=steps, mininterval=5):
        with torch.autocast("cpu", torch.bfloat16):
            said = functional.log_softmax((foretelling(model, batch) @ head.T).float(), -1)
        loss = functional.kl_div(said, aim.clone(), reduction="batchmean", log_target=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tenth = math.ceil(len(losses) / 10)
    log.info("divergence %.4f in the first tenth, %.4f in the last", np.mean(losses[:tenth]), np.mean(losses[-tenth:]))
    return {
        name: rounded[name][0].scales * (1 + torch.cat(found).detach().numpy().T) for name, found in factors.items()
    }


HEAD = "/lm_head/MatMul"


def examples_of(requests: Sequence[Request], tokenizer: Any) -> list[shared_prefix.Example]:
    examples = []
    for request in requests:
        prefix = prompt.prefix_tokens(tokenizer, request.tools)
        asked = prompt.request_tokens(tokenizer, request.messages, request.tools)
        reply = prompt.reply_tokens(tokenizer, request)
        tokens = [*prefix, *asked, *reply]
        told = shared_prefix.Reply(len(tokens) - len(reply), len(tokens))
        examples.append(shared_prefix.Example(tokens, len(prefix), [told]))
    return examples


def foretelling(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Hidden states (reply tokens, hidden) from which the reply tokens are predicted."""
    return model.get_decoder()(
        input_ids=batch["tokens"], position_ids=batch["positions"], lengths=batch["lengths"], use_cache=False
    ).last_hidden_state[0, batch["predicting"]]


def values_of(rounded: Rounded, bits: int) -> torch.Tensor:
    """The weight (outputs, inputs) of the rounded model."""
    block = len(rounded.codes) // len(rounded.scales)
    return torch.from_numpy(decode(rounded.codes, rounded.scales.repeat(block, 0), bits).T.copy())


def modules_of(model: Any, node: str) -> list[Any]:
    """The linear layers that make up the fused graph's `node`, such as `/model/layers.7/attn/qkv_proj/MatMul`."""
    layer, part, name = node.removeprefix("/model/layers.").split("/")[:3]
    block = model.get_decoder().layers[int(layer)]
    names = ["q_proj", "k_proj", "v_proj"] if name == "qkv_proj" else [name]
    return [getattr(block.self_attn if part == "attn" else block.mlp, each) for each in names]


def _round_embedding(model: Any, rounded: Rounded, bits: int) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(values_of(rounded, bits))


def _make_tunable(model: Any, node: str, rounded: Rounded, bits: int) -> list[torch.Tensor]:
    """Replace the weights of the linear layers in the graph's `node` by Factors; returns their parameters."""
    modules = modules_of(model, node)
    parts = values_of(rounded, bits).to(torch.bfloat16).split([module.out_features for module in modules])
    factors = []
    for module, values in zip(modules, parts, strict=True):
        module.weight = torch.nn.Parameter(torch.zeros(len(values), len(rounded.scales)))
        made = Factors(values.contiguous(), len(rounded.scales))
        parametrize.register_parametrization(module, "weight", made, unsafe=True)
        factors.append(module.parametrizations.weight.original)
    return factors
