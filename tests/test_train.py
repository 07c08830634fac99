"""Repair: what moves and what does not, in which types, and what a kill costs."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import tamba
from compare import assert_same
from killed import assert_killed, die
from models import VOCAB, random_ids, tiny_model
from tamba import train as train_module
from tamba.data import Batch, TokenBlocks
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import ConvertOptions
from tamba.recipe import Align, Distil, LeastSquares, Sft, read_recipe
from tamba.sections import dump_toml
from tamba.surgery import convert_layer
from tamba.text import RecipeText, prepare_text
from tamba.train import (
    align,
    distil,
    engine,
    kinds,
    least_squares,
    objectives,
    trained_parameters,
    trainer,
)
from tamba.train.chat_steps import shares
from tamba.train.engine import Engine
from tamba.train.log import StageLog
from tamba.train.memory import Memory
from tamba.train.teacher import check_room
from tokens import character_tokenizer

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
[output]
report_to = []
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
    right = objectives.next_token_loss
    monkeypatch.setattr(objectives, "next_token_loss", lambda *a, **k: -right(*a, **k))
    with pytest.raises(AssertionError):
        check_distil(distil_stage(batch=4, tokens=40 * 128, lr=1e-2))


def check_overfit() -> None:
    student, teacher = pair()
    log = align(student, teacher, PAIRS, rows(2), align_stage(tokens=100 * 32, batch=2, lr=2e-2))
    assert log.losses[-1][1] < 0.05 * log.losses[0][1]
    assert log.layers[1] < 0.05
    # What it says is left is left: the mixer on the teacher's input, after the last step.
    again = align(student, teacher, PAIRS, rows(2), align_stage(tokens=32, batch=2, lr=1e-9))
    assert again.losses[0][1] == pytest.approx(log.layers[1], rel=0.5)


def test_align_overfits_a_tiny_batch() -> None:
    check_overfit()


@pytest.mark.slow
def test_steps_that_are_not_taken_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "rate_factor", lambda *_: 0.0)
    with pytest.raises(AssertionError):
        check_overfit()


def check_frozen(what: str, moved: Callable[[str], bool]) -> None:
    student, teacher = pair()
    ours, theirs = parameters(student), parameters(teacher)
    names = trained_parameters(ours, [1], what)
    distil(student, teacher, names, rows(), distil_stage(tokens=320, weight_decay=0.1))
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
    align(student, teacher, PAIRS, rows(), align_stage(tokens=320))
    least_squares(student, teacher, PAIRS, rows(), LeastSquares(stage="least_squares", tokens=128))
    for name, parameter in student.named_parameters():
        assert name.startswith(MIXER) or torch.equal(parameter, ours[name])
    assert all(torch.equal(p, theirs[n]) for n, p in teacher.named_parameters())


@pytest.mark.parametrize("fit", ["output", "mixer"])
def test_the_pull_of_a_fit_is_the_stages(fit: str) -> None:
    """The more of it, the less is fitted."""
    left = []
    for ridge in (0.01, 100.0):
        student, teacher = pair()
        stage = LeastSquares(stage="least_squares", tokens=128, fit=fit, ridge=ridge)
        left.append(least_squares(student, teacher, PAIRS, rows(), stage).layers[1])
    assert left[0] < 0.9 * left[1]


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
        log = distil(student, teacher, names, filled(token), distil_stage(tokens=320, ce=1.0))
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
    monkeypatch.setattr(Batch, "predicted", everywhere)
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
        told = {"tokens": 64, "micro_batch": micro, "mixing": 0.5}
        fit = align(student, teacher, PAIRS, blocks, align_stage(**told))
        got.append((log.losses[0][1], fit.losses[0][1]))
    for one in got[1:]:
        assert one == pytest.approx(got[0], rel=1e-4)


def test_a_step_in_parts_is_the_same_step() -> None:
    check_micro_batches()


def test_parts_of_wrong_weight_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    by_rows = staticmethod(lambda batch: len(batch.tokens))
    monkeypatch.setattr(objectives.DistilObjective, "count", by_rows)
    with pytest.raises(AssertionError):
        check_micro_batches()


def test_losses_that_are_no_numbers_stop_the_stage() -> None:
    student, teacher = pair()
    names = trained_parameters(parameters(student), [1], "mixers")
    with torch.no_grad():
        student.get_parameter(MIXER + "D").fill_(float("nan"))
    message = "no loss or gradient was a number in 8 steps, up to step 8; lower the learning rate"
    with pytest.raises(UserError, match=f"train: distil: {message}"):
        distil(student, teacher, names, rows(), distil_stage())
    assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(UserError, match=f"train: align: {message}"):
        align(student, teacher, PAIRS, rows(), align_stage())


@pytest.mark.parametrize("kind", ["align", "distil"])
def test_a_layer_that_is_not_kept_is_computed_again(kind: str) -> None:
    found = []
    for again in (False, True):
        student, teacher = pair()
        passes: list[int] = []
        student.model.layers[1].mixer.register_forward_hook(lambda *_, to=passes: to.append(1))
        if kind == "align":
            stage = align_stage(tokens=192, mixing=0.5, micro_batch=2, checkpointing=again)
            log = align(student, teacher, PAIRS, rows(), stage)
        else:
            names = trained_parameters(parameters(student), [1], "mixers")
            stage = distil_stage(tokens=192, micro_batch=2, checkpointing=again)
            log = distil(student, teacher, names, rows(), stage)
        found.append((len(passes), log.losses, parameters(student)))
    (once, losses, first), (twice, others, second) = found
    assert twice == 2 * once and others == losses
    for name, parameter in first.items():
        assert_same(second[name], parameter, "exact", name)


# Folders.


def prepare(
    folder: Path,
    train: str,
    dtype: torch.dtype = torch.float32,
    blocks: TokenBlocks | None = None,
) -> Path:
    """Teacher, text and built student of a recipe with these stages; the recipe's path."""
    teacher = tiny_model(["attention"] * 3, dtype=dtype)
    teacher.save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text("Text stands ready as tokens.")
    path = folder / "recipe.toml"
    path.write_text(RECIPE + train)
    RecipeText(blocks or rows(), None).save(folder / "text")
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
tokens = 384
batch = 4
lr = 1e-2
[[train]]
stage = "distil"
tokens = 384
batch = 4
lr = 1e-2
ce = 0.5
"""


def train_until_killed(folder: Path) -> None:
    """Keep every step, and die after the third of the second stage."""
    torch.use_deterministic_algorithms(True)
    trainer.KEEP_SECONDS = 0.0
    save = Engine._save_checkpoint

    def and_die(self: Engine, *args: object) -> None:
        save(self, *args)
        if self.stage.stage == "distil" and self.state.global_step == 3:
            die()

    Engine._save_checkpoint = and_die  # type: ignore[method-assign]
    run_training(folder)


def assert_same_training(folder: Path, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name in want:
        assert_same(got[name], want[name], "exact", name)
    records = [json.loads((folder / n / "train.json").read_text()) for n in ("whole", "student")]
    for stage in (*records[0]["stages"], *records[1]["stages"]):
        assert 0 < stage.pop("step_seconds") <= stage.pop("seconds")
    assert records[0]["stages"] == records[1]["stages"]


def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps of two stages; SIGKILL after three of the second; three more."""
    prepare(tmp_path, STAGES)
    want = run_training(tmp_path, "whole")
    assert_killed(train_until_killed, tmp_path)
    assert not (tmp_path / "student").exists()
    taken: list[int] = []
    right = Engine.note

    def counted(self: Engine) -> None:
        right(self)
        taken.append(self.state.global_step)

    monkeypatch.setattr(Engine, "note", counted)
    assert_same_training(tmp_path, run_training(tmp_path), want)
    assert taken == [4, 5, 6]
    assert not (tmp_path / ".student.stages").exists()


