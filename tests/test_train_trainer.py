"""What stages on text and on conversations have in common, seen on one of each."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("trl")

from tamba.errors import UserError
from tamba.train import chat_steps, distil, objectives, on_policy, sft, trained_parameters, trainer
from tamba.train.log import StageLog
from tamba.train.trainer import Place, StageTrainer
from test_train import (
    STAGES,
    align_stage,
    distil_stage,
    pair,
    parameters,
    prepare,
    rows,
    run_training,
)
from test_train_chat import on_policy_stage, sft_stage, student, teacher, tokenizer
from test_train_chat import rows as conversations

STEPS = 6
TOLD = {"batch": 2, "lr": 3e-3}


def text(place: Place = trainer.NOWHERE) -> StageLog:
    model, giver = pair()
    names = trained_parameters(parameters(model), [1], "mixers")
    stage = distil_stage(tokens=STEPS * 2 * 16, **TOLD)
    return distil(model, giver, names, rows(), stage, 0, place)


def talk(place: Place = trainer.NOWHERE) -> StageLog:
    stage = sft_stage(steps=STEPS, **TOLD)
    return sft(student(), tokenizer(), stage, conversations(), seed=3, place=place)


@pytest.fixture(params=[text, talk])
def stage(request: pytest.FixtureRequest) -> Callable[..., StageLog]:
    """Six steps."""
    return request.param


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The steps, counted over all runs, whose loss is no number."""
    steps: set[int] = set()
    calls: list[int] = []

    def poisoned(right: Callable) -> Callable:
        def loss(*args, **options) -> Tensor:
            calls.append(1)
            return right(*args, **options) * (math.nan if len(calls) in steps else 1.0)

        return loss

    for place, name in ((objectives, "next_token_loss"), (chat_steps._SftSteps, "compute_loss")):
        monkeypatch.setattr(place, name, poisoned(getattr(place, name)))
    yield steps


class Cut(Exception):
    pass


