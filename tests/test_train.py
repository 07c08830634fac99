"""Repair: what moves and what does not, in which types, and what a kill costs."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tamba
from compare import assert_same
from models import VOCAB, random_ids, tiny_model
from tamba import train as train_module
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import ConvertOptions
from tamba.recipe import Align, Distil, LeastSquares
from tamba.surgery import convert_layer
from tamba.text import RecipeText
from tamba.train import align, distil, least_squares, trained_parameters
from tamba.train import steps as steps_module
from tamba.train.steps import Curve, Learner, Memory, Schedule, Steps, orders, pools

PAIRS = {1: 1}
RECIPE = """
name = "small"
[teacher]
path = "teacher"
[data]
train = ["text.txt"]
length = 16
[build]
plan = ["keep 0", "convert 1", "keep 2"]
"""
MIXER = "model.layers.1.mixer."


def rows(n: int = 8, length: int = 16, seed: int = 1) -> TokenBlocks:
    starts = torch.zeros(n, length, dtype=torch.bool)
    starts[:, 0] = True
    starts[::3, length // 2] = True
    return TokenBlocks(random_ids(n, length, seed).int(), starts, n * length)


def pair(stack: str = "attention") -> tuple[TambaForCausalLM, TambaForCausalLM]:
    """A student whose middle layer is converted, and its teacher."""
    teacher, student = (tiny_model([stack] * 3) for _ in range(2))
    student.model.layers[1] = convert_layer(
        student.model.layers[1], student.config, ConvertOptions(), 1
    )
    return student, teacher


def parameters(model: TambaForCausalLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distil_stage(**options) -> Distil:
    told = {"stage": "distil", "tokens": 1280, "lr": 3e-3, "batch": 4, "dtype": "float32"}
    return Distil.model_validate(told | options)


def align_stage(**options) -> Align:
    told = {"stage": "align", "tokens": 1280, "lr": 3e-3, "batch": 4, "dtype": "float32"}
    return Align.model_validate(told | options)


def divergence(student: TambaForCausalLM, teacher: TambaForCausalLM, blocks: TokenBlocks) -> float:
    """KL(teacher, student) by the definition, row by row and document by document."""
    found = []
    for tokens, starts in zip(blocks.tokens.long(), blocks.starts, strict=True):
        edges = [*starts.nonzero()[:, 0].tolist(), len(tokens)]
        for a, b in itertools.pairwise(edges):
            with torch.no_grad():
                q, p = (
                    m(tokens[None, a:b], use_cache=False).logits[0, :-1].double().log_softmax(-1)
                    for m in (student, teacher)
                )
            found.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(found).mean())


# What a stage does.


def check_distil(stage: Distil) -> None:
    student, teacher = pair()
    before = divergence(student, teacher, rows())
    log = distil(
        student, teacher, trained_parameters(parameters(student), [1], "mixers"), rows(), stage
    )
    # The first loss is the divergence of the first batch: all rows, when a step takes all.
    if stage.batch == len(rows()):
        assert log.losses[0][1] == pytest.approx(before, rel=1e-4)
    assert divergence(student, teacher, rows()) < 0.5 * before


def test_distil_lowers_the_divergence() -> None:
    check_distil(distil_stage(batch=8, tokens=40 * 128, lr=1e-2))


@pytest.mark.slow
def test_a_step_the_wrong_way_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = train_module._loss
    monkeypatch.setattr(train_module, "_loss", lambda *args: -right(*args))
    with pytest.raises(AssertionError):
        check_distil(distil_stage(batch=4, tokens=40 * 128, lr=1e-2))


def check_overfit() -> None:
    student, teacher = pair()
    log = align(student, teacher, PAIRS, rows(2), align_stage(tokens=150 * 32, batch=2, lr=2e-2))
    assert log.losses[-1][1] < 0.05 * log.losses[0][1]
    assert log.layers[1] < 0.05
    # What it says is left is left: the mixer on the teacher's input, after the last step.
    again = align(student, teacher, PAIRS, rows(2), align_stage(tokens=32, batch=2, lr=1e-9))
    assert again.losses[0][1] == pytest.approx(log.layers[1], rel=0.5)


def test_align_overfits_a_tiny_batch() -> None:
    check_overfit()


@pytest.mark.slow
def test_steps_that_are_not_taken_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def idle(self: Learner) -> None:
        self.taken += 1

    monkeypatch.setattr(Learner, "step", idle)
    with pytest.raises(AssertionError):
        check_overfit()


def check_frozen(what: str, moved: Callable[[str], bool]) -> None:
    student, teacher = pair()
    ours, theirs = parameters(student), parameters(teacher)
    names = trained_parameters(ours, [1], what)
    distil(student, teacher, names, rows(), distil_stage(weight_decay=0.1))
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, ours[name]) != moved(name), name
    for name, parameter in teacher.named_parameters():
        assert_same(parameter.detach(), theirs[name], "exact", name)
    assert all(p.requires_grad for p in student.parameters())


def test_what_is_frozen_stays() -> None:
    check_frozen("mixers", lambda name: name.startswith(MIXER))
    check_frozen("mixers+norms", lambda name: name.startswith(MIXER) or "norm." in name)
    check_frozen("all", lambda name: True)


def test_what_moves_though_it_should_not_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [n for n in parameters(pair()[0]) if n.startswith((MIXER, "model.layers.2.norm"))]
    monkeypatch.setitem(globals(), "trained_parameters", lambda *_: wrong)
    with pytest.raises(AssertionError, match=r"layers\.2\.norm"):
        check_frozen("mixers", lambda name: name.startswith(MIXER))


def test_layers_are_fitted_apart() -> None:
    student, teacher = pair()
    ours, theirs = parameters(student), parameters(teacher)
    align(student, teacher, PAIRS, rows(), align_stage())
    least_squares(student, teacher, PAIRS, rows(), LeastSquares(stage="least_squares", tokens=128))
    for name, parameter in student.named_parameters():
        assert name.startswith(MIXER) or torch.equal(parameter, ours[name])
    assert all(torch.equal(p, theirs[n]) for n, p in teacher.named_parameters())


def filled(token: int) -> TokenBlocks:
    """Rows whose ends are filling, each token a document of its own, as packing leaves them."""
    blocks = rows()
    tokens, starts = blocks.tokens.clone(), blocks.starts.clone()
    tokens[:, 10:], starts[:, 10:] = token, True
    return TokenBlocks(tokens, starts, 80)


def check_filling_does_not_count() -> None:
    results = []
    for token in (3, 7):
        student, teacher = pair()
        names = trained_parameters(parameters(student), [1], "mixers")
        log = distil(student, teacher, names, filled(token), distil_stage(ce=1.0))
        results.append((log.losses, parameters(student)))
    (losses, first), (others, second) = results
    assert [v for _, v in losses] == pytest.approx([v for _, v in others], rel=1e-5)
    for name in first:
        assert_same(first[name], second[name], "fp32", name)
    # And a mean is one over what is predicted: 9 - 1 or 9 places of a row, not 15.
    student, teacher = pair()
    stage = distil_stage(tokens=128, batch=8, lr=1e-9)
    log = distil(
        student, teacher, trained_parameters(parameters(student), [1], "mixers"), filled(3), stage
    )
    short = TokenBlocks(filled(3).tokens[:, :10], filled(3).starts[:, :10], 80)
    student, teacher = pair()
    assert log.losses[0][1] == pytest.approx(divergence(student, teacher, short), rel=1e-4)


def test_filling_does_not_count() -> None:
    check_filling_does_not_count()


def test_filling_that_counts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = property(lambda self: torch.ones_like(self.starts[:, 1:]))
    monkeypatch.setattr(train_module.Batch, "predicted", everywhere)
    with pytest.raises(AssertionError):
        check_filling_does_not_count()


def check_micro_batches() -> None:
    blocks = rows()
    blocks.starts[5, 3:12] = True  # so that parts of a batch predict different numbers of tokens
    got = []
    for micro in (None, 1, 3):
        student, teacher = pair()
        names = trained_parameters(parameters(student), [1], "mixers")
        # One step each: Adam's first steps are signs, which magnify the last bit of a small mean.
        stage = distil_stage(tokens=64, micro_batch=micro, lr=1e-3, clip=0.0)
        log = distil(student, teacher, names, blocks, stage)
        fit = align(student, teacher, PAIRS, blocks, align_stage(tokens=64, micro_batch=micro))
        got.append((log.losses[0][1], fit.losses[0][1]))
    for one in got[1:]:
        assert one == pytest.approx(got[0], rel=1e-4)


def test_a_step_in_parts_is_the_same_step() -> None:
    check_micro_batches()


def test_parts_of_wrong_weight_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "_predicted", lambda pool, rows: len(rows))
    with pytest.raises(AssertionError):
        check_micro_batches()


def test_a_loss_that_is_no_number_stops_the_stage() -> None:
    student, teacher = pair()
    names = trained_parameters(parameters(student), [1], "mixers")
    with torch.no_grad():
        student.get_parameter(MIXER + "D").fill_(float("nan"))
    with pytest.raises(UserError, match="no longer a number, at step 1; lower the learning rate"):
        distil(student, teacher, names, rows(), distil_stage())
    assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(UserError, match="train: align: the loss is no longer a number"):
        align(student, teacher, PAIRS, rows(), align_stage())


# Steps.


@pytest.mark.parametrize("batch", [1, 3, 4, 11])
def test_orders_go_on_anywhere(batch: int) -> None:
    whole = Steps(5, 17)
    every = list(orders(7, batch, whole, whole, seed=3))
    assert all(sorted(torch.cat(every)[i : i + 7].tolist()) == [*range(7)] for i in (0, 7))
    for taken in range(5, 22):
        rest = list(orders(7, batch, whole, whole.after(taken), seed=3))
        assert [r.tolist() for r in rest] == [r.tolist() for r in every[taken - 5 :]]
    assert every[0].tolist() != next(orders(7, batch, whole, whole, seed=4)).tolist() or batch == 1


def test_pools_share_rows_and_steps() -> None:
    blocks = rows(10)
    found = list(pools(blocks, 100, 2, 21, room=400))
    assert torch.equal(torch.cat([pool.tokens for pool, _ in found]), blocks.tokens)
    assert [steps.first for _, steps in found] == [0, 7, 14] and found[-1][1].stop == 21
    (part,) = pools(blocks, 100, 2, 3, room=1 << 20)
    assert len(part[0]) == 6  # no more rows than three steps of two can use


def test_short_parameters_are_never_stepped() -> None:
    short = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    stage = align_stage()
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16; steps need a float32 master"):
        Learner({"x": short}, stage, Schedule(stage, 16))


def test_rates() -> None:
    stage = align_stage(tokens=64 * 10, warmup=0.2, lr=1.0, schedule="linear")
    schedule = Schedule(stage, 16)
    assert [schedule.rate(i) for i in range(10)] == pytest.approx(
        [0.5, 1.0, *(1 - i / 8 for i in range(8))]
    )


# Folders.


def prepare(folder: Path, train: str, dtype: torch.dtype = torch.float32) -> Path:
    """Teacher, text and built student of a recipe with these stages; the recipe's path."""
    teacher = tiny_model(["attention"] * 3, dtype=dtype)
    teacher.save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text("Text stands ready as tokens.")
    path = folder / "recipe.toml"
    path.write_text(RECIPE + train)
    RecipeText(rows(), None).save(folder / "text")
    tamba.build(path, folder / "built")
    return path


