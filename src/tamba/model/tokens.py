"""Where the tokens of a forward pass stand: positions, padding, document starts, rotary angles.

Worked out once a pass by the model and handed to every mixer, so that no mixer interprets an
attention mask. Shape letters: `B` batch, `T` tokens, `S` cached plus new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Tokens:
    """What a mixer needs to know of the tokens besides their vectors.

    Args:
        positions: [B, T] or [1, T], the position of each token in its document.
        padding: [B], leading places of each row that hold no token once `order` is applied; None
            when every place holds one.
        order: [B, T], a permutation of each row that puts padding first, or None when it is there
            already. Recurrent mixers work in this order, so padding anywhere touches no state.
        starts: [B, T] bool, in that order too, True where a token begins a new document; None for
            one document a row.
        documents: [B, T], counted, padding apart; None for one document a row. In the given order.
        mask: [B, T] bool, False at padding; None when there is none.
        attention_masks: a ready mask for each layer type (`full_attention`, `sliding_attention`),
            in the form that transformers' attention interface expects.
        segments: as `segments` gives them, where attention takes packed rows as documents end to
            end; None where `attention_masks` tell documents apart.
        rotary: (cos, sin), each [B, T, rotary_dim], by rotary key (see `rotary.py`).
    """

    positions: Tensor
    padding: Tensor | None = None
    order: Tensor | None = None
    starts: Tensor | None = None
    documents: Tensor | None = None
    mask: Tensor | None = None
    attention_masks: dict[str, Tensor | None] = field(default_factory=dict)
    segments: Tensor | None = None
    rotary: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tokens:
        """The same on another device; asked for where a stack is spread over several."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, non_blocking=non_blocking)

        return Tokens(
            positions=self.positions.to(device, non_blocking=non_blocking),
            padding=move(self.padding),
            order=move(self.order),
            starts=move(self.starts),
            documents=move(self.documents),
            mask=move(self.mask),
            attention_masks={k: move(m) for k, m in self.attention_masks.items()},
            segments=move(self.segments),
            rotary={k: (c.to(device), s.to(device)) for k, (c, s) in self.rotary.items()},
        )

    def arrange(self, x: Tensor) -> Tensor:
        """[B, T, ...] with zeros at padding and, where needed, padding moved to the front."""
        if self.mask is not None:
            x = x.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (x.dim() - 2)), 0)
        return x if self.order is None else _gather_rows(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """Undo the reordering of `arrange`."""
        return x if self.order is None else _gather_rows(x, self.order.argsort(dim=1))


def _gather_rows(x: Tensor, order: Tensor) -> Tensor:
    index = order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x)
    return x.gather(1, index)


def padding_first(valid: Tensor) -> Tensor:
    """[B, T] bool -> [B, T]: the stable permutation of each row that puts False places first."""
    return valid.to(torch.int8).argsort(dim=1, stable=True)


def locate(
    length: int,
    past: int,
    *,
    rows: int = 1,
    restarts: bool = True,
    mask: Tensor | None,
    positions: Tensor | None,
    seq_idx: Tensor | None,
    device: torch.device,
) -> Tokens:
    """Read Hugging Face's arguments into a `Tokens` (without attention masks and angles).

    Args:
        length: T, new tokens.
        past: places already in the cache.
        rows: B, where `positions` has one row for all.
        restarts: whether positions may mark documents.
        mask: [B, past + T] bool, False at padding, which may stand anywhere; None for no padding.
        positions: [B, T] or [1, T]; by default the count of real tokens before each.
            Without mask and cache, a position that does not follow its neighbour starts a document
            (the convention of transformers' packing collators).
        seq_idx: [B, T], the document of each token of a packed row; padding ends a document.
    """
    new_mask: Tensor | None = None
    if mask is not None:
        mask = mask.to(device)
        new_mask = mask[:, past:]
        if bool(new_mask.all()):
            new_mask = None

    starts = None
    if seq_idx is not None:
        starts = _starts(seq_idx.to(device))
    elif restarts and positions is not None and mask is None and past == 0 and length > 1:
        broken = torch.ones_like(positions, dtype=torch.bool)
        broken[:, 1:] = positions.diff(dim=1) != 1
        if bool(broken[:, 1:].any()):
            starts = broken
    if starts is not None:
        starts = starts.expand(max(rows, len(starts)), -1)
        if new_mask is not None:
            starts = starts | _starts(new_mask.long())

    if positions is None:
        positions = _positions(length, past, mask, starts, device)

    tokens = Tokens(positions=positions, starts=starts, mask=new_mask)
    if starts is not None:
        tokens.documents = starts.cumsum(dim=1)
    if new_mask is not None:
        count = new_mask.sum(dim=1)
        tokens.padding = length - count
        in_front = torch.arange(length, device=device) >= tokens.padding[:, None]
        if not torch.equal(in_front, new_mask):
            tokens.order = padding_first(new_mask)
            if tokens.documents is not None:
                tokens.starts = _starts(_gather_rows(tokens.documents, tokens.order))
    return tokens


def _starts(seq_idx: Tensor) -> Tensor:
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx.diff(dim=1) != 0
    return starts


def segments(starts: Tensor) -> Tensor:
    """[B, T] bool -> [n + 1] int32: where documents begin once rows lie end to end, then B · T.

    A row begins a document whatever its first column says. So that few lengths occur, `n` is a
    power of two, at least 4 B: the end is repeated, as by documents of no token.
    """
    starts = starts.clone()
    starts[:, 0] = True
    begins = starts.flatten().nonzero()[:, 0]
    n = 1 << (max(len(begins), 4 * len(starts)) - 1).bit_length()
    edges = begins.new_full((n + 1,), starts.numel(), dtype=torch.int32)
    edges[: len(begins)] = begins
    return edges


def restart_positions(starts: Tensor) -> Tensor:
    """[B, T] bool -> [B, T]: positions counted from the latest start."""
    index = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def _positions(
    length: int, past: int, mask: Tensor | None, starts: Tensor | None, device: torch.device
) -> Tensor:
    if starts is not None:
        return restart_positions(starts)
    if mask is not None:
        return (mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, past:]
    return torch.arange(past, past + length, device=device)[None]
