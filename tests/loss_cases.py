"""Losses on next-token distributions from their definitions, and cases to compare with them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tamba.ops.losses import Divergence, Top, Weights, next_token_loss

N, D, WORDS = 5, 3, 11
PARTS = [(1.0, 0.0), (0.5, 2.0)]
WEIGHTS = [
    Weights(kl, ce, temperature, divergence, 0.3, top_k)
    for (kl, ce), temperature, divergence, top_k in itertools.product(
        PARTS, (1.0, 2.5), ("forward", "reverse", "js"), (None, 4)
    )
] + [Weights(0.0, 1.0)]


def arguments(n: int = N, d: int = D, words: int = WORDS, seed: int = 3) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=make)

    return {
        "hidden": draw(n, d).requires_grad_(),
        "head": draw(words, d).requires_grad_(),
        "targets": torch.randint(words, (n,), generator=make),
        "teacher_hidden": draw(n, d + 1),
        "teacher_head": draw(words, d + 1),
    }


def probabilities(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    odds = ((hidden @ head.mT) / temperature).exp()
    return odds / odds.sum(-1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1).mean()


def divergence_of(p: Tensor, q: Tensor, name: Divergence, beta: float) -> Tensor:
    if name == "forward":
        return kl(p, q)
    if name == "reverse":
        return kl(q, p)
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def coarse(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Over the given tokens of each row and all others as one."""
    known = probabilities.gather(-1, tokens)
    return torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)


def truth(c: dict[str, Tensor], w: Weights) -> Tensor:
    """The loss as it is defined, from probabilities; autograd knows its gradients."""
    total = c["hidden"].new_zeros(())
    if w.kl:
        q = probabilities(c["hidden"], c["head"], w.temperature)
        p = probabilities(c["teacher_hidden"], c["teacher_head"], w.temperature)
        if w.top_k is not None:
            tokens = p.argsort(-1, descending=True)[:, : w.top_k]
            p, q = coarse(p, tokens), coarse(q, tokens)
        total = total + w.kl * w.temperature**2 * divergence_of(p, q, w.divergence, w.beta)
    if w.ce:
        q = probabilities(c["hidden"], c["head"], 1.0)
        total = total - w.ce * q.gather(-1, c["targets"][:, None]).log().mean()
    return total


def with_gradients(loss: Tensor, c: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden, head = torch.autograd.grad(loss, (c["hidden"], c["head"]))
    return {"loss": loss.detach(), "gradient of hidden": hidden, "gradient of head": head}


def wanted(w: Weights, c: dict[str, Tensor]) -> dict[str, Tensor]:
    return with_gradients(truth(c, w), c)


def ours(w: Weights, c: dict[str, Tensor], top: Top | None = None) -> dict[str, Tensor]:
    given = dict(c)
    if top is not None:
        del given["teacher_hidden"], given["teacher_head"]
    return with_gradients(next_token_loss(**given, teacher_top=top, weights=w), c)


def cast(c: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """The same in another type and place, as leaves."""
    found = {}
    for name, tensor in c.items():
        moved = tensor.detach().to(device)
        if moved.is_floating_point():
            moved = moved.to(dtype).requires_grad_(name in ("hidden", "head"))
        found[name] = moved
    return found
