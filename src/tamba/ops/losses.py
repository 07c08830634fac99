"""Losses on next-token distributions, computed from what the heads are given.

`next_token_loss` goes over slices of positions: logits of a slice, the loss and its gradient in
their place, and at once the products of that gradient with the head and with what the head was
given. No product is done twice and no more than a slice of logits exists. On a GPU a Triton kernel
does the middle part in one launch; elsewhere it is a few passes over pieces that stay in cache.

Shape letters: `n` positions, `D` d_model, `V` vocabulary, `K` most likely tokens of the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tamba.ops.backend import kernels_run, rows_for_cpu

Divergence = Literal["forward", "reverse", "js"]

# On a CPU: logits of each of teacher and student as products give them (fewer would repack the head
# more often), and how many of these are widened and worked on: some steps over 4 MiB, which stay in
# cache.
_LOGITS_AT_ONCE = 1 << 26
_WIDE_AT_ONCE = 1 << 20
# Elsewhere: bytes of the student's logits, of which the gradient's product with the head needs many
# rows to fill a card (1,024 of 128,256 words in bfloat16), and of the teacher's, which need not be
# as many; numbers widened at once where kernels do not run.
_STUDENT_BYTES = 1024 * 128_256 * 2
_TEACHER_BYTES = 256 * 128_256 * 2
_WIDE_AT_ONCE_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Weights:
    """What a next-token loss is made of. With p the teacher's distribution and q the student's:

    Args:
        kl: weight of the divergence between p and q.
        ce: weight of cross-entropy with the text.
        temperature: of both distributions in the divergence.
        divergence: ``forward`` is KL(p, q), ``reverse`` KL(q, p); ``js`` the generalised
            Jensen-Shannon divergence ``β KL(p, m) + (1 - β) KL(q, m)`` with ``m = β p + (1 - β) q``
            (arXiv 2306.13649, section 2).
        beta: β, between 0 and 1.
        top_k: compare the teacher's so many most likely tokens, and all others as one outcome: the
            divergence of the two distributions over ``top_k + 1`` outcomes, never above that over
            all tokens. None for all tokens.

    Raises:
        ValueError: a value out of its range.
    """

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = "forward"
    beta: float = 0.5
    top_k: int | None = None

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", self.temperature > 0, "above 0"),
            ("divergence", self.divergence in get_args(Divergence), "forward, reverse or js"),
            ("beta", 0 < self.beta < 1, "between 0 and 1"),
            ("top_k", self.top_k is None or self.top_k > 0, "above 0, or None"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")


class Top(NamedTuple):
    """A teacher's distribution, known by its most likely tokens; in nats, of any row order.

    Args:
        indices: [n, K] int, the tokens, each once.
        log_probs: [n, K], of these tokens.
        log_rest: [n], of all others together.

    The ``K + 1`` numbers of a row are normalised where they are used, so that short storage types
    do no harm and logits will do too.
    """

    indices: Tensor
    log_probs: Tensor
    log_rest: Tensor


def next_token_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor | None = None,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    teacher_top: Top | None = None,
    counted: Tensor | None = None,
    weights: Weights = Weights(),
) -> Tensor:
    """``kl · τ² · divergence + ce · cross-entropy`` with a teacher, in nats, a mean over positions.

    τ is the temperature; τ² keeps gradients of one size (Hinton et al. 2015, arXiv 1503.02531,
    section 2). Logits exist for a slice of positions at a time, in the backward pass too, which
    costs no second product with the head: the gradient is known when the loss is. Under autocast
    the products take its type; sums and exponentials are float32 (float64 for float64 inputs).

    Args:
        hidden: [n, D], what the student's head is given.
        head: [V, D], the student's.
        targets: [n] int64, the tokens that follow; None without cross-entropy.
        teacher_hidden: [n, D'], and `teacher_head` [V, D']: the same of the teacher, without
            gradient; None without a divergence.
        teacher_top: instead of these two, the teacher's most likely tokens, at the temperature of
            `weights` (`most_likely`). With them ``weights.top_k`` says nothing more.
        counted: [n] bool, the positions that the mean is over; None for all. The others change
            nothing, whatever is said of them, numbers or not, so that shapes can stay as they are
            where numbers differ.
        weights: of the parts.

    Returns:
        A scalar in float32 (float64 for float64 inputs). Differentiable in `hidden` and `head`.

    Raises:
        ValueError: a part has weight and its arguments are missing, or shapes do not fit.
    """
    if not weights.ce:
        targets = None
    if not weights.kl:
        teacher_hidden = teacher_head = teacher_top = None
    _check(hidden, head, targets, teacher_hidden, teacher_head, teacher_top, weights)
    if counted is not None and counted.shape != hidden.shape[:1]:
        raise ValueError(
            f"next_token_loss: counted {tuple(counted.shape)} of {len(hidden)} positions"
        )
    top = (None, None, None) if teacher_top is None else teacher_top
    learns = torch.is_grad_enabled()
    loss, _grad_hidden, _grad_head = _loss_op(
        hidden,
        head,
        targets,
        teacher_hidden,
        teacher_head,
        *top,
        counted,
        weights.kl,
        weights.ce,
        weights.temperature,
        weights.divergence,
        weights.beta,
        weights.top_k or 0,
        _product_type(hidden),
        learns and hidden.requires_grad,
        learns and head.requires_grad,
        kernels_run("next_token_loss", hidden, head, teacher_hidden, teacher_head),
    )
    return loss


@torch.no_grad()
def most_likely(hidden: Tensor, head: Tensor, k: int, temperature: float = 1.0) -> Top:
    """The k most likely next tokens, from what a head is given; see `Top`.

    Args:
        hidden: [n, D].
        head: [V, D], of more than k words.
        k: how many.
        temperature: of the distribution.

    Returns:
        int32 indices, most likely first, and logarithms in float32 (float64 for float64 inputs).

    Raises:
        ValueError: k is not between 1 and V - 1.
    """
    if not 0 < k < len(head):
        raise ValueError(f"k is {k}; expected 1 to {len(head) - 1}, one word less than all")
    kernels = kernels_run("most_likely", hidden, head)
    product, wide = _product_type(hidden), _wide(hidden)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        words = head.to(product)
        for part in _slices(len(hidden), _rows(words)[1]):
            logits = _logits(hidden[part].to(product), words)
            found = _top_of(logits, k, temperature, wide, kernels)
            del logits
            both = torch.cat([found.log_probs, found.log_rest[:, None]], -1).log_softmax(-1)
            parts.append((found.indices.int(), both[:, :-1], both[:, -1]))
    if not parts:
        return Top(
            hidden.new_empty((0, k), dtype=torch.int32),
            hidden.new_empty((0, k), dtype=wide),
            hidden.new_empty(0, dtype=wide),
        )
    return Top(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _check(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    top: Top | None,
    weights: Weights,
) -> None:
    n, words = len(hidden), len(head)
    if weights.ce and targets is None:
        raise ValueError("next_token_loss: cross-entropy has weight; give targets")
    if targets is not None and targets.shape != (n,):
        raise ValueError(f"next_token_loss: targets {tuple(targets.shape)} of {n} positions")
    live = teacher_hidden is not None and teacher_head is not None
    if weights.kl and live == (top is not None):
        raise ValueError(
            "next_token_loss: the divergence has weight; give teacher_hidden and teacher_head, "
            "or teacher_top"
        )
    if live:
        assert teacher_hidden is not None and teacher_head is not None
        if len(teacher_hidden) != n or len(teacher_head) != words:
            raise ValueError(
                f"next_token_loss: student and teacher have {n} and {len(teacher_hidden)} "
                f"positions, {words} and {len(teacher_head)} words"
            )
    if top is not None:
        k = top.indices.shape[-1]
        fits = (
            top.indices.shape == top.log_probs.shape == (n, k)
            and top.log_rest.shape == (n,)
            and 0 < k < words
        )
        if not fits:
            raise ValueError(
                f"next_token_loss: expected teacher_top of [{n}, K], [{n}, K] and [{n}], K below "
                f"{words}; got {', '.join(str(tuple(t.shape)) for t in top)}"
            )


def _product_type(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# The operator: one for torch's compiler and autograd, whatever runs inside it.


@torch.library.custom_op("tamba::next_token_loss", mutates_args=())
def _loss_op(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    indices: Tensor | None,
    log_probs: Tensor | None,
    log_rest: Tensor | None,
    counted: Tensor | None,
    kl: float,
    ce: float,
    temperature: float,
    divergence: str,
    beta: float,
    top_k: int,
    product: torch.dtype,
    learns_hidden: bool,
    learns_head: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradient of `hidden` times n, and its gradient of `head`; empty if unwanted.

    The first gradient is the sum's and not the mean's, because a mean over many positions can be
    too small for float16.
    """
    parts = Weights(kl, ce, temperature, divergence, beta, top_k or None)  # type: ignore[arg-type]
    top = None
    if indices is not None:
        assert log_probs is not None and log_rest is not None
        top = Top(indices.contiguous(), log_probs.contiguous(), log_rest.contiguous())
    # As the kernels read it, who know no stride of it.
    targets = None if targets is None else targets.contiguous()
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        x, words = hidden.to(product), head.to(product)
        theirs = None if teacher_head is None else teacher_head.to(product)
        # What does not count must be a number all the same: 0 times NaN is NaN in the products.
        if counted is not None and targets is not None:
            targets = targets.masked_fill(~counted, 0)
        if counted is not None and top is not None:
            top = _only_top(top, counted)
        wide, count = _wide(hidden), _count(len(hidden), counted)
        losses = torch.empty(len(x), dtype=wide, device=x.device)
        grad_x = x.new_empty(x.shape if learns_hidden else 0)
        grad_words = torch.zeros(head.shape if learns_head else 0, dtype=wide, device=x.device)
        ours, other = _rows(words)
        for part in _slices(len(x), ours):
            given = _only(x[part], counted, part)
            logits = _logits(given, words)
            for some in _slices(len(logits), other):
                rows = slice(part.start + some.start, part.start + some.stop)
                teacher = None
                if theirs is not None:
                    assert teacher_hidden is not None
                    above = _only(teacher_hidden[rows].to(product), counted, rows)
                    teacher = _logits(above, theirs)
                loop = not kernels and _has_loop(logits, teacher, parts)
                turn = _by_kernel if kernels else _by_loop if loop else _by_torch
                turn(
                    logits[some],
                    teacher,
                    top,
                    targets,
                    losses,
                    rows.start,
                    parts,
                    learns_hidden or learns_head,
                )
                del teacher
            if learns_hidden:
                torch.mm(logits, words, out=grad_x[part])
            if learns_head:
                _add_product(grad_words, logits.mT, given)
            del logits
        if counted is not None:
            losses.masked_fill_(~counted, 0)
            if learns_hidden:
                grad_x.masked_fill_(~counted[:, None], 0)
        loss = (losses.sum(dtype=torch.float64) / count).to(wide)
        return loss, grad_x, grad_words.div_(count).to(head.dtype)


