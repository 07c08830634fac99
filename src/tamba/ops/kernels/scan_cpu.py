"""The selective scan on a CPU as one compiled loop (Numba), forward and backward, float32.

Plain torch has to pass over D · N numbers a token once for every operation; here a token's decay,
state and output are made in registers, for a block of channels that a core walks through time
alone. Blocks go to as many threads as torch uses. The gradient keeps one state every `_RUN` tokens
and recomputes a run at a time; sums over channels are made in blocks and added in a fixed order, so
that results repeat to the bit whatever the number of threads.

Numba compiles at the first import (seconds) and keeps the machine code on disk: once, for arrays of
any strides, since a block of many channels has other strides than one of few.

Shape letters: `B` batch, `T` tokens, `D` channels, `G` groups, `N` d_state.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import float32, njit
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 64  # channels that one core walks together: eight vectors of eight
_RUN = 32  # tokens between kept states
_FAST = {"contract", "reassoc", "nsz"}  # fused and reordered sums; infinities and NaN stay

# 2^f on [-1/2, 1/2], the polynomial of sixth degree whose greatest relative error is least (2e-9;
# 8e-8 as rounded) with 1 at f = 0: a step of size 0 has to pass the state on as it is.
_E1, _E2, _E3, _E4, _E5, _E6 = (
    np.float32(e)
    for e in (0.69314718, 0.24022648, 0.055503324, 0.0096184369, 0.0013398875, 0.00015353362)
)
_LOG2_E = math.log2(math.e)
_LEAST, _MOST = np.float32(-126.0), np.float32(127.0)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@intrinsic
def _power_of_two(typing: Any, exponent: Any) -> Any:
    """2^exponent for a whole float32 in [-126, 127]: its bits, with 32-bit integers throughout."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = builder.fptosi(arguments[0], ir.IntType(32))
        bits = builder.shl(
            builder.add(whole, ir.Constant(ir.IntType(32), 127)), ir.Constant(ir.IntType(32), 23)
        )
        return builder.bitcast(bits, ir.FloatType())

    return float32(float32), generate


@njit(fastmath=_FAST, inline="always")
def _exp2(v: Any) -> Any:
    """2^v by a polynomial that vectorises; at least 2^-126, at most 2^127."""
    v = min(max(v, _LEAST), _MOST)
    whole = np.rint(v)
    f = v - whole
    p = _E5 + f * _E6
    p = _E4 + f * p
    p = _E3 + f * p
    p = _E2 + f * p
    p = _E1 + f * p
    p = _ONE + f * p
    return p * _power_of_two(whole)


@njit(nogil=True, cache=True, fastmath=_FAST)
def exponentials(rates, steps):
    """Sums over t < `steps` of ``2^(-t rates / 2^20)``, for a block of `_BLOCK` rates: exponentials
    as the loops below take them, with nothing beside them. For benchmarks."""
    total = np.zeros(_BLOCK, np.float32)
    for t in range(steps):
        step = np.float32(t) * np.float32(-(2.0**-20))
        for d in range(_BLOCK):
            total[d] += _exp2(step * rates[d])
    return total


