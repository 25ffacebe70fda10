import random

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.model.int8_training import Int8Products
from pipeline.model.shared_prefix import ATTENTION, Example, Reply, loss, pack, short_head, steps


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


STEP = [
    Example([1, 2, 3, 4, 10, 11, 20, 21, 22], 4, [Reply(6, 9)]),
    Example([5, 6, 7, 12, 23], 3, [Reply(4, 5)]),
    Example([1, 2, 3, 4, 12, 23], 4, [Reply(5, 6)]),
    Example([1, 2, 3, 4, 13, 14, 15, 24, 25, 26], 4, [Reply(5, 6), Reply(7, 10, weight=0.25)]),
    Example([5, 6, 7, 30, 31, 32, 33], 3, [Reply(5, 7, weight=0.5, first_weight=0.5)]),
]


def test_loss_and_gradient_are_those_of_the_plain_batch() -> None:
    """Two prefixes in one step, one of them not first in it; and a conversation with an earlier reply."""
    model = tiny_model()
    terms, weights = [], []
    for row in STEP:
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0]
        for reply in row.replies:
            predicted, said = logits[reply.start - 1 : reply.end - 1], row.tokens[reply.start : reply.end]
            terms.append(functional.cross_entropy(predicted, torch.tensor(said), reduction="none"))
            weights += [reply.first_weight, *[reply.weight] * (len(predicted) - 1)]
    plain = (torch.cat(terms) * torch.tensor(weights)).mean()
    plain.backward()  # type: ignore[no-untyped-call]
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    model.set_attn_implementation(ATTENTION)
    found = loss(model, pack(STEP))
    torch.testing.assert_close(found, plain)
    found.backward()  # type: ignore[no-untyped-call]
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_short_head_leaves_out_what_no_example_holds() -> None:
    model = tiny_model()
    tokens, rows = short_head(model, STEP)
    assert set(tokens.tolist()) == {token for example in STEP for token in example.tokens}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([STEP[1].tokens])).logits[0, -2, tokens]
        model.set_attn_implementation(ATTENTION)
        found = loss(model, pack(STEP[1:2]), (tokens, rows))
        everything = short_head(model, [Example(list(range(50)), 1, [])])
        torch.testing.assert_close(loss(model, pack(STEP), everything), loss(model, pack(STEP)))
    torch.testing.assert_close(found, -logits.log_softmax(-1)[tokens.tolist().index(23)])


def test_steps_hold_every_example_once_within_the_budget() -> None:
    rare = [Example([9, 8, n, 3], 2 + n % 2, [Reply(3, 4)]) for n in range(5)]
    long = Example([1, 2, 3, 4, *range(10, 50)], 4, [Reply(6, 44)])
    examples = [*STEP * 10, *rare, long]
    found = steps(examples, tokens=30, rng=random.Random(0))
    assert sorted(at for step in found for at in step) == list(range(56))
    sizes = [pack([examples[at] for at in step])["tokens"].shape[1] for step in found]
    assert all(size <= 30 or len(step) == 1 for size, step in zip(sizes, found, strict=True))
    assert sum(sizes) / len(sizes) > 20
    assert found != steps(examples, tokens=30, rng=random.Random(1))


def test_int8_products_are_close_forward_and_backward() -> None:
    model = tiny_model()
    model.set_attn_implementation(ATTENTION)
    gradients = []
    for products in (torch.enable_grad(), Int8Products()):
        model.zero_grad()
        with products:
            found = loss(model, pack(STEP))
            found.backward()  # type: ignore[no-untyped-call]
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    for exact, rounded in zip(*gradients, strict=True):
        assert not torch.equal(exact, rounded) or exact.ndim == 1  # norms stay exact but for what reaches them
        error = (exact - rounded).norm() / exact.norm()
        assert error < 0.05


def test_int8_products_do_not_round_the_gradient_of_the_input() -> None:
    weight, x, grad = torch.randn(6, 4), torch.randn(3, 4, requires_grad=True), torch.randn(3, 6)
    with Int8Products():
        torch.autograd.backward(functional.linear(x, weight), grad)
    torch.testing.assert_close(x.grad, grad @ weight)


def test_mean_of_the_shares_is_the_step() -> None:
    """Of 5 requests in 2, 3 and 7 shares: with 7 two have none."""
    model = tiny_model()
    model.set_attn_implementation(ATTENTION)
    whole = loss(model, pack(STEP))
    for count in (2, 3, 7):
        shares = [loss(model, pack(STEP, count, index)) for index in range(count)]
        torch.testing.assert_close(torch.stack(shares).mean(), whole)