def run_training(folder: Path, out: str = "student") -> dict[str, Tensor]:
    tamba.train(
        folder / "recipe.toml", folder / out, student=folder / "built", text=folder / "text"
    )
    return load_file(folder / out / "model.safetensors")


STAGES = """
[[train]]
stage = "align"
tokens = 640
batch = 4
lr = 1e-2
[[train]]
stage = "distil"
tokens = 640
batch = 4
lr = 1e-2
ce = 0.5
"""

KILLED = """
import os, signal, sys, torch
from pathlib import Path
import tamba
from tamba.train import steps

torch.use_deterministic_algorithms(True)
steps.KEEP_SECONDS = 0.0
offer = steps.Memory.offer
seen = []

def and_die(self, learners, curve, taken):
    offer(self, learners, curve, taken)
    seen.append(taken)
    if taken == 5 and len(seen) > 1:  # half way through the second stage
        os.kill(os.getpid(), signal.SIGKILL)

steps.Memory.offer = and_die
here = Path(sys.argv[1])
tamba.train(here / "recipe.toml", here / "student", student=here / "built", text=here / "text")
"""


def assert_same_training(folder: Path, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name in want:
        assert_same(got[name], want[name], "exact", name)
    records = [json.loads((folder / n / "train.json").read_text()) for n in ("whole", "student")]
    assert records[0]["stages"] == records[1]["stages"]


def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps of two stages; SIGKILL after five of the second; five more."""
    prepare(tmp_path, STAGES)
    want = run_training(tmp_path, "whole")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(tamba.__file__).parents[1])},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "student").exists()
    kept = (tmp_path / ".student.stages" / "stage.safetensors").read_bytes()
    taken: list[int] = []
    right = Learner.step

    def counted(self: Learner) -> None:
        right(self)
        taken.append(self.taken)

    monkeypatch.setattr(Learner, "step", counted)
    assert_same_training(tmp_path, run_training(tmp_path), want)
    assert taken == [6, 7, 8, 9, 10]
    assert not (tmp_path / ".student.stages").exists()

    # The comparison can fail: the same kill, but moments, order of rows or losses forgotten.
    def without_moments(self: Learner, taken: int, moments: dict[str, Tensor]) -> None:
        self.taken = taken

    def from_the_first(n: int, batch: int, pool: Steps, part: Steps, seed: int):
        yield from list(orders(n, batch, pool, pool, seed))[: part.count]

    faults = {
        (Learner, "go_on"): without_moments,
        (train_module, "orders"): from_the_first,
        (Curve, "go_on"): lambda self, lists: None,
    }
    for (place, name), fault in faults.items():
        (tmp_path / ".student.stages").mkdir()
        (tmp_path / ".student.stages" / "stage.safetensors").write_bytes(kept)
        for path in sorted((tmp_path / "student").iterdir()):
            path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fault)
            with pytest.raises((AssertionError, KeyError)):
                assert_same_training(tmp_path, run_training(tmp_path), want)
        if (tmp_path / ".student.stages").exists():
            (tmp_path / ".student.stages" / "stage.safetensors").unlink()
            (tmp_path / ".student.stages").rmdir()


class Cut(Exception):
    pass


def test_align_goes_on_inside_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, STAGES)
    want = run_training(tmp_path, "whole")
    monkeypatch.setattr(train_module, "_STEPS_APART", 3)
    # Two pools of four rows: the first is done and not read again.
    monkeypatch.setattr(train_module, "_POOL_BYTES", 4 * 2 * 32 * 2 * 16)
    pooled = run_training(tmp_path, "pooled")
    right = Memory.offer

    def cut(self: Memory, *args: object) -> None:
        right(self, *args)
        if args[-1] == 8:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(steps_module, "KEEP_SECONDS", 0.0)
        patch.setattr(Memory, "offer", cut)
        with pytest.raises(Cut):
            run_training(tmp_path)
    got = run_training(tmp_path)
    for name in pooled:
        assert_same(got[name], pooled[name], "exact", name)
    # Pools divide the text otherwise, which the order of rows shows.
    assert any(not torch.equal(pooled[name], want[name]) for name in want)


@pytest.mark.slow
def test_what_another_run_left_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepare(tmp_path, STAGES)

    def cut(self: Memory, *_: object) -> None:
        self._write({"taken": 1, "losses": {}}, {})
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "offer", cut)
        with pytest.raises(Cut):
            run_training(tmp_path)
    path.write_text(path.read_text().replace("ce = 0.5", "ce = 0.25"))
    got = run_training(tmp_path)
    want = run_training(tmp_path, "whole")
    assert_same_training(tmp_path, got, want)


def test_stages_of_one_kind_are_told_apart(tmp_path: Path) -> None:
    distil = '[[train]]\nstage = "distil"\ntokens = 64\nbatch = 4\nlr = 1e-3\n'
    prepare(tmp_path, distil + distil.replace("distil", "align") + distil)
    run_training(tmp_path)
    record = json.loads((tmp_path / "student" / "record.json").read_text())
    names = [point["stage"] for point in record["training"]]
    assert list(dict.fromkeys(names)) == ["distil 1", "align", "distil 2"]


def test_nothing_is_left_of_a_run_that_came_to_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, STAGES.replace("lr = 1e-2", "lr = 1e30\nclip = 0"))
    with pytest.raises(UserError, match="lower the learning rate"):
        run_training(tmp_path)
    assert not (tmp_path / "student").exists()
    # Were the loss not looked at, the weights still are.
    monkeypatch.setattr(Curve, "check", lambda self: None)
    monkeypatch.setattr(Curve, "log", lambda self, by_layer=False: steps_module.StageLog("x", 0))
    with pytest.raises(UserError, match="is no longer a number"):
        run_training(tmp_path)
    assert not (tmp_path / "student").exists() and not (tmp_path / ".student.partial").exists()


# Types and memory.

HALF = """
[[train]]
stage = "least_squares"
tokens = 128
[[train]]
stage = "align"
tokens = 128
batch = 4
lr = 1e-3
[[train]]
stage = "distil"
tokens = 128
batch = 4
lr = 1e-3
"""


def copies(shape: tuple[int, ...]) -> int:
    """Pieces of memory, alive now, that hold a matrix of this shape."""
    gc.collect()
    found = {
        o.untyped_storage().data_ptr()
        for o in gc.get_objects()
        if issubclass(type(o), Tensor) and o.shape == shape and o.device.type != "meta"
    }
    return len(found)


def check_types(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 stored, bf16 asked for: masters of what moves, one short copy of all else."""
    embedding = (VOCAB, 32)
    before = copies(embedding)
    looked = []
    right = train_module.distil

    def look(student: TambaForCausalLM, teacher: TambaForCausalLM, *rest: object):
        for name, parameter in student.named_parameters():
            master = name.startswith(MIXER)
            assert parameter.dtype == (torch.float32 if master else torch.bfloat16), name
        assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
        # Embedding and head of both.
        assert copies(embedding) - before == 4
        looked.append(1)
        return right(student, teacher, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "distil", look)
        stored = run_training(folder)
    assert looked
    kept = ("A_log", "dt_bias", "D")
    for name, tensor in stored.items():
        wide = name.rpartition(".")[2] in kept
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name


def test_masters_are_wide_and_the_rest_is_held_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, HALF, torch.bfloat16)
    check_types(tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_second_copy_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, HALF, torch.bfloat16)
    right = Memory.restore

    def wrong(self: Memory):
        self.copy = {name: p.detach().clone() for name, p in self._parameters.items()}
        return right(self)

    monkeypatch.setattr(Memory, "restore", wrong)
    with pytest.raises(AssertionError):
        check_types(tmp_path, monkeypatch)


