# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment,var-annotated,misc"
"""The loss on next-token distributions as Triton kernels: one program a row of logits.

A program reads its row twice. The first time it finds the log-sum-exp of student and teacher, each
lane with a maximum and a sum of its own, and with them the divergence; the second time it writes
the gradient over the student's logits. Jensen-Shannon, whose terms need both sums, reads once more.
Sums and exponentials are float32 whatever the logits are. Logits are scaled to powers of 2.

Where the teacher is known by its most likely tokens, these outcomes and one for all the rest are
few enough to lie in registers. The student's logits of them are set to minus infinity first, so
that what remains of its mass is a sum and not one minus something close to one.

Shape letters: `n` rows, `V` vocabulary, `K` most likely tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tamba.ops.kernels.tiles import tile

DIVERGENCES = {"forward": 1, "reverse": 2, "js": 3}


@triton.jit
def see(m, total, z):
    """A lane's maximum and sum of 2^(z - maximum) with one number more, one exponential.

    Also what the lane's other sums are scaled with, and the weight of the number itself.
    """
    d = z - m
    e = tl.exp2(-tl.abs(d))
    keep = tl.where(d > 0, e, 1.0)
    share = tl.where(d > 0, 1.0, e)
    return tl.maximum(m, z), total * keep + share, keep, share


@triton.jit
def log_sum(m, total):
    """Of all lanes: log2 of the sum, and what each lane's sums are scaled with."""
    most = tl.max(m, 0)
    scale = tl.exp2(m - most)
    return most + tl.log2(tl.sum(total * scale, 0)), most, scale


@triton.jit
def log_ratio(a, b):
    """log2(a / b), 0 where a is 0."""
    return tl.log2(tl.where(a > 0, a, 1.0) / tl.where(a > 0, b, 1.0))