class Cut(Exception):
    pass


def cut_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Keep every step, and stop with an exception after this one."""
    right = Engine._save_checkpoint

    def cut(self: Engine, *args: object) -> None:
        right(self, *args)
        if self.stage.stage == stage and self.state.global_step == step:
            raise Cut

    monkeypatch.setattr(trainer, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(Engine, "_save_checkpoint", cut)


@pytest.mark.slow
def test_what_is_forgotten_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on without its moments, its place in the text, or its losses."""
    prepare(tmp_path, STAGES)
    want = run_training(tmp_path, "whole")
    with monkeypatch.context() as patch:
        cut_at(patch, "distil", 3)
        with pytest.raises(Cut):
            run_training(tmp_path)
    stages = tmp_path / ".student.stages"
    shutil.copytree(stages, tmp_path / "kept")

    def without_moments(self: Engine, checkpoint: str | None) -> None:
        path = Path(checkpoint or "") / "scheduler.pt"
        self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))

    def from_the_first(self: engine._Stream):
        for step in range(self._engine.steps):
            yield from self._engine.pieces.of(step)

    faults = {
        (Engine, "_load_optimizer_and_scheduler"): without_moments,
        (engine._Stream, "__iter__"): from_the_first,
        (Engine, "_begin"): lambda self: None,
    }
    for (place, name), fault in faults.items():
        shutil.rmtree(stages, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", stages)
        shutil.rmtree(tmp_path / "student", ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fault)
            with pytest.raises(AssertionError):
                assert_same_training(tmp_path, run_training(tmp_path), want)


def test_align_goes_on_inside_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, STAGES.replace("lr = 1e-2", "lr = 1e-2\nema = 0.9\nmicro_batch = 3"))
    want = run_training(tmp_path, "whole")
    with monkeypatch.context() as patch:
        cut_at(patch, "align", 4)
        with pytest.raises(Cut):
            run_training(tmp_path)
    assert_same_training(tmp_path, run_training(tmp_path), want)


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, STAGES[: STAGES.index("[[train]]", 5)])
    want = run_training(tmp_path, "whole")
    right = trainer.save_file

    def full(tensors: object, path: Path, **options: object) -> None:
        if "checkpoint-4" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        right(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "KEEP_SECONDS", 0.0)
        patch.setattr(trainer, "save_file", full)
        with pytest.raises(UserError, match=r"No space left on device.*free some room on the disk"):
            run_training(tmp_path)
    left = [p.name for p in (tmp_path / ".student.stages").glob("*/*")]
    assert left == ["checkpoint-3"]
    assert_same_training(tmp_path, run_training(tmp_path), want)


