"""What a step does as a function of its number."""

from __future__ import annotations

import math

import pytest
import torch

from tamba.errors import UserError
from tamba.model.tokens import segments
from tamba.recipe import Align, Distil
from tamba.train.pieces import Pieces, rows_of_step, tokens
from tamba.train.schedules import active_layers, n_steps, rate_factor, replacement_order
from test_train import rows


def distil(**options) -> Distil:
    return Distil.model_validate({"stage": "distil", "tokens": 64, "lr": 1.0} | options)


def rates(steps: int, **options) -> list[float]:
    stage = Align.model_validate({"stage": "align", "tokens": 1, "lr": 1.0} | options)
    return [rate_factor(stage, steps, step) for step in range(steps)]


def test_rates() -> None:
    linear = [0.5, 1.0, *(1 - i / 8 for i in range(8))]
    assert rates(10, warmup=0.2, schedule="linear") == pytest.approx(linear)
    cosine = [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    assert rates(10, warmup=0, schedule="cosine") == pytest.approx(cosine)
    assert rates(3, warmup=0, schedule="constant") == [1.0] * 3
    stays_then_falls = [0.5, *[1.0] * 5, 1.0, 0.75, 0.5, 0.25]
    assert rates(10, warmup=0.15, schedule="wsd", cooldown=0.4) == pytest.approx(
        [0.5, 1.0, *stays_then_falls[2:]]
    )
    assert n_steps(distil(tokens=100, batch=2), 16) == 3
    assert n_steps(distil(tokens=1, batch=2), 16) == 1


# Which layers are converted.


def counts(steps: int, layers: int, attention: int, **options) -> list[int]:
    active = active_layers(distil(**options), range(layers), attention, steps, seed=0)
    return [len(list(active(step))) for step in range(steps)]


def test_progressive_replacement_follows_the_shares() -> None:
    """16 attention layers: 75, 50, 25, 12.5 and 0 % of them are left, a phase each."""
    assert counts(10, 16, 16, replacement="progressive") == [4, 4, 8, 8, 12, 12, 14, 14, 16, 16]
    # A plan that keeps a quarter ends there.
    assert counts(6, 12, 16, replacement="progressive") == [4, 4, 8, 8, 12, 12]
    assert counts(4, 12, 16, replacement="progressive", shares=(0.5,)) == [8, 8, 12, 12]
    assert counts(6, 3, 8, replacement="one_by_one") == [1, 1, 2, 2, 3, 3]
    assert counts(2, 3, 8) == [3, 3]
    assert counts(5, 5, 8, replacement="one_by_one") == [1, 2, 3, 4, 5]


def test_fewer_steps_than_phases_are_refused() -> None:
    """The last layers would never be replaced, and never trained."""
    with pytest.raises(UserError, match="'one_by_one' takes 5 phases, and the stage has 4 steps"):
        counts(4, 5, 8, replacement="one_by_one")
    with pytest.raises(UserError, match="'progressive' takes 2 phases, and the stage has 1 step;"):
        counts(1, 12, 16, replacement="progressive", shares=(0.5,))


def test_layers_stay_replaced() -> None:
    for order in ("spread", "bottom_up", "top_down"):
        stage = distil(replacement="one_by_one", order=order)
        active = active_layers(stage, [2, 3, 5, 8, 9], 12, 10, seed=0)
        for step in range(9):
            assert set(active(step)) <= set(active(step + 1))
    spread = replacement_order(distil(), range(8))
    assert spread == [0, 4, 2, 6, 1, 5, 3, 7]
    assert replacement_order(distil(replacement="one_by_one", order=(5, 2)), [2, 3, 5]) == [5, 2, 3]


def check_theseus(seed: int) -> None:
    stage = distil(replacement="theseus", chance=0.25)
    steps = 400
    active = active_layers(stage, range(50), 50, steps, seed)
    for first, want in ((0, 0.25 + 0.75 * 10 / 300), (140, 0.25 + 0.75 * 150 / 300), (380, 1.0)):
        drawn = [len(list(active(step))) / 50 for step in range(first, first + 20)]
        assert sum(drawn) / 20 == pytest.approx(want, abs=0.05)
    again = active_layers(stage, range(50), 50, steps, seed)
    assert list(again(7)) == list(active(7)) != list(active(8))


def test_theseus_draws_likelier_with_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    check_theseus(3)
    monkeypatch.setattr("tamba.train.schedules._chance", lambda *_: 0.5)
    with pytest.raises(AssertionError):
        check_theseus(3)


def test_theseus_draws_one_layer_at_least() -> None:
    active = active_layers(distil(replacement="theseus", chance=0.0), [2, 5, 7], 9, 400, seed=3)
    found = [list(active(step)) for step in range(400)]
    assert all(found) and [len(some) for some in found[:3]] == [1, 1, 1]
    assert {tuple(some) for some in found[:20]} == {(2,), (5,), (7,)}


# Which rows are read.


@pytest.mark.parametrize("batch", [1, 3, 4, 11])
def test_rows_come_once_an_epoch(batch: int) -> None:
    stream = torch.cat([rows_of_step(7, batch, step, seed=3) for step in range(14)])
    for epoch in range(len(stream) // 7):
        assert sorted(stream[7 * epoch : 7 * epoch + 7].tolist()) == [*range(7)]
    other = torch.cat([rows_of_step(7, batch, step, seed=4) for step in range(14)])
    assert stream.tolist() != other.tolist()


@pytest.mark.parametrize(("world", "micro"), [(1, None), (1, 3), (2, 1), (4, 2)])
def test_pieces_are_the_step_however_it_is_divided(world: int, micro: int | None) -> None:
    blocks = rows(10)
    blocks.starts[5, 3:12] = True  # pieces predict different numbers of tokens
    found, share = [], 0.0
    for rank in range(world):
        pieces = Pieces(blocks, 4, micro, 1, tokens, rank, world)
        mine = list(pieces.of(3))
        assert len(mine) == pieces.per_step
        for piece in mine:
            assert torch.equal(piece.batch.tokens, blocks.tokens[piece.rows].long())
            at = piece.batch.tokens.flatten()[piece.places]
            assert torch.equal(at, piece.batch.tokens[:, :-1][piece.batch.predicted])
            want = piece.batch.tokens[:, 1:][piece.batch.predicted]
            assert torch.equal(piece.targets, want)
            assert piece.edges is not None
            assert torch.equal(piece.edges, segments(piece.batch.starts))
            found += piece.rows.tolist()
            share += piece.share
    assert sorted(found) == sorted(rows_of_step(10, 4, 3, 1).tolist())
    assert share == pytest.approx(1.0)
