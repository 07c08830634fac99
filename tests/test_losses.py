"""The loss on next-token distributions, against probabilities written out word by word."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compare import assert_same
from tamba.ops import losses
from tamba.ops.losses import Weights, next_token_loss


def brute_force(
    student: list[list[float]], teacher: list[list[float]], temperature: float
) -> float:
    """KL(teacher, student), mean over rows, from the definition and nothing else."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q = [math.exp(x / temperature) for x in s]
        p = [math.exp(x / temperature) for x in t]
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


def case(n: int = 7, d: int = 3, words: int = 5) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=make)

    return {
        "hidden": draw(n, d).requires_grad_(),
        "head": draw(words, d).requires_grad_(),
        "targets": torch.randint(words, (n,), generator=make),
        "teacher_hidden": draw(n, d + 1),
        "teacher_head": draw(words, d + 1),
    }


def check_kl(temperature: float) -> None:
    c = case()
    got = next_token_loss(**c, weights=Weights(temperature=temperature))
    ours = (c["hidden"] @ c["head"].mT).tolist()
    theirs = (c["teacher_hidden"] @ c["teacher_head"].mT).tolist()
    want = torch.tensor(brute_force(ours, theirs, temperature), dtype=torch.float64)
    assert_same(got.detach(), want, "fp64")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_over_five_words(temperature: float) -> None:
    check_kl(temperature)


def test_a_kl_the_other_way_round_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses._some

    def wrong(student: Tensor, teacher: Tensor, *rest: object) -> object:
        return right(teacher, student, *rest)

    monkeypatch.setattr(losses, "_some", wrong)
    with pytest.raises(AssertionError):
        check_kl(1.0)


@pytest.mark.parametrize("at_once", [(2, 1), (4, 3), (1 << 20, 1 << 20)])
@pytest.mark.parametrize("weights", [Weights(), Weights(0.5, 2.0, 3.0), Weights(0.0, 1.0)])
def test_gradients_in_slices_of_any_size(
    weights: Weights, at_once: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    c = case()
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", at_once[0] * 5)
    monkeypatch.setattr(losses, "_WIDE_AT_ONCE", at_once[1] * 5)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return next_token_loss(**(c | {"hidden": hidden, "head": head}), weights=weights)

    assert torch.autograd.gradcheck(loss, (c["hidden"], c["head"]))


def test_ce_is_torchs() -> None:
    c = case()
    got = next_token_loss(c["hidden"], c["head"], c["targets"], weights=Weights(0.0, 1.0))
    want = torch.nn.functional.cross_entropy(c["hidden"] @ c["head"].mT, c["targets"])
    assert_same(got.detach(), want.detach(), "fp64")


def test_half_precision_products() -> None:
    c = case(n=50, words=40)
    c = {k: v.detach().float() if v.is_floating_point() else v for k, v in c.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = next_token_loss(**c)
    want = next_token_loss(**c)
    assert got.dtype == torch.float32
    # Sums and softmax are wide: what is off are the products' 8 bits alone.
    assert 0 < float((got - want).abs() / want) < 0.02