def test_types_follow_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepare(tmp_path, HALF, torch.bfloat16)
    loaded: list[torch.dtype] = []
    right = train_module.load_model

    def spy(checkpoint: object, dtype: torch.dtype, *args: object, **options: object):
        loaded.append(dtype)
        return right(checkpoint, dtype, *args, **options)

    monkeypatch.setattr(train_module, "load_model", spy)
    run_training(tmp_path, "short")
    text = path.read_text()
    # A stage that computes in float32 needs float32 weights.
    stage = 'dtype = "float32"\n[[train]]\nstage = "align"'
    path.write_text(text.replace('[[train]]\nstage = "align"', stage))
    run_training(tmp_path, "wide")
    # So does a teacher that is asked to be wide.
    path.write_text(text.replace("[data]", 'dtype = "float32"\n[data]'))
    run_training(tmp_path, "asked")
    bf16, wide = torch.bfloat16, torch.float32
    assert loaded == [bf16, bf16, wide, wide, bf16, wide]
    # Without a stage that asks it, the teacher is not loaded.
    loaded.clear()
    path.write_text(RECIPE + STAGES[STAGES.index('[[train]]\nstage = "distil"') :] + "kl = 0\n")
    run_training(tmp_path, "alone")
    assert loaded == [bf16]


@pytest.mark.parametrize(
    ("what", "stack"),
    [("mixers", "attention"), ("mixers+norms", "parallel"), ("all", "attention")],
)
@pytest.mark.slow
def test_short_weights_learn_as_wide_ones_do(what: str, stack: str) -> None:
    """Half the memory, nearly the same losses; layer norms take a short stream too."""
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = pair(stack)
        names = trained_parameters(parameters(student), [1], what)
        for model in (student, teacher):
            for name, parameter in model.named_parameters():
                if model is teacher or name not in names:
                    parameter.data = parameter.data.to(dtype)
        log = distil(student, teacher, names, rows(), distil_stage(dtype="bfloat16", lr=1e-2))
        curves.append([loss for _, loss in log.losses])
    assert curves[1] == pytest.approx(curves[0], rel=0.15)
    assert curves[1][-1] < 0.9 * curves[1][0]
