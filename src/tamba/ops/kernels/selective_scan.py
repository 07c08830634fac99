# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment,var-annotated,misc,unreachable"
"""The Mamba-1 selective scan as Triton kernels: a lane a channel, time in registers.

A program owns a block of channels of one row and walks a span of tokens, `K` at a time. What a lane
holds is a few numbers per token and the states of its channel; sums over states never leave the
lane. B and C are the same for all lanes: they are laid out beforehand as pairs of float32 and, a
tile at a time, put into shared memory. The exponentials are what bounds the forward pass in theory
(the special-function units give 16 a clock where there are 128 multiply-adds); the kernel can give
some states of a token a polynomial instead, as many as the tile table says.

The gradient needs the states again. The forward pass keeps one state per tile of the backward pass,
rounded like x, which recomputes K states at a time in registers, one state number after the other,
walking from the last token to the first. Sums over channels (for B and C) go through small matrix
products where operands are half precision, and through float32 reductions otherwise; what a program
cannot finish it leaves as a partial sum of its own, added up afterwards in a fixed order: results
repeat bit for bit.

With 9 to 16 states a channel, a GPU runs other kernels for the same: two warps share channels,
each with half of the states and of a tile's tokens, so that a scheduler has twice the warps to
choose from.

Rows too few to fill the card are cut into spans of tokens that run at the same time: a first pass
finds what each span adds to a zero state, a second one chains the spans, and the main pass starts
each span from the state it really has. The forward pass does more than 16 states a channel 16 at a
time, with the sums over states kept in float32 between the passes.

Shape letters: `B` batch, `T` tokens, `D` channels, `G` groups, `N` d_state (`M`: rounded up), `K`
tokens of a tile, `J` kept states of a row, `S` spans of a row, `R` channel blocks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tamba.ops.kernels.tiles import Tile, multiprocessors, tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Added to the exponent of a token that starts a document: its decay is exactly 0.
START = tl.constexpr(-1.0e30)
STATES = 16  # of one pass


# What differs from call to call of one model: not to be compiled for.
_OF_A_CALL = ["padding", "x_b", "dt_b", "z_b", "dy_b", "state_b", "dlast_b"]


@triton.jit
def row_at(rows, row, stride, STRIDE: tl.constexpr):
    """Where a row of the batch begins: a multiple of what of 16 there is in the STRIDE of tokens.

    `rows_of` sees to that, so that accesses are as wide for an odd number of tokens as for others.
    """
    if STRIDE % 16 == 0:
        return rows + tl.multiple_of(row * stride, 16)
    elif STRIDE % 8 == 0:
        return rows + tl.multiple_of(row * stride, 8)
    elif STRIDE % 4 == 0:
        return rows + tl.multiple_of(row * stride, 4)
    else:
        return rows + row * stride


@triton.jit
def exp2_by_polynomial(x):
    """2^x for x ≤ 0 without the special-function unit, relative error 2e-7; 0 below -127."""
    x = tl.maximum(x, -127.0)
    shifted = x + 12582912.0  # 1.5 · 2^23: the integer nearest to x is in the low bits
    f = x - (shifted - 12582912.0)
    p = 0.0013333533
    p = p * f + 0.00966625
    p = p * f + 0.055505
    p = p * f + 0.24022351
    p = p * f + 0.69314714
    p = p * f + 1.0
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decay_of(exponent, POLYNOMIAL: tl.constexpr):
    """2^exponent by one way or the other."""
    if POLYNOMIAL:
        return exp2_by_polynomial(exponent)
    return tl.exp2(exponent)


@triton.jit
def reciprocal(x, ASM: tl.constexpr):
    """1 / x, within one unit in the last place where assembly may be used."""
    if ASM:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def sigmoid(x, ASM: tl.constexpr):
    """1 / (1 + exp(-x)), for any x."""
    return reciprocal(1.0 + tl.exp2(x * -LOG2E), ASM)


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(exp(-|x|)), relative error 3e-7 down to the smallest results."""
    u = tl.exp2(tl.abs(x) * -LOG2E)
    p = -0.00853921
    p = p * u + 0.04408963
    p = p * u - 0.10768171
    p = p * u + 0.17745241
    p = p * u - 0.24495463
    p = p * u + 0.3327548
    p = p * u - 0.49997405
    p = p * u + 0.99999981
    return p * u + tl.maximum(x, 0.0)


# Triton's pass that picks a layout for each access takes a minute for kernels of this many. Here
# any layout with one channel a lane will do, so accesses go past it.
GET_16 = tl.constexpr(
    "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b16 $0, 0; @p ld.global.b16 $0, [$1];}"
)
GET_32 = tl.constexpr(
    "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1];}"
)
GET_64 = tl.constexpr(
    "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b64 $0, 0; @p ld.global.b64 $0, [$1];}"
)
PUT_16 = tl.constexpr(
    "{.reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; @p st.global.b16 [$1], $2;}"
)
PUT_32 = tl.constexpr(
    "{.reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; @p st.global.b32 [$1], $2;}"
)