@pytest.mark.slow
def test_what_another_run_left_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepare(tmp_path, STAGES)

    with monkeypatch.context() as patch:
        cut_at(patch, "distil", 1)
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
    def unseen(self: Engine, model: object, grad_norm: object = None) -> None:
        self.losses.append([0.0])
        self._total = None

    monkeypatch.setattr(Engine, "_get_grad_norm", unseen)
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
    right = kinds.distil

    def look(student: TambaForCausalLM, teacher: TambaForCausalLM, *rest: object, **options):
        for name, parameter in student.named_parameters():
            master = name.startswith(MIXER)
            assert parameter.dtype == (torch.float32 if master else torch.bfloat16), name
        assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
        # Embedding and head of both.
        assert copies(embedding) - before == 4
        looked.append(1)
        return right(student, teacher, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "distil", look)
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

    def wrong(self: Memory, model: TambaForCausalLM):
        self.copy = {name: p.detach().clone() for name, p in model.named_parameters()}
        return right(self, model)

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


# Golden losses.

GOLDEN = Path(__file__).parent / "golden" / "train_demo.json"


def demo_losses(folder: Path) -> list[list[float]]:
    """Losses of the demo recipe's stages on the tiny teacher: its settings, fewer tokens."""
    demo = tomllib.loads((Path(__file__).parents[1] / "recipes" / "demo.toml").read_text())
    for stage in demo["train"]:
        stage |= {"tokens": 32 * 32, "dtype": "float32"}
        if "batch" in stage:
            stage["tokens"] = stage["batch"] * 32 * 12
    told = dump_toml({"convert": demo["build"]["convert"], "train": demo["train"]})
    prepare(folder, told.replace("[convert]", "[build.convert]"), blocks=rows(64, 32))
    run_training(folder)
    record = json.loads((folder / "student" / "train.json").read_text())
    return [[loss for _, loss in stage["losses"]] for stage in record["stages"]]


