"""What is done to rows of numbers between the matrix products of a step on a CPU (Numba).

Products in bfloat16 are so fast on CPUs with tiles of it (AMX) that most of a step is what lies
between them, when torch does it: one pass over memory for each operation, and more for each change
of type. Here each is one pass: numbers are widened to float32 in registers and rounded once, when
they are stored. Rows go to as many threads as torch uses in blocks of a fixed size, so that sums
over rows repeat to the bit.

Shape letters: `n` rows, `D` numbers of a row, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import float32, njit, types, uint16
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from tamba.ops.kernels.scan_cpu import _FAST, _exp2, _threads

_ROWS = 128  # of a block
_LANES = 64
_LOG2_E = np.float32(math.log2(math.e))
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@intrinsic
def _wide(typing: Any, value: Any) -> Any:
    """An element of an array as float32, of bfloat16 bits or as it is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not isinstance(value, types.Integer):
            return arguments[0]
        word = builder.zext(arguments[0], ir.IntType(32))
        word = builder.shl(word, ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(word, ir.FloatType())

    return float32(value), generate


@intrinsic
def _rounded(typing: Any, value: Any) -> Any:
    """The bits of the bfloat16 that is nearest to a float32, the even one of two."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _round(builder, arguments[0])

    return uint16(float32), generate


@intrinsic
def _as(typing: Any, array: Any, value: Any) -> Any:
    """A float32 as an element of this array, which holds float32 or bfloat16 bits."""
    short = isinstance(array.dtype, types.Integer)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _round(builder, arguments[1]) if short else arguments[1]

    return array.dtype(array, float32), generate


def _round(builder: Any, value: Any) -> Any:
    def whole(number: int) -> Any:
        return ir.Constant(ir.IntType(32), number)

    word = builder.bitcast(value, ir.IntType(32))
    odd = builder.and_(builder.lshr(word, whole(16)), whole(1))
    near = builder.add(word, builder.add(odd, whole(0x7FFF)))
    number = builder.fcmp_ordered("ord", value, value)
    word = builder.select(number, near, whole(0x7FC00000))
    return builder.trunc(builder.lshr(word, whole(16)), ir.IntType(16))


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _gate_forward(a, b, out):
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            v = _wide(a[i, j])
            s = _ONE / (_ONE + _exp2(-v * _LOG2_E))
            out[i, j] = _as(out, v * s * _wide(b[i, j]))


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _gate_backward(a, b, g, ga, gb):
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            v, d = _wide(a[i, j]), _wide(g[i, j])
            s = _ONE / (_ONE + _exp2(-v * _LOG2_E))
            ga[i, j] = _as(ga, d * _wide(b[i, j]) * s * (_ONE + v * (_ONE - s)))
            gb[i, j] = _as(gb, d * v * s)


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _norm_forward(x, weight, eps, out, scale):
    groups, width = weight.shape
    for i in range(x.shape[0]):
        for k in range(groups):
            total = _ZERO
            for j in range(width):
                v = _wide(x[i, k * width + j])
                total += v * v
            r = _ONE / np.float32(np.sqrt(total / np.float32(width) + eps))
            scale[i, k] = r
            for j in range(width):
                v = _wide(x[i, k * width + j])
                out[i, k * width + j] = _as(out, v * r * weight[k, j])


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _norm_backward(x, weight, scale, g, gx, gw):
    groups, width = weight.shape
    for i in range(x.shape[0]):
        for k in range(groups):
            r = scale[i, k]
            along = _ZERO
            for j in range(width):
                unit = _wide(x[i, k * width + j]) * r
                d = _wide(g[i, k * width + j])
                gw[k, j] += d * unit
                along += d * weight[k, j] * unit
            along = along / np.float32(width)
            for j in range(width):
                unit = _wide(x[i, k * width + j]) * r
                d = _wide(g[i, k * width + j]) * weight[k, j]
                gx[i, k * width + j] = _as(gx, r * (d - unit * along))


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _turn(x, cos, sin, sign, out):
    """x, out [n, H, P]; cos, sin [n, dim] with equal halves."""
    half = cos.shape[1] // 2
    for i in range(x.shape[0]):
        for h in range(x.shape[1]):
            for j in range(half):
                c, s = cos[i, j], sign * sin[i, j]
                a, b = _wide(x[i, h, j]), _wide(x[i, h, half + j])
                out[i, h, j] = _as(out, a * c - b * s)
                out[i, h, half + j] = _as(out, b * c + a * s)
            for j in range(2 * half, x.shape[2]):
                out[i, h, j] = x[i, h, j]


@njit(inline="always")
def _most(row):
    """The largest of a row, lane by lane: a reduction to one number would not vectorise."""
    lanes = np.full(_LANES, -np.inf, np.float32)
    whole = row.shape[0] // _LANES * _LANES
    for first in range(0, whole, _LANES):
        for k in range(_LANES):
            v = _wide(row[first + k])
            lanes[k] = v if v > lanes[k] else lanes[k]
    most = lanes.max()
    for j in range(whole, row.shape[0]):
        most = max(most, _wide(row[j]))
    return most


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _divergence(student, teacher, targets, losses, kl, ce, temperature, grad):
    """Rows of logits, bfloat16 bits; see `divergence`. `targets` is empty without cross-entropy."""
    cold = _LOG2_E / temperature
    words = student.shape[1]
    for i in range(student.shape[0]):
        most_s, most_t = _most(student[i]), _most(teacher[i])
        sum_s, sum_t, apart = _ZERO, _ZERO, _ZERO
        for j in range(words):
            s, t = _wide(student[i, j]) - most_s, _wide(teacher[i, j]) - most_t
            p = _exp2(t * cold)
            sum_s += _exp2(s * cold)
            sum_t += p
            apart += p * (t - s)
        between = apart / (sum_t * temperature) + np.float32(math.log(sum_s) - math.log(sum_t))
        loss = kl * temperature * temperature * between
        sum_1, target = _ONE, -1
        if targets.shape[0] > 0:
            target = targets[i]
            sum_1 = _ZERO
            for j in range(words):
                sum_1 += _exp2((_wide(student[i, j]) - most_s) * _LOG2_E)
            known = _wide(student[i, target]) - most_s
            loss += ce * (np.float32(math.log(sum_1)) - known)
        losses[i] = loss
        if grad:
            # What is not a number stays so: polynomials of such logits would be some number.
            whole = kl * temperature if math.isfinite(loss) else loss - loss
            of_s, of_t = whole / sum_s, whole / sum_t
            if target >= 0:
                of_1 = ce / sum_1
                hit = _wide(student[i, target]) - most_s
                q = of_s * _exp2(hit * cold) + of_1 * _exp2(hit * _LOG2_E) - ce
                q -= of_t * _exp2((_wide(teacher[i, target]) - most_t) * cold)
                for j in range(words):
                    s, t = _wide(student[i, j]) - most_s, _wide(teacher[i, j]) - most_t
                    d = of_s * _exp2(s * cold) - of_t * _exp2(t * cold)
                    student[i, j] = _rounded(d + of_1 * _exp2(s * _LOG2_E))
                student[i, target] = _rounded(q)
            else:
                for j in range(words):
                    s, t = _wide(student[i, j]) - most_s, _wide(teacher[i, j]) - most_t
                    student[i, j] = _rounded(of_s * _exp2(s * cold) - of_t * _exp2(t * cold))


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _scores_backward(scores, grads, log_sums, along, scaling, first, count, shares):
    """[R t, S]: `count` rows of queries, those from `first` on, for one head after another."""
    keys = scores.shape[1]
    for i in range(scores.shape[0]):
        seen = first + i % count + 1
        log_sum, own = log_sums[i] * _LOG2_E, along[i]
        cold = scaling * _LOG2_E
        for j in range(seen):
            p = _exp2(scores[i, j] * cold - log_sum)
            shares[i, j] = _as(shares, p)
            grads[i, j] = _as(grads, p * (_wide(grads[i, j]) - own) * scaling)
        for j in range(seen, keys):
            shares[i, j] = _as(shares, _ZERO)
            grads[i, j] = _as(grads, _ZERO)


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _window(x, weight, bias, t, out):
    """Token t of a causal convolution before its activation: x [T, C], weight [W, C]."""
    width = weight.shape[0]
    for c in range(x.shape[1]):
        out[c] = bias[c]
    for k in range(max(0, width - 1 - t), width):
        row, taps = x[t - (width - 1) + k], weight[k]
        for c in range(x.shape[1]):
            out[c] += taps[c] * _wide(row[c])


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _conv_forward(x, weight, bias, silu, first, end, y):
    out = np.empty(x.shape[1], np.float32)
    for t in range(first, end):
        _window(x, weight, bias, t, out)
        row = y[t]
        for c in range(x.shape[1]):
            v = out[c]
            if silu:
                v = v / (_ONE + _exp2(-v * _LOG2_E))
            row[c] = _as(row, v)


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _conv_backward(x, weight, bias, silu, first, end, g, gx, gw, gb):
    """Tokens from `first` to `end`: what they get from those up to W - 1 after, and give."""
    width, channels = weight.shape
    length = x.shape[0]
    out = np.empty(channels, np.float32)
    reach = min(end + width - 1, length)
    into = np.zeros((reach - first, channels), np.float32)
    for t in range(first, reach):
        _window(x, weight, bias, t, out)
        row, d_out = g[t], into[t - first]
        for c in range(channels):
            d = _wide(row[c])
            if silu:
                s = _ONE / (_ONE + _exp2(-out[c] * _LOG2_E))
                d *= s * (_ONE + out[c] * (_ONE - s))
            d_out[c] = d
    for t in range(first, end):
        d_out = into[t - first]
        for c in range(channels):
            gb[c] += d_out[c]
            out[c] = _ZERO
        for k in range(width):
            back, on = t - (width - 1) + k, t + (width - 1) - k
            if back >= 0:
                row, taps = x[back], gw[k]
                for c in range(channels):
                    taps[c] += d_out[c] * _wide(row[c])
            if on < length:
                later, own = into[on - first], weight[k]
                for c in range(channels):
                    out[c] += later[c] * own[c]
        row = gx[t]
        for c in range(channels):
            row[c] = _as(row, out[c])


def _array(tensor: Tensor) -> Any:
    """Its numbers, bfloat16 as bits, where they lie."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _each(rows: int, work: Callable[[slice, int], None], size: int = _ROWS) -> None:
    """``work(rows of the block, block)`` for all blocks."""
    spans = [slice(at, min(at + size, rows)) for at in range(0, rows, size)]
    number = min(torch.get_num_threads(), len(spans))
    if number <= 1:
        for block, span in enumerate(spans):
            work(span, block)
    else:
        for _ in _threads(number).map(work, spans, range(len(spans))):
            pass


class _Gate(torch.autograd.Function):
    """silu(a) b; a, b [n, D]."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        out = torch.empty_like(b, memory_format=torch.contiguous_format)
        A, B, Y = _array(a), _array(b), _array(out)
        _each(len(a), lambda at, _: _gate_forward(A[at], B[at], Y[at]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        outs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, b)]
        A, B, G, to_a, to_b = (_array(t) for t in (a, b, grad.contiguous(), *outs))
        _each(len(a), lambda at, _: _gate_backward(A[at], B[at], G[at], to_a[at], to_b[at]))
        return outs[0], outs[1]


class _Norm(torch.autograd.Function):
    """x [n, G D], weight [G, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=torch.bfloat16)
        scale = torch.empty(len(x), len(weight))
        X, W, Y, S = (_array(t) for t in (x, weight, out, scale))
        _each(len(x), lambda at, _: _norm_forward(X[at], W, np.float32(eps), Y[at], S[at]))
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = torch.zeros(-(-len(x) // _ROWS), *weight.shape)
        X, W, S, G, to_x, to_w = (
            _array(t) for t in (x, weight, scale, grad.contiguous(), grad_x, parts)
        )
        _each(len(x), lambda at, k: _norm_backward(X[at], W, S[at], G[at], to_x[at], to_w[k]))
        return grad_x, parts.sum(0), None


class _Rotation(torch.autograd.Function):
    """x [n, H, P]; cos, sin [n, dim]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad.contiguous(), cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    X, C, S, Y = (_array(t) for t in (x, cos, sin, out))
    _each(len(x), lambda at, _: _turn(X[at], C[at], S[at], np.float32(sign), Y[at]))
    return out


class _Conv(torch.autograd.Function):
    """x [B, T, C]; weight [W, C] and bias [C] in float32; whether silu follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        X, W, b, Y = (_array(t) for t in (x, weight, bias, y))

        def work(at: slice, _: int) -> None:
            for row, first, end in _tokens_of(at, x.shape):
                _conv_forward(X[row], W, b, silu, first, end, Y[row])

        _each(x.shape[0] * -(-x.shape[1] // _ROWS), work, 1)
        ctx.save_for_backward(x, weight, bias)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias = ctx.saved_tensors
        blocks = x.shape[0] * -(-x.shape[1] // _ROWS)
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        taps, total = torch.zeros(blocks, *weight.shape), torch.zeros(blocks, *bias.shape)
        X, W, b, G, to_x, to_w, to_b = (
            _array(t) for t in (x, weight, bias, grad.contiguous(), grad_x, taps, total)
        )

        def work(at: slice, k: int) -> None:
            for row, first, end in _tokens_of(at, x.shape):
                _conv_backward(
                    X[row], W, b, ctx.silu, first, end, G[row], to_x[row], to_w[k], to_b[k]
                )

        _each(blocks, work, 1)
        return grad_x, taps.sum(0), total.sum(0), None


def _tokens_of(at: slice, shape: torch.Size) -> Iterator[tuple[int, int, int]]:
    """The row of the batch, the first token and the end of every block of tokens."""
    per_row = -(-shape[1] // _ROWS)
    for block in range(at.start, at.stop):
        row, first = block // per_row, block % per_row * _ROWS
        yield row, first, min(first + _ROWS, shape[1])


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The convolution of whole rows from nothing; see `tamba.ops.causal_conv1d`.

    Args:
        x: [B, T, C] in bfloat16.
        weight: [C, W].
        bias: [C], or None.
        silu: whether the activation follows.

    Returns:
        [B, T, C] in bfloat16.
    """
    taps = weight.float().mT.contiguous()
    added = torch.zeros(x.shape[2]) if bias is None else bias.float()
    y: Tensor = _Conv.apply(x.contiguous(), taps, added, silu)
    return y


def gate(a: Tensor, b: Tensor) -> Tensor:
    """``silu(a) b``, both [..., D] in bfloat16 or float32, as `b` is."""
    rows = (t.contiguous().view(-1, t.shape[-1]) for t in (a, b))  # else it would not vectorise
    return _Gate.apply(*rows).view(b.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """``weight · x / sqrt(mean(x²) + eps)`` over `groups` equal parts of the last dimension.

    Args:
        x: [..., D] in bfloat16 or float32.
        weight: [D].

    Returns:
        [..., D] in bfloat16.
    """
    rows = x.contiguous().view(-1, x.shape[-1])
    return _Norm.apply(rows, weight.float().view(groups, -1), eps).view(x.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first dim numbers of every head turned; see `tamba.model.rotary.rotate`.

    Args:
        x: [B, H, T, P] in bfloat16.
        cos, sin: [B or 1, T, dim] in float32; the two halves of `dim` are equal.

    Returns:
        [B, H, T, P] in bfloat16, heads of a token side by side.
    """
    tokens = x.transpose(1, 2)
    cos, sin = (t.expand(len(x), -1, -1).contiguous().flatten(0, 1) for t in (cos, sin))
    return (
        _Rotation.apply(tokens.contiguous().flatten(0, 1), cos, sin)
        .view(tokens.shape)
        .transpose(1, 2)
    )


def divergence(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None,
    losses: Tensor,
    *,
    kl: float,
    ce: float,
    temperature: float,
    grad: bool,
) -> None:
    """``kl τ² KL(teacher, student) + ce · cross-entropy`` of every row, and its gradient.

    Args:
        student: [n, V] logits in bfloat16; the gradient takes their place.
        teacher: [n, V] logits in bfloat16.
        targets: [n] int64, or None without cross-entropy.
        losses: [n] float32, filled.
        grad: whether the gradient is wanted.
    """
    follow = torch.empty(0, dtype=torch.int64) if targets is None else targets
    S, T, F, L = (_array(t) for t in (student, teacher, follow, losses))
    weights = np.float32(kl), np.float32(ce), np.float32(temperature)

    def work(at: slice, _: int) -> None:
        _divergence(S[at], T[at], F[at], L[at], *weights, grad)

    _each(len(student), work, 32)


def scores_backward(
    scores: Tensor, grads: Tensor, log_sums: Tensor, along: Tensor, scaling: float, first: int
) -> Tensor:
    """The shares ``exp(scaling · scores - log_sums)`` of causal attention; their gradient.

    Args:
        scores: [n, R, t, S] float32, products of queries ``first`` to ``first + t`` with S keys.
        grads: [n, R, t, S] bfloat16, of the shares; those of the products take their place.
        log_sums: [n, R, t] float32, of the exponentials of scaled scores.
        along: [n, R, t] float32, the shares' gradients in their mean.

    Returns:
        [n, R, t, S] bfloat16; 0, as the gradient is, for keys after the query.
    """
    shares = torch.empty_like(grads)
    S, G, L, A, P = (_array(t) for t in (scores, grads, log_sums, along, shares))
    count, keys = scores.shape[2:]

    def work(at: slice, _: int) -> None:
        for n in range(at.start, at.stop):
            _scores_backward(
                S[n].reshape(-1, keys), G[n].reshape(-1, keys), L[n].reshape(-1),
                A[n].reshape(-1), np.float32(scaling), first, count, P[n].reshape(-1, keys),
            )  # fmt: skip

    _each(len(scores), work, 1)
    return shares