@njit(
    "f4[:,:], f4[:,:], f4[:,:], f4[:,::1], f4[:,::1], b1[::1], f4[:,:], f4[:,:], f4[:,:,:]",
    nogil=True, cache=True, fastmath=_FAST,
)  # fmt: skip
def _forward(x, dt, A, B, C, starts, state, y, kept):
    """One block of channels of one row. A and state are [N, D], A times log2(e)."""
    tokens, width = x.shape
    d_state = A.shape[0]
    h = np.zeros((d_state, _BLOCK), np.float32)
    a = np.zeros((d_state, _BLOCK), np.float32)
    step = np.zeros(_BLOCK, np.float32)
    u = np.zeros(_BLOCK, np.float32)
    out = np.zeros(_BLOCK, np.float32)
    for n in range(d_state):
        for d in range(width):
            h[n, d] = state[n, d]
            a[n, d] = A[n, d]
    for t in range(tokens):
        if kept.shape[0] > 0 and t % _RUN == 0:
            for n in range(d_state):
                for d in range(width):
                    kept[t // _RUN, n, d] = h[n, d]
        if starts[t]:
            h[:, :] = _ZERO
        for d in range(width):
            step[d] = dt[t, d]
            u[d] = step[d] * x[t, d]
        for d in range(_BLOCK):
            out[d] = _ZERO
        for n in range(d_state):
            b, c = B[t, n], C[t, n]
            for d in range(_BLOCK):
                s = _exp2(step[d] * a[n, d]) * h[n, d] + u[d] * b
                h[n, d] = s
                out[d] += s * c
        for d in range(width):
            y[t, d] = out[d]
    for n in range(d_state):
        for d in range(width):
            state[n, d] = h[n, d]


@njit(
    "f4[:,:], f4[:,:], f4[:,:], f4[:,::1], f4[:,::1], b1[::1], f4[:,:,:], f4[:,:], f4[:,:], "
    "f4[:,:], f4[:,:], f4[:,:], f4[:,::1], f4[:,::1]",
    nogil=True, cache=True, fastmath=_FAST,
)  # fmt: skip
def _backward(x, dt, A, B, C, starts, kept, gy, g_state, gx, gdt, gA, gB, gC):
    """One block of channels of one row; g_state [N, D] is read and written."""
    tokens, width = x.shape
    d_state = A.shape[0]
    a = np.zeros((d_state, _BLOCK), np.float32)
    g = np.zeros((d_state, _BLOCK), np.float32)
    ga = np.zeros((d_state, _BLOCK), np.float32)
    decays = np.zeros((_RUN, d_state, _BLOCK), np.float32)
    states = np.zeros((_RUN + 1, d_state, _BLOCK), np.float32)
    step = np.zeros((_RUN, _BLOCK), np.float32)
    u = np.zeros((_RUN, _BLOCK), np.float32)
    dy = np.zeros(_BLOCK, np.float32)
    to_u = np.zeros(_BLOCK, np.float32)
    to_log = np.zeros(_BLOCK, np.float32)
    for n in range(d_state):
        for d in range(width):
            a[n, d] = A[n, d]
            g[n, d] = g_state[n, d]
    for run in range((tokens - 1) // _RUN, -1, -1):
        first = run * _RUN
        length = min(_RUN, tokens - first)
        for n in range(d_state):
            for d in range(width):
                states[0, n, d] = kept[run, n, d]
        for i in range(length):
            t = first + i
            for d in range(width):
                step[i, d] = dt[t, d]
                u[i, d] = step[i, d] * x[t, d]
            seen = _ZERO if starts[t] else _ONE
            for n in range(d_state):
                b = B[t, n]
                for d in range(_BLOCK):
                    decay = _exp2(step[i, d] * a[n, d]) * seen
                    decays[i, n, d] = decay
                    states[i + 1, n, d] = decay * states[i, n, d] + u[i, d] * b
        for i in range(length - 1, -1, -1):
            t = first + i
            for d in range(width):
                dy[d] = gy[t, d]
            for d in range(_BLOCK):
                to_u[d] = _ZERO
                to_log[d] = _ZERO
            for n in range(d_state):
                b, c = B[t, n], C[t, n]
                to_b, to_c = _ZERO, _ZERO
                for d in range(_BLOCK):
                    gh = g[n, d] + dy[d] * c
                    to_c += dy[d] * states[i + 1, n, d]
                    to_b += gh * u[i, d]
                    to_u[d] += gh * b
                    before = gh * decays[i, n, d]
                    log = before * states[i, n, d]  # gain of the decay's exponent, dt · A
                    ga[n, d] += log * step[i, d]
                    to_log[d] += log * a[n, d]
                    g[n, d] = before
                gB[t, n] = to_b
                gC[t, n] = to_c
            for d in range(width):
                gx[t, d] = to_u[d] * step[i, d]
                gdt[t, d] = to_u[d] * x[t, d] + to_log[d] * np.float32(1 / _LOG2_E)
    for n in range(d_state):
        for d in range(width):
            gA[n, d] = ga[n, d]
            g_state[n, d] = g[n, d]


@cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="tamba-scan")


os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork


def _each_block(work: Callable[[int, int, int, int], None], x: Tensor, groups: int) -> None:
    """``work(row, group, first channel, block)`` for every block of channels of every row."""
    batch, _, channels = x.shape
    members = channels // groups
    places = [
        (b, k, d0) for b in range(batch) for k in range(groups) for d0 in range(0, members, _BLOCK)
    ]
    per_row = len(places) // batch
    jobs = [(b, k, d0, i % per_row) for i, (b, k, d0) in enumerate(places)]
    number = min(torch.get_num_threads(), len(jobs))
    if number == 1:
        for job in jobs:
            work(*job)
    else:
        for _ in _threads(number).map(lambda job: work(*job), jobs):
            pass


class _Scan(torch.autograd.Function):
    """x, dt [B, T, G, D/G]; A [G, N, D/G] times log2(e); B, C [B, G, T, N]; state [B, G, N, D/G].

    The order of D is that of groups, then of their members.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        starts: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, groups = x.shape[:3]
        y, final = torch.empty_like(x), state.clone(memory_format=torch.contiguous_format)
        runs = -(-tokens // _RUN) if keep and any(ctx.needs_input_grad) else 0
        kept = x.new_empty(batch, groups, runs, *A.shape[1:])
        if starts is None:
            starts = torch.zeros(batch, tokens, dtype=torch.bool)
        xs, dts, As, Bs, Cs, ss, hs, ys, ks = (
            t.detach().numpy() for t in (x, dt, A, B, C, starts, final, y, kept)
        )

        def work(b: int, k: int, d0: int, _: int) -> None:
            d = slice(d0, d0 + _BLOCK)
            _forward(
                xs[b, :, k, d], dts[b, :, k, d], As[k, :, d], Bs[b, k], Cs[b, k], ss[b],
                hs[b, k, :, d], ys[b, :, k, d], ks[b, k, :, :, d],
            )  # fmt: skip

        _each_block(work, x.flatten(2), groups)
        ctx.save_for_backward(x, dt, A, B, C, starts, kept)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        x, dt, A, B, C, starts, kept = ctx.saved_tensors
        batch, tokens, groups, members = x.shape
        d_state, blocks = A.shape[1], -(-members // _BLOCK)
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y.contiguous()
        grad_state = x.new_zeros(batch, groups, d_state, members)
        if grad_final is not None:
            grad_state.copy_(grad_final)
        grad_x, grad_dt = torch.empty_like(x), torch.empty_like(x)
        grad_A = x.new_empty(batch, *A.shape)
        grad_B = x.new_empty(batch, groups, blocks, tokens, d_state)
        grad_C = torch.empty_like(grad_B)
        xs, dts, As, Bs, Cs, ss, ks, gys, gss, gxs, gdts, gAs, gBs, gCs = (
            t.numpy()
            for t in (
                x, dt, A, B, C, starts, kept, grad_y, grad_state, grad_x, grad_dt, grad_A,
                grad_B, grad_C,
            )
        )  # fmt: skip

        def work(b: int, k: int, d0: int, block: int) -> None:
            d, i = slice(d0, d0 + _BLOCK), block % blocks
            _backward(
                xs[b, :, k, d], dts[b, :, k, d], As[k, :, d], Bs[b, k], Cs[b, k], ss[b],
                ks[b, k, :, :, d], gys[b, :, k, d], gss[b, k, :, d], gxs[b, :, k, d],
                gdts[b, :, k, d], gAs[b, k, :, d], gBs[b, k, i], gCs[b, k, i],
            )  # fmt: skip

        _each_block(work, x.flatten(2), groups)
        # A came times log2(e), so its gradient is that of dt · A over it.
        d_A = grad_A.sum(0) / _LOG2_E
        return grad_x, grad_dt, d_A, grad_B.sum(2), grad_C.sum(2), grad_state, None, None


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``y_t = C_t · h_t``, on a CPU in float32.

    Args:
        x: [B, T, D], any dtype.
        dt: [B, T, D] float32, processed.
        A: [D, N] float32.
        B: [B, T, G, N], any dtype.
        C: [B, T, G, N], any dtype.
        state: [B, D, N] float32 before token 0.
        starts: [B, T] bool or None.

    Returns:
        y [B, T, D] and the last state [B, D, N], both float32.
    """
    batch, _, channels = x.shape
    groups = B.shape[2]

    def by_group(t: Tensor) -> Tensor:
        return t.float().unflatten(2, (groups, -1)).contiguous()

    y, final = _Scan.apply(
        by_group(x),
        by_group(dt),
        (A * _LOG2_E).view(groups, -1, A.shape[1]).mT.contiguous(),
        B.float().transpose(1, 2).contiguous(),
        C.float().transpose(1, 2).contiguous(),
        state.view(batch, groups, -1, A.shape[1]).mT.contiguous(),
        None if starts is None else starts.contiguous(),
        torch.is_grad_enabled(),
    )
    return y.flatten(2), final.mT.reshape(batch, channels, A.shape[1])