def check_golden(folder: Path) -> None:
    # Versions of torch add up in other orders, and steps of Adam magnify that: 1 %.
    for got, want in zip(demo_losses(folder), json.loads(GOLDEN.read_text()), strict=True):
        assert got == pytest.approx(want, rel=0.01)


def test_the_demos_stages_give_the_losses_on_record(tmp_path: Path) -> None:
    """To record them again: ``json.dumps(demo_losses(folder))`` into the file."""
    check_golden(tmp_path)


@pytest.mark.slow
def test_other_losses_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = trainer.rate_factor
    monkeypatch.setattr(trainer, "rate_factor", lambda *args: 0.8 * right(*args))
    with pytest.raises(AssertionError):
        check_golden(tmp_path)


# Loggers, stages alone, rows of other lengths.


def test_curves_end_beside_the_weights(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    path = prepare(tmp_path, STAGES[: STAGES.index("[[train]]", 5)])
    path.write_text(path.read_text().replace("report_to = []", 'report_to = ["tensorboard"]'))
    run_training(tmp_path)
    assert list((tmp_path / "student" / "logs" / "0-align").rglob("events.*"))


@pytest.mark.parametrize(
    "name, problem", [("wandbb", "did you mean 'wandb'"), ("mlflow", "mlflow")]
)
def test_a_logger_that_cannot_be_is_refused_before_any_stage(
    tmp_path: Path, name: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError("mlflow is not installed")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "mlflow", missing)
    path = prepare(tmp_path, STAGES)
    path.write_text(path.read_text().replace("report_to = []", f'report_to = ["{name}"]'))
    with pytest.raises(UserError, match=f"output.report_to: .*{problem}"):
        run_training(tmp_path)
    assert not (tmp_path / ".student.stages").exists()


def test_a_batch_that_processes_cannot_share_is_refused_before_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, STAGES)
    three = SimpleNamespace(num_processes=3, is_main_process=True, device=torch.device("cpu"))
    monkeypatch.setattr(train_module, "PartialState", lambda **_: three)
    with pytest.raises(UserError, match=r"train.0 \(align\): batch = 4 cannot be shared by 3"):
        run_training(tmp_path)
    assert not (tmp_path / ".student.stages").exists()
    # Conversations are shared in whole pieces.
    chat = Sft.model_validate({"stage": "sft", "data": ("a",), "lr": 1e-3, "batch": 12})
    assert shares(chat, 3, "here") == (4, 1)
    assert shares(chat.model_copy(update={"micro_batch": 2}), 3, "here") == (2, 2)
    assert shares(chat.model_copy(update={"micro_batch": 6}), 3, "here") == (4, 1)
    with pytest.raises(UserError, match="here: batch = 12 cannot be shared by 3 processes in piec"):
        shares(chat.model_copy(update={"micro_batch": 3}), 3, "here")
    with pytest.raises(UserError, match="here: batch = 12 cannot be shared by 5 processes; "):
        shares(chat, 5, "here")


def test_graphs_without_a_gpu_are_refused_before_any_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, STAGES.replace("ce = 0.5", "ce = 0.5\ngraphs = true"))
    cpu = SimpleNamespace(num_processes=1, is_main_process=True, device=torch.device("cpu"))
    monkeypatch.setattr(train_module, "PartialState", lambda **_: cpu)
    with pytest.raises(UserError, match=r"train.1 \(distil\): graphs = true.*leave graphs out"):
        run_training(tmp_path)
    assert not (tmp_path / ".student.stages").exists()


def test_text_of_another_tokenizer_is_refused_before_any_stage(tmp_path: Path) -> None:
    blocks = rows()
    blocks.tokens[3, 5] = VOCAB
    prepare(tmp_path, STAGES, blocks=blocks)
    with pytest.raises(UserError, match=f"built: has {VOCAB} words, and the text one of number"):
        run_training(tmp_path)
    assert not (tmp_path / ".student.stages").exists()


