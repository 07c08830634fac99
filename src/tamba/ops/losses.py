"""Losses on next-token distributions, computed from what the heads are given.

Shape letters: `n` positions, `D` d_model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LOGITS_AT_ONCE = 1 << 26
"""Of each of teacher and student, as products give them. Fewer would repack the head more often."""
_WIDE_AT_ONCE = 1 << 20
"""Of these, how many are widened and worked on: some steps over 4 MiB, which stay in cache."""


@dataclass(frozen=True)
class Weights:
    """What a next-token loss is made of.

    Args:
        kl: weight of KL(teacher, student).
        ce: weight of cross-entropy with the text.
        temperature: of both distributions in the KL.
    """

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0


def next_token_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor | None = None,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    weights: Weights = Weights(),
) -> Tensor:
    """``kl · τ² KL(teacher, student) + ce · cross-entropy``, a mean over positions, in nats.

    τ is the temperature; τ² keeps gradients of one size (Hinton et al. 2015, arXiv 1503.02531,
    section 2). Logits exist for a slice of positions at a time, in the backward pass too, which
    costs no second product with the head: the gradient is known when the loss is.

    Args:
        hidden: [n, D], what the student's head is given.
        head: [V, D], the student's.
        targets: [n] int64, the tokens that follow; None without cross-entropy.
        teacher_hidden: [n, D], and `teacher_head` [V, D']: the same of the teacher, without
            gradient; None without KL.
        weights: of the parts.

    Returns:
        A scalar in float32 (float64 for float64 inputs). Differentiable in `hidden` and `head`.
    """
    loss: Tensor = _HeadLoss.apply(hidden, head, targets, teacher_hidden, teacher_head, weights)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        weights: Weights,
    ) -> Tensor:
        device, count = hidden.device.type, max(1, len(hidden))
        product = hidden.dtype
        if torch.is_autocast_enabled(device):
            product = torch.get_autocast_dtype(device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        learns_hidden, learns_head = ctx.needs_input_grad[:2]
        with torch.autocast(device, enabled=False):
            x, ours = hidden.to(product), head.to(product)
            theirs = None if teacher_head is None else teacher_head.to(product)
            grad_x = torch.empty_like(x) if learns_hidden else None
            grad_head = torch.zeros_like(head, dtype=wide) if learns_head else None
            total = torch.zeros((), dtype=torch.float64, device=hidden.device)
            for part in _slices(len(x), max(1, _LOGITS_AT_ONCE // len(head))):
                logits = F.linear(x[part], ours)
                other = None
                if weights.kl:
                    assert teacher_hidden is not None and theirs is not None
                    other = F.linear(teacher_hidden[part].to(product), theirs)
                follow = None if targets is None else targets[part]
                for rows in _slices(len(logits), max(1, _WIDE_AT_ONCE // len(head))):
                    loss, grad = _some(
                        logits[rows].to(wide),
                        None if other is None else other[rows].to(wide),
                        None if follow is None else follow[rows],
                        weights,
                    )
                    total += loss
                    logits[rows] = grad.div_(count)  # the logits themselves are done with
                if grad_x is not None:
                    torch.mm(logits, ours, out=grad_x[part])
                if grad_head is not None:
                    grad_head += logits.mT @ x[part]
        ctx.save_for_backward(grad_x, grad_head)
        ctx.types = hidden.dtype, head.dtype
        return (total / count).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = (
            None if grad is None else (grad * grads[0]).to(kind)
            for grad, kind in zip(ctx.saved_tensors, ctx.types, strict=True)
        )
        return *found, None, None, None, None


def _slices(n: int, size: int) -> Iterator[slice]:
    for first in range(0, n, size):
        yield slice(first, min(first + size, n))


def _some(
    student: Tensor, teacher: Tensor | None, targets: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor]:
    """The loss of logits [n, V], summed over n, and its gradient; `student` is overwritten."""
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    grad: Tensor | None = None
    if weights.kl:
        assert teacher is not None
        tau = weights.temperature
        mine, their = (student, teacher) if tau == 1.0 else (student / tau, teacher / tau)
        log_q, log_p = mine.log_softmax(-1), their.log_softmax(-1)
        p = log_p.exp()
        total += torch.mul(log_p.sub_(log_q), p).sum(dtype=torch.float64) * (weights.kl * tau**2)
        grad = log_q.exp_().sub_(p).mul_(weights.kl * tau)
    if weights.ce:
        assert targets is not None
        log_q = student.log_softmax(-1)
        index = targets[:, None]
        total -= log_q.gather(-1, index).sum(dtype=torch.float64) * weights.ce
        q = log_q.exp_()
        q.scatter_add_(-1, index, q.new_full(index.shape, -1.0))
        q.mul_(weights.ce)
        grad = q if grad is None else grad.add_(q)
    return total, student.zero_() if grad is None else grad
