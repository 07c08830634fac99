# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment,var-annotated,misc"
"""Angles between all states of a token, and centred kernels between tokens, as Triton kernels.

Four launches a batch, whatever the number of states, and states lie where the layers left them:

1. Lengths, float32.
2. Squared chords |u - v|² of directions u, v, for blocks of states and a few tokens: differences
   are squared and added up in float32, rounded to nearest, without products of matrices. Tensor
   cores cut sums off instead of rounding them, and a cosine near 1 has no digits left of the angle;
   a chord has all of them. Near half a turn |u - v|² says little, and |u + v|² is computed too.
   Blocks of one tile of tokens are neighbours in the grid, so that states come from the
   second-level cache all but once.
3. Angles of chords, and their sums over the tokens of a row, in a fixed order.
4. Kernel matrices of groups of tokens by tensor cores, made cosines and U-centred (Székely and
   Rizzo 2014, Annals of Statistics 42, definition 2): inner products of these are the unbiased
   HSIC, with nothing left that cancels.

Shape letters: `B` rows, `S` states, `D` d_model, `n` tokens that count, `G` groups of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tamba.ops.kernels.tiles import tile


@triton.jit
def block_pair(pair, BLOCKS: tl.constexpr):
    """Row and column of entry `pair` of the upper triangle of BLOCKS x BLOCKS, row by row."""
    low = 0
    for row in tl.static_range(BLOCKS):
        down = (low == row) & (pair >= BLOCKS - row)
        pair = tl.where(down, pair - (BLOCKS - row), pair)
        low = tl.where(down, row + 1, low)
    return low, low + pair


@triton.jit(do_not_specialize=["n", "rows", "row_length"])
def lengths_kernel(
    base, offsets, tokens, lengths, fault, n, rows, row_length,
    S: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Lengths [S, n], and the least (state, row, whether zero) that has no direction."""
    state = tl.program_id(0) % S
    at = tl.program_id(0) // S * TOKENS + tl.arange(0, TOKENS)
    lanes = tl.arange(0, WIDTH)
    token = tl.load(tokens + at, mask=at < n, other=0)
    offset = tl.multiple_of(tl.load(offsets + state), ALIGNED)
    x = base + (offset + token * D)[:, None] + lanes[None, :]
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for d in tl.range(0, D, WIDTH):
        values = tl.load(x + d, mask=(lanes < D - d)[None, :], other=0.0).to(tl.float32)
        total += values * values
    length = tl.sqrt_rn(tl.sum(total, 1))
    tl.store(lengths + state.to(tl.int64) * n + at, length, mask=at < n)
    good = (length > 0) & (length < float("inf"))
    zero = tl.where(length == 0, 1, 0)
    code = (state * rows + (token // row_length).to(tl.int32)) * 2 + zero
    NONE: tl.constexpr = 2147483647
    least = tl.min(tl.where(good | (at >= n), NONE, code), 0)
    tl.atomic_min(fault, least, mask=least < NONE)


@triton.jit
def squares(left, right, a, b, left_there, right_there, SIGN: tl.constexpr, D: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    """|x a + SIGN y b|² [P, Q, tokens] of what lies at `left` [P, 1, tokens, WIDTH] and `right`."""
    lanes = tl.arange(0, WIDTH)[None, None, None, :]
    total = (left_there & right_there & (lanes < 0)).to(tl.float32)
    x = tl.load(left, mask=left_there & (lanes < D), other=0.0)
    y = tl.load(right, mask=right_there & (lanes < D), other=0.0)
    # In registers and not by Triton's stages, which would have every thread widen what all of a
    # warp's threads take from shared memory.
    for d in tl.range(WIDTH, D + WIDTH, WIDTH, num_stages=1):
        next_x = tl.load(left + d, mask=left_there & (lanes < D - d), other=0.0)
        next_y = tl.load(right + d, mask=right_there & (lanes < D - d), other=0.0)
        between = x.to(tl.float32) * a + SIGN * (y.to(tl.float32) * b)
        total += between * between
        x, y = next_x, next_y
    return tl.sum(total, 3)


@triton.jit(do_not_specialize=["n"])
def chords_kernel(
    base, offsets, tokens, lengths, chords, n,
    S: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr,
    STATES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Chords [pairs of blocks, n, STATES * STATES] of directions.

    |u - v|², or where that is nearly 4, the square of |u + v| below zero.
    """
    FAR: tl.constexpr = 3.5
    TINY: tl.constexpr = 1e-30
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    pair = tl.program_id(0) % PAIRS
    first = tl.program_id(0) // PAIRS * TOKENS
    low, high = block_pair(pair, BLOCKS)
    p = (low * STATES + tl.arange(0, STATES))[:, None, None, None]
    q = (high * STATES + tl.arange(0, STATES))[None, :, None, None]
    at = (first + tl.arange(0, TOKENS))[None, None, :, None]
    lanes = tl.arange(0, WIDTH)[None, None, None, :]
    token = tl.load(tokens + at, mask=at < n, other=0) * D
    left_there = (p < S) & (at < n)
    right_there = (q < S) & (at < n)
    of_left = tl.multiple_of(tl.load(offsets + p, mask=p < S, other=0), [ALIGNED] * 4)
    of_right = tl.multiple_of(tl.load(offsets + q, mask=q < S, other=0), [ALIGNED] * 4)
    left = base + (of_left + token) + lanes
    right = base + (of_right + token) + lanes
    a = tl.load(lengths + p.to(tl.int64) * n + at, mask=left_there, other=1.0)
    b = tl.load(lengths + q.to(tl.int64) * n + at, mask=right_there, other=1.0)
    a = tl.div_rn(tl.full(a.shape, 1.0, tl.float32), a)
    b = tl.div_rn(tl.full(b.shape, 1.0, tl.float32), b)
    chord = squares(left, right, a, b, left_there, right_there, -1.0, D, WIDTH)
    if tl.max(tl.max(tl.max(chord, 2), 1), 0) > FAR:
        sums = squares(left, right, a, b, left_there, right_there, 1.0, D, WIDTH)
        chord = tl.where(chord > FAR, tl.minimum(-sums, -TINY), chord)
    i = tl.arange(0, STATES)[:, None, None]
    j = tl.arange(0, STATES)[None, :, None]
    t = first + tl.arange(0, TOKENS)[None, None, :]
    where = (pair.to(tl.int64) * n + t) * (STATES * STATES) + i * STATES + j
    tl.store(chords + where, chord, mask=t < n)


@triton.jit
def half_turns(chord):
    """The angle of what `chords_kernel` says: 2/π atan2(|u - v|, |u + v|), and 1 - cos."""
    apart = tl.where(chord < 0, 4.0 + chord, chord)
    together = tl.where(chord < 0, -chord, 4.0 - chord)
    s = tl.sqrt_rn(apart)
    c = tl.sqrt_rn(together)
    t = tl.div_rn(tl.minimum(s, c), tl.maximum(s, c))
    z = t * t
    # 2/π atan(t) / t as a polynomial of t², Chebyshev's; off by less than 1e-8 in exact arithmetic.
    r = 1.8042214214801788e-03 * z - 1.0189118795096874e-02
    r = r * z + 2.7112113311886787e-02
    r = r * z - 4.7717489302158356e-02
    r = r * z + 6.7715682089328766e-02
    r = r * z - 9.0416371822357178e-02
    r = r * z + 1.2727610766887665e-01
    r = r * z - 2.1220488846302032e-01
    r = (r * z + 6.3661974668502808e-01) * t
    return tl.where(s > c, 1.0 - r, r), 0.5 * apart


@triton.jit(do_not_specialize=["n", "rows"])
def sums_kernel(
    chords, ends, sums, n, rows,
    S: tl.constexpr, BLOCKS: tl.constexpr, STATES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """[3, B, S, S] float64: mean angle of a row, that of its last token, mean of 1 - cos."""
    CELLS: tl.constexpr = STATES * STATES
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    pair = tl.program_id(0) % PAIRS
    row = tl.program_id(0) // PAIRS
    low, high = block_pair(pair, BLOCKS)
    cell = tl.arange(0, CELLS)
    begin = tl.load(ends + row)
    end = tl.load(ends + row + 1)
    chords += pair.to(tl.int64) * n * CELLS
    angles = tl.zeros([CELLS], tl.float64)
    apart = tl.zeros([CELLS], tl.float64)
    for first in tl.range(begin, end, TOKENS):
        at = first + tl.arange(0, TOKENS)[:, None]
        chord = tl.load(chords + at * CELLS + cell[None, :], mask=at < end, other=0.0)
        angle, versine = half_turns(chord)
        angles += tl.sum(angle.to(tl.float64), 0)
        apart += tl.sum(versine.to(tl.float64), 0)
    last, _versine = half_turns(tl.load(chords + (end - 1) * CELLS + cell))
    count = (end - begin).to(tl.float64)
    p = low * STATES + cell // STATES
    q = high * STATES + cell % STATES
    table = tl.cast(rows, tl.int64) * S * S
    there = (p < q) & (q < S)
    for turn in tl.static_range(2):
        # Both triangles of a table; the diagonal is zero and was so before.
        where = row.to(tl.int64) * S * S + (p * S + q if turn == 0 else q * S + p)
        tl.store(sums + where, angles / count, mask=there)
        tl.store(sums + table + where, last.to(tl.float64), mask=there)
        tl.store(sums + 2 * table + where, apart / count, mask=there)


@triton.jit(do_not_specialize=["n"])
def centred_kernel(
    base, offsets, tokens, lengths, groups, centred, n,
    S: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr,
    DOT: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """U-centred cosines [G, S, SIZE, SIZE] between the tokens of a group, of every state.

    `groups` [G, 3]: the first token of those that count, from one to the next, how many. Scaled so
    that inner products over a group are the unbiased HSIC.
    """
    state = tl.program_id(0) % S
    group = (tl.program_id(0) // S).to(tl.int64)
    start = tl.load(groups + 3 * group)
    step = tl.load(groups + 3 * group + 1)
    size = tl.load(groups + 3 * group + 2)
    i = tl.arange(0, SIZE)
    live = i < size
    lanes = tl.arange(0, WIDTH)
    at = start + i * step
    token = tl.load(tokens + at, mask=live, other=0)
    offset = tl.multiple_of(tl.load(offsets + state), ALIGNED)
    x = base + (offset + token * D)[:, None] + lanes[None, :]
    product = tl.zeros([SIZE, SIZE], tl.float32)
    for d in tl.range(0, D, WIDTH, num_stages=STAGES):
        there = live[:, None] & (lanes < D - d)[None, :]
        values = tl.load(x + d, mask=there, other=0.0).to(DOT)
        product = tl.dot(values, tl.trans(values), product, input_precision="ieee")
    length = tl.load(lengths + state.to(tl.int64) * n + at, mask=live, other=1.0)
    other = live[:, None] & live[None, :] & (i[:, None] != i[None, :])
    cosine = tl.where(other, product / length[:, None] / length[None, :], 0.0)
    many = size.to(tl.float32)
    rows = tl.sum(cosine, 1)
    columns = tl.sum(cosine, 0)
    whole = tl.sum(rows, 0) / ((many - 1.0) * (many - 2.0))
    found = cosine - (rows[:, None] + columns[None, :]) / (many - 2.0) + whole
    found = tl.where(other, found, 0.0) / tl.sqrt_rn(many * (many - 3.0))
    centred += (group * S + state) * (SIZE * SIZE)
    tl.store(centred + i[:, None] * SIZE + i[None, :], found)


def compared(
    states: Sequence[Tensor], tokens: Tensor, ends: Tensor, groups: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Angles and dependence of states [B, T, D], contiguous and of one type.

    Args:
        tokens: [n] int64, numbers of the tokens that count in the flattened batch, on the CPU, as
            are the others.
        ends: [B + 1] int64, where among these rows begin and the last one ends.
        groups: [G, 3] int64, groups of tokens: the first, from one to the next, how many.
        group_size: tokens of a group at most, a power of two.

    Returns:
        [3, B, S, S] float64: mean angle in half turns, angle of the last token, mean of 1 - cos;
        [G, S, S] float32: unbiased HSIC; and the least ``(state * B + row) * 2 + (1 if zero)`` of
        states without a direction, or the largest int32.
    """
    first = states[0]
    device, (B, T, D), S, n, G = first.device, first.shape, len(states), len(tokens), len(groups)
    bytes_of = first.element_size()
    # A load of 16 bytes needs to know that addresses are multiples of it.
    spans = [state.data_ptr() - first.data_ptr() for state in states]
    aligned = 16 // bytes_of if all(span % 16 == 0 for span in spans) else 1
    offsets = torch.tensor([span // bytes_of for span in spans])
    parts = [offsets, tokens, ends, groups.flatten()]
    offsets, tokens, ends, groups = _sent(parts, device)
    lengths = torch.empty(S, n, dtype=torch.float32, device=device)
    fault = torch.full((), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)
    shape = {"S": S, "D": D, "ALIGNED": aligned}

    sizes = tile("lengths", device=device)
    lengths_kernel[(triton.cdiv(n, sizes["tokens"]) * S,)](
        first, offsets, tokens, lengths, fault, n, B, T,
        **shape, TOKENS=sizes["tokens"], WIDTH=sizes["width"], num_warps=sizes["warps"],
    )  # fmt: skip

    sizes = tile("chords", device=device)
    block = sizes["states"]
    blocks = triton.cdiv(S, block)
    pairs = blocks * (blocks + 1) // 2
    chords = torch.empty(pairs, n, block * block, dtype=torch.float32, device=device)
    chords_kernel[(triton.cdiv(n, sizes["tokens"]) * pairs,)](
        first, offsets, tokens, lengths, chords, n,
        **shape, BLOCKS=blocks, STATES=block, TOKENS=sizes["tokens"], WIDTH=sizes["width"],
        num_warps=sizes["warps"],
    )  # fmt: skip

    sums = torch.zeros(3, B, S, S, dtype=torch.float64, device=device)
    sizes = tile("chord_sums", device=device)
    sums_kernel[(pairs * B,)](
        chords, ends, sums, n, B, S=S, BLOCKS=blocks, STATES=block, TOKENS=sizes["tokens"],
        num_warps=sizes["warps"],
    )  # fmt: skip
    del chords

    if not G:
        return sums, torch.zeros(0, S, S, device=device), fault
    sizes = tile("centred", *(["wide"] if bytes_of == 4 else []), device=device)
    centred = torch.empty(G, S, group_size**2, dtype=torch.float32, device=device)
    # The interpreter knows no products of bfloat16.
    short = first.is_cuda and bytes_of == 2
    product = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(first.dtype)
    centred_kernel[(G * S,)](
        first, offsets, tokens, lengths, groups, centred, n,
        **shape, SIZE=group_size, DOT=product if short else tl.float32, WIDTH=sizes["width"],
        STAGES=sizes["stages"],
        num_warps=sizes["warps"],
    )  # fmt: skip
    return sums, torch.bmm(centred, centred.mT), fault


def _sent(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Numbers on the device, by one copy that nothing waits for; each begins at 16 bytes."""
    padded = [torch.nn.functional.pad(part, (0, len(part) % 2)) for part in parts]
    whole = torch.cat(padded)
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    pieces = whole.split([len(part) for part in padded])
    return [piece[: len(part)] for piece, part in zip(pieces, parts, strict=True)]