@pytest.mark.parametrize(
    "stages, problem",
    [
        (STAGES, r"train.0 \(align\): the teacher's layers are 64 wide and the student's 32"),
        ('[[train]]\nstage = "least_squares"\ntokens = 64', r"train.0 \(least_squares\): the tea"),
        (
            '[[train]]\nstage = "distil"\ntokens = 64\nlr = 1e-3\nreplacement = "theseus"',
            r"train.0 \(distil\): the teacher's layers are 64 wide",
        ),
    ],
)
def test_another_teacher_for_the_layers_is_refused_before_any_stage(
    stages: str, problem: str, tmp_path: Path
) -> None:
    prepare(tmp_path, stages)
    shutil.rmtree(tmp_path / "teacher")
    tiny_model(["attention"] * 3, hidden_size=64).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=problem):
        run_training(tmp_path)
    assert not (tmp_path / ".student.stages").exists()


def test_rows_beyond_the_teachers_positions_are_refused_before_any_stage(tmp_path: Path) -> None:
    prepare(tmp_path, STAGES)
    shutil.rmtree(tmp_path / "teacher")
    short = tiny_model(["attention"] * 3, max_position_embeddings=8)
    short.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"data.length: 16 is beyond the teacher's 8 positions"):
        run_training(tmp_path)
    assert not (tmp_path / ".student.stages").exists()


def test_a_teacher_with_other_words_may_lend_its_layers() -> None:
    """Where the loss does not ask it, its vocabulary does not matter."""
    student, _ = pair()
    teacher = tiny_model(["attention"] * 3, vocab_size=VOCAB + 7)
    stage = distil_stage(kl=0.0, ce=1.0, replacement="theseus", tokens=64)
    names = trained_parameters(parameters(student), [1], "mixers")
    log = distil(student, teacher, names, rows(), stage, pairs=PAIRS)
    assert log.skipped == 0
    with pytest.raises(UserError, match="teacher and student have"):
        distil(student, teacher, names, rows(), distil_stage(), pairs=PAIRS)


def test_fewer_steps_than_phases_are_refused_before_any_stage(tmp_path: Path) -> None:
    by_and_by = STAGES.replace("ce = 0.5", 'replacement = "one_by_one"')
    path = prepare(tmp_path, by_and_by.replace("tokens = 384", "tokens = 64"))
    path.write_text(path.read_text().replace("keep 0", "convert 0"))
    shutil.rmtree(tmp_path / "built")
    tamba.build(path, tmp_path / "built")
    with pytest.raises(UserError, match=r"train.1 \(distil\): .* 2 phases, .* has 1 step"):
        run_training(tmp_path)
    assert not (tmp_path / ".student.stages").exists()


def test_a_stage_alone_keeps_its_number_in_messages(tmp_path: Path) -> None:
    path = prepare(tmp_path, STAGES.replace("ce = 0.5", 'dtype = "float16"'))
    told = {"student": tmp_path / "built", "text": tmp_path / "text"}
    with pytest.raises(UserError, match=r"train.1 \(distil\): float16"):
        tamba.train(path, tmp_path / "second", stages=["distil"], **told)


def test_what_was_kept_of_other_parameters_leaves_no_trace(tmp_path: Path) -> None:
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)
    Memory(tmp_path, "same").keep(StageLog("align", 4), small, ["bias", "weight"])
    before, memory = large.weight.detach().clone(), Memory(tmp_path, "same")
    assert memory.restore(large) == [] == memory.logs
    assert_same(large.weight.detach(), before, "exact")


def test_a_stage_alone(tmp_path: Path) -> None:
    path = prepare(tmp_path, STAGES)
    told = {"student": tmp_path / "built", "text": tmp_path / "text"}
    (log,) = tamba.train(path, tmp_path / "first", stages=["align"], **told)
    assert log.stage == "align"
    # A student that was trained is trained on.
    told["student"] = tmp_path / "first"
    tamba.train(path, tmp_path / "second", stages=[1], **told)
    whole = run_training(tmp_path)
    for name, tensor in load_file(tmp_path / "second" / "model.safetensors").items():
        assert_same(tensor, whole[name], "exact", name)
    with pytest.raises(UserError, match=r"train: has no stage 'distill'; did you mean 'distil'\?"):
        tamba.train(path, tmp_path / "third", stages=["distill"], **told)


