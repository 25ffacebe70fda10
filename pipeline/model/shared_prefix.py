"""Training on many short requests behind one long prefix, which is computed once.

The tools' prefix is most of each example. Examples are put into groups, most of them with equal
tools; the tokens that all of a group begin with go through the model once, as a batch of one, and
their keys and values serve every row. Gradients flow through them, so the loss is that of the plain
batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

IGNORED = -100  # label of a token that is not in the loss


@dataclass(frozen=True)
class Example:
    tokens: list[int]
    reply_at: int  # tokens from here on are in the loss
    prefix: int  # how many of the tokens are the tools' prefix
    weight: float = 1.0  # of the reply's tokens in the loss, its first apart, which decides between call and text


def groups(examples: Sequence[Example], tokens: int) -> list[list[int]]:
    """Indices of `examples` in groups of at most `tokens`, padding included, or of one long example.

    Equal prefixes come together, then like lengths. What is left over of rare prefixes makes groups of
    its own, of twice the tokens, since little is shared there and half of them are prefixes.
    """
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for at, example in enumerate(examples):
        by_prefix.setdefault(tuple(example.tokens[: example.prefix]), []).append(at)
    full: list[list[int]] = []
    rest: list[int] = []
    for members in by_prefix.values():
        if sum(len(examples[at].tokens) - examples[at].prefix for at in members) < tokens // 4:
            rest += members
        else:
            full += _cut(members, [len(row.tokens) - row.prefix for row in examples], tokens)
    return full + _cut(rest, [len(row.tokens) for row in examples], 2 * tokens)


def _cut(members: list[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    cut: list[list[int]] = []
    for at in sorted(members, key=lengths.__getitem__):
        if not cut or (len(cut[-1]) + 1) * lengths[at] > tokens:  # in order of length: this one is the longest
            cut.append([])
        cut[-1].append(at)
    return cut


def tensors(group: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """prefix (1, shared), tokens, labels and weights (rows, longest), mask (rows, shared + longest)."""
    shortest = min(example.reply_at for example in group)
    first = group[0].tokens
    # One token at least stays in the rows, to predict the first reply token from.
    shared = next((at for at in range(shortest - 1) if any(row.tokens[at] != first[at] for row in group)), shortest - 1)
    shared = min(shared, max(row.prefix for row in group))
    longest = max(len(row.tokens) for row in group) - shared
    tokens = torch.full((len(group), longest), pad)
    labels = torch.full((len(group), longest), IGNORED)
    weights = torch.zeros((len(group), longest))
    mask = torch.zeros((len(group), shared + longest), dtype=torch.long)
    for at, row in enumerate(group):
        n = len(row.tokens) - shared
        tokens[at, :n] = torch.tensor(row.tokens[shared:])
        labels[at, row.reply_at - shared : n] = torch.tensor(row.tokens[row.reply_at :])
        weights[at, row.reply_at - shared : n] = row.weight
        weights[at, row.reply_at - shared] = 1.0
        mask[at, : shared + n] = 1
    return {
        "prefix": torch.tensor([first[:shared]]),
        "tokens": tokens,
        "labels": labels,
        "weights": weights,
        "mask": mask,
    }


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Weighted mean negative log-likelihood of the reply tokens in nats. `model` is a transformers causal LM."""
    prefix, tokens, labels = batch["prefix"], batch["tokens"], batch["labels"]
    decoder, past = model.get_decoder(), None
    if prefix.shape[1]:
        past = decoder(input_ids=prefix, use_cache=True).past_key_values
        past.batch_repeat_interleave(len(tokens))
    positions = torch.arange(prefix.shape[1], prefix.shape[1] + tokens.shape[1], device=tokens.device)
    hidden = decoder(
        input_ids=tokens,
        attention_mask=batch["mask"],
        position_ids=positions[None].expand(len(tokens), -1),
        past_key_values=past,
        use_cache=past is not None,
    ).last_hidden_state
    # The head is a fifth of the arithmetic and most of the memory: it sees only what predicts a reply token.
    predicting = labels[:, 1:] != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][predicting])
    found = functional.cross_entropy(logits.float(), labels[:, 1:][predicting], reduction="none")
    weights = batch["weights"][:, 1:][predicting]
    return (found * weights).sum() / weights.sum()