@triton.jit(do_not_specialize=["first"])
def dense_kernel(
    student, teacher, targets, losses, first, kl, ce, temperature, beta,
    V: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr,
    CE: tl.constexpr, WARM: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row's loss in nats, and its gradient in place of the student's logits.

    DIVERGENCE: 0 for none, else from `DIVERGENCES`. WARM: the temperature is not 1.
    STUDENT, TEACHER: from one row to the next.
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOWEST: tl.constexpr = -1e38
    row = tl.program_id(0).to(tl.int64)
    student += row * STUDENT
    teacher += row * TEACHER
    lanes = tl.arange(0, BLOCK)
    cold = 1.0 / LN2
    warm = cold / temperature
    s_m = tl.full([BLOCK], LOWEST, tl.float32)
    s_l = tl.zeros([BLOCK], tl.float32)
    t_m = tl.full([BLOCK], LOWEST, tl.float32)
    t_l = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    c_m = tl.full([BLOCK], LOWEST, tl.float32)
    c_l = tl.zeros([BLOCK], tl.float32)
    for v in tl.range(0, V, BLOCK, num_stages=STAGES):
        at = v + lanes
        here = at < V
        raw = tl.load(student + at, mask=here, other=-float("inf")).to(tl.float32)
        z = raw * warm
        s_m, s_l, s_keep, s_share = see(s_m, s_l, z)
        if CE and WARM:
            c_m, c_l, _keep, _share = see(c_m, c_l, raw * cold)
        if DIVERGENCE != 0:
            y = tl.load(teacher + at, mask=here, other=-float("inf")).to(tl.float32) * warm
            t_m, t_l, t_keep, t_share = see(t_m, t_l, y)
            if DIVERGENCE == 1:
                gap = gap * t_keep + t_share * tl.where(y > -float("inf"), y - z, 0.0)
            if DIVERGENCE == 2:
                gap = gap * s_keep + s_share * tl.where(z > -float("inf"), z - y, 0.0)
    s_lse, s_top, s_scale = log_sum(s_m, s_l)
    loss = 0.0
    t_lse = 0.0
    c_lse = s_lse
    d = 0.0
    if CE and WARM:
        c_lse, _top, _scale = log_sum(c_m, c_l)
    if DIVERGENCE != 0:
        t_lse, t_top, t_scale = log_sum(t_m, t_l)
        if DIVERGENCE == 1:
            d = tl.sum(gap * t_scale, 0) * tl.exp2(t_top - t_lse) - t_lse + s_lse
        if DIVERGENCE == 2:
            d = tl.sum(gap * s_scale, 0) * tl.exp2(s_top - s_lse) - s_lse + t_lse
        if DIVERGENCE == 3:
            of_p = tl.zeros([BLOCK], tl.float32)
            of_q = tl.zeros([BLOCK], tl.float32)
            for v in tl.range(0, V, BLOCK, num_stages=STAGES):
                at = v + lanes
                here = at < V
                raw = tl.load(student + at, mask=here, other=-float("inf")).to(tl.float32)
                y = tl.load(teacher + at, mask=here, other=-float("inf")).to(tl.float32)
                q = tl.exp2(raw * warm - s_lse)
                p = tl.exp2(y * warm - t_lse)
                between = beta * p + (1.0 - beta) * q
                of_p += p * log_ratio(p, between)
                of_q += q * log_ratio(q, between)
            d = tl.sum(of_q, 0)  # what the gradient needs
            loss = kl * temperature * temperature * beta * tl.sum(of_p, 0)
            loss += kl * temperature * temperature * (1.0 - beta) * d
        else:
            loss = kl * temperature * temperature * d
    target = 0
    if CE:
        target = tl.load(targets + first + row)
        given = tl.load(student + target).to(tl.float32) * cold
        loss += ce * (c_lse - given)
    tl.store(losses + first + row, loss * LN2)
    if GRAD:
        tl.debug_barrier()
        pull = kl * temperature
        for v in tl.range(0, V, BLOCK, num_stages=STAGES):
            at = v + lanes
            here = at < V
            raw = tl.load(student + at, mask=here, other=-float("inf")).to(tl.float32)
            grad = tl.zeros([BLOCK], tl.float32)
            if DIVERGENCE != 0:
                log_q = raw * warm - s_lse
                y = tl.load(teacher + at, mask=here, other=-float("inf")).to(tl.float32)
                log_p = y * warm - t_lse
                q = tl.exp2(log_q)
                if DIVERGENCE == 1:
                    grad = pull * (q - tl.exp2(log_p))
                if DIVERGENCE == 2:
                    grad = pull * LN2 * tl.where(q > 0, q * (log_q - log_p - d), 0.0)
                if DIVERGENCE == 3:
                    between = beta * tl.exp2(log_p) + (1.0 - beta) * q
                    grad = pull * LN2 * (1.0 - beta) * q * (log_ratio(q, between) - d)
            if CE:
                of_text = tl.exp2(raw * cold - c_lse)
                grad += ce * (of_text - tl.where(at == target, 1.0, 0.0))
            tl.store(student + at, grad.to(student.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["first"])
def top_kernel(
    student, indices, log_probs, log_rest, targets, losses, first, kl, ce, temperature, beta,
    V: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, STUDENT: tl.constexpr,
    DIVERGENCE: tl.constexpr, CE: tl.constexpr, WARM: tl.constexpr, GRAD: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same where the teacher is K tokens and the rest; SLOTS a power of 2 above K.

    The K places of the student's row are lost without GRAD, too.
    """
    LN2: tl.constexpr = 0.6931471805599453
    LOWEST: tl.constexpr = -1e38
    row = tl.program_id(0).to(tl.int64)
    student += row * STUDENT
    lanes = tl.arange(0, BLOCK)
    slots = tl.arange(0, SLOTS)
    known = slots < K
    at_k = (first + row) * K + slots
    cold = 1.0 / LN2
    warm = cold / temperature
    index = tl.load(indices + at_k, mask=known, other=0).to(tl.int64)
    mine = tl.load(student + index, mask=known, other=-float("inf")).to(tl.float32)
    target = 0
    given = 0.0
    if CE:
        target = tl.load(targets + first + row)
        given = tl.load(student + target).to(tl.float32) * cold
    tl.debug_barrier()
    nothing = tl.full([SLOTS], -float("inf"), tl.float32)
    tl.store(student + index, nothing.to(student.dtype.element_ty), mask=known)
    tl.debug_barrier()
    s_m = tl.full([BLOCK], LOWEST, tl.float32)
    s_l = tl.zeros([BLOCK], tl.float32)
    c_m = tl.full([BLOCK], LOWEST, tl.float32)
    c_l = tl.zeros([BLOCK], tl.float32)
    for v in tl.range(0, V, BLOCK, num_stages=STAGES):
        at = v + lanes
        raw = tl.load(student + at, mask=at < V, other=-float("inf")).to(tl.float32)
        s_m, s_l, _keep, _share = see(s_m, s_l, raw * warm)
        if CE and WARM:
            c_m, c_l, _keep, _share = see(c_m, c_l, raw * cold)
    rest, _top, _scale = log_sum(s_m, s_l)
    # Both distributions over K tokens and, in the slot after them, the rest.
    z = tl.where(slots == K, rest, mine * warm)
    y = tl.load(log_probs + at_k, mask=known, other=-float("inf")).to(tl.float32)
    y = tl.where(slots == K, tl.load(log_rest + first + row).to(tl.float32), y) * cold
    y = tl.where(known | (slots == K), tl.maximum(y, -1e4), y)
    z_top, y_top = tl.max(z, 0), tl.max(y, 0)
    s_lse = z_top + tl.log2(tl.sum(tl.exp2(z - z_top), 0))
    log_q = tl.where(slots <= K, z - s_lse, 0.0)
    log_p = tl.where(
        slots <= K, y - y_top - tl.log2(tl.sum(tl.exp2(y - y_top), 0)), 0.0
    )  # fmt: skip
    q = tl.where(slots <= K, tl.exp2(log_q), 0.0)
    p = tl.where(slots <= K, tl.exp2(log_p), 0.0)
    loss = 0.0
    grad = q - p
    if DIVERGENCE == 1:
        loss = tl.sum(p * (log_p - log_q), 0)
    if DIVERGENCE == 2:
        loss = tl.sum(q * (log_q - log_p), 0)
        grad = LN2 * q * (log_q - log_p - loss)
    if DIVERGENCE == 3:
        between = beta * p + (1.0 - beta) * q
        of_q = tl.sum(q * log_ratio(q, between), 0)
        loss = beta * tl.sum(p * log_ratio(p, between), 0) + (1.0 - beta) * of_q
        grad = LN2 * (1.0 - beta) * q * (log_ratio(q, between) - of_q)
    loss = loss * kl * temperature * temperature
    grad = grad * kl * temperature
    c_lse = s_lse
    if CE:
        if WARM:
            c_rest, _top, _scale = log_sum(c_m, c_l)
            c = tl.where(slots == K, c_rest, mine * cold)
            c_top = tl.max(c, 0)
            c_lse = c_top + tl.log2(tl.sum(tl.exp2(c - c_top), 0))
        loss += ce * (c_lse - given)
    tl.store(losses + first + row, loss * LN2)
    if GRAD:
        of_rest = tl.sum(tl.where(slots == K, grad, 0.0), 0)
        for v in tl.range(0, V, BLOCK, num_stages=STAGES):
            at = v + lanes
            here = at < V
            raw = tl.load(student + at, mask=here, other=-float("inf")).to(tl.float32)
            other = of_rest * tl.exp2(raw * warm - rest)
            if CE:
                of_text = tl.exp2(raw * cold - c_lse)
                other += ce * (of_text - tl.where(at == target, 1.0, 0.0))
            tl.store(student + at, other.to(student.dtype.element_ty), mask=here)
        tl.debug_barrier()
        if CE:
            of_text = tl.exp2(mine * cold - c_lse)
            grad += ce * (of_text - tl.where(index == target, 1.0, 0.0))
        tl.store(student + index, grad.to(student.dtype.element_ty), mask=known)


@triton.jit
def rest_kernel(
    logits, indices, log_rest, temperature, V: tl.constexpr, K: tl.constexpr,
    SLOTS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """log Σ exp(logit / temperature) of one row over all but K tokens; those logits are lost."""
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    lanes = tl.arange(0, BLOCK)
    slots = tl.arange(0, SLOTS)
    index = tl.load(indices + row * K + slots, mask=slots < K, other=0)
    nothing = tl.full([SLOTS], -float("inf"), tl.float32)
    tl.store(logits + index, nothing.to(logits.dtype.element_ty), mask=slots < K)
    tl.debug_barrier()
    m = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for v in tl.range(0, V, BLOCK, num_stages=STAGES):
        at = v + lanes
        raw = tl.load(logits + at, mask=at < V, other=-float("inf")).to(tl.float32)
        m, total, _keep, _share = see(m, total, raw / (LN2 * temperature))
    found, _top, _scale = log_sum(m, total)
    tl.store(log_rest + row, found * LN2)


def _launch(operation: str, logits: Tensor) -> dict[str, Any]:
    sizes = tile(operation, device=logits.device)
    return {"BLOCK": sizes["block"], "STAGES": sizes["stages"], "num_warps": sizes["warps"]}


def _slots(k: int) -> int:
    return 1 << k.bit_length()


def dense(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    losses: Tensor,
    first: int,
    *,
    kl: float,
    ce: float,
    temperature: float,
    beta: float,
    divergence: str,
    grad: bool,
) -> None:
    """Losses of logits [n, V], whose columns lie side by side, written to ``losses[first:]``.

    Args:
        student: overwritten by the gradient of the sum of losses, if `grad`.
        teacher: [n, V], or None without a divergence.
        targets: [N] int64 of all rows; this call's begin at `first`.
        losses: [N] float32.
    """
    n, words = student.shape
    dense_kernel[(n,)](
        student,
        student if teacher is None else teacher,
        losses if targets is None else targets,
        losses,
        first,
        float(kl),
        float(ce),
        float(temperature),
        float(beta),
        V=words,
        STUDENT=student.stride(0),
        TEACHER=0 if teacher is None else teacher.stride(0),
        DIVERGENCE=0 if teacher is None else DIVERGENCES[divergence],
        CE=targets is not None,
        WARM=temperature != 1.0,
        GRAD=grad,
        **_launch("loss_dense", student),
    )


def top(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    log_rest: Tensor,
    targets: Tensor | None,
    losses: Tensor,
    first: int,
    *,
    kl: float,
    ce: float,
    temperature: float,
    beta: float,
    divergence: str,
    grad: bool,
) -> None:
    """`dense` where the teacher is its most likely tokens: [N, K], [N, K] and [N] of all rows."""
    n, words = student.shape
    k = indices.shape[1]
    top_kernel[(n,)](
        student,
        indices,
        log_probs,
        log_rest,
        losses if targets is None else targets,
        losses,
        first,
        float(kl),
        float(ce),
        float(temperature),
        float(beta),
        V=words,
        K=k,
        SLOTS=_slots(k),
        STUDENT=student.stride(0),
        DIVERGENCE=DIVERGENCES[divergence],
        CE=targets is not None,
        WARM=temperature != 1.0,
        GRAD=grad,
        **_launch("loss_top", student),
    )


def rest(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """log Σ exp(logits / temperature) [n] over the tokens that `indices` [n, K] leaves out.

    The logits [n, V] of the others are overwritten.
    """
    found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    k = indices.shape[1]
    rest_kernel[(len(logits),)](
        logits,
        indices,
        found,
        float(temperature),
        V=logits.shape[1],
        K=k,
        SLOTS=_slots(k),
        STRIDE=logits.stride(0),
        **_launch("loss_top", logits),
    )
    return found
