"""Estimate of how much rounding each matrix product changes the replies, without a run per product.

To second order, the KL divergence that a change of the weights causes is half the expected square of the change in the
log-likelihood of replies sampled from the model (Fisher information). Here the squares are taken token by token, as if
tokens were independent. On the default model the products' order agrees with that of the divergences measured one by
one (docs/experiments.md).
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from pipeline.model import scale_tuning, shared_prefix
from pipeline.model.gptq import Rounded
from pipeline.toolcall.conversation import Request

TOKENS = 1500  # per step


def nats_lost(
    model: Any, rounded: Mapping[str, tuple[Rounded, int]], requests: Sequence[Request], tokenizer: Any
) -> dict[str, float]:
    """KL divergence, in nats per reply token, if only this product were rounded; for each but the head.

    `rounded`: node name in the fused graph -> rounded weight and bits. `model`: the fine-tuned model; its weights stay,
    its attention is replaced and its gradients are switched off.
    """
    torch.manual_seed(0)
    model.set_attn_implementation(shared_prefix.ATTENTION)
    model.requires_grad_(False)
    changes = {name: _changes(model, name, *found) for name, found in rounded.items() if name != scale_tuning.HEAD}
    examples = scale_tuning.examples_of(requests, tokenizer)
    steps = shared_prefix.steps(examples, TOKENS, random.Random(0))
    embedding = model.get_input_embeddings()
    inputs: dict[Any, torch.Tensor] = {}
    gradients: dict[Any, torch.Tensor] = {}

    def watch(module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs[module] = given[0].detach()[0]
        output.register_hook(lambda gradient: gradients.__setitem__(module, gradient[0]))

    hooks = [module.register_forward_hook(watch) for parts in changes.values() for module, _ in parts]
    hooks.append(embedding.register_forward_hook(lambda *found: found[-1].requires_grad_()))
    lost, tokens = dict.fromkeys(changes, 0.0), 0
    for step in steps:
        batch = shared_prefix.pack([examples[at] for at in step])
        logits = scale_tuning.foretelling(model, batch) @ embedding.weight.T
        likelihood = functional.log_softmax(logits, -1)
        drawn = torch.multinomial(likelihood.detach().exp(), 1)
        likelihood.gather(1, drawn).sum().backward()
        for name, parts in changes.items():
            change = torch.stack([(gradients[at] * functional.linear(inputs[at], by)).sum(-1) for at, by in parts])
            lost[name] += float((change.sum(0) ** 2).sum()) / 2
        tokens += len(batch["predicting"])
    for hook in hooks:
        hook.remove()
    return {name: value / tokens for name, value in lost.items()}


def _changes(model: Any, node: str, rounded: Rounded, bits: int) -> list[tuple[Any, torch.Tensor]]:
    """The linear layers that make up the graph's `node`, and what rounding adds to the weight of each."""
    modules = scale_tuning.modules_of(model, node)
    parts = scale_tuning.values_of(rounded, bits).split([module.out_features for module in modules])
    return [(module, part - module.weight.detach()) for module, part in zip(modules, parts, strict=True)]
