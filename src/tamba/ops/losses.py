"""Losses on next-token distributions, computed from what the heads are given.

Shape letters: `n` positions, `D` d_model, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LOGITS_AT_ONCE = 1 << 23
"""Of each of teacher and student: 32 MiB in float32, which a large cache holds."""


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
            step = max(1, _LOGITS_AT_ONCE // len(head))
            for first in range(0, len(x), step):
                part = slice(first, first + step)
                logits = F.linear(x[part], ours).to(wide)
                grad = torch.zeros((), dtype=wide, device=x.device)
                if weights.kl:
                    assert teacher_hidden is not None and theirs is not None
                    other = F.linear(teacher_hidden[part].to(product), theirs).to(wide)
                    loss, grad = _kl(logits, other, weights.temperature)
                    total += weights.kl * loss
                    grad = grad.mul_(weights.kl)
                if weights.ce:
                    assert targets is not None
                    log_q = logits.log_softmax(-1)
                    index = targets[part][:, None]
                    total -= weights.ce * log_q.gather(-1, index).sum(dtype=torch.float64)
                    ones = torch.ones_like(index, dtype=wide)
                    q = log_q.exp_().scatter_add_(-1, index, -ones)
                    grad = grad + q.mul_(weights.ce)
                if grad_x is None and grad_head is None:
                    continue
                grad = (grad / count).to(product)
                if grad_x is not None:
                    torch.mm(grad, ours, out=grad_x[part])
                if grad_head is not None:
                    grad_head += grad.mT @ x[part]
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


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """τ² KL of logits [n, V], summed over n, and its gradient for the student's."""
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    p = log_p.exp()
    loss = (log_p.sub_(log_q).mul_(p)).sum(dtype=torch.float64) * temperature**2
    return loss, log_q.exp_().sub_(p).mul_(temperature)