def _count(n: int, counted: Tensor | None) -> int | Tensor:
    """Positions that a mean is over, 1 at least; a tensor where the device alone knows."""
    return max(1, n) if counted is None else counted.sum().clamp_min(1)


def _only(rows: Tensor, counted: Tensor | None, part: slice) -> Tensor:
    """Rows `part` of all, [n, D]; zeros where they do not count."""
    return rows if counted is None else rows.masked_fill(~counted[part, None], 0)


def _only_top(top: Top, counted: Tensor) -> Top:
    """The same with the first K tokens, all as likely, at positions that do not count."""
    aside = ~counted[:, None]
    first = torch.arange(top.indices.shape[1], device=counted.device, dtype=top.indices.dtype)
    return Top(
        torch.where(aside, first, top.indices),
        top.log_probs.masked_fill(aside, 0),
        top.log_rest.masked_fill(~counted, 0),
    )


@_loss_op.register_fake
def _(hidden: Tensor, head: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    product, learns_hidden, learns_head = rest[-4:-1]
    return (
        hidden.new_empty((), dtype=_wide(hidden)),
        hidden.new_empty(hidden.shape if learns_hidden else 0, dtype=product),
        head.new_empty(head.shape if learns_head else 0),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, _head, *_rest, learns_hidden, learns_head, _kernels = inputs
    counted: Tensor | None = inputs[8]
    ctx.save_for_backward(*output[1:], *(() if counted is None else (counted,)))
    ctx.learns, ctx.n, ctx.dtype = (learns_hidden, learns_head), len(hidden), hidden.dtype
    ctx.n_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    of_hidden = of_head = None
    if grad is not None:
        sums, mean, *counted = ctx.saved_tensors
        count = _count(ctx.n, *counted or (None,))
        if ctx.learns[0]:
            of_hidden = (sums * (grad / count)).to(ctx.dtype)
        if ctx.learns[1]:
            of_head = mean * grad
    return (of_hidden, of_head, *(None,) * (ctx.n_inputs - 2))


_loss_op.register_autograd(_gradients, setup_context=_keep_gradients)


def _slices(n: int, most: int) -> Iterator[slice]:
    """Of 0 to n in order, each at most so long, and as equal as multiples of 128 can be."""
    even = -(-n // max(1, -(-n // most)))
    size = min(most, -(-even // 128) * 128)
    for first in range(0, n, max(1, size)):
        yield slice(first, min(first + size, n))


def _rows(words: Tensor) -> tuple[int, int]:
    """How many positions' logits exist at once: of the student, and of the teacher."""
    if words.device.type == "cpu":
        rows = max(1, _LOGITS_AT_ONCE // len(words))
        return rows, rows
    each = len(words) * words.element_size()
    student, teacher = (
        max(32, size // each // 32 * 32) for size in (_STUDENT_BYTES, _TEACHER_BYTES)
    )
    return student, teacher


def _logits(x: Tensor, words: Tensor) -> Tensor:
    """``x wordsᵀ`` [n, V]; on a GPU rows are a multiple of 128 bytes apart, whatever V is.

    Products with rows that begin anywhere are several times slower there.
    """
    if not x.is_cuda:
        return F.linear(x, words)
    apart = -(-len(words) // 64) * 64
    return torch.mm(x, words.mT, out=x.new_empty(len(x), apart)[:, : len(words)])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``; without a second `total` where a GPU's products are short and it is not."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _top_of(logits: Tensor, k: int, temperature: float, wide: torch.dtype, kernels: bool) -> Top:
    """The k most likely tokens of logits [n, V], which are overwritten; see `Top`."""
    largest, indices = logits.topk(k, -1)
    largest = largest.to(wide) / temperature
    if kernels:
        from tamba.ops.kernels import losses as triton_kernels

        return Top(indices, largest, triton_kernels.rest(logits, indices, temperature))
    others = logits.scatter_(-1, indices, -math.inf)
    rest = [
        (some.to(wide) / temperature).logsumexp(-1) for some in others.split(_wide_rows(logits))
    ]
    return Top(indices, largest, torch.cat(rest))


def _wide_rows(logits: Tensor) -> int:
    size = _WIDE_AT_ONCE if logits.device.type == "cpu" else _WIDE_AT_ONCE_ELSEWHERE
    return max(1, size // logits.shape[-1])


# Logits to losses and gradients.


def _by_kernel(
    student: Tensor,
    teacher: Tensor | None,
    top: Top | None,
    targets: Tensor | None,
    losses: Tensor,
    first: int,
    weights: Weights,
    grad: bool,
) -> None:
    """Fill ``losses[first:]`` for logits [n, V], and put the sum's gradient in the student's place.

    Args:
        student: overwritten.
        teacher: [n, V], overwritten, or None.
        top, targets, losses: of all positions; those of `student` begin at `first`.
    """
    from tamba.ops.kernels import losses as triton_kernels

    how: dict[str, Any] = {
        "kl": weights.kl,
        "ce": weights.ce,
        "temperature": weights.temperature,
        "beta": weights.beta,
        "divergence": weights.divergence,
        "grad": grad,
    }
    n, words = student.shape
    if teacher is not None and weights.top_k is not None and weights.top_k < words:
        top = _top_of(teacher, weights.top_k, weights.temperature, losses.dtype, True)
        here = slice(first, first + n)
        first, losses = 0, losses[here]
        targets = None if targets is None else targets[here]
    if top is None:
        triton_kernels.dense(student, teacher, targets, losses, first, **how)
    else:
        triton_kernels.top(student, *top, targets, losses, first, **how)


def _has_loop(logits: Tensor, teacher: Tensor | None, weights: Weights) -> bool:
    """Whether a compiled loop of a CPU knows this loss: KL of whole distributions in bfloat16."""
    return (
        teacher is not None
        and weights.divergence == "forward"
        and (weights.top_k is None or weights.top_k >= logits.shape[1])
        and logits.dtype == torch.bfloat16
        and rows_for_cpu(logits)
    )


def _by_loop(
    student: Tensor,
    teacher: Tensor | None,
    top: Top | None,
    targets: Tensor | None,
    losses: Tensor,
    first: int,
    weights: Weights,
    grad: bool,
) -> None:
    """`_by_kernel` in one compiled loop, where `_has_loop`."""
    from tamba.ops.kernels import rows_cpu

    assert teacher is not None and top is None
    here = slice(first, first + len(student))
    rows_cpu.divergence(
        student,
        teacher,
        None if targets is None else targets[here],
        losses[here],
        kl=weights.kl,
        ce=weights.ce,
        temperature=weights.temperature,
        grad=grad,
    )


def _by_torch(
    student: Tensor,
    teacher: Tensor | None,
    top: Top | None,
    targets: Tensor | None,
    losses: Tensor,
    first: int,
    weights: Weights,
    grad: bool,
) -> None:
    """`_by_kernel` in plain torch, a few rows at a time."""
    n, words = student.shape
    if teacher is not None and weights.top_k is not None and weights.top_k < words:
        top = _top_of(teacher, weights.top_k, weights.temperature, losses.dtype, False)
        teacher, offset = None, 0
    else:
        offset = first
    for rows in _slices(n, _wide_rows(student)):
        here = slice(first + rows.start, first + rows.stop)
        there = slice(offset + rows.start, offset + rows.stop)
        other: Tensor | Top | None = None
        if teacher is not None:
            other = teacher[rows].to(losses.dtype)
        elif top is not None:
            other = Top(*(t[there] for t in top))
        follow = None if targets is None else targets[here]
        losses[here], gradient = _some(student[rows].to(losses.dtype), other, follow, weights)
        if grad:
            student[rows] = gradient


def _some(
    student: Tensor, teacher: Tensor | Top | None, targets: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor]:
    """The losses [n] of logits [n, V], and the gradient of their sum; arguments are overwritten."""
    loss, grad = None, None
    if teacher is not None:
        tau = weights.temperature
        mine = student if tau == 1.0 else student / tau
        if isinstance(teacher, Top):
            loss, grad = _over_top(mine, teacher, weights)
        else:
            their = teacher if tau == 1.0 else teacher.div_(tau)
            loss, grad = _between(their.log_softmax(-1), mine.log_softmax(-1), weights)
        loss, grad = loss.mul_(weights.kl * tau**2), grad.mul_(weights.kl * tau)
    if targets is not None:
        log_q = student.log_softmax(-1)
        index = targets[:, None]
        text = log_q.gather(-1, index)[:, 0] * -weights.ce
        q = log_q.exp_()
        q.scatter_add_(-1, index, q.new_full(index.shape, -1.0))
        q.mul_(weights.ce)
        loss, grad = (text, q) if grad is None or loss is None else (loss + text, grad.add_(q))
    if loss is None or grad is None:
        return student.new_zeros(len(student)), student.zero_()
    return loss, grad


def _between(log_p: Tensor, log_q: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """The divergence [n] of distributions over C outcomes, and its gradient [n, C] in q's logits.

    Both arguments [n, C] are overwritten.
    """
    if weights.divergence == "forward":
        p = log_p.exp()
        return torch.mul(log_p.sub_(log_q), p).sum(-1), log_q.exp_().sub_(p)
    q = log_q.exp()
    if weights.divergence == "reverse":
        over_p = log_q.sub_(log_p)
        total = torch.linalg.vecdot(over_p, q)
        return total, over_p.sub_(total[:, None]).mul_(q)
    beta = weights.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    over_m = log_q.sub_(log_m)
    of_q = torch.linalg.vecdot(over_m, q)
    of_p = log_p.sub(log_m).mul_(log_p.exp_()).sum(-1)
    grad = over_m.sub_(of_q[:, None]).mul_(q).mul_(1 - beta)
    return beta * of_p + (1 - beta) * of_q, grad


def _over_top(student: Tensor, top: Top, weights: Weights) -> tuple[Tensor, Tensor]:
    """`_between` over K tokens and one outcome for the rest, with its gradient [n, V].

    The rest of the student's mass is a sum over the others, not 1 minus something close to 1. The
    gradient of that outcome falls to the others by their shares of it.
    """
    index = top.indices.long()
    mine = student.gather(-1, index)
    others = student.scatter(-1, index, -math.inf)
    rest = others.logsumexp(-1, keepdim=True)
    log_q = torch.cat([mine, rest], -1).log_softmax(-1)
    known = torch.cat([top.log_probs, top.log_rest[:, None]], -1).to(student.dtype)
    loss, grad = _between(known.log_softmax(-1).clamp_(min=-1e4), log_q, weights)
    spread = others.sub_(rest).exp_().mul_(grad[:, -1:])
    return loss, spread.scatter_(-1, index, grad[:, :-1])
