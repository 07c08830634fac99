"""Directions of hidden states: angles between all states of a token, and what the directions of one
state say of those of another by the tokens that they make alike.

A batch gives one Gram matrix a token over its states, or in Triton chords instead of products
(`kernels/directions`), which take the states as the layers left them: of the many passes over
states in float32 that the angles of torch's own operators need, none is left. These kernels have
been interpreted and compiled, but no GPU has run them yet: `TAMBA_KERNELS=triton` asks for them.

Shape letters: `B` rows of a batch, `T` tokens of a row, `S` states, `D` d_model, `n` tokens that
count, `G` groups of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from tamba.ops.backend import kernels_run

GROUP = 64
"""Tokens of one kernel matrix, all of one row; its estimate is unbiased for any number."""
_NEAR = 0.999
"""Cosines beyond which an angle is taken from a difference: arccos loses half the digits there."""
_VALUES_AT_ONCE = 1 << 23
"""Numbers of the states that are compared by differences at once."""
_SOUND = (1 << 31) - 1


@dataclass(frozen=True, eq=False)
class Compared:
    """What the states of a batch are to one another, row by row; on the device of the states.

    Args:
        angles: [B, S, S] float64, mean angle of two states over the tokens of a row that count, in
            half turns, from 0 to 1.
        last: [B, S, S] float64, the angle at the last of these tokens.
        apart: [B, S - 1] float64, mean of one minus the cosine of a state and the next one.
        dependence: [B, S, S] float64, sums over groups of `GROUP` tokens of a row of the unbiased
            HSIC of cosine kernels times the tokens of a group; zero in rows of less than four
            tokens.
        fault: int, the least ``(state * B + row) * 2 + (1 if zero)`` of states that are not finite
            or zero, for `faulty`. Numbers of its row mean nothing.
    """

    angles: Tensor
    last: Tensor
    apart: Tensor
    dependence: Tensor
    fault: Tensor


def faulty(fault: int, rows: int) -> tuple[int, int, bool] | None:
    """(state, row, whether it is zero) of the lowest state that has no direction, or None.

    States above it only inherit what is wrong.

    Args:
        fault: `Compared.fault`, read; on a GPU reading it waits for all that was asked for before.
        rows: of the batch.
    """
    if fault == _SOUND:
        return None
    return fault // 2 // rows, fault // 2 % rows, fault % 2 == 1


def compare(states: Sequence[Tensor], counts: Tensor) -> Compared:
    """Compare the directions of all states of some tokens.

    Angles are off by less than 1e-6 half turns in float32 and wider, near 0 and near 1 too. No row
    depends on others. With kernels nothing waits for the GPU.

    Args:
        states: two or more, [B, T, D], one of them after another layer than the other.
        counts: [B, T] bool, tokens that count, at least one a row; on the CPU, because all that
            only depends on it is worked out there.
    """
    if kernels_run("compare", *states, proven=False):
        common = reduce(torch.promote_types, (state.dtype for state in states))
        return _by_kernels([state.to(common).contiguous() for state in states], counts)
    return _by_torch(states, counts)


def _by_kernels(states: Sequence[Tensor], counts: Tensor) -> Compared:
    from tamba.ops.kernels import directions as kernels

    per_row = counts.sum(1)
    groups = _groups(per_row)
    ends = torch.nn.functional.pad(per_row.cumsum(0), (1, 0))
    tokens = counts.flatten().nonzero()[:, 0]
    with torch.cuda.device_of(states[0]):
        found, hsic, fault = kernels.compared(states, tokens, ends, groups[:, 1:], GROUP)
    return Compared(
        found[0], found[1], found[2].diagonal(1, 1, 2), _by_row(hsic, groups, len(counts)), fault
    )


def _by_torch(states: Sequence[Tensor], counts: Tensor) -> Compared:
    B, device = len(counts), states[0].device
    rows = counts.nonzero()[:, 0]
    per_row = counts.sum(1)
    unit, lengths = _directions(states, counts)
    angle = _angles(unit, unit @ unit.mT)
    # [B, n], the mean over the tokens of a row as a product: no additions in turns.
    share = (torch.arange(B)[:, None] == rows).double() / per_row[:, None]
    share = share.to(device)
    means = (share @ angle.double().flatten(1)).unflatten(1, angle.shape[1:])
    last = angle[(per_row.cumsum(0) - 1).to(device)].double()
    # 1 - cos t = 2 sin(t/2)^2 keeps its digits where the layer hardly turns.
    own = angle.diagonal(1, 1, 2).double()
    apart = share @ (2.0 * torch.sin(own * (math.pi / 2)).square())
    groups = _groups(per_row)
    hsic = torch.zeros(len(groups), *angle.shape[1:], dtype=torch.float64, device=device)
    for size in groups[:, 3].unique().tolist():
        (some,) = (groups[:, 3] == size).nonzero(as_tuple=True)
        first, step = groups[some, 1:3, None].unbind(1)
        hsic[some.to(device)] = _dependence(unit, first + step * torch.arange(size))
    return Compared(means, last, apart, _by_row(hsic, groups, B), _fault(lengths, rows, B))


def _groups(per_row: Tensor) -> Tensor:
    """Tokens that are compared with one another, [G, 4] int64: their row, the first of them, from
    one to the next, how many. Tokens that count are numbered through.

    Groups lie in one row, so that what they say does not depend on how rows are batched and rows
    can be left out one by one; far apart in it, since neighbours are not independent.

    Args:
        per_row: [B], tokens that count.
    """
    size = per_row.clamp_max(GROUP)
    number = torch.where(size >= 4, per_row // size, 0)
    row = torch.repeat_interleave(number)
    place = torch.arange(len(row)) - (number.cumsum(0) - number)[row]
    first = (per_row.cumsum(0) - per_row)[row] + place
    return torch.stack([row, first, number[row], size[row]], dim=1)


def _by_row(hsic: Tensor, groups: Tensor, rows: int) -> Tensor:
    """[B, S, S] float64 of [G, S, S]: sums over groups times their tokens, in a fixed order."""
    share = (torch.arange(rows)[:, None] == groups[:, 0]).double() * groups[:, 3]
    if hsic.device.type == "cuda":
        share = share.pin_memory().to(hsic.device, non_blocking=True)
    return (share @ hsic.double().flatten(1)).unflatten(1, hsic.shape[1:])


def _directions(states: Sequence[Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
    """States of tokens that count, [n, S, D] of length one, and their lengths [n, S]."""
    flat = [state.flatten(0, 1) for state in states]
    if not bool(counts.all()):
        where = counts.flatten().nonzero()[:, 0].to(flat[0].device)
        flat = [state.index_select(0, where) for state in flat]
    seen = torch.stack(flat, dim=1)
    wide = torch.promote_types(seen.dtype, torch.float32)
    lengths = torch.linalg.vector_norm(seen, dim=-1, dtype=wide)
    scale = lengths[..., None]
    # What was stacked is a copy, which a wide type lets be written over.
    unit = seen.div_(scale) if seen.dtype == wide else seen / scale
    return unit, lengths


def _fault(lengths: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """`Compared.fault` of lengths [n, S] of tokens in these rows [n]."""
    state = torch.arange(lengths.shape[1], device=lengths.device)
    code = (state * n_rows + rows.to(lengths.device)[:, None]) * 2 + (lengths == 0).long()
    good = torch.isfinite(lengths) & (lengths > 0)
    return code.masked_fill(good, _SOUND).min()


def _angles(unit: Tensor, cosine: Tensor) -> Tensor:
    """[n, S, S] angles in half turns.

    arccos where it is well conditioned; 2 asin(|u - v| / 2) for directions that nearly agree, and
    the same from |u + v| where they are nearly opposite.
    """
    angle = torch.acos(cosine.clamp(-1.0, 1.0)) / math.pi
    near = (cosine.abs() > _NEAR).triu(1)  # the other half is its mirror image
    angle.diagonal(0, 1, 2).zero_()
    where = near.nonzero()
    step = max(1, _VALUES_AT_ONCE // unit.shape[-1])
    for some in where.split(step):
        token, low, high = some.unbind(1)
        opposite = cosine[token, low, high] < 0
        u, v = unit[token, low], unit[token, high]
        apart = torch.linalg.vector_norm(torch.where(opposite[:, None], u + v, u - v), dim=-1)
        turn = 2.0 * torch.asin((apart / 2.0).clamp_max(1.0)) / math.pi
        turn = torch.where(opposite, 1.0 - turn, turn)
        angle[token, low, high] = turn
        angle[token, high, low] = turn
    return angle


def _dependence(unit: Tensor, groups: Tensor) -> Tensor:
    """[G, S, S] float64: the unbiased HSIC of every two states in groups [G, size] of tokens.

    HSIC of linear kernels, estimator 5 of Song et al. (2012, JMLR 13): unbiased in groups of any
    size, so that groups can be added up (Nguyen et al. 2021, arXiv 2010.15327, section 3.1).
    """
    G, size = groups.shape
    some = unit.transpose(0, 1)[:, groups.flatten().to(unit.device)]
    some = some.view(-1, size, some.shape[-1])
    kernels = torch.bmm(some, some.mT).view(-1, G, size, size)
    kernels.diagonal(0, -2, -1).zero_()
    kernels = kernels.transpose(0, 1).double()
    sums = kernels.sum(-1)
    whole = sums.sum(-1, keepdim=True)
    flat = kernels.flatten(2)
    found = (
        flat @ flat.mT
        + whole @ whole.mT / ((size - 1) * (size - 2))
        - 2.0 / (size - 2) * (sums @ sums.mT)
    )
    return found / (size * (size - 3))
