"""Text that asks for what it said before: passages followed by their own pieces in another order.

Ordinary text seldom needs an exact look back over hundreds of tokens. A hybrid that is chosen,
fitted and trained on nothing else loses what the teacher's attention can do there, and no score on
text shows it. Here most tokens of a passage's second half follow from its first half alone, once a
piece has been recognised by its first tokens: copying and key-value recall at once (Olsson et al.
2022, arXiv 2209.11895; Jelassi et al. 2024, arXiv 2402.01032), in whatever language and tokens the
text has. Half of the passages are as they were written, where much can be guessed from the words
before; a quarter are the same tokens in any order, where nothing can; a quarter are entries of a
made-up list, whose values are of so few different tokens that only the key tells one from another.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tamba.data import TokenBlocks

SHORTEST_PASSAGE = 32
"""Tokens of a passage; the longest fills half a row."""
SHORTEST_ROW = 2 * SHORTEST_PASSAGE
"""Tokens of a row that holds one twice."""
PIECE = (4, 32)
"""Fewest and most tokens of a piece, drawn evenly by their logarithm."""
KINDS = ("written", "written", "scattered", "listed")
"""What passages are, drawn evenly."""
KEY, VALUE, ALPHABET = (1, 4), (2, 16), (8, 64)
"""Tokens of an entry's key, of every value of a list, and from which values are drawn."""


def with_lookups(blocks: TokenBlocks, share: float, seed: int) -> TokenBlocks:
    """Some rows made of passages that are said again, the others as they are.

    Such a row is documents of ``2 c`` tokens, ``c`` drawn evenly by its logarithm from
    `SHORTEST_PASSAGE` to half a row: `c` of the row's own tokens, by one of `KINDS`, then the same
    in pieces of another order. What is left of the row is a document as it was written.

    Args:
        share: of the rows, drawn at random.
        seed: of the rows, passages and pieces.

    Returns:
        Blocks of as many tokens. The tokens of the other rows are shared with `blocks`'.
    """
    n, length = blocks.tokens.shape
    some = round(share * n)
    if not some or length < SHORTEST_ROW:
        return blocks
    generator = torch.Generator().manual_seed(seed)
    tokens, starts = blocks.tokens.clone(), blocks.starts.clone()
    for row in torch.randperm(n, generator=generator)[:some].tolist():
        if bool(starts[row, -2:].all()):
            continue  # it ends in filling, whose every token is a document
        tokens[row], starts[row] = _said_again(blocks.tokens[row], generator)
    return TokenBlocks(tokens, starts, blocks.n_tokens, blocks.bytes_per_token)


def _said_again(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A row [T] of such documents, and where they begin."""
    length = len(text)
    parts, starts = [], torch.zeros(length, dtype=torch.bool)
    at = read = 0
    while length - at >= SHORTEST_ROW:
        c = _between(SHORTEST_PASSAGE, (length - at) // 2, generator)
        kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
        pieces = _pieces(text[read : read + c], kind, generator)
        parts += [*pieces, *_shuffled(pieces, generator)]
        starts[at] = True
        at, read = at + 2 * c, read + c
    if at < length:
        starts[at] = True
        parts.append(text[read : read + length - at])
    return torch.cat(parts), starts


def _pieces(passage: Tensor, kind: str, generator: torch.Generator) -> list[Tensor]:
    """As many tokens as a passage [c] has."""
    if kind == "listed":
        return _entries(passage, generator)
    if kind == "scattered":
        passage = _drawn(passage, len(passage), generator)
    pieces, at = [], 0
    while at < len(passage):
        size = _between(*PIECE, generator)
        pieces.append(passage[at : at + size])
        at += size
    return pieces


def _entries(passage: Tensor, generator: torch.Generator) -> list[Tensor]:
    """``mark key mark value mark``, the marks and the length of values the same in all of them."""
    marks = _drawn(passage, 3, generator).split(1)
    alphabet = _drawn(passage, min(len(passage), _between(*ALPHABET, generator)), generator)
    size = _between(*VALUE, generator)
    entries, left = [], len(passage)
    while left:
        k = _between(*KEY, generator)
        at = int(torch.randint(len(passage) - k + 1, (), generator=generator))
        value = alphabet[torch.randint(len(alphabet), (size,), generator=generator)]
        entry = torch.cat([marks[0], passage[at : at + k], marks[1], value, marks[2]])[:left]
        entries.append(entry)
        left -= len(entry)
    return entries


def _drawn(passage: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return passage[torch.randperm(len(passage), generator=generator)[:n]]


def _shuffled(pieces: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    return [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]


def _between(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from `low` to `high`, drawn evenly by its logarithm."""
    drawn = float(torch.rand((), generator=generator))
    return min(high, int(math.exp(math.log(low) + drawn * math.log((high + 1) / low))))
