"""Passages that are said again: read back from the rows alone, without the code that makes them."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tamba import lookup_text
from tamba.data import TokenBlocks
from tamba.lookup_text import with_lookups


def rows(n: int = 40, length: int = 256) -> TokenBlocks:
    """No token occurs twice, so that each says where it was read."""
    tokens = torch.arange(n * length).view(n, length).int()
    starts = torch.zeros(n, length, dtype=torch.bool)
    starts[:, 0] = starts[::2, length // 3] = True
    return TokenBlocks(tokens, starts, n * length, 4.0)


def documents(tokens: Tensor, starts: Tensor) -> list[list[int]]:
    edges = [*starts.nonzero()[:, 0].tolist(), len(tokens)]
    return [tokens[a:b].tolist() for a, b in pairwise(edges)]


def cuts(tokens: list[int], whole: list[int]) -> list[int]:
    """Where `tokens` do not go on as they do in `whole`, which names none twice."""
    at = {token: i for i, token in enumerate(whole)}
    return [j for j in range(1, len(tokens)) if at[tokens[j]] != at[tokens[j - 1]] + 1]


def check(n: int = 120, length: int = 256) -> None:
    before, made = rows(n, length), with_lookups(rows(n, length), 0.25, seed=3)
    assert (made.n_tokens, made.bytes_per_token) == (before.n_tokens, before.bytes_per_token)
    assert made.tokens.shape == before.tokens.shape and bool(made.starts[:, 0].all())
    changed = [i for i in range(n) if not torch.equal(made.tokens[i], before.tokens[i])]
    assert len(changed) == round(n / 4)
    sizes, pieces, kinds = [], [], Counter[str]()
    for i in range(n):
        if i not in changed:
            assert torch.equal(made.starts[i], before.starts[i])
            continue
        read = int(before.tokens[i, 0])
        *passages, last = documents(made.tokens[i], made.starts[i])
        if len(last) >= 64:
            passages.append(last)
            last = []
        for said in passages:
            first, again = said[: len(said) // 2], said[len(said) // 2 :]
            written = [*range(read, read + len(first))]
            assert set(first) <= set(written), "the row's own tokens"
            assert sorted(again) == sorted(first), "all of them again"
            sizes.append(len(first))
            read += len(first)
            if len(set(first)) < len(first):
                kinds["listed"] += 1
                check_list(first, again)
                continue
            kinds["written" if first == written else "scattered"] += 1
            edges = [0, *cuts(again, first), len(again)]
            pieces += [b - a for a, b in pairwise(edges)]
        assert last == [*range(read, read + len(last))]
    assert kinds["written"] > 1.2 * kinds["scattered"]
    assert min(kinds[k] for k in ("written", "scattered", "listed")) > len(sizes) / 8
    assert min(sizes) >= 32 and max(sizes) > length // 4
    assert sum(p < 12 for p in pieces) > len(pieces) / 3  # many lookups
    assert max(pieces) >= 24


def check_list(first: list[int], again: list[int]) -> None:
    """Entries of one form, the same ones twice, in another order."""
    begin, end = first[0], None
    entries = []
    for tokens in (first, again):
        # An entry ends with what stands before the next one's beginning.
        places = [j for j, token in enumerate(tokens) if token == begin]
        if end is None:
            follows = Counter(tokens[j - 1] for j in places if j)
            end = follows.most_common(1)[0][0] if follows else tokens[-1]
        at = [j for j in places if j == 0 or tokens[j - 1] == end]
        entries.append(Counter(tuple(tokens[a:b]) for a, b in pairwise([*at, len(tokens)])))
    assert sum((entries[0] & entries[1]).values()) >= sum(entries[0].values()) - 2


def test_passages_are_said_again_in_pieces() -> None:
    check()
    check(n=40, length=1000)


@pytest.mark.parametrize("fault", ["order", "loss", "starts", "kinds", "keys"])
def test_passages_that_are_not_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lookup_text._shuffled
    if fault == "order":
        monkeypatch.setattr(lookup_text, "_shuffled", lambda pieces, _: pieces)
    if fault == "loss":
        lost = lambda p, g: [x.clamp(min=int(p[0][1])) for x in right(p, g)]  # noqa: E731
        monkeypatch.setattr(lookup_text, "_shuffled", lost)
    if fault == "starts":
        said = lookup_text._said_again
        monkeypatch.setattr(
            lookup_text, "_said_again", lambda t, g: (said(t, g)[0], torch.zeros(len(t)).bool())
        )
    if fault == "kinds":
        monkeypatch.setattr(lookup_text, "KINDS", ("written", "written", "written", "listed"))
    if fault == "keys":  # cut anywhere, so that what follows a key differs
        pieces = lookup_text._pieces
        entries = lambda p, k, g: pieces(torch.cat(pieces(p, k, g)), "written", g)  # noqa: E731
        monkeypatch.setattr(lookup_text, "_pieces", entries)
    with pytest.raises(AssertionError):
        check()


def test_the_seed_decides_and_filling_stays() -> None:
    a, b, c = (with_lookups(rows(), 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens, c.tokens)
    blocks = rows(2)
    blocks.starts[1] = True  # filling
    assert torch.equal(with_lookups(blocks, 1.0, 0).tokens[1], blocks.tokens[1])
    short = rows(4, 40)
    assert with_lookups(short, 1.0, 0) is short
    assert with_lookups(blocks, 0.0, 0) is blocks
