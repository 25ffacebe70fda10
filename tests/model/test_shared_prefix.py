import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.model.shared_prefix import Example, groups, loss, tensors


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


GROUP = [
    Example([1, 2, 3, 4, 10, 11, 20, 21, 22], 6, 4),
    Example([1, 2, 3, 4, 12, 23], 5, 4),
    Example([1, 2, 3, 4, 13, 14, 15, 24, 25, 26], 7, 4, weight=0.25),
]


def test_loss_and_gradient_are_those_of_the_plain_batch() -> None:
    model = tiny_model()
    loss(model, tensors(GROUP, pad=0)).backward()  # type: ignore[no-untyped-call]
    shared = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    terms, weights = [], []
    for row in GROUP:
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0]
        predicted = logits[row.reply_at - 1 : -1]
        terms.append(functional.cross_entropy(predicted, torch.tensor(row.tokens[row.reply_at :]), reduction="none"))
        weights += [1.0, *[row.weight] * (len(predicted) - 1)]
    plain = (torch.cat(terms) * torch.tensor(weights)).sum() / sum(weights)
    plain.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss(model, tensors(GROUP, pad=0)), plain)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(shared[name], weight.grad, rtol=1e-4, atol=1e-6)


def test_groups_hold_every_example_once_within_the_budget() -> None:
    rare = [Example([9, 8, n, 3], 3, 2 + n % 2) for n in range(5)]
    long = Example([1, 2, 3, 4, *range(10, 50)], 6, 4)
    examples = [*GROUP * 10, *rare, long]
    found = groups(examples, tokens=20)
    assert sorted(at for group in found for at in group) == list(range(36))
    for group in found:
        longest = max(len(examples[at].tokens) - 4 for at in group)
        assert len(group) * longest <= (20 if 0 in group else 40) or len(group) == 1
    assert min(len(group) for group in found if 0 in group) >= 20 // 5  # rows of 5 and less: four fit
