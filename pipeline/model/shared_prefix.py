"""Training on many short requests after a long shared prefix, which is computed once.

The tools' prefix is most of each example. A step is one row of tokens without padding: a prefix, its requests with
their replies, the next prefix, its requests, and so on. Each request attends to its own tokens and to its prefix.
Gradients flow through the prefix, so loss and gradients equal those of a plain batch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.func import functional_call
from torch.nn import functional
from transformers import AttentionInterface

ATTENTION = "shared_prefix"  # name for the model's set_attn_implementation
CLUSTER = 12  # requests of one prefix that stay together: few prefixes per step, but still a mixture


@dataclass(frozen=True)
class Reply:
    start: int
    end: int
    weight: float = 1.0  # of its tokens in the loss
    first_weight: float = 1.0  # of its first token, which decides between call and text


@dataclass(frozen=True)
class Example:
    tokens: list[int]
    prefix: int  # how many of the tokens are the tools' prefix
    replies: list[Reply]  # the parts of the tokens to learn, in order


def steps(examples: Sequence[Example], tokens: int, rng: random.Random) -> list[list[int]]:
    """Indices of `examples` in random steps of at most `tokens`, prefixes included; a longer one is its own step."""
    clusters = [
        members[at : at + CLUSTER]
        for members in _by_prefix(rng.sample(range(len(examples)), len(examples)), examples).values()
        for at in range(0, len(members), CLUSTER)
    ]
    rng.shuffle(clusters)
    found: list[list[int]] = [[]]
    used, prefixes = 0, set[tuple[int, ...]]()
    for at in (at for cluster in clusters for at in cluster):
        example = examples[at]
        prefix = tuple(example.tokens[: example.prefix])
        cost = len(example.tokens) - (len(prefix) if prefix in prefixes else 0)
        if found[-1] and used + cost > tokens:
            found.append([])
            used, prefixes, cost = 0, set(), len(example.tokens)
        found[-1].append(at)
        prefixes.add(prefix)
        used += cost
    return found


def _by_prefix(order: Sequence[int], examples: Sequence[Example]) -> dict[tuple[int, ...], list[int]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for at in order:
        found.setdefault(tuple(examples[at].tokens[: examples[at].prefix]), []).append(at)
    return found


def pack(step: Sequence[Example], count: int = 1, index: int = 0) -> dict[str, Any]:
    """The input of `loss` for a step, or for process `index`'s share of it out of `count`.

    tokens, positions: (1, n). lengths: of each prefix, then of its requests. predicting, labels, weights: (reply
    tokens,); `predicting` are the positions that predict the labels. reply_tokens: the whole step's, over `count`.
    """
    reply_tokens = sum(reply.end - reply.start for example in step for reply in example.replies) / count
    # gradients are averaged over all processes, so one without a share takes part with zero weights
    share = step[index::count]
    scale = float(bool(share))
    step = share or step[:1]
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[list[int]] = []
    predicting: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for prefix, members in _by_prefix(range(len(step)), step).items():
        tokens += prefix
        positions += range(len(prefix))
        lengths.append([len(prefix)])
        for example in (step[at] for at in members):
            own = example.tokens[example.prefix :]
            before = len(tokens) - example.prefix  # add to a position in the example to get the one in the row
            lengths[-1].append(len(own))
            tokens += own
            positions += range(example.prefix, len(example.tokens))
            for reply in example.replies:
                predicting += range(before + reply.start - 1, before + reply.end - 1)
                labels += example.tokens[reply.start : reply.end]
                weights += [scale * reply.first_weight, *[scale * reply.weight] * (reply.end - reply.start - 1)]
    return {
        "tokens": torch.tensor([tokens]),
        "positions": torch.tensor([positions]),
        "lengths": lengths,
        "predicting": torch.tensor(predicting),
        "labels": torch.tensor(labels),
        "weights": torch.tensor(weights),
        "reply_tokens": reply_tokens,
    }


def short_head(model: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct tokens in `examples`, (tokens,), and the head's rows for them, (tokens, hidden)."""
    weight = model.get_output_embeddings().weight.detach()
    tokens = torch.tensor(sorted({token for example in examples for token in example.tokens}), device=weight.device)
    return tokens, weight[tokens]


def loss(
    model: Any,
    batch: dict[str, Any],
    head: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Weighted negative log-likelihood of the reply tokens in nats, divided by their number.

    `model` is a transformers causal LM whose attention is ATTENTION. The sum is not divided by the weights' sum: each
    text would then count more in a step with many texts. With a `short_head` the likelihood is over its tokens only:
    the whole vocabulary takes an eighth of a step's time. The mean over several processes, each with its share of a
    step, is the step's loss.

    Everything but norms and the likelihood is computed in `dtype`; weights and their gradients keep theirs. Weights are
    cast once; torch.autocast would cast them in every product and use float32 between products.
    """
    decoder = model.get_decoder()
    given = {"input_ids": batch["tokens"], "position_ids": batch["positions"], "lengths": batch["lengths"]}
    weights = {name: weight.to(dtype) for name, weight in decoder.named_parameters()}
    hidden = functional_call(decoder, weights, (), given | {"use_cache": False}).last_hidden_state
    # The head is a fifth of the arithmetic and most of the memory: it gets only positions that predict reply tokens.
    hidden, labels = hidden[0, batch["predicting"]], batch["labels"]
    vocabulary, rows = head or (None, model.get_output_embeddings().weight)
    if vocabulary is not None:
        labels = torch.searchsorted(vocabulary, labels)
    logits = functional.linear(hidden, rows.to(dtype))
    found = functional.cross_entropy(logits.float(), labels, reduction="none")
    return (found * batch["weights"]).sum() / batch["reply_tokens"]


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, n, size), key and value (1, groups, n, size) -> (1, n, heads, size)."""
    del module, attention_mask
    lengths: list[list[int]] = more["lengths"]
    groups, size = key.shape[1], key.shape[3]
    sizes = [length for section in lengths for length in section]
    parts = zip(query[0].split(sizes, 1), key[0].split(sizes, 1), value[0].split(sizes, 1), strict=True)
    found: list[torch.Tensor] = []
    for section in lengths:
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None
        for _length in section:
            q, k, v = next(parts)
            if prefix is None:
                prefix = k, v
            else:
                k, v = torch.cat((prefix[0], k), 1), torch.cat((prefix[1], v), 1)
            rows = q.reshape(groups, -1, size)  # the heads of a group share keys and values: one product for all
            mask = _mask(q.shape[1], k.shape[1], len(q) // groups, q.dtype, q.device)
            scores = torch.baddbmm(mask, rows, k.transpose(1, 2), alpha=more["scaling"])
            found.append((scores.softmax(-1) @ v).view_as(q))
    return torch.cat(found, 1).transpose(0, 1)[None], None


@lru_cache(256)  # more than a step needs; every layer uses the same ones
def _mask(n: int, keys: int, repeat: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(repeat * n, keys): causal among the last n keys, all earlier ones visible."""
    mask = torch.full((n, keys), float("-inf"), dtype=dtype, device=device).triu(keys - n + 1)
    return mask.repeat(repeat, 1)


AttentionInterface.register(ATTENTION, attention)