def test_longer_rows_are_packed_anew(tmp_path: Path) -> None:
    """A document that two short rows divide is whole in a long one."""
    stage = '[[train]]\nstage = "distil"\ntokens = 128\nlr = 1e-3\nbatch = 2\nlength = 64\n'
    path = prepare(tmp_path, stage)
    character_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("a long line of one document " * 20)
    recipe = read_recipe(path)
    short = prepare_text(recipe, sides=("train",)).train
    assert short is not None and short.length == 16
    long = train_module._of_length(short, 64, recipe)
    assert long.length == 64 and int(long.starts.sum()) == len(long)
    assert torch.equal(long.tokens.flatten(), short.tokens.flatten()[: long.tokens.numel()])
    cut = train_module._of_length(short, 8, recipe)
    assert torch.equal(cut.tokens.flatten(), short.tokens.flatten()) and bool(
        cut.starts[:, 0].all()
    )
    with pytest.raises(UserError, match="length = 7 does not divide the 16 tokens of a row"):
        train_module._of_length(short, 7, recipe)


# What a teacher says: in process, on disk, in 8 bits.

TOP = """
[[train]]
stage = "distil"
tokens = 640
batch = 4
lr = 1e-2
top_k = 9
"""


def test_a_stored_teacher_teaches_as_the_live_one(tmp_path, monkeypatch):
    path = prepare(tmp_path, TOP)
    live = run_training(tmp_path, "live")
    path.write_text(RECIPE + TOP + 'stored = "top"\n')
    first = run_training(tmp_path, "first")
    before, asked = load_file(tmp_path / "built" / "model.safetensors"), []
    load = tamba.train.load_model
    monkeypatch.setattr(
        tamba.train, "load_model", lambda *a, **k: asked.append(a[0].location) or load(*a, **k)
    )
    again = run_training(tmp_path, "again")
    assert len(asked) == 1  # the student
    for name, want in live.items():
        assert_same(again[name], first[name], "exact", name)
        # The words' probabilities are rounded to 11 bits, and steps of Adam follow signs.
        assert_same(first[name], want, "half_gradient", name)
    assert any(not torch.equal(live[name], before[name]) for name in live)
    path.write_text(RECIPE + TOP.replace("top_k = 9", "top_k = 8") + 'stored = "top"\n')
    with pytest.raises(UserError, match="words of a place: it was made for 9, not 8"):
        run_training(tmp_path, "other")
    assert not (tmp_path / "other").exists()


def test_a_store_without_room_is_refused_before_any_stage(tmp_path, monkeypatch):
    prepare(tmp_path, STAGES + TOP + 'stored = "deep/down/top"\n')
    # 8 rows of 16 tokens, 9 words of 6 bytes and the rest in 4.
    needed, right = 8 * 16 * (6 * 9 + 4), shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        short = right._replace(free=needed - 1)
        patch.setattr(shutil, "disk_usage", lambda path: short)
        with pytest.raises(UserError, match="deep/down: not enough room on disk"):
            run_training(tmp_path)
        enough = right._replace(free=needed)
        patch.setattr(shutil, "disk_usage", lambda path: enough)
        check_room(tmp_path / "deep" / "down" / "top", rows(), 9)
    assert not (tmp_path / ".student.stages").exists() and not (tmp_path / "deep").exists()
    run_training(tmp_path)


def test_a_teacher_in_8_bits(tmp_path):
    pytest.importorskip("torchao")
    path = prepare(tmp_path, TOP)
    live = run_training(tmp_path, "live")
    path.write_text(RECIPE + TOP + 'teacher = "int8"\n')
    short = run_training(tmp_path, "short")
    assert any(not torch.equal(short[name], live[name]) for name in live)
    logs = [json.loads((tmp_path / n / "train.json").read_text()) for n in ("live", "short")]
    losses = [log["stages"][0]["losses"][0][1] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
