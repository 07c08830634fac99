"""Recorded passes: the steps of a loop written by hand, whatever is replayed in them.

On a CPU a recording is its work, done again on the tensors that it was recorded with, which is what
a CUDA graph does. `test_gpu.py` has the graphs themselves.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tamba.errors import UserError
from tamba.recipe import Distil
from tamba.train import distil, recorder
from tamba.train.engine import Engine
from tamba.train.recorder import Recorder
from test_train import distil_stage, pair, rows
from test_train_engine import check_by_hand, hybrid, named


@dataclass
class Again:
    work: Any
    found: torch.Tensor
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.found.copy_(self.work())


class Recordings:
    """What stands for CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self.made: list[Again] = []
        everything.append(self)

    def aside(self):
        return nullcontext()

    def __call__(self, work):
        found = work().clone().fill_(torch.nan)  # nothing is computed when it is recorded
        self.made.append(Again(work, found))
        return self.made[-1], found


everything: list[Recordings] = []


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recordings]:
    everything.clear()
    monkeypatch.setattr(Engine, "_records", lambda self: True)
    monkeypatch.setattr(recorder, "_Cuda", Recordings)
    return everything


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_recorded_steps_equal_a_loop_written_by_hand(recordings, micro_batch) -> None:
    """With documents inside rows, and with pieces of two sizes."""
    check_by_hand(micro_batch=micro_batch, ema=0.5)
    made = [again for one in recordings for again in one.made]
    assert len(made) == (1 if micro_batch is None else 2)
    assert all(again.replays > 3 for again in made)


@pytest.mark.parametrize("fault", ["text", "counted", "share", "sums"])
def test_what_a_replay_leaves_as_it_was_is_seen(recordings, fault, monkeypatch) -> None:
    right, fixed, replay = recorder._tensors, recorder.Piece.fixed, Recorder._replay
    if fault == "text":
        monkeypatch.setattr(recorder, "_tensors", lambda piece: right(piece)[1:])
    if fault == "counted":
        monkeypatch.setattr(recorder, "_tensors", lambda piece: right(piece)[:-1])
    if fault == "share":
        monkeypatch.setattr(recorder.Piece, "fixed", lambda p: replace(fixed(p), share=0.9))
    if fault == "sums":

        def dirty(self, recorded, piece):
            for p, total in recorded.sums.items():
                p.grad = total
            return replay(self, recorded, piece)

        monkeypatch.setattr(Recorder, "_replay", dirty)
    with pytest.raises(AssertionError):
        check_by_hand(micro_batch=3 if fault == "share" else None)


@pytest.mark.parametrize("why", ["cannot", "differs"])
def test_what_cannot_be_recorded_runs_as_it_is(recordings, why, monkeypatch, caplog) -> None:
    right = Recordings.__call__

    def wrong(self, work):
        if why == "cannot":
            raise RuntimeError("operation not permitted\nand a page of advice")
        again, found = right(self, work)
        again.work = lambda: 2 * work()
        return again, found

    used, prepare = [], Recorder._prepare
    monkeypatch.setattr(
        Recorder, "_prepare", lambda self, *given: used.append(self) or prepare(self, *given)
    )
    monkeypatch.setattr(Recordings, "__call__", wrong)
    check_by_hand()
    assert used and not any(one._sums for one in used), "sums of nothing take no memory"
    (said,) = [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]
    assert "page" not in said
    assert ("not permitted" if why == "cannot" else "another gradient") in said


def test_layers_that_come_by_and_by_are_recorded_apart(recordings, monkeypatch) -> None:
    """Layers that wait get no gradient, and are not moved by one of zero either."""
    found = []
    for records in (True, False):
        monkeypatch.setattr(Engine, "_records", lambda self, records=records: records)
        student, teacher = hybrid((0, 1, 3))
        stage = distil_stage(tokens=640, batch=2, replacement="one_by_one", weight_decay=0.1)
        names = [n for n, _ in student.named_parameters() if ".mixer." in n]
        log = distil(student, teacher, names, rows(), stage, pairs={i: i for i in (0, 1, 3)})
        found.append([loss for _, loss in log.losses])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len(recordings[0].made) == 3


def test_graphs_are_for_one_process_on_a_gpu() -> None:
    student, teacher = pair()
    with pytest.raises(UserError, match="graphs = true"):
        distil(student, teacher, named(student, "mixers"), rows(), distil_stage(graphs=True))
    with pytest.raises(ValueError, match="computed again"):
        Distil(stage="distil", tokens=64, lr=1e-3, graphs=True, checkpointing=True)
