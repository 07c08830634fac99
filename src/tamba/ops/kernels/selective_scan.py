# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment,var-annotated,misc"
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

Rows too few to fill the card are cut into spans of tokens that run at the same time: a first pass
finds what each span adds to a zero state, a second one chains the spans, and the main pass starts
each span from the state it really has. The forward pass does more than 16 states a channel 16 at a
time, with the sums over states kept in float32 between the passes.

Shape letters: `B` batch, `T` tokens, `D` channels, `G` groups, `N` d_state (`M`: rounded up), `K`
tokens of a tile, `J` kept states of a row, `S` spans of a row, `R` channel blocks of a row.
"""

from __future__ import annotations

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


# Numbers that a lane of the backward pass keeps for itself, by state number: what the second-level
# cache would give back in some three hundred cycles.
OWN = tl.constexpr("{.shared .align 16 .b8 tamba_own[8192]; mov.u32 $0, tamba_own;}")
RATE = tl.constexpr(0)
CARRY = tl.constexpr(2048)
SUM_A = tl.constexpr(4096)
KEPT = tl.constexpr(6144)


@triton.jit
def own_memory(lane):
    """This lane's address; from there 16 x 128 bytes each for RATE, CARRY, SUM_A and KEPT."""
    base = tl.inline_asm_elementwise(OWN, "=r,r", [lane], tl.int32, is_pure=False, pack=1)
    return base + lane * 4


@triton.jit
def own(address):
    """What this lane keeps at `address`."""
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [address], tl.float32, is_pure=False, pack=1
    )


@triton.jit
def set_own(address, value):
    """Keep `value` at `address`."""
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.b32 $0, 0;", "=r,r,f", [address, value],
        tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_kept(kept_at, mask, N: tl.constexpr, CHANNELS: tl.constexpr, ASM: tl.constexpr):
    """The states before a tile, as they lie in memory."""
    rows = ()
    for i in tl.static_range(N):
        rows += (get(kept_at + i * CHANNELS, mask, ASM),)
    return rows


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