@triton.jit
def get(pointer, mask, ASM: tl.constexpr):
    """What lies at `pointer`; 0 where `mask` is False."""
    if ASM:
        bits: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth
        if bits == 16:
            got = tl.inline_asm_elementwise(
                GET_16, "=h,l,r", [pointer.to(tl.int64), mask.to(tl.int32)],
                tl.int16, is_pure=True, pack=1,
            )  # fmt: skip
        elif bits == 32:
            got = tl.inline_asm_elementwise(
                GET_32, "=r,l,r", [pointer.to(tl.int64), mask.to(tl.int32)],
                tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            got = tl.inline_asm_elementwise(
                GET_64, "=l,l,r", [pointer.to(tl.int64), mask.to(tl.int32)],
                tl.int64, is_pure=True, pack=1,
            )  # fmt: skip
        return got.to(pointer.dtype.element_ty, bitcast=True)
    return tl.load(pointer, mask=mask, other=0)


@triton.jit
def get_again(pointer, mask, ASM: tl.constexpr):
    """float32 that this program may have put there: in the order in which it is written."""
    if ASM:
        return tl.inline_asm_elementwise(
            GET_32, "=f,l,r", [pointer.to(tl.int64), mask.to(tl.int32)],
            tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def put(pointer, value, mask, ASM: tl.constexpr):
    """`value`, in the type that `pointer` points to, where `mask` is True."""
    value = value.to(pointer.dtype.element_ty)
    if ASM:
        bits: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth
        if bits == 16:
            tl.inline_asm_elementwise(
                PUT_16, "=r,l,h,r",
                [pointer.to(tl.int64), value.to(tl.int16, bitcast=True), mask.to(tl.int32)],
                tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.inline_asm_elementwise(
                PUT_32, "=r,l,r,r",
                [pointer.to(tl.int64), value.to(tl.int32, bitcast=True), mask.to(tl.int32)],
                tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def load_rows(pointer, stride, t0, end, mask, K: tl.constexpr, ASM: tl.constexpr):
    """K rows as they lie in memory; 0 past `end`."""
    rows = ()
    pointer += t0.to(tl.int64) * stride
    for k in tl.static_range(K):
        rows += (get(pointer + k * stride, mask & (t0 + k < end), ASM),)
    return rows


@triton.jit
def step_sizes(raw, bias, t0, first, end, SOFTPLUS: tl.constexpr, K: tl.constexpr):
    """K rows of dt ready for use; 0 where there is no token."""
    rows = ()
    for k in tl.static_range(K):
        v = raw[k].to(tl.float32) + bias
        if SOFTPLUS:
            v = softplus(v)
        rows += (tl.where((t0 + k >= first) & (t0 + k < end), v, 0.0),)
    return rows


@triton.jit
def b_and_c(pointer):
    """The pair of float32 that lies at `pointer` as one 64-bit number."""
    pair = tl.load(pointer)
    b = (pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    c = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return b, c


# B and C of a tile wait in shared memory, where a lane finds them within some thirty cycles; from
# the second-level cache it would be ten times that, and a scheduler has two warps to hide it with.
# Triton places what it likes there but offers no handle, hence the assembly. Only for one warp.
STAGE_4 = tl.constexpr(
    """
    {
    .shared .align 16 .b8 tamba_pairs_4[512];
    .reg .u32 a;
    mov.u32 a, tamba_pairs_4;
    mov.u32 $0, a;
    add.u32 a, a, $1;
    bar.warp.sync 0xffffffff;
    st.shared.b64 [a], $2;
    st.shared.b64 [a+256], $3;
    bar.warp.sync 0xffffffff;
    }
    """
)
STAGE_8 = tl.constexpr(
    """
    {
    .shared .align 16 .b8 tamba_pairs_8[1024];
    .reg .u32 a;
    mov.u32 a, tamba_pairs_8;
    mov.u32 $0, a;
    add.u32 a, a, $1;
    bar.warp.sync 0xffffffff;
    st.shared.b64 [a], $2;
    st.shared.b64 [a+256], $3;
    st.shared.b64 [a+512], $4;
    st.shared.b64 [a+768], $5;
    bar.warp.sync 0xffffffff;
    }
    """
)


@triton.jit
def load_pairs(pairs, t0, T_all, lane, M: tl.constexpr, K: tl.constexpr, ASM: tl.constexpr):
    """A tile's 16 pairs a token, two tokens a row of lanes; 0 past the end."""
    rows = ()
    for i in tl.static_range(K // 2):
        t = t0 + 2 * i + (lane >> 4)
        rows += (get(pairs + t.to(tl.int64) * M + (lane & 15), t < T_all, ASM),)
    return rows


@triton.jit
def stage_pairs(rows, lane, K: tl.constexpr):
    """Put `rows` into shared memory; gives the address [32] of the first pair."""
    if K == 4:
        return tl.inline_asm_elementwise(
            STAGE_4, "=r,r,l,l", [lane * 8, rows[0], rows[1]], tl.int32, is_pure=False, pack=1
        )
    else:
        tl.static_assert(K == 8)
        return tl.inline_asm_elementwise(
            STAGE_8, "=r,r,l,l,l,l", [lane * 8, rows[0], rows[1], rows[2], rows[3]],
            tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def own(address):
    """float32 in shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [address], tl.float32, is_pure=False, pack=1
    )


@triton.jit
def staged_pair(address):
    """The pair at `address`: b, c."""
    return tl.inline_asm_elementwise(
        "ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [address],
        (tl.float32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def staged_pairs(address):
    """Two pairs: b, c, b, c."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r", [address],
        (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip


# Sums over a warp's channels of 8 + 8 numbers a lane. Neighbouring tokens go, rounded to bfloat16,
# into one register of the left operand of a 16 x 8 x 16 matrix product; the right operand has a one
# in the column where a sum is to come out, and the product adds up the four lanes of a row. What
# the eight rows hold is added by exchanging halves. Lane l then has the sum number
# ``(l>>3&1) + 2(l>>4&1) + 4(l&1) + 8(l>>1&1)``; lanes 4 to 7 of each eight repeat their neighbours.
SUM_OVER_WARP = tl.constexpr(
    """
    {
    .reg .b32 a<8>;
    .reg .f32 d<4>, e<2>, s, t, zero;
    .reg .pred high, odd;
    mov.f32 zero, 0f00000000;
    cvt.rn.bf16x2.f32 a0, $2, $1;
    cvt.rn.bf16x2.f32 a1, $4, $3;
    cvt.rn.bf16x2.f32 a2, $6, $5;
    cvt.rn.bf16x2.f32 a3, $8, $7;
    cvt.rn.bf16x2.f32 a4, $10, $9;
    cvt.rn.bf16x2.f32 a5, $12, $11;
    cvt.rn.bf16x2.f32 a6, $14, $13;
    cvt.rn.bf16x2.f32 a7, $16, $15;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {d0, d1, d2, d3}, {a0, a1, a2, a3}, {$17, $18}, {zero, zero, zero, zero};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {d0, d1, d2, d3}, {a4, a5, a6, a7}, {$19, $20}, {d0, d1, d2, d3};
    setp.ne.s32 high, $21, 0;
    setp.ne.s32 odd, $22, 0;
    selp.f32 s, d0, d2, high;
    selp.f32 e0, d2, d0, high;
    shfl.sync.bfly.b32 t, s, 16, 0x1f, 0xffffffff;
    add.f32 e0, e0, t;
    selp.f32 s, d1, d3, high;
    selp.f32 e1, d3, d1, high;
    shfl.sync.bfly.b32 t, s, 16, 0x1f, 0xffffffff;
    add.f32 e1, e1, t;
    selp.f32 s, e0, e1, odd;
    selp.f32 e0, e1, e0, odd;
    shfl.sync.bfly.b32 t, s, 8, 0x1f, 0xffffffff;
    add.f32 e0, e0, t;
    shfl.sync.bfly.b32 t, e0, 4, 0x1f, 0xffffffff;
    add.f32 $0, e0, t;
    }
    """
)
# bfloat16 one in the low and in the high half of a register.
ONE_LOW = tl.constexpr(0x00003F80)
ONE_HIGH = tl.constexpr(0x3F800000)


@triton.jit
def ones_in(row, low: tl.constexpr):
    """This lane's part of a right operand with ones in columns `low` and `low` + 1."""
    return tl.where(row == low, ONE_LOW, tl.where(row == low + 1, ONE_HIGH, 0)).to(tl.int32)


@triton.jit
def sums_over_warps(p, q, lane):
    """Eight rows p and eight rows q to one number a lane, their sums over the 32 lanes."""
    row = lane >> 2
    return tl.inline_asm_elementwise(
        SUM_OVER_WARP,
        "=f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,r,r,r,r,r,r",
        [p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7],
         q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7],
         ones_in(row, 0), ones_in(row, 2), ones_in(row, 4), ones_in(row, 6),
         lane & 16, lane & 8],
        tl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["starts", "padding", "T", "T_all", "B_b", "C_b", "starts_b", "starts_t"]
)
def pack_kernel(
    B, C, starts, padding, pairs, offsets,
    T, T_all, G: tl.constexpr, N: tl.constexpr, M: tl.constexpr, M2: tl.constexpr,
    B_b, B_T: tl.constexpr, B_g, B_n, C_b, C_T: tl.constexpr, C_g, C_n, starts_b, starts_t,
    HAS_STARTS: tl.constexpr, HAS_PADDING: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """B and C as pairs [B, G, T_all, M, 2] float32, and what a start adds to exponents [B, T_all].

    Zero where there is no token and no state.
    """
    row, group = tl.program_id(1).to(tl.int64), tl.program_id(2)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    first = 0
    if HAS_PADDING:
        first = tl.load(padding + row)
    real = (t < T) & (t >= first)
    n = tl.arange(0, M2)
    mask = real[:, None] & (n < N)[None, :]
    t_, n_ = t[:, None], n[None, :]
    B = row_at(B, row, B_b, B_T) + group * B_g
    C = row_at(C, row, C_b, C_T) + group * C_g
    b = tl.load(B + t_ * B_T + n_ * B_n, mask=mask, other=0.0)
    c = tl.load(C + t_ * C_T + n_ * C_n, mask=mask, other=0.0)
    both = tl.join(b.to(tl.float32), c.to(tl.float32))  # [TOKENS, M, 2]
    at = ((row * G + group) * T_all + t_) * M + n_
    at = at[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tl.store(pairs + at, both, mask=((t < T_all)[:, None] & (n < M)[None, :])[:, :, None])
    if HAS_STARTS and group == 0:
        begins = tl.load(starts + row * starts_b + t * starts_t, mask=real, other=0) != 0
        tl.store(offsets + row * T_all + t, tl.where(begins, START, 0.0), mask=t < T_all)


@triton.jit(do_not_specialize=[*_OF_A_CALL, "T", "T_all", "span", "n_spans", "J"])
def forward_kernel(
    x, dt, z, A, pairs, offsets, D, bias, padding, state,
    y, sums, last, kept, ends, steps,
    T, T_all, span, n_spans, J,
    x_b, dt_b, z_b, A_d, A_n, state_b, state_d, state_n,
    n0, X_T: tl.constexpr, DT_T: tl.constexpr, Z_T: tl.constexpr,
    N: tl.constexpr, NB: tl.constexpr, M: tl.constexpr, CHANNELS: tl.constexpr,
    G: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, POLYNOMIALS: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_PADDING: tl.constexpr,
    ENDS_ONLY: tl.constexpr, FROM_ENDS: tl.constexpr, KEEP: tl.constexpr, EVERY: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, ASM: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """States n0 … n0 + NB of one block of channels over one span of tokens.

    `ends` [B, S, N, D] holds what each span leaves (written with ENDS_ONLY, with `steps` [B, S, D],
    the sum of dt or -1 where a document starts inside) or the state each span begins with (read
    with FROM_ENDS). `kept` [B, J, N, D] gets the state before every EVERY tokens. `sums` [B, T, D]
    carries the float32 sums over states from the FIRST to the LAST pass.
    """
    per_group: tl.constexpr = CHANNELS // G
    blocks: tl.constexpr = (per_group + BLOCK - 1) // BLOCK
    group = tl.program_id(0) // blocks
    inside = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    d = group * per_group + inside
    mask = inside < per_group
    row, which = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = which * span
    end = tl.minimum(begin + span, T)

    x += row * x_b + d
    dt += row * dt_b + d
    z += row * z_b + d
    y += row * T * CHANNELS + d
    sums += row * T * CHANNELS + d
    pairs += (row * G + group) * T_all * M + n0
    offsets += row * T_all
    first = 0
    if HAS_PADDING:
        first = tl.load(padding + row).to(tl.int32)
    bias_ = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias_ = get(bias + d, mask, ASM).to(tl.float32)
    D_ = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        D_ = get(D + d, mask, ASM).to(tl.float32)

    rates = ()
    h = ()
    for i in tl.static_range(NB):
        n = n0 + i
        here = mask & (n < N)
        rates += (get(A + d * A_d + n * A_n, here, ASM).to(tl.float32) * LOG2E,)
        if FROM_ENDS:
            at = ((row * n_spans + which) * N + n) * CHANNELS + d
            h += (get(ends + at, here, ASM),)
        elif HAS_STATE:
            at = row * state_b + d * state_d + n * state_n
            h += (get(state + at, here, ASM).to(tl.float32),)
        else:
            h += (tl.zeros([BLOCK], tl.float32),)

    elapsed = tl.zeros([BLOCK], tl.float32)
    begun = tl.zeros([], tl.float32)
    raw_x = load_rows(x, X_T, begin, end, mask, K, ASM)
    raw_dt = load_rows(dt, DT_T, begin, end, mask, K, ASM)
    lane = tl.arange(0, BLOCK)
    raw_pairs = raw_x
    if STAGED:
        raw_pairs = load_pairs(pairs, begin, T_all, lane, M, K, ASM)
    for j in range((end - begin + K - 1) // K):
        t0 = begin + j * K
        tile_at = t0.to(tl.int64) * CHANNELS
        pairs_at = pairs + t0.to(tl.int64) * M
        dts = step_sizes(raw_dt, bias_, t0, first, end, SOFTPLUS, K)
        inputs = ()
        out = ()
        for k in tl.static_range(K):
            value = raw_x[k].to(tl.float32)
            if HAS_PADDING:
                value = tl.where(t0 + k >= first, value, 0.0)
            inputs += (dts[k] * value,)
            if ENDS_ONLY:
                elapsed += dts[k]
            elif not FIRST:
                so_far = sums + tile_at + k * CHANNELS
                out += (get(so_far, mask & (t0 + k < end), ASM),)
            else:
                out += (D_ * value,)
        # What the next tile needs is on its way while this one is worked on.
        raw_x = load_rows(x, X_T, t0 + K, end, mask, K, ASM)
        raw_dt = load_rows(dt, DT_T, t0 + K, end, mask, K, ASM)
        raw_z = raw_x
        if HAS_Z and LAST and not ENDS_ONLY:
            raw_z = load_rows(z, Z_T, t0, end, mask, K, ASM)
        begins = ()
        if HAS_STARTS:
            for k in tl.static_range(K):
                begins += (tl.load(offsets + t0 + k),)
                begun = tl.minimum(begun, begins[k])
        if KEEP:  # noqa: SIM102  # known when compiled, the other is not
            if t0 % EVERY == 0:
                # Shared by the lanes but for d: 32 bits hold what is left.
                kept_at = kept + (row * J + t0 // EVERY) * (N * CHANNELS) + n0 * CHANNELS
                for i in tl.static_range(NB):
                    to = kept_at + (i * CHANNELS + d)
                    put(to, h[i], mask & (n0 + i < N), ASM)
        if STAGED:
            address = stage_pairs(raw_pairs, lane, K)
            raw_pairs = load_pairs(pairs, t0 + K, T_all, lane, M, K, ASM)
        given = out
        out = ()
        for k in tl.static_range(K):
            moved = ()
            even = tl.zeros([BLOCK], tl.float32)
            if not ENDS_ONLY:
                even = given[k]
            odd = tl.zeros([BLOCK], tl.float32)
            for i in tl.static_range(NB // 2):
                if STAGED:
                    b0, c0, b1, c1 = staged_pairs(address + (k * 16 + 2 * i) * 8)
                else:
                    b0, c0 = b_and_c(pairs_at + k * M + 2 * i)
                    b1, c1 = b_and_c(pairs_at + k * M + 2 * i + 1)
                exponent0 = dts[k] * rates[2 * i]
                exponent1 = dts[k] * rates[2 * i + 1]
                if HAS_STARTS:
                    exponent0 += begins[k]
                    exponent1 += begins[k]
                # The polynomials stand apart from each other, between exponentials.
                h0 = decay_of(exponent0, False) * h[2 * i] + inputs[k] * b0
                h1 = (
                    decay_of(exponent1, (i * POLYNOMIALS) % (NB // 2) < POLYNOMIALS) * h[2 * i + 1]
                    + inputs[k] * b1
                )
                even += h0 * c0
                odd += h1 * c1
                moved += (h0, h1)
            h = moved
            out += (even + odd,)
        if not ENDS_ONLY:
            for k in tl.static_range(K):
                live = mask & (t0 + k < end)
                if LAST:
                    value = out[k]
                    if HAS_Z:
                        gate = raw_z[k].to(tl.float32)
                        value = value * gate * sigmoid(gate, ASM)
                    put(y + tile_at + k * CHANNELS, value, live, ASM)
                else:
                    put(sums + tile_at + k * CHANNELS, out[k], live, ASM)

    for i in tl.static_range(NB):
        n = n0 + i
        if ENDS_ONLY:
            at = ((row * n_spans + which) * N + n) * CHANNELS + d
            put(ends + at, h[i], mask & (n < N), ASM)
        else:
            at = (row * CHANNELS + d) * N + n
            put(last + at, h[i], mask & (n < N) & (which == n_spans - 1), ASM)
    if ENDS_ONLY:
        if HAS_STARTS:
            elapsed = tl.where(begun < 0.0, -1.0, elapsed)
        put(steps + (row * n_spans + which) * CHANNELS + d, elapsed, mask, ASM)


@triton.jit(do_not_specialize=["n_spans", "state_b"])
def chain_kernel(
    ends, steps, A, state, out,
    n_spans, A_d, A_n, state_b, state_d, state_n,
    N: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    BACKWARDS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    """`ends` [B, S, N, D], what spans add to a zero state, becomes what they begin with.

    BACKWARDS chains from the last span to the first; `out` [B, D, N] then gets what is left.
    """
    row, n = tl.program_id(1).to(tl.int64), tl.program_id(2)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = d < CHANNELS
    rate = tl.load(A + d * A_d + n * A_n, mask=mask, other=0.0).to(tl.float32) * LOG2E
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_STATE:
        at = row * state_b + d * state_d + n * state_n
        carry = tl.load(state + at, mask=mask, other=0.0).to(tl.float32)
    for i in range(n_spans):
        which = i
        if BACKWARDS:
            which = n_spans - 1 - i
        of_span = row * n_spans + which
        elapsed = tl.load(steps + of_span * CHANNELS + d, mask=mask, other=0.0)
        here = ends + (of_span * N + n) * CHANNELS + d
        added = tl.load(here, mask=mask, other=0.0)
        tl.store(here, carry, mask=mask)
        carry = tl.where(elapsed < 0.0, 0.0, tl.exp2(elapsed * rate)) * carry + added
    if HAS_OUT:
        tl.store(out + (row * CHANNELS + d) * N + n, carry, mask=mask)


@triton.jit
def there_and_back(
    h, carry, rate, dA, decays, bs, cs, dts, inputs, grads, ys, d_inputs, d_logs, K: tl.constexpr
):
    """One state of each channel through a tile's K tokens, and its gradient back.

    Tuples have a row a token. `h` is the state before the tile, `carry` the gradient of that after.
    Back come the gradient of the state before; the rate's with what this tile adds; by token the
    outputs, and the gradients of inputs and of logarithms of decays, with what this state adds; by
    token its gradients of B and C.
    """
    before = ()
    for_C = ()
    sums = ()
    for k in tl.static_range(K):
        before += (h,)
        h = decays[k] * h + inputs[k] * bs[k]
        sums += (ys[k] + h * cs[k],)
        for_C += (grads[k] * h,)
    backwards_B = ()
    backwards_input = ()
    backwards_log = ()
    for back in tl.static_range(K):
        g = grads[K - 1 - back] * cs[K - 1 - back] + carry
        carry = decays[K - 1 - back] * g
        q = carry * before[K - 1 - back]
        backwards_input += (d_inputs[K - 1 - back] + g * bs[K - 1 - back],)
        backwards_log += (d_logs[K - 1 - back] + q * rate,)
        backwards_B += (g * inputs[K - 1 - back],)
        dA += q * dts[K - 1 - back]
    by_input = ()
    by_log = ()
    for_B = ()
    for k in tl.static_range(K):
        by_input += (backwards_input[K - 1 - k],)
        by_log += (backwards_log[K - 1 - k],)
        for_B += (backwards_B[K - 1 - k],)
    return carry, dA, sums, by_input, by_log, for_B, for_C


@triton.jit(do_not_specialize=[*_OF_A_CALL, "T", "T_all", "span", "n_spans", "J", "n_states"])
def backward_kernel(
    x, dt, z, rates, pairs, offsets, D, bias, padding, kept, dy, dlast,
    dx, ddt, dz, dA, dBC, dD, dbias, dstate, R, steps,
    T, T_all, span, n_spans, J, n_states,
    x_b, dt_b, z_b, dy_b, dlast_b, dlast_d, dlast_n,
    X_T: tl.constexpr, DT_T: tl.constexpr, Z_T: tl.constexpr, DY_T: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, CHANNELS: tl.constexpr,
    G: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_DLAST: tl.constexpr, ENDS_ONLY: tl.constexpr, FROM_ENDS: tl.constexpr,
    BY_PRODUCT: tl.constexpr, ASM: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """The gradient over one span, last token first.

    With R what later tokens and the last state take from h_t, and g its whole gradient:
    ``g = dy C + R``, ``R' = a g``; ``d(dt x) = Σ_n g B``, ``d(dt A) = R' h_before``,
    ``dB = Σ_d g dt x``, ``dC = Σ_d dy h``.

    `R` and `dA` [B, S, N, D] are this program's memory from tile to tile, one state number after
    the other. In the end `R` holds, ENDS_ONLY,
    what the span leaves to the one before it; with FROM_ENDS it begins with what the spans after it
    left. `dBC` [R, B, J, M, 2, K] (R counts warps BY_PRODUCT, else programs), `dD` and `dbias`
    [B, S, D] get this program's share.
    `rates` [N, D] is A in powers of two.
    """
    per_group: tl.constexpr = CHANNELS // G
    blocks: tl.constexpr = (per_group + BLOCK - 1) // BLOCK
    group = tl.program_id(0) // blocks
    inside = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    d = group * per_group + inside
    mask = inside < per_group
    row, which = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = which * span
    end = tl.minimum(begin + span, T)

    x += row * x_b + d
    dt += row * dt_b + d
    z += row * z_b + d
    dy += row * dy_b + d
    flat = row * T * CHANNELS + d
    pairs += (row * G + group) * T_all * M
    offsets += row * T_all
    kept += row * J * (N * CHANNELS) + d
    rates += d
    of_span = (row * n_spans + which) * (N * CHANNELS) + d
    R += of_span
    dA += of_span
    first = 0
    if HAS_PADDING:
        first = tl.load(padding + row).to(tl.int32)
    bias_ = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias_ = get(bias + d, mask, ASM).to(tl.float32)
    D_ = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        D_ = get(D + d, mask, ASM).to(tl.float32)
    nothing = tl.zeros([BLOCK], tl.float32)
    for i in range(n_states):
        if not ENDS_ONLY:
            put(dA + i * CHANNELS, nothing, mask, ASM)
        if HAS_DLAST and not ENDS_ONLY:
            at = row * dlast_b + d * dlast_d + i * dlast_n
            put(R + i * CHANNELS, get(dlast + at, mask, ASM).to(tl.float32), mask, ASM)
        elif not FROM_ENDS:
            put(R + i * CHANNELS, nothing, mask, ASM)
    dD_ = nothing
    dbias_ = nothing
    elapsed = nothing
    begun = tl.zeros([], tl.float32)
    lane = tl.arange(0, BLOCK) % 32
    which_sum = (lane >> 3 & 1) + 2 * (lane >> 4 & 1) + 4 * (lane & 1) + 8 * (lane >> 1 & 1)
    part = tl.program_id(0).to(tl.int64)

    tiles = (end - begin + K - 1) // K
    start = begin + (tiles - 1) * K
    raw_x = load_rows(x, X_T, start, end, mask, K, ASM)
    raw_dt = load_rows(dt, DT_T, start, end, mask, K, ASM)
    raw_dy = load_rows(dy, DY_T, start, end, mask, K, ASM)
    raw_z = raw_dy
    if HAS_Z:
        raw_z = load_rows(z, Z_T, start, end, mask, K, ASM)
    raw_pairs = raw_x
    if STAGED:
        raw_pairs = load_pairs(pairs, start, T_all, lane, M, K, ASM)
    for j in range(tiles):
        t0 = start - j * K
        tile_at = flat + t0.to(tl.int64) * CHANNELS
        pairs_at = pairs + t0.to(tl.int64) * M
        kept_at = kept + (t0 // K).to(tl.int64) * (N * CHANNELS)
        next_h = nothing
        if not ENDS_ONLY:
            next_h = get(kept_at, mask, ASM).to(tl.float32)
        next_R = get_again(R, mask, ASM)
        next_rate = get(rates, mask, ASM)
        dts = step_sizes(raw_dt, bias_, t0, first, end, SOFTPLUS, K)
        inputs = ()
        grads = ()
        for k in tl.static_range(K):
            value = raw_x[k].to(tl.float32)
            grad = raw_dy[k].to(tl.float32)
            if HAS_Z:
                gate = raw_z[k].to(tl.float32)
                grad = grad * gate * sigmoid(gate, ASM)
            if HAS_PADDING:
                value = tl.where(t0 + k >= first, value, 0.0)
                grad = tl.where(t0 + k >= first, grad, 0.0)
            inputs += (dts[k] * value,)
            grads += (grad,)
            if ENDS_ONLY:
                elapsed += dts[k]
        ahead = tl.maximum(t0 - K, 0)
        raw_x = load_rows(x, X_T, ahead, end, mask, K, ASM)
        raw_dt = load_rows(dt, DT_T, ahead, end, mask, K, ASM)
        raw_dy = load_rows(dy, DY_T, ahead, end, mask, K, ASM)
        if HAS_Z:
            raw_z = load_rows(z, Z_T, ahead, end, mask, K, ASM)
        address = lane
        if STAGED:
            address = stage_pairs(raw_pairs, lane, K)
            raw_pairs = load_pairs(pairs, ahead, T_all, lane, M, K, ASM)
        begins = ()
        ys = ()
        d_inputs = ()
        d_logs = ()
        for k in tl.static_range(K):
            if HAS_STARTS:
                begins += (tl.load(offsets + t0 + k),)
                begun = tl.minimum(begun, begins[k])
            ys += (nothing,)
            d_inputs += (nothing,)
            d_logs += (nothing,)
        # By twos, so that one's sums over the warp hide behind the other's recurrences.
        for i in tl.range(0, n_states, loop_unroll_factor=2):
            rate = next_rate
            carry = next_R
            h = next_h
            # The next state number's are on their way; the last asks for its own again.
            then = tl.minimum(i + 1, n_states - 1) * CHANNELS
            next_rate = get(rates + then, mask, ASM)
            if not ENDS_ONLY:
                next_h = get(kept_at + then, mask, ASM).to(tl.float32)
            next_R = get_again(R + then, mask, ASM)
            decays = ()
            bs = ()
            cs = ()
            for k in tl.static_range(K):
                exponent = dts[k] * rate
                if HAS_STARTS:
                    exponent += begins[k]
                decays += (tl.exp2(exponent),)
                if STAGED:
                    b, c = staged_pair(address + (k * 16 + i) * 8)
                else:
                    b, c = b_and_c(pairs_at + k * M + i)
                bs += (b,)
                cs += (c,)
            if ENDS_ONLY:
                for back in tl.static_range(K):
                    carry = decays[K - 1 - back] * (grads[K - 1 - back] * cs[K - 1 - back] + carry)
            else:
                dA_i = get_again(dA + i * CHANNELS, mask, ASM)
                carry, dA_i, ys, d_inputs, d_logs, for_B, for_C = there_and_back(
                    h, carry, rate, dA_i, decays, bs, cs, dts, inputs, grads, ys, d_inputs, d_logs,
                    K,
                )  # fmt: skip
                put(dA + i * CHANNELS, dA_i, mask, ASM)
                if BY_PRODUCT:
                    tl.static_assert(K == 8)
                    total = sums_over_warps(for_B, for_C, lane)
                    warp = part * (BLOCK // 32) + tl.arange(0, BLOCK) // 32
                    to = ((warp * tl.num_programs(1) + row) * J + t0 // K) * M + i
                    put(dBC + to * 16 + which_sum, total, (lane & 4) == 0, ASM)
                else:
                    to = ((part * tl.num_programs(1) + row) * J + t0 // K) * M + i
                    for k in tl.static_range(K):
                        tl.store(dBC + to * (2 * K) + k, tl.sum(for_B[k], 0))
                        tl.store(dBC + to * (2 * K) + K + k, tl.sum(for_C[k], 0))
            put(R + i * CHANNELS, carry, mask, ASM)
        if not ENDS_ONLY:
            for k in tl.static_range(K):
                live = mask & (t0 + k < end)
                at = tile_at + k * CHANNELS
                value = get(x + t0.to(tl.int64) * X_T + k * X_T, live, ASM).to(tl.float32)
                real = live
                if HAS_PADDING:
                    real = live & (t0 + k >= first)
                    value = tl.where(t0 + k >= first, value, 0.0)
                grad_dt = d_inputs[k] * value + d_logs[k] * LN2
                if SOFTPLUS:
                    raw = get(dt + t0.to(tl.int64) * DT_T + k * DT_T, live, ASM).to(tl.float32)
                    grad_dt = grad_dt * sigmoid(raw + bias_, ASM)
                grad_dt = tl.where(real, grad_dt, 0.0)
                dbias_ += grad_dt
                put(ddt + at, grad_dt, live, ASM)
                put(dx + at, d_inputs[k] * dts[k] + D_ * grads[k], live, ASM)
                dD_ += grads[k] * value
                if HAS_Z:
                    gate = get(z + t0.to(tl.int64) * Z_T + k * Z_T, live, ASM).to(tl.float32)
                    grad = get(dy + t0.to(tl.int64) * DY_T + k * DY_T, live, ASM).to(tl.float32)
                    s = sigmoid(gate, ASM)
                    grad_z = grad * (ys[k] + D_ * value) * (s + gate * s * (1.0 - s))
                    put(dz + at, tl.where(real, grad_z, 0.0), live, ASM)

    share = (row * n_spans + which) * CHANNELS + d
    if ENDS_ONLY:
        if HAS_STARTS:
            elapsed = tl.where(begun < 0.0, -1.0, elapsed)
        put(steps + share, elapsed, mask, ASM)
    else:
        put(dD + share, dD_, mask, ASM)
        put(dbias + share, dbias_, mask, ASM)
        if HAS_STATE:
            for i in range(n_states):
                to = dstate + (row * CHANNELS + d) * N + i
                put(to, get_again(R + i * CHANNELS, mask, ASM), mask & (which == 0), ASM)


# The split kernel: two warps share 32 channels, each with half of the states and half of the tokens
# of a tile. What one works out for its tokens, the other finds in shared memory, where each array
# has its place (offsets in bytes): step, input and gradient of a tile's tokens by channel, the
# stride keeps 16-byte accesses of neighbouring lanes in different banks; pairs by state; sums over
# half of the states; sums over 32 channels for B and C.
SHARED_64 = tl.constexpr("{.shared .align 16 .b8 tamba_split[33024]; mov.u32 $0, tamba_split;}")
SHARED_128 = tl.constexpr("{.shared .align 16 .b8 tamba_split[48384]; mov.u32 $0, tamba_split;}")
TOKEN_STRIDE = tl.constexpr(112)
PAIR_STRIDE = tl.constexpr(80)


@triton.jit
def shared_memory(lane, BLOCK: tl.constexpr):
    """The address of this program's bytes."""
    if BLOCK == 64:
        return tl.inline_asm_elementwise(SHARED_64, "=r,r", [lane], tl.int32, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise(
            SHARED_128, "=r,r", [lane], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def set_own(address, value):
    """Put float32 into shared memory."""
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.b32 $0, 0;", "=r,r,f", [address, value],
        tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def everyone_here(lane):
    """Wait for the program's other warps; what they put into shared memory can be seen then."""
    tl.inline_asm_elementwise(
        "bar.sync 0; mov.b32 $0, 0;", "=r,r", [lane], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def put_four(address, a, b, c, d):
    """Four float32 side by side, at an address that is a multiple of 16."""
    tl.inline_asm_elementwise(
        "st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;", "=r,r,f,f,f,f",
        [address, a, b, c, d], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put_pair(address, pair, mask):
    """A pair of B and C."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.s32 p, $3, 0; mov.b32 $0, 0; @p st.shared.b64 [$1], $2;}",
        "=r,r,l,r", [address, pair, mask.to(tl.int32)], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_OF_A_CALL, "T", "T_all", "span", "n_spans", "J"])
def split_forward_kernel(
    x, dt, z, A, pairs, offsets, D, bias, padding, state,
    y, last, kept, ends,
    T, T_all, span, n_spans, J,
    x_b, dt_b, z_b, A_d, A_n, state_b, state_d, state_n,
    X_T: tl.constexpr, DT_T: tl.constexpr, Z_T: tl.constexpr,
    N: tl.constexpr, CHANNELS: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_PADDING: tl.constexpr,
    FROM_ENDS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """`forward_kernel` for 9 to 16 states a channel on a GPU: tiles of 8 tokens.

    A program has BLOCK channels and 2 BLOCK threads, of which the second half has the states from 8
    on. A thread finishes 4 of a tile's tokens for its channel.
    """
    K: tl.constexpr = 8
    M: tl.constexpr = 16
    KP: tl.constexpr = 4  # a thread's tokens
    NP: tl.constexpr = 8  # and states
    tl.static_assert(BLOCK == 64 or BLOCK == 128)  # what shared memory is laid out for
    TOKEN: tl.constexpr = 80  # bytes of shared memory, 16-byte accesses in different banks
    SUM: tl.constexpr = 48
    per_group: tl.constexpr = CHANNELS // G
    blocks: tl.constexpr = (per_group + BLOCK - 1) // BLOCK
    thread = tl.arange(0, 2 * BLOCK)
    part = thread // BLOCK
    lane = thread % 32
    group = tl.program_id(0) // blocks
    channel = thread % BLOCK
    inside = (tl.program_id(0) % blocks) * BLOCK + channel
    d = group * per_group + inside
    mask = inside < per_group
    row, which = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = which * span
    end = tl.minimum(begin + span, T)
    late = part * KP  # a thread's first token in a tile
    n0 = part * NP

    x += row * x_b + d + late * X_T
    dt += row * dt_b + d + late * DT_T
    z += row * z_b + d + late * Z_T
    y += row * T * CHANNELS + d + late * CHANNELS
    pairs += (row * G + group) * T_all * M
    offsets += row * T_all
    kept += row * J * (N * CHANNELS) + n0 * CHANNELS + d
    first = 0
    if HAS_PADDING:
        first = tl.load(padding + row).to(tl.int32)
    bias_ = tl.zeros([2 * BLOCK], tl.float32)
    if HAS_BIAS:
        bias_ = get(bias + d, mask, True).to(tl.float32)
    D_ = tl.zeros([2 * BLOCK], tl.float32)
    if HAS_D:
        D_ = get(D + d, mask, True).to(tl.float32)
    rates = ()
    h = ()
    for i in tl.static_range(NP):
        n = n0 + i
        here = mask & (n < N)
        rates += (get(A + d * A_d + n * A_n, here, True).to(tl.float32) * LOG2E,)
        if FROM_ENDS:
            at = ((row * n_spans + which) * N + n) * CHANNELS + d
            h += (get(ends + at, here, True),)
        elif HAS_STATE:
            at = row * state_b + d * state_d + n * state_n
            h += (get(state + at, here, True).to(tl.float32),)
        else:
            h += (tl.zeros([2 * BLOCK], tl.float32),)

    base = shared_memory(lane, BLOCK)
    tokens_at = base + channel * TOKEN
    own_at = tokens_at + late * 4
    pairs_at = base + BLOCK * TOKEN
    sums_at = pairs_at + K * M * 8
    give_at = sums_at + thread * SUM
    take_at = sums_at + channel * SUM + late * 4
    pair = thread % (K * M)
    pair_here = thread < K * M

    end_ = end - late
    raw_x = load_rows(x, X_T, begin, end_, mask, KP, True)
    raw_dt = load_rows(dt, DT_T, begin, end_, mask, KP, True)
    raw_pair = get(
        pairs + begin.to(tl.int64) * M + pair, pair_here & (begin + pair // M < T_all), True
    )
    for j in range((end - begin + K - 1) // K):
        t0 = begin + j * K
        if KEEP:
            kept_at = kept + (t0 // K).to(tl.int64) * (N * CHANNELS)
            for i in tl.static_range(NP):
                put(kept_at + i * CHANNELS, h[i], mask & (n0 + i < N), True)
        own_dts = step_sizes(raw_dt, bias_, t0 + late, first, end, SOFTPLUS, KP)
        own_inputs = ()
        through = ()
        for k in tl.static_range(KP):
            value = raw_x[k].to(tl.float32)
            if HAS_PADDING:
                value = tl.where(t0 + late + k >= first, value, 0.0)
            own_inputs += (own_dts[k] * value,)
            through += (D_ * value,)
        put_four(own_at, own_dts[0], own_dts[1], own_dts[2], own_dts[3])
        put_four(own_at + 32, own_inputs[0], own_inputs[1], own_inputs[2], own_inputs[3])
        put_pair(pairs_at + pair * 8, raw_pair, pair_here)
        # What the next tile needs is on its way while this one is worked on.
        raw_x = load_rows(x, X_T, t0 + K, end_, mask, KP, True)
        raw_dt = load_rows(dt, DT_T, t0 + K, end_, mask, KP, True)
        raw_pair = get(
            pairs + (t0 + K).to(tl.int64) * M + pair,
            pair_here & (t0 + K + pair // M < T_all), True,
        )  # fmt: skip
        raw_z = raw_x
        if HAS_Z:
            raw_z = load_rows(z, Z_T, t0, end_, mask, KP, True)
        everyone_here(lane)
        dts = staged_pairs(tokens_at) + staged_pairs(tokens_at + 16)
        inputs = staged_pairs(tokens_at + 32) + staged_pairs(tokens_at + 48)
        out = ()
        for k in tl.static_range(K):
            begins = 0.0
            if HAS_STARTS:
                begins = tl.load(offsets + t0 + k)
            moved = ()
            even = tl.zeros([2 * BLOCK], tl.float32)
            odd = even
            for i in tl.static_range(NP // 2):
                b0, c0, b1, c1 = staged_pairs(pairs_at + (k * M + n0 + 2 * i) * 8)
                exponent0 = dts[k] * rates[2 * i]
                exponent1 = dts[k] * rates[2 * i + 1]
                if HAS_STARTS:
                    exponent0 += begins
                    exponent1 += begins
                h0 = tl.exp2(exponent0) * h[2 * i] + inputs[k] * b0
                h1 = tl.exp2(exponent1) * h[2 * i + 1] + inputs[k] * b1
                even += h0 * c0
                odd += h1 * c1
                moved += (h0, h1)
            h = moved
            out += (even + odd,)
        put_four(give_at, out[0], out[1], out[2], out[3])
        put_four(give_at + 16, out[4], out[5], out[6], out[7])
        everyone_here(lane)
        half = staged_pairs(take_at)
        other = staged_pairs(take_at + BLOCK * SUM)
        y_at = y + t0.to(tl.int64) * CHANNELS
        for k in tl.static_range(KP):
            value = half[k] + other[k] + through[k]
            if HAS_Z:
                gate = raw_z[k].to(tl.float32)
                value = value * gate * sigmoid(gate, True)
            put(y_at + k * CHANNELS, value, mask & (t0 + late + k < end), True)

    for i in tl.static_range(NP):
        at = (row * CHANNELS + d) * N + n0 + i
        put(last + at, h[i], mask & (n0 + i < N) & (which == n_spans - 1), True)


# Sums over a warp's channels of 16 numbers a lane, put into shared memory. Rounded to bfloat16 and
# packed by twos, four numbers are a right operand of a 16 x 8 x 16 product whose left operand has
# its ones in row r < 8 where the number r mod 4 of the four stands: the product adds up the four
# lanes of a column. What comes out is laid out like a left operand. The four products' results
# together are one, and a last product adds up the columns of two of them in even, of the others in
# odd ones. Nobody looks at rows from 8 on; what multiplies there only has to differ from the other
# registers of the operand, or the compiler copies four registers for each product.
SUM_AND_PUT = tl.constexpr(
    """
    {
    .reg .b32 b<8>, a<4>;
    .reg .f32 d<16>, e<4>, zero;
    .reg .pred p;
    mov.f32 zero, 0f00000000;
    cvt.rn.bf16x2.f32 b0, $3, $2;
    cvt.rn.bf16x2.f32 b1, $5, $4;
    cvt.rn.bf16x2.f32 b2, $7, $6;
    cvt.rn.bf16x2.f32 b3, $9, $8;
    cvt.rn.bf16x2.f32 b4, $11, $10;
    cvt.rn.bf16x2.f32 b5, $13, $12;
    cvt.rn.bf16x2.f32 b6, $15, $14;
    cvt.rn.bf16x2.f32 b7, $17, $16;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {d0, d1, d2, d3}, {$18, $23, $19, $24}, {b0, b1}, {zero, zero, zero, zero};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {d4, d5, d6, d7}, {$18, $23, $19, $24}, {b2, b3}, {zero, zero, zero, zero};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {d8, d9, d10, d11}, {$18, $23, $19, $24}, {b4, b5}, {zero, zero, zero, zero};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {d12, d13, d14, d15}, {$18, $23, $19, $24}, {b6, b7}, {zero, zero, zero, zero};
    cvt.rn.bf16x2.f32 a0, d1, d0;
    cvt.rn.bf16x2.f32 a2, d5, d4;
    cvt.rn.bf16x2.f32 a1, d9, d8;
    cvt.rn.bf16x2.f32 a3, d13, d12;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {e0, e1, e2, e3}, {a0, a1, a2, a3}, {$20, $21}, {zero, zero, zero, zero};
    setp.ne.s32 p, $22, 0;
    @p st.shared.v4.f32 [$1], {e0, e1, e2, e3};
    mov.b32 $0, 0;
    }
    """
)


def _halving() -> str:
    """The same in float32: lanes exchange halves of what they hold until each has one number."""
    lines = [f"mov.f32 v{i}, ${i + 2};" for i in range(16)]
    for bit, held in ((16, 8), (8, 4), (4, 2), (2, 1)):
        lines += [f"and.b32 bit, $18, {bit};", "setp.ne.s32 p, bit, 0;"]
        for i in range(held):
            lines += [
                f"selp.f32 s, v{i}, v{i + held}, p;",
                f"selp.f32 v{i}, v{i + held}, v{i}, p;",
                f"shfl.sync.bfly.b32 t, s, {bit}, 0x1f, 0xffffffff;",
                f"add.f32 v{i}, v{i}, t;",
            ]
    lines += ["shfl.sync.bfly.b32 t, v0, 1, 0x1f, 0xffffffff;", "add.f32 v0, v0, t;"]
    lines += ["st.shared.f32 [$1], v0;", "mov.b32 $0, 0;"]
    return "{.reg .b32 bit; .reg .pred p; .reg .f32 s, t, v<16>;\n" + "\n".join(lines) + "}"


HALVE_AND_PUT = tl.constexpr(_halving())


@triton.jit
def put_sums_over_warps(address, p, q, lane, BY_PRODUCT: tl.constexpr):
    """Sums over 32 lanes of eight rows p and eight rows q, side by side at `address`.

    They stand in the order of ``4 (i mod 4) + 2 [of q] + i div 4``.
    """
    row = lane >> 2
    if BY_PRODUCT:
        odd = lane >> 2 & 1
        tl.inline_asm_elementwise(
            SUM_AND_PUT,
            "=r,r,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r",
            [address + row * 16,
             p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7],
             q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7],
             ones_in(row & 3, 0), ones_in(row & 3, 2), (1 - odd) * 0x3F803F80, odd * 0x3F803F80,
             ((lane & 3) == 0) & (row < 4), lane * 5 + 2, lane * 3 + 1],
            tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        i = (lane >> 1) & 7
        place = (i & 3) * 4 + (lane >> 4) * 2 + (i >> 2)
        tl.inline_asm_elementwise(
            HALVE_AND_PUT,
            "=r,r,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,r",
            [address + place * 4,
             p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7],
             q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], lane],
            tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load_again(pointer, stride, t0, end, mask, K: tl.constexpr):
    """`load_rows` once more, not kept in registers since."""
    bits: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth
    rows = ()
    pointer += t0.to(tl.int64) * stride
    for k in tl.static_range(K):
        at = (pointer + k * stride).to(tl.int64)
        here = (mask & (t0 + k < end)).to(tl.int32)
        if bits == 16:
            got = tl.inline_asm_elementwise(
                GET_16, "=h,l,r", [at, here], tl.int16, is_pure=False, pack=1
            )
        else:
            got = tl.inline_asm_elementwise(
                GET_32, "=r,l,r", [at, here], tl.int32, is_pure=False, pack=1
            )
        rows += (got.to(pointer.dtype.element_ty, bitcast=True),)
    return rows


@triton.jit(do_not_specialize=[*_OF_A_CALL, "T", "T_all", "span", "n_spans", "J"])
def split_backward_kernel(
    x, dt, z, rates, pairs, offsets, D, bias, padding, kept, dy, dlast,
    dx, ddt, dz, dA, dBC, dD, dbias, dstate, ends,
    T, T_all, span, n_spans, J,
    x_b, dt_b, z_b, dy_b, dlast_b, dlast_d, dlast_n,
    X_T: tl.constexpr, DT_T: tl.constexpr, Z_T: tl.constexpr, DY_T: tl.constexpr,
    N: tl.constexpr, CHANNELS: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_PADDING: tl.constexpr,
    HAS_DLAST: tl.constexpr, FROM_ENDS: tl.constexpr, BY_PRODUCT: tl.constexpr,
):  # fmt: skip
    """`backward_kernel` for 9 to 16 states a channel on a GPU: tiles of 8 tokens.

    A program has BLOCK channels and 2 BLOCK threads, of which the second half has the states from 8
    on. A thread finishes 4 of a tile's tokens for its channel. `dBC` is [programs, B, J, 16, 2, 8];
    `dD` and `dbias` are [B, S, 2, D].
    """
    tl.static_assert(BLOCK == 64)  # what shared memory is laid out for
    K: tl.constexpr = 8
    M: tl.constexpr = 16
    KP: tl.constexpr = 4  # a thread's tokens
    NP: tl.constexpr = 8  # and states
    per_group: tl.constexpr = CHANNELS // G
    blocks: tl.constexpr = (per_group + BLOCK - 1) // BLOCK
    thread = tl.arange(0, 2 * BLOCK)
    part = thread // BLOCK
    lane = thread % 32
    group = tl.program_id(0) // blocks
    channel = thread % BLOCK
    inside = (tl.program_id(0) % blocks) * BLOCK + channel
    d = group * per_group + inside
    mask = inside < per_group
    row, which = tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = which * span
    end = tl.minimum(begin + span, T)
    late = part * KP  # a thread's first token in a tile
    n0 = part * NP

    x += row * x_b + d + late * X_T
    dt += row * dt_b + d + late * DT_T
    z += row * z_b + d + late * Z_T
    dy += row * dy_b + d + late * DY_T
    flat = row * T * CHANNELS + d + late * CHANNELS
    pairs += (row * G + group) * T_all * M
    offsets += row * T_all
    kept += row * J * (N * CHANNELS) + n0 * CHANNELS + d
    dBC += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + row) * J * (2 * K * M)
    of_span = (row * n_spans + which) * (N * CHANNELS) + n0 * CHANNELS + d
    first = 0
    if HAS_PADDING:
        first = tl.load(padding + row).to(tl.int32)
    bias_ = tl.zeros([2 * BLOCK], tl.float32)
    if HAS_BIAS:
        bias_ = get(bias + d, mask, True).to(tl.float32)
    D_ = tl.zeros([2 * BLOCK], tl.float32)
    if HAS_D:
        D_ = get(D + d, mask, True).to(tl.float32)
    nothing = tl.zeros([2 * BLOCK], tl.float32)
    dD_ = nothing
    dbias_ = nothing
    rates_ = ()
    carry = ()
    for i in tl.static_range(NP):
        here = mask & (n0 + i < N)
        rates_ += (get(rates + (n0 + i) * CHANNELS + d, here, True),)
        if FROM_ENDS:
            carry += (get(ends + of_span + i * CHANNELS, here, True),)
        elif HAS_DLAST:
            at = row * dlast_b + d * dlast_d + (n0 + i) * dlast_n
            carry += (get(dlast + at, here, True).to(tl.float32),)
        else:
            carry += (nothing,)

    base = shared_memory(lane, BLOCK)
    tokens_at = base + channel * TOKEN_STRIDE
    pairs_at = base + BLOCK * TOKEN_STRIDE
    sums_at = pairs_at + 16 * PAIR_STRIDE
    give_at = sums_at + thread * TOKEN_STRIDE
    own_at = tokens_at + late * 4
    take_at = sums_at + channel * TOKEN_STRIDE + late * 4
    shares_at = sums_at + 2 * BLOCK * TOKEN_STRIDE
    share_at = shares_at + (channel // 32) * 1024 + n0 * 64
    # Where in [16, 2, 8] the sum belongs that stands at a thread's place in shared memory.
    to_dBC = (thread & 15) // 2 % 2 * K + (thread & 15) // 4 + thread % 2 * 4 + thread // 16 * 16

    # A thread's own numbers by state: rates, and after them sums for A.
    mine_at = shares_at + BLOCK * 32 + thread * 4
    for i in tl.static_range(NP):
        set_own(mine_at + i * 8 * BLOCK, rates_[i])
        set_own(mine_at + (NP + i) * 8 * BLOCK, nothing)

    tiles = (end - begin + K - 1) // K
    start = begin + (tiles - 1) * K
    for j in range(tiles):
        t0 = start - j * K
        raw_x = load_rows(x, X_T, t0, end - late, mask, KP, True)
        raw_dt = load_rows(dt, DT_T, t0, end - late, mask, KP, True)
        raw_dy = load_rows(dy, DY_T, t0, end - late, mask, KP, True)
        raw_z = raw_dy
        if HAS_Z:
            raw_z = load_rows(z, Z_T, t0, end - late, mask, KP, True)
        kept_at = kept + (t0 // K).to(tl.int64) * (N * CHANNELS)
        hs = ()
        for i in tl.static_range(NP):
            hs += (get(kept_at + i * CHANNELS, mask & (n0 + i < N), True),)
        for i in tl.static_range((K * M + 2 * BLOCK - 1) // (2 * BLOCK)):
            pair = thread + i * 2 * BLOCK
            t = t0 + pair // M
            here = pair < K * M
            got = get(pairs + t0.to(tl.int64) * M + pair, here & (t < T_all), True)
            put_pair(pairs_at + (pair % M) * PAIR_STRIDE + (pair // M) * 8, got, here)
        own_dts = step_sizes(raw_dt, bias_, t0 + late, first, end, SOFTPLUS, KP)
        own_inputs = ()
        own_grads = ()
        for k in tl.static_range(KP):
            value = raw_x[k].to(tl.float32)
            grad = raw_dy[k].to(tl.float32)
            if HAS_Z:
                gate = raw_z[k].to(tl.float32)
                grad = grad * gate * sigmoid(gate, True)
            if HAS_PADDING:
                value = tl.where(t0 + late + k >= first, value, 0.0)
                grad = tl.where(t0 + late + k >= first, grad, 0.0)
            own_inputs += (own_dts[k] * value,)
            own_grads += (grad,)
        put_four(own_at, own_dts[0], own_dts[1], own_dts[2], own_dts[3])
        put_four(own_at + 32, own_inputs[0], own_inputs[1], own_inputs[2], own_inputs[3])
        put_four(own_at + 64, own_grads[0], own_grads[1], own_grads[2], own_grads[3])
        everyone_here(lane)
        dts = staged_pairs(tokens_at) + staged_pairs(tokens_at + 16)
        inputs = staged_pairs(tokens_at + 32) + staged_pairs(tokens_at + 48)
        grads = staged_pairs(tokens_at + 64) + staged_pairs(tokens_at + 80)
        begins = ()
        ys = ()
        d_inputs = ()
        d_logs = ()
        for k in tl.static_range(K):
            if HAS_STARTS:
                begins += (tl.load(offsets + t0 + k),)
            ys += (nothing,)
            d_inputs += (nothing,)
            d_logs += (nothing,)
        carried = ()
        for i in tl.static_range(NP):
            rate = own(mine_at + i * 8 * BLOCK)
            dA_i = own(mine_at + (NP + i) * 8 * BLOCK)
            h = hs[i].to(tl.float32)
            R = carry[i]
            bs = ()
            cs = ()
            for k in tl.static_range(K // 2):
                b0, c0, b1, c1 = staged_pairs(pairs_at + (n0 + i) * PAIR_STRIDE + k * 16)
                bs += (b0, b1)
                cs += (c0, c1)
            decays = ()
            for k in tl.static_range(K):
                exponent = dts[k] * rate
                if HAS_STARTS:
                    exponent += begins[k]
                decays += (tl.exp2(exponent),)
            R, dA_i, ys, d_inputs, d_logs, for_B, for_C = there_and_back(
                h, R, rate, dA_i, decays, bs, cs, dts, inputs, grads, ys, d_inputs, d_logs, K
            )
            put_sums_over_warps(share_at + i * 64, for_B, for_C, lane, BY_PRODUCT)
            carried += (R,)
            set_own(mine_at + (NP + i) * 8 * BLOCK, dA_i)
        carry = carried
        put_four(give_at, ys[0], ys[1], ys[2], ys[3])
        put_four(give_at + 16, ys[4], ys[5], ys[6], ys[7])
        put_four(give_at + 32, d_inputs[0], d_inputs[1], d_inputs[2], d_inputs[3])
        put_four(give_at + 48, d_inputs[4], d_inputs[5], d_inputs[6], d_inputs[7])
        put_four(give_at + 64, d_logs[0], d_logs[1], d_logs[2], d_logs[3])
        put_four(give_at + 80, d_logs[4], d_logs[5], d_logs[6], d_logs[7])
        everyone_here(lane)
        for i in tl.static_range((2 * K * M + 2 * BLOCK - 1) // (2 * BLOCK)):
            number = thread + i * 2 * BLOCK
            total = nothing
            for block in tl.static_range(BLOCK // 32):
                total += own(shares_at + block * 1024 + number * 4)
            to = dBC + (t0 // K).to(tl.int64) * (2 * K * M) + to_dBC + i * 2 * BLOCK
            put(to, total, number < 2 * K * M, True)
        raw_x = load_again(x, X_T, t0, end - late, mask, KP)
        raw_dt = load_again(dt, DT_T, t0, end - late, mask, KP)
        raw_dy = load_again(dy, DY_T, t0, end - late, mask, KP)
        if HAS_Z:
            raw_z = load_again(z, Z_T, t0, end - late, mask, KP)
        other_at = take_at + BLOCK * TOKEN_STRIDE
        ys = staged_pairs(take_at)
        other_ys = staged_pairs(other_at)
        d_inputs = staged_pairs(take_at + 32)
        other_inputs = staged_pairs(other_at + 32)
        d_logs = staged_pairs(take_at + 64)
        other_logs = staged_pairs(other_at + 64)
        own_dts = staged_pairs(own_at)
        own_grads = staged_pairs(own_at + 64)
        for k in tl.static_range(KP):
            y = ys[k] + other_ys[k]
            d_input = d_inputs[k] + other_inputs[k]
            d_log = d_logs[k] + other_logs[k]
            t = t0 + late + k
            live = mask & (t < end)
            at = flat + t0.to(tl.int64) * CHANNELS + k * CHANNELS
            value = raw_x[k].to(tl.float32)
            real = live
            if HAS_PADDING:
                real = live & (t >= first)
                value = tl.where(t >= first, value, 0.0)
            grad_dt = d_input * value + d_log * LN2
            if SOFTPLUS:
                grad_dt = grad_dt * sigmoid(raw_dt[k].to(tl.float32) + bias_, True)
            grad_dt = tl.where(real, grad_dt, 0.0)
            dbias_ += grad_dt
            put(ddt + at, grad_dt, live, True)
            put(dx + at, d_input * own_dts[k] + D_ * own_grads[k], live, True)
            dD_ += own_grads[k] * value
            if HAS_Z:
                gate = raw_z[k].to(tl.float32)
                s = sigmoid(gate, True)
                grad_z = raw_dy[k].to(tl.float32) * (y + D_ * value) * s * (1.0 + gate * (1.0 - s))
                put(dz + at, tl.where(real, grad_z, 0.0), live, True)

    for i in tl.static_range(NP):
        here = mask & (n0 + i < N)
        put(dA + of_span + i * CHANNELS, own(mine_at + (NP + i) * 8 * BLOCK), here, True)
        if HAS_STATE:
            to = dstate + (row * CHANNELS + d) * N + n0 + i
            put(to, carry[i], here & (which == 0), True)
    share = ((row * n_spans + which) * 2 + part) * CHANNELS + d
    put(dD + share, dD_, mask, True)
    put(dbias + share, dbias_, mask, True)


@dataclass(frozen=True)
class Cut:
    """How a call is cut into programs.

    Attributes:
        tokens: of a tile, `K`.
        channels: of a program.
        warps: of a program.
        polynomials: states of a tile whose decay is a polynomial.
        blocks: programs that the channels of a row are for.
        passes: each for `states` states.
        padded: states of all passes together, `M`.
        n_tiles: of a row.
        span: tokens of a program, a multiple of `tokens`.
        n_spans: of a row.
    """

    tokens: int
    channels: int
    warps: int
    polynomials: int
    blocks: int
    states: int
    passes: int
    padded: int
    n_tiles: int
    span: int
    n_spans: int

    @classmethod
    def of(cls, x: Tensor, A: Tensor, groups: int, operation: str) -> Cut:
        batch, length, channels = x.shape
        d_state = A.shape[1]
        sizes = sizes_for(operation, x)
        tokens = sizes["tokens"]
        per_group = channels // groups
        block = min(sizes["channels"], max(32, triton.next_power_of_2(per_group)))
        blocks = groups * -(-per_group // block)
        states = min(STATES, max(4, triton.next_power_of_2(d_state)))
        passes = -(-d_state // states)
        n_tiles = -(-length // tokens)
        # A span costs its work about twice: only where the card would be less than half full.
        wanted = sizes["per_sm"] * multiprocessors(x.device)
        n_spans = wanted // (blocks * batch)
        tiles = max(sizes["least_tiles"], -(-n_tiles // max(1, n_spans)))
        n_spans = -(-n_tiles // tiles)
        if n_spans < 3:
            n_spans, tiles = 1, n_tiles
        return cls(
            tokens=tokens,
            channels=block,
            warps=sizes["warps"],
            polynomials=sizes["polynomials"],
            blocks=blocks,
            states=states,
            passes=passes,
            padded=passes * states,
            n_tiles=n_tiles,
            span=tiles * tokens,
            n_spans=n_spans,
        )


# Kinds of calls that there were, all of whose kernels are compiled.
_known_kinds: set[Hashable] = set()


class _Prepared:
    """Arguments of one call as both passes of the kernels want them."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        softplus: bool,
        starts: Tensor | None,
        padding: Tensor | None,
        operation: str,
    ) -> None:
        self.batch, self.length, self.n_channels = x.shape
        self.groups, self.d_state = B.shape[2:]
        self.given = x, dt, A, B, C, D, z, dt_bias, padding
        self.cut = cut = Cut.of(x, A, self.groups, operation)
        self.T_all = cut.n_tiles * cut.tokens
        self.x, self.dt = rows_of(x), rows_of(dt)
        self.z = None if z is None else rows_of(z)
        self.A, self.D, self.dt_bias = A, D, dt_bias
        self.padding = padding
        new = x.new_empty
        self.pairs = new((self.batch, self.groups, self.T_all, cut.padded), dtype=torch.int64)
        self.offsets = (
            new((self.batch, self.T_all), dtype=torch.float32) if starts is not None else self.pairs
        )
        self.flags = dict(
            SOFTPLUS=softplus,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None,
            HAS_STARTS=starts is not None,
            HAS_PADDING=padding is not None,
            ASM=x.is_cuda,
            STAGED=x.is_cuda
            and cut.states == 16
            and cut.channels == 32
            and cut.warps == 1
            and cut.tokens in (4, 8),
        )
        tokens = 32
        marks = self.pairs if starts is None else starts.view(torch.uint8)
        B, C = rows_of(B), rows_of(C)
        pack_kernel[(-(-self.T_all // tokens), self.batch, self.groups)](
            B, C, marks, _or(padding, self.pairs), self.pairs.view(torch.float32), self.offsets,
            self.length, self.T_all, self.groups, self.d_state, cut.padded,
            triton.next_power_of_2(cut.padded),
            B.stride(0), token_stride(B), *B.stride()[2:],
            C.stride(0), token_stride(C), *C.stride()[2:], *marks.stride()[:2],
            HAS_STARTS=starts is not None, HAS_PADDING=padding is not None, TOKENS=tokens,
        )  # fmt: skip

    def grid(self, blocks: int, several: bool) -> tuple[int, int, int]:
        """Programs of a launch; none where it is only compiled (`ways`)."""
        spans = self.cut.n_spans if several == self.several else 0
        return blocks, self.batch, spans

    @property
    def several(self) -> bool:
        return self.cut.n_spans > 1

    def ways(self, *others: object) -> tuple[bool, ...]:
        """Whether to launch for several spans a row, for one, or both in turn.

        Lengths and batches choose between the two. So the first call of its kind (dtypes, sizes of
        the model, which arguments are there: `others` what is not among this call's own) goes both
        ways, one of them without programs, which compiles what a later call will want.
        """
        kinds = (t.dtype if isinstance(t, Tensor) else t for t in (*self.given, *others))
        kind = self.x.device, *self.constants(0).items(), *kinds
        if kind in _known_kinds:
            return (self.several,)
        _known_kinds.add(kind)
        return not self.several, self.several

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What both kernels take first."""
        blank = self.pairs
        return (
            self.x, self.dt, _or(self.z, blank), self.A, self.pairs, self.offsets,
            _or(self.D, blank), _or(self.dt_bias, blank), _or(self.padding, blank),
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Lengths, and the strides of x, dt, z and A."""
        cut = self.cut
        z = self.x if self.z is None else self.z
        return (
            self.length, self.T_all, cut.span, cut.n_spans, -(-self.length // kept_every(self.x)),
            self.x.stride(0), self.dt.stride(0), z.stride(0), *self.A.stride(),
        )  # fmt: skip

    def constants(self, number: int) -> dict[str, Any]:
        """Those of pass `number` over the states."""
        cut = self.cut
        return self.flags | dict(
            n0=number * cut.states,
            X_T=token_stride(self.x),
            DT_T=token_stride(self.dt),
            Z_T=token_stride(self.x if self.z is None else self.z),
            N=self.d_state,
            NB=cut.states,
            M=cut.padded,
            CHANNELS=self.n_channels,
            G=self.groups,
            BLOCK=cut.channels,
            K=cut.tokens,
            POLYNOMIALS=cut.polynomials,
            FIRST=number == 0,
            LAST=number == cut.passes - 1,
            num_warps=cut.warps,
            num_stages=1,
        )

    def split_constants(self, sizes: Tile) -> dict[str, Any]:
        """Those of kernels whose states are split between two warps."""
        general = self.constants(0)
        for name in ("n0", "NB", "M", "K", "POLYNOMIALS", "FIRST", "LAST", "ASM", "STAGED"):
            del general[name]
        block = sizes["split"]
        return general | dict(BLOCK=block, num_warps=block // 16, maxnreg=sizes["registers"])

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype)

    def chain(
        self, ends: Tensor, steps: Tensor, state: Tensor | None, out: Tensor | None, *,
        backwards: bool,
    ) -> None:  # fmt: skip
        strides = (0, 0, 0) if state is None else state.stride()
        block = 64
        rows = self.batch if self.several else 0
        chain_kernel[(-(-self.n_channels // block), rows, self.d_state)](
            ends, steps, self.A, _or(state, ends), _or(out, ends),
            self.cut.n_spans, *self.A.stride(), *strides,
            N=self.d_state, CHANNELS=self.n_channels, BLOCK=block, BACKWARDS=backwards,
            HAS_STATE=state is not None, HAS_OUT=out is not None, num_warps=1,
        )  # fmt: skip


def sizes_for(operation: str, x: Tensor) -> Tile:
    """The entry of the tile table; `wide` where operands are float32."""
    return tile(operation, *(("wide",) if x.dtype == torch.float32 else ()), device=x.device)


def rows_of(tensor: Tensor) -> Tensor:
    """[B, T, ...] with its last dimension side by side, and each row of the batch where `row_at`
    expects it; only what is not so already is copied."""
    unit = math.gcd(token_stride(tensor), 16)
    fits = tensor.stride(-1) == 1 and (tensor.shape[0] == 1 or tensor.stride(0) % unit == 0)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def token_stride(rows: Tensor) -> int:
    """Of [B, T, ...]; that of one token may be anything, and must not ask for another compilation:
    of a view it is taken for what it is, of less than a token's numbers for theirs."""
    stride = rows.stride(1)
    return stride if rows.shape[1] > 1 else max(stride, math.prod(rows.shape[2:]))


def _or(tensor: Tensor | None, blank: Tensor) -> Tensor:
    """An address to pass where there is no argument."""
    return blank if tensor is None else tensor


def kept_shape(x: Tensor, A: Tensor, keep: bool) -> tuple[int, int, int, int]:
    """[B, J, N, D]: a state before each tile of tokens."""
    tiles = -(-x.shape[1] // kept_every(x)) if keep else 0
    return x.shape[0], tiles, A.shape[1], x.shape[2]


def kept_every(x: Tensor) -> int:
    """Tokens from one kept state to the next: a tile of the backward pass."""
    return sizes_for("scan_backward", x)["tokens"]


def kept_dtype(x: Tensor) -> torch.dtype:
    """What kept states are rounded to: each is an entry of its own, so errors do not add up."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, D], the last state [B, D, N] float32, and the states before each tile [B, J, N, D].

    The latter are what the gradient needs; none unless `keep`.
    """
    call = _Prepared(x, dt, A, B, C, D, z, dt_bias, dt_softplus, starts, padding, "scan_forward")
    cut, batch, d_state, channels = call.cut, call.batch, call.d_state, call.n_channels
    y = x.new_empty(x.shape)
    last = call.new(batch, channels, d_state)
    kept = call.new(*kept_shape(x, A, keep), dtype=kept_dtype(x))
    sums = call.new(*x.shape) if cut.passes > 1 else last
    ends = steps = last
    strides = (0, 0, 0) if state is None else state.stride()
    if call.several:
        ends = call.new(batch, cut.n_spans, d_state, channels)
        steps = call.new(batch, cut.n_spans, channels)

    def run(number: int, several: bool, **flags: bool) -> None:
        forward_kernel[call.grid(cut.blocks, several)](
            *call.inputs, _or(state, last), y, sums, last, kept, ends, steps,
            *call.sizes, *strides, **call.constants(number), EVERY=kept_every(x), **flags,
        )  # fmt: skip

    sizes = sizes_for("scan_forward", x)
    split = x.is_cuda and cut.padded == 16 and cut.tokens == kept_every(x) == 8
    for several in call.ways(state, keep):
        if several:
            for number in range(cut.passes):
                run(number, several, HAS_STATE=False, ENDS_ONLY=True, FROM_ENDS=False, KEEP=False)
            call.chain(ends, steps, state, None, backwards=False)
        flags = dict(HAS_STATE=state is not None and not several, FROM_ENDS=several, KEEP=keep)
        if split:
            blocks = call.groups * -(-(channels // call.groups) // sizes["split"])
            split_forward_kernel[call.grid(blocks, several)](
                *call.inputs, _or(state, last), y, last, kept, ends, *call.sizes, *strides,
                **call.split_constants(sizes), **flags,
            )  # fmt: skip
            continue
        for number in range(cut.passes):
            run(number, several, ENDS_ONLY=False, **flags)
    return y, last, kept


def backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    starts: Tensor | None,
    padding: Tensor | None,
    kept: Tensor,
    has_state: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the state, empty for what was not given."""
    call = _Prepared(x, dt, A, B, C, D, z, dt_bias, dt_softplus, starts, padding, "scan_backward")
    cut, batch, d_state, channels = call.cut, call.batch, call.d_state, call.n_channels
    dy = rows_of(dy)
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dz = x.new_empty(0) if z is None else z.new_empty(z.shape)
    dA = call.new(batch, cut.n_spans, d_state, channels)
    by_product = x.is_cuda and x.dtype != torch.float32 and cut.tokens == 8
    sizes = sizes_for("scan_backward", x)
    split = x.is_cuda and cut.padded == 16 and cut.tokens == 8
    if split:
        blocks = call.groups * -(-(channels // call.groups) // sizes["split"])
        parts, halves = blocks, 2
    else:
        blocks = cut.blocks
        parts, halves = blocks * (cut.channels // 32 if by_product else 1), 1
    n_tiles = -(-call.length // cut.tokens)
    dBC = call.new(parts, batch, n_tiles, cut.padded, 2, cut.tokens)
    dD, dbias = (call.new(batch, cut.n_spans, halves, channels) for _ in range(2))
    dstate = call.new(batch, channels, d_state) if has_state else call.new(0)
    ends = call.new(batch, cut.n_spans, d_state, channels)
    steps = call.new(batch, cut.n_spans, channels) if call.several else dD
    rates = (A.mT.float() * LOG2E.value).contiguous()
    strides = (0, 0, 0) if dlast is None else dlast.stride()
    x_, dt_, z_, _, *inputs = call.inputs
    inputs = [x_, dt_, z_, rates, *inputs, kept, dy, _or(dlast, dA)]
    grads = [dx, ddt, dz, dA, dBC, dD, dbias, dstate, ends]
    row_strides = (*call.sizes[5:8], dy.stride(0), *strides)
    constants = call.constants(0) | dict(HAS_STATE=has_state, DY_T=token_stride(dy))
    for name in ("n0", "NB", "POLYNOMIALS", "FIRST", "LAST"):
        del constants[name]

    def run(several: bool, **flags: bool) -> None:
        staged = constants["STAGED"] and cut.passes == 1
        backward_kernel[call.grid(cut.blocks, several)](
            *inputs, *grads, steps, *call.sizes[:5], d_state, *row_strides,
            **constants | dict(STAGED=staged), **flags, BY_PRODUCT=by_product,
        )  # fmt: skip

    for several in call.ways(dy, dlast, has_state):
        if several:
            run(several, HAS_DLAST=False, ENDS_ONLY=True, FROM_ENDS=False)
            call.chain(ends, steps, dlast, None, backwards=True)
        flags = dict(HAS_DLAST=dlast is not None and not several, FROM_ENDS=several)
        if split:
            split_backward_kernel[call.grid(blocks, several)](
                *inputs, *grads, *call.sizes[:5], *row_strides, **call.split_constants(sizes),
                HAS_STATE=has_state, DY_T=token_stride(dy), BY_PRODUCT=by_product, **flags,
            )  # fmt: skip
        else:
            run(several, ENDS_ONLY=False, **flags)
    # [G, B, J, M, 2, K] to two of [B, T, G, N]
    of_groups = dBC.view(call.groups, -1, *dBC.shape[1:]).sum(1).permute(4, 1, 2, 5, 0, 3)
    of_groups = of_groups.flatten(2, 3)[:, :, : call.length, :, :d_state]
    return (
        dx,
        ddt,
        dA.sum((0, 1)).mT.to(A.dtype).contiguous(),
        B.new_empty(B.shape).copy_(of_groups[0]),
        C.new_empty(C.shape).copy_(of_groups[1]),
        x.new_empty(0) if D is None else dD.sum((0, 1, 2)).to(D.dtype),
        dz,
        x.new_empty(0) if dt_bias is None else dbias.sum((0, 1, 2)).to(dt_bias.dtype),
        dstate,
    )


@torch.library.custom_op("tamba::selective_scan", mutates_args=())
def scan_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` as an operator that torch's compiler and autograd know."""
    with torch.cuda.device_of(x):
        return forward(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, starts, padding, keep)


@scan_op.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty((x.shape[0], *A.shape), dtype=torch.float32),
        x.new_empty(kept_shape(x, A, keep), dtype=kept_dtype(x)),
    )


@torch.library.custom_op("tamba::selective_scan_backward", mutates_args=())
def scan_backward_op(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    starts: Tensor | None,
    padding: Tensor | None,
    kept: Tensor,
    has_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`backward` likewise."""
    with torch.cuda.device_of(x):
        return backward(
            dy, dlast, x, dt, A, B, C, D, z, dt_bias, dt_softplus, starts, padding, kept, has_state
        )  # type: ignore[return-value]


@scan_backward_op.register_fake
def _(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    starts: Tensor | None,
    padding: Tensor | None,
    kept: Tensor,
    has_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], *A.shape) if has_state else (0,)

    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return (
        like(x), like(dt), like(A), like(B), like(C), like(D), like(z), like(dt_bias),
        x.new_empty(shape, dtype=torch.float32),
    )  # fmt: skip


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, A, B, C, D, z, dt_bias, softplus, state, starts, padding, _ = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, starts, padding, output[2])
    ctx.softplus, ctx.has_state = softplus, state is not None
    ctx.state_dtype = None if state is None else state.dtype
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dy: Tensor | None, dlast: Tensor | None, dkept: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, z, dt_bias, starts, padding, kept = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate = scan_backward_op(
        dy, dlast, x, dt, A, B, C, D, z, dt_bias, ctx.softplus, starts, padding, kept,
        ctx.has_state,
    )  # fmt: skip
    return (
        dx,
        ddt,
        dA,
        dB,
        dC,
        None if D is None else dD,
        None if z is None else dz,
        None if dt_bias is None else dbias,
        None,
        dstate.to(ctx.state_dtype) if ctx.has_state else None,
        None,
        None,
        None,
    )


scan_op.register_autograd(_gradient, setup_context=_keep_for_gradient)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`tamba.ops.selective_scan` for arguments whose shapes were checked, at least one token."""
    given = (x, dt, A, B, C, D, z, dt_bias, state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y, last, _ = scan_op(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, starts, padding, keep)
    return y, last