def cut_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Keep every step, and stop after this one."""
    right = StageTrainer._save_checkpoint

    def cut(self: StageTrainer, *args: object) -> None:
        right(self, *args)
        if self.state.global_step == step:
            raise Cut

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", cut)


def check_goes_on(stage: Callable[..., StageLog], poison: set[int], folder: Path) -> None:
    """Two steps of no number, a cut, and a third."""
    poison |= {3, 4, 5}
    place = Place(folder / "kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "KEEP_SECONDS", 0.0)
        patch.setattr(trainer, "MOST_SKIPPED", 3)
        with pytest.raises(Cut), pytest.MonkeyPatch.context() as inside:
            cut_after(inside, 4)
            stage(place)
        with pytest.raises(UserError, match=r"in 3 steps, up to step 5; .*not-a-number-5"):
            stage(place)


def test_skipped_steps_are_counted_on_after_a_cut(stage, poison, tmp_path: Path) -> None:
    check_goes_on(stage, poison, tmp_path)


def test_a_count_that_begins_anew_is_seen(stage, poison, tmp_path: Path, monkeypatch) -> None:
    right = StageTrainer._begin

    def forgets(self: StageTrainer) -> None:
        right(self)
        self._skipped_running = 0

    monkeypatch.setattr(StageTrainer, "_begin", forgets)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_goes_on(stage, poison, tmp_path)


def test_loggers_hear_numbers_after_a_skipped_step(stage, poison, monkeypatch) -> None:
    heard: list[float] = []
    right = StageTrainer.log

    def log(self: StageTrainer, logs: dict[str, float], *rest: object) -> None:
        heard.extend(logs[name] for name in ("loss", "train_loss") if name in logs)
        right(self, logs, *rest)

    monkeypatch.setattr(StageTrainer, "log", log)
    poison.add(2)
    done = stage()
    assert done.skipped == 1 and len(done.losses) == STEPS - 1
    assert len(heard) == STEPS + 1 and all(map(math.isfinite, heard))
    assert heard[0] == pytest.approx(done.losses[0][1], rel=1e-3)
    assert heard[2] == pytest.approx(done.losses[1][1], rel=1e-3)


def test_seconds_are_those_of_all_runs(stage, tmp_path: Path, monkeypatch) -> None:
    clock = [0.0]

    def now() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(trainer, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(trainer.time, "monotonic", now)
    place = Place(tmp_path / "kept")
    with pytest.raises(Cut), monkeypatch.context() as inside:
        cut_after(inside, 4)
        stage(place)
    clock[0] += 1e6  # the night between
    log = stage(place)
    # The clock is looked at up to three times a step.
    assert 2 * STEPS <= log.seconds <= 3 * STEPS and 2 <= log.step_seconds <= 3


def test_no_room_for_the_last_batch_does_not_hide_why(
    stage, poison, tmp_path: Path, monkeypatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "write_tensors", full)
    poison |= {*range(20)}
    with pytest.raises(UserError, match=r"no loss or gradient .* not kept: .*No space left"):
        stage(Place(tmp_path / "kept"))


def test_answers_that_came_to_nothing_are_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(StageTrainer, "_norm_of", lambda *_: torch.tensor(math.inf))
    stage = on_policy_stage(steps=1, micro_batch=2)
    with pytest.raises(UserError, match="not-a-number-1"):
        on_policy(
            *(student(), tokenizer(), stage, conversations()),
            teacher=teacher(),
            place=Place(tmp_path / "kept"),
        )
    kept = load_file(tmp_path / "not-a-number-1.safetensors")
    assert all(kept[f"{i}/completion_ids"].shape == (2, 8) for i in (0, 1))


def test_a_device_without_room_says_what_to_do(stage, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for place, name in ((objectives, "next_token_loss"), (chat_steps._SftSteps, "compute_loss")):
        monkeypatch.setattr(place, name, full)
    with pytest.raises(UserError, match="out of memory with 2 rows at a time; lower micro_batch"):
        stage()


# What launchers say.

TOLD_BY = "ACCELERATE_MIXED_PRECISION"


def test_what_a_launcher_says_of_precision_is_refused_or_not_heard(stage, monkeypatch) -> None:
    monkeypatch.setenv(TOLD_BY, "bf16")
    with pytest.raises(UserError, match=r"^train: \w+: dtype = 'float32', .* bf16; launch with"):
        stage()
    heard, begin = [], StageTrainer.begin

    def watched(self, *args, **options) -> None:
        heard.append(self.accelerator.mixed_precision)
        begin(self, *args, **options)

    monkeypatch.setattr(StageTrainer, "begin", watched)
    monkeypatch.setattr(trainer, "check_launch", lambda *_: None)
    stage()
    assert os.environ[TOLD_BY] == "bf16"
    monkeypatch.setattr(trainer, "_own_precision", contextlib.nullcontext)
    stage()
    assert heard == ["no", "bf16"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("say", ["no", "bf16", "fp16", "fp8"])
def test_a_launcher_may_say_what_the_stage_says(say, dtype, monkeypatch) -> None:
    monkeypatch.setenv(TOLD_BY, say)
    one = distil_stage(dtype=dtype)
    if (say, dtype) in {("bf16", "bfloat16"), ("fp16", "float16")} or say == "no":
        trainer.check_launch(one, "here")
    else:
        with pytest.raises(UserError, match=f"^here: dtype = '{dtype}', .*{say}; launch with"):
            trainer.check_launch(one, "here")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}, None),
        ({"fp16": {"enabled": False}, "gradient_clipping": 1.0}, None),
        ({"zero_optimization": {"stage": 3}}, "here: DeepSpeed's stage 3 .*FSDP2"),
        ({"bf16": {"enabled": True}}, "here: DeepSpeed's configuration enables bf16"),
        ({"fp16": {"enabled": True}}, "here: DeepSpeed's configuration enables fp16"),
        ("{", r"ds.json: cannot be read \(.*\); give a JSON file"),
        (None, "ds.json: cannot be read"),
    ],
)
def test_what_deepspeed_may_be_told(config, said, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "ds.json"
    if config is not None:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    trainer.check_launch(distil_stage(), "here")  # it is not to be used
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    if said is None:
        trainer.check_launch(distil_stage(), "here")
    else:
        with pytest.raises(UserError, match=said):
            trainer.check_launch(distil_stage(), "here")


def test_deepspeeds_stage_may_be_told_without_a_file(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for level in ("", "0", "1", "2", "3"):
        if level:
            monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", level)
        if level != "3":
            trainer.check_launch(distil_stage(), "here")
    with pytest.raises(UserError, match="stage 3"):
        trainer.check_launch(distil_stage(), "here")


def test_matrices_are_not_compared_where_mixers_are_shared_out(monkeypatch) -> None:
    """Two processes under FSDP2 ended in a traceback of torch's at the first step."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer.check_launch(align_stage(), "here")
    with pytest.raises(UserError, match=r"here: mixing reads .*FSDP2.*; launch without FSDP2"):
        trainer.check_launch(align_stage(mixing=0.5), "here")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    trainer.check_launch(align_stage(mixing=0.5), "here")


def test_recipes_are_checked_before_any_work(tmp_path: Path, monkeypatch) -> None:
    prepare(tmp_path, STAGES.replace("lr = 1e-2", 'lr = 1e-2\ndtype = "float32"', 1))
    monkeypatch.setenv(TOLD_BY, "bf16")
    with pytest.raises(UserError, match=r"train\.0 \(align\).*--mixed_precision bf16"):
        run_training(tmp_path, "out")
    assert not list(tmp_path.glob("*out*"))