@triton.jit(do_not_specialize=["T", "T_all"])
def pack_kernel(
    B, C, starts, padding, pairs, offsets,
    T, T_all, G: tl.constexpr, N: tl.constexpr, M: tl.constexpr, M2: tl.constexpr,
    B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, starts_b, starts_t,
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
    b = tl.load(B + row * B_b + t_ * B_t + group * B_g + n_ * B_n, mask=mask, other=0.0)
    c = tl.load(C + row * C_b + t_ * C_t + group * C_g + n_ * C_n, mask=mask, other=0.0)
    both = tl.join(b.to(tl.float32), c.to(tl.float32))  # [TOKENS, M, 2]
    at = ((row * G + group) * T_all + t_) * M + n_
    at = at[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    tl.store(pairs + at, both, mask=((t < T_all)[:, None] & (n < M)[None, :])[:, :, None])
    if HAS_STARTS and group == 0:
        begins = tl.load(starts + row * starts_b + t * starts_t, mask=real, other=0) != 0
        tl.store(offsets + row * T_all + t, tl.where(begins, START, 0.0), mask=t < T_all)


@triton.jit(do_not_specialize=["T", "T_all", "span", "n_spans", "J"])
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


@triton.jit(do_not_specialize=["n_spans"])
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


@triton.jit(do_not_specialize=["T", "T_all", "span", "n_spans", "J", "n_states"])
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
    BY_PRODUCT: tl.constexpr, ASM: tl.constexpr, STAGED: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """The gradient over one span, last token first.

    With R what later tokens and the last state take from h_t, and g its whole gradient:
    ``g = dy C + R``, ``R' = a g``; ``d(dt x) = Σ_n g B``, ``d(dt A) = R' h_before``,
    ``dB = Σ_d g dt x``, ``dC = Σ_d dy h``.

    `R` and `dA` [B, S, N, D] are this program's memory from tile to tile, one state number after
    the other; LOCAL keeps both in shared memory until the end. In the end `R` holds, ENDS_ONLY,
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
    mine = lane
    raw_kept = raw_x
    if LOCAL:
        mine = own_memory(lane)
        for i in range(n_states):
            set_own(mine + RATE + i * 128, get(rates + i * CHANNELS, mask, ASM))
            set_own(mine + CARRY + i * 128, get_again(R + i * CHANNELS, mask, ASM))
            set_own(mine + SUM_A + i * 128, nothing)
        if not ENDS_ONLY:
            first_kept = kept + (start // K).to(tl.int64) * (N * CHANNELS)
            raw_kept = load_kept(first_kept, mask, N, CHANNELS, ASM)
    for j in range(tiles):
        t0 = start - j * K
        tile_at = flat + t0.to(tl.int64) * CHANNELS
        pairs_at = pairs + t0.to(tl.int64) * M
        kept_at = kept + (t0 // K).to(tl.int64) * (N * CHANNELS)
        next_h = nothing
        next_R = nothing
        next_rate = nothing
        if LOCAL:
            if not ENDS_ONLY:
                for i in tl.static_range(N):
                    set_own(mine + KEPT + i * 128, raw_kept[i].to(tl.float32))
                before_it = kept + (tl.maximum(t0 - K, 0) // K).to(tl.int64) * (N * CHANNELS)
                raw_kept = load_kept(before_it, mask, N, CHANNELS, ASM)
        else:
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
            if LOCAL:
                rate = own(mine + RATE + i * 128)
                carry = own(mine + CARRY + i * 128)
                if not ENDS_ONLY:
                    h = own(mine + KEPT + i * 128)
            else:
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
                if LOCAL:
                    dA_i = own(mine + SUM_A + i * 128)
                else:
                    dA_i = get_again(dA + i * CHANNELS, mask, ASM)
                before = ()
                for_C = ()
                sums = ()
                for k in tl.static_range(K):
                    before += (h,)
                    h = decays[k] * h + inputs[k] * bs[k]
                    sums += (ys[k] + h * cs[k],)
                    for_C += (grads[k] * h,)
                ys = sums
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
                    dA_i += q * dts[K - 1 - back]
                d_inputs = ()
                d_logs = ()
                for_B = ()
                for k in tl.static_range(K):
                    d_inputs += (backwards_input[K - 1 - k],)
                    d_logs += (backwards_log[K - 1 - k],)
                    for_B += (backwards_B[K - 1 - k],)
                if LOCAL:
                    set_own(mine + SUM_A + i * 128, dA_i)
                else:
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
            if LOCAL:
                set_own(mine + CARRY + i * 128, carry)
            else:
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

    if LOCAL:
        for i in range(n_states):
            put(R + i * CHANNELS, own(mine + CARRY + i * 128), mask, ASM)
            if not ENDS_ONLY:
                put(dA + i * CHANNELS, own(mine + SUM_A + i * 128), mask, ASM)
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
        pack_kernel[(-(-self.T_all // tokens), self.batch, self.groups)](
            B, C, marks, _or(padding, self.pairs), self.pairs.view(torch.float32), self.offsets,
            self.length, self.T_all, self.groups, self.d_state, cut.padded,
            triton.next_power_of_2(cut.padded),
            *B.stride(), *C.stride(), *(marks.stride()[:2]),
            HAS_STARTS=starts is not None, HAS_PADDING=padding is not None, TOKENS=tokens,
        )  # fmt: skip

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.cut.blocks, self.batch, self.cut.n_spans

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

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype)

    def chain(
        self, ends: Tensor, steps: Tensor, state: Tensor | None, out: Tensor | None, *,
        backwards: bool,
    ) -> None:  # fmt: skip
        strides = (0, 0, 0) if state is None else state.stride()
        block = 64
        chain_kernel[(-(-self.n_channels // block), self.batch, self.d_state)](
            ends, steps, self.A, _or(state, ends), _or(out, ends),
            self.cut.n_spans, *self.A.stride(), *strides,
            N=self.d_state, CHANNELS=self.n_channels, BLOCK=block, BACKWARDS=backwards,
            HAS_STATE=state is not None, HAS_OUT=out is not None, num_warps=1,
        )  # fmt: skip


def sizes_for(operation: str, x: Tensor) -> Tile:
    """The entry of the tile table; `wide` where operands are float32."""
    return tile(operation, *(("wide",) if x.dtype == torch.float32 else ()), device=x.device)


def rows_of(tensor: Tensor) -> Tensor:
    """Channels next to each other; only what is not so already is copied."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def token_stride(rows: Tensor) -> int:
    """Of [B, T, D]; with one token it says nothing, and must not ask for another compilation."""
    return rows.stride(1) if rows.shape[1] > 1 else rows.shape[2]


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
    several = cut.n_spans > 1
    if several:
        ends = call.new(batch, cut.n_spans, d_state, channels)
        steps = call.new(batch, cut.n_spans, channels)

    def run(number: int, **flags: bool) -> None:
        forward_kernel[call.grid](
            *call.inputs, _or(state, last), y, sums, last, kept, ends, steps,
            *call.sizes, *strides, **call.constants(number), EVERY=kept_every(x), **flags,
        )  # fmt: skip

    if several:
        for number in range(cut.passes):
            run(number, HAS_STATE=False, ENDS_ONLY=True, FROM_ENDS=False, KEEP=False)
        call.chain(ends, steps, state, None, backwards=False)
    for number in range(cut.passes):
        from_state = state is not None and not several
        run(number, HAS_STATE=from_state, ENDS_ONLY=False, FROM_ENDS=several, KEEP=keep)
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
    parts = cut.blocks * (cut.channels // 32 if by_product else 1)
    n_tiles = -(-call.length // cut.tokens)
    dBC = call.new(parts, batch, n_tiles, cut.padded, 2, cut.tokens)
    dD, dbias = (call.new(batch, cut.n_spans, channels) for _ in range(2))
    dstate = call.new(batch, channels, d_state) if has_state else call.new(0)
    several = cut.n_spans > 1
    ends = call.new(batch, cut.n_spans, d_state, channels)
    steps = call.new(batch, cut.n_spans, channels) if several else dD
    rates = (A.mT.float() * LOG2E.value).contiguous()
    strides = (0, 0, 0) if dlast is None else dlast.stride()

    def run(**flags: bool) -> None:
        x_, dt_, z_, _, *inputs = call.inputs
        lengths = call.sizes[:5]
        constants = call.constants(0)
        for name in ("n0", "NB", "POLYNOMIALS", "FIRST", "LAST"):
            del constants[name]
        constants["STAGED"] &= cut.passes == 1
        local = bool(sizes_for("scan_backward", x).get("local", 0)) and constants["STAGED"]
        backward_kernel[call.grid](
            x_, dt_, z_, rates, *inputs, kept, dy, _or(dlast, dA),
            dx, ddt, dz, dA, dBC, dD, dbias, dstate, ends, steps,
            *lengths, d_state, *call.sizes[5:8], dy.stride(0), *strides,
            **constants, **flags, HAS_STATE=has_state, DY_T=token_stride(dy),
            BY_PRODUCT=by_product, LOCAL=local,
        )  # fmt: skip

    if several:
        run(HAS_DLAST=False, ENDS_ONLY=True, FROM_ENDS=False)
        call.chain(ends, steps, dlast, None, backwards=True)
    from_last = dlast is not None and not several
    run(HAS_DLAST=from_last, ENDS_ONLY=False, FROM_ENDS=several)
    # [G, B, J, M, 2, K] to two of [B, T, G, N]
    of_groups = dBC.view(call.groups, -1, *dBC.shape[1:]).sum(1).permute(4, 1, 2, 5, 0, 3)
    of_groups = of_groups.flatten(2, 3)[:, :, : call.length, :, :d_state]
    return (
        dx,
        ddt,
        dA.sum((0, 1)).mT.to(A.dtype).contiguous(),
        B.new_empty(B.shape).copy_(of_groups[0]),
        C.new_empty(C.shape).copy_(of_groups[1]),
        x.new_empty(0) if D is None else dD.sum((0, 1)).to(D.dtype),
        dz,
        x.new_empty(0) if dt_bias is None else dbias.sum((0, 1)).to(dt_bias.dtype),
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
