"""A teacher on disk says what the teacher in process says; one in 8 bits nearly so."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compare import assert_same, relative_rms
from models import tiny_model
from tamba.data import Batch, TokenBlocks
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.ops.losses import Weights, next_token_loss
from tamba.train import teacher as module
from tamba.train.pieces import Piece
from tamba.train.teacher import StoredTop, shorten, write_top

K, LENGTH = 5, 6


@pytest.fixture
def teacher() -> TambaForCausalLM:
    return tiny_model("attention").eval()


def blocks_of(teacher: TambaForCausalLM, rows: int = 5, seed: int = 0) -> TokenBlocks:
    make = torch.Generator().manual_seed(seed)
    size = (rows, LENGTH)
    tokens = torch.randint(teacher.config.vocab_size, size, generator=make, dtype=torch.int32)
    starts = torch.zeros(size, dtype=torch.bool)
    starts[:, 0] = starts[1, 3] = True
    return TokenBlocks(tokens, starts, rows * LENGTH)


def store(teacher: TambaForCausalLM, out: Path, rows: int = 5, **given: object) -> StoredTop:
    how = {"digest": "a teacher", "k": K, "batch_size": 2, "shard_rows": 2} | given
    return write_top(teacher, blocks_of(teacher, rows), out, **how)  # type: ignore[arg-type]


def teach(student: Tensor, head: Tensor, weights: Weights, **signal: object) -> list[Tensor]:
    hidden = student.clone().requires_grad_()
    loss = next_token_loss(hidden, head, weights=weights, **signal)  # type: ignore[arg-type]
    return [loss.detach(), torch.autograd.grad(loss, hidden)[0]]


def piece_of(blocks: TokenBlocks) -> Piece:
    rows = torch.tensor([3, 0, 1])
    batch = Batch(blocks.tokens[rows].long(), blocks.starts[rows])
    return Piece(batch, rows, torch.tensor([0, 4, 7, 12, 16]), 0, 1.0)


@torch.no_grad()
def live(teacher: TambaForCausalLM, piece: Piece) -> dict[str, Tensor]:
    hidden = teacher.model(**piece.batch.inputs, use_cache=False).last_hidden_state
    head = teacher.lm_head.weight.detach()
    return {"teacher_hidden": piece.at_places(hidden), "teacher_head": head}


def check(teacher: TambaForCausalLM, found: StoredTop, temperature: float) -> None:
    piece = piece_of(blocks_of(teacher))
    signal = live(teacher, piece)
    make = torch.Generator().manual_seed(1)
    student = torch.randn(signal["teacher_hidden"].shape, generator=make)
    weights = Weights(temperature=temperature, top_k=K)
    got = teach(student, signal["teacher_head"], weights, **found(piece))
    want = teach(student, signal["teacher_head"], weights, **signal)
    assert_same(got[0], want[0], "half", "loss")
    assert_same(got[1], want[1], "half", "gradient")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_store_teaches_what_the_teacher_does(
    teacher: TambaForCausalLM, temperature: float, tmp_path: Path
) -> None:
    check(teacher, store(teacher, tmp_path / "top", temperature=temperature), temperature)
    assert [p.name for p in tmp_path.iterdir()] == ["top"]


def test_rows_in_another_order_are_noticed(teacher: TambaForCausalLM, tmp_path: Path) -> None:
    found = store(teacher, tmp_path / "top")
    right = found.read
    found.read = lambda rows: right(rows.flip(0))  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="loss"):
        check(teacher, found, 1.0)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_was_cut_off_goes_on(
    teacher: TambaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, asked = module._shard, []

    def dies_at(row: int) -> None:
        def shard(model: object, blocks: object, rows: slice, *rest: object) -> dict[str, Tensor]:
            asked.append(rows.start)
            if rows.start == row:
                raise KeyboardInterrupt
            return right(model, blocks, rows, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(module, "_shard", shard)

    dies_at(4)
    with pytest.raises(KeyboardInterrupt):
        store(teacher, tmp_path / "top")
    assert not (tmp_path / "top").exists()
    asked.clear()
    dies_at(-1)
    store(teacher, tmp_path / "top")
    assert asked == [4]
    asked.clear()
    store(teacher, tmp_path / "top")  # it is whole: nobody is asked
    assert asked == []
    store(teacher, tmp_path / "at once")
    assert content(tmp_path / "top") == content(tmp_path / "at once")

    # What another teacher left is not mixed in.
    dies_at(2)
    with pytest.raises(KeyboardInterrupt):
        store(teacher, tmp_path / "other", digest="another")
    asked.clear()
    dies_at(-1)
    store(teacher, tmp_path / "other")
    assert asked == [0, 2, 4]


def test_a_store_of_something_else_is_refused(teacher: TambaForCausalLM, tmp_path: Path) -> None:
    found, blocks = store(teacher, tmp_path / "top"), blocks_of(teacher)
    vocab = teacher.config.vocab_size
    fits = {"digest": "a teacher", "k": K}
    found.check(blocks, **fits)  # type: ignore[arg-type]
    for other, change, message in [
        (blocks.take(4), {}, "rows: it was made for 5, not 4"),
        (blocks_of(teacher, seed=1), {}, "the text"),
        (blocks, {"digest": "another"}, "for a teacher, not another"),
        (blocks, {"k": 4}, "words of a place"),
        (blocks, {"temperature": 2.0}, "the temperature"),
    ]:
        with pytest.raises(UserError, match=message):
            found.check(other, **(fits | change))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="k 5, not 4"):
        store(teacher, tmp_path / "top", k=4)
    with pytest.raises(UserError, match=f"use 1 to {vocab - 1}"):
        store(teacher, tmp_path / "new", k=vocab)
    (tmp_path / "file").touch()
    with pytest.raises(UserError):
        store(teacher, tmp_path / "file")


def test_damage_is_said(teacher: TambaForCausalLM, tmp_path: Path) -> None:
    out = tmp_path / "top"
    store(teacher, out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no stored teacher"):
        StoredTop(tmp_path / "empty")
    shard = out / "rows-000002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"rows-000002.* damaged"):
        StoredTop(out)
    shard.unlink()
    with pytest.raises(UserError, match=r"rows-000002.* missing"):
        StoredTop(out)
    shutil.copy(out / "rows-000004.safetensors", shard)  # of one row
    with pytest.raises(UserError, match="damaged"):
        StoredTop(out)
    shard.write_bytes(whole)
    StoredTop(out)
    facts = json.loads((out / "top.json").read_text())
    (out / "top.json").write_text(json.dumps(facts | {"more": 1}))
    with pytest.raises(UserError, match=r"top\.json"):
        StoredTop(out)


def test_one_writer_and_room_on_disk(
    teacher: TambaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / ".top.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process"):
        store(teacher, tmp_path / "top")
    os.close(lock)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    with pytest.raises(UserError, match="not enough room"):
        store(teacher, tmp_path / "top")
    assert not (tmp_path / "top").exists()


def test_eight_bits_say_nearly_the_same() -> None:
    pytest.importorskip("torchao")
    teacher = tiny_model("attention").eval()
    ids = torch.randint(
        teacher.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        want = teacher(ids).logits
        short = shorten(teacher)
        assert short is teacher
        error = relative_rms(teacher(ids).logits, want)
    # 127 steps to the largest weight of a row: some thousandths in each of a few projections.
    assert 1e-4 < error < 5e-2
    weights = [m.weight for m in teacher.model.layers.modules() if type(m) is torch.nn.Linear]
    stored = sum(w.qdata.nbytes for w in weights)
    assert stored == sum(w.numel() for w in weights)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert type(teacher.lm_head.weight) is torch.nn.Parameter


def test_eight_bits_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tamba\[int8\]"):
        shorten(tiny_model("attention"))
