"""Rounded weights, tuned on training requests so that the model says what it said before.

Scales learn a factor each, and codes to go up or down, by the divergence of what the rounded model foretells
of the replies from what the model in full precision does (quantization-aware training with straight-through
gradients, after EfficientQAT, arXiv:2407.11062). A code has to be pushed half a step before it changes, which takes
gradients that agree: what is noise stays as GPTQ left it.
"""

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
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

FACTOR_RATE = 2e-3  # learning rate of factors that begin at 1
CODE_RATE = 2e-2  # of codes, in steps from one to the next
TOKENS = 1500  # of a step
REQUESTS = 30  # more than a step has


class Weight(torch.nn.Module):
    """A weight (outputs, inputs) from pushes to its codes (outputs, inputs), which begin at 0."""

    def __init__(self, rounded: Rounded, bits: int, outputs: slice) -> None:
        super().__init__()
        self._lowest, self._highest = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
        codes, scales = (torch.from_numpy(part[:, outputs].T.copy()) for part in (rounded.codes, rounded.scales))
        self.register_buffer("codes", codes.float() + self._lowest)
        self.register_buffer("scales", scales)
        self.factors = torch.nn.Parameter(torch.zeros_like(scales))  # (outputs, blocks), of 1 + that

    def forward(self, pushes: torch.Tensor) -> torch.Tensor:
        codes: Any = pushes + (self.rounded(pushes) - pushes).detach()  # rounded, and as if it were not in the gradient
        return (codes.unflatten(1, (self.factors.shape[1], -1)) * self.tuned_scales()[:, :, None]).flatten(1)

    def rounded(self, pushes: torch.Tensor) -> torch.Tensor:
        codes: Any = self.codes
        return (codes + pushes).round_().clamp_(self._lowest, self._highest)

    def tuned_scales(self) -> torch.Tensor:
        scales: Any = self.scales
        return scales * (1 + self.factors)

    def found(self, pushes: torch.Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Codes (inputs, outputs) and scales (blocks, outputs), as in Rounded."""
        codes = (self.rounded(pushes) - self._lowest).to(torch.uint8)
        return codes.numpy().T, self.tuned_scales().numpy().T


def tune(
    model: Any, rounded: Mapping[str, tuple[Rounded, int]], requests: Sequence[Request], tokenizer: Any, steps: int
) -> dict[str, Rounded]:
    """What `rounded` is after `steps`, which go round where requests are few; the head stays and is left out.

    `rounded`: by the name of its node in the fused graph, with its bits. `model`: the tuned one, which is taken apart.
    """
    torch.manual_seed(0)
    model.set_attn_implementation(shared_prefix.ATTENTION)
    model.requires_grad_(False)
    examples = _examples(requests, tokenizer)
    rows = shared_prefix.steps(examples, TOKENS, random.Random(0))
    batches = [shared_prefix.pack([examples[at] for at in row]) for row in rows][:steps]
    vocabulary, head = shared_prefix.short_head(model, examples)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        wanted = [functional.log_softmax((_hidden(model, batch) @ head.T).float(), -1) for batch in batches]
    _round_embedding(model, *rounded[HEAD])
    head = model.get_input_embeddings().weight.detach()[vocabulary]
    tuned = {name: _make_tunable(model, name, *found) for name, found in rounded.items() if name != HEAD}
    weights = [weight for found in tuned.values() for weight in found]
    groups = [
        {"params": [weight[0].factors for weight in weights], "lr": FACTOR_RATE},
        {"params": [weight.original for weight in weights], "lr": CODE_RATE},
    ]
    optimizer = torch.optim.Adam(groups, fused=True)
    rates = [FACTOR_RATE, CODE_RATE]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    losses = []
    pairs = islice(cycle(zip(batches, wanted, strict=True)), steps)
    for batch, aim in tqdm(pairs, desc="tuning what was rounded", total=steps, mininterval=5):
        with torch.autocast("cpu", torch.bfloat16):
            said = functional.log_softmax((_hidden(model, batch) @ head.T).float(), -1)
        loss = functional.kl_div(said, aim.clone(), reduction="batchmean", log_target=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tenth = math.ceil(len(losses) / 10)
    log.info("divergence %.4f in the first tenth, %.4f in the last", np.mean(losses[:tenth]), np.mean(losses[-tenth:]))
    return {name: _tuned(rounded[name][0], found) for name, found in tuned.items()}


HEAD = "/lm_head/MatMul"


def _examples(requests: Sequence[Request], tokenizer: Any) -> list[shared_prefix.Example]:
    examples = []
    for request in requests:
        prefix = prompt.prefix_tokens(tokenizer, request.tools)
        asked = prompt.request_tokens(tokenizer, request.messages, request.tools)
        reply = prompt.reply_tokens(tokenizer, request)
        examples.append(shared_prefix.Example([*prefix, *asked, *reply], len(prefix) + len(asked), len(prefix)))
    return examples


def _hidden(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """(reply tokens, hidden) where they are foretold."""
    return model.get_decoder()(
        input_ids=batch["tokens"], position_ids=batch["positions"], lengths=batch["lengths"], use_cache=False
    ).last_hidden_state[0, batch["predicting"]]


def _values(rounded: Rounded, bits: int) -> torch.Tensor:
    """(outputs, inputs), as the rounded model has them."""
    block = len(rounded.codes) // len(rounded.scales)
    return torch.from_numpy(decode(rounded.codes, rounded.scales.repeat(block, 0), bits).T.copy())


def _round_embedding(model: Any, rounded: Rounded, bits: int) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(_values(rounded, bits))


def _make_tunable(model: Any, node: str, rounded: Rounded, bits: int) -> list[Any]:
    """The weights of the linear layers that are the graph's `node`, such as `/model/layers.7/attn/qkv_proj/MatMul`."""
    layer, part, name = node.removeprefix("/model/layers.").split("/")[:3]
    block = model.get_decoder().layers[int(layer)]
    names = ["q_proj", "k_proj", "v_proj"] if name == "qkv_proj" else [name]
    modules = [getattr(block.self_attn if part == "attn" else block.mlp, each) for each in names]
    weights: list[Any] = []
    first = 0
    for module in modules:
        outputs = slice(first, first + module.out_features)
        first = outputs.stop
        module.weight = torch.nn.Parameter(torch.zeros(module.out_features, module.in_features))
        parametrize.register_parametrization(module, "weight", Weight(rounded, bits, outputs), unsafe=True)
        weights.append(module.parametrizations.weight)
    return weights


@torch.no_grad()
def _tuned(rounded: Rounded, weights: Sequence[Any]) -> Rounded:
    codes, scales = zip(*(weight[0].found(weight.original) for weight in weights), strict=True)
    return replace(rounded, codes=np.concatenate(codes, 1), scales=np.concatenate(scales, 1))
