"""Sampling is of the distribution that it says, and a prompt's draws are its own."""

from __future__ import annotations

import pytest
import torch

from compare import assert_same
from models import VOCAB, tiny_model
from tamba.decoding import Sampling, decode
from tamba.errors import UserError

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0])


def truth(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution in float64, by sorting and counting."""
    p = (logits.double() / temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda i: -float(p[i]))
    kept = order[: top_k or len(p)]
    total, some = sum(float(p[i]) for i in kept), []
    mass = 0.0
    for i in kept:
        if mass >= top_p:
            break
        some.append(i)
        mass += float(p[i]) / total
    wanted = torch.zeros(len(p), dtype=torch.float64)
    wanted[some] = p[some]
    return wanted / wanted.sum()


def found(sampling, n=2000):
    """Shares of tokens over evenly spaced places: the distribution to within 1 / n."""
    places = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    picked = sampling.pick(LOGITS.expand(n, -1), places)
    return torch.bincount(picked, minlength=len(LOGITS)).double() / n


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.3, "top_k": 4, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 1e-9},
    ],
)
def test_shares_are_those_of_the_distribution(settings):
    shares = found(Sampling(**settings))
    assert float((shares - truth(LOGITS, **settings)).abs().max()) <= 1 / 1000
    # A wrong distribution is seen.
    assert float((shares - truth(LOGITS, temperature=3.0)).abs().max()) > 1 / 100


def test_the_ends_of_the_line():
    sampling = Sampling(temperature=1.0)
    ends = sampling.pick(LOGITS.expand(2, -1), torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64))
    assert ends.tolist() == [0, len(LOGITS) - 1]
    never = torch.tensor([[0.0, -torch.inf, 0.0]])
    for place in (0.0, 0.4999, 0.5, 0.99):
        assert sampling.pick(never, torch.tensor([place], dtype=torch.float64)).item() != 1


def test_a_prompts_draws_are_its_own():
    model = tiny_model("mixed")
    prompts = [[3, 4, 5], [7], [9, 10], [3, 4, 5]]
    names = ["a", "b", "c", "d"]

    def write(picked, seed=0, **options):
        sampling = Sampling(temperature=1.0, seed=seed)
        chosen = [prompts[i] for i in picked]
        choose = sampling.chooser([names[i] for i in picked])
        answers = {}
        for batch in decode(model, chosen, [8] * len(chosen), choose=choose, **options):
            answers |= {names[picked[i]]: tokens for i, tokens in batch.items()}
        return answers

    torch.manual_seed(1)
    together = write([0, 1, 2, 3])
    torch.manual_seed(2)
    alone = write([2]) | write([0, 3]) | write([1])
    assert alone == together
    assert together["a"] != together["d"]
    assert write([0], seed=1)["a"] != together["a"]
    # Known prompts are left out by whole batches alone.
    some = write([0, 1, 2, 3], tokens_at_once=1, known={0, 2})
    assert some.keys() == {"b", "d"} and some["b"] == together["b"]
    assert write([0, 1, 2, 3], known={0, 2}) == together


def test_greedy_is_the_likeliest_token():
    model = tiny_model("mixed")
    assert Sampling().chooser(["a"]) is None
    (answer,) = next(iter(decode(model, [[3, 4]], [5]))).values()
    ids = torch.tensor([[3, 4, *answer]])
    with torch.no_grad():
        want = model(ids).logits[0, 1:-1].argmax(-1)
    assert_same(torch.tensor(answer), want, "exact")
    assert max(answer) < VOCAB


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0}]
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
