"""Steps: beside a loop written by hand, and when something is no number."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from compare import assert_same
from models import tiny_model
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import ConvertOptions
from tamba.surgery import convert_layer
from tamba.train import align, distil, objectives, trained_parameters, trainer
from tamba.train.engine import Engine, Place, run_steps
from tamba.train.objectives import DistilObjective, LiveTeacher
from tamba.train.pieces import rows_of_step
from test_train import MIXER, PAIRS, align_stage, distil_stage, pair, parameters, rows


def named(model: TambaForCausalLM, what: str) -> list[str]:
    return trained_parameters(parameters(model), [1], what)


def by_hand(student, teacher, names, blocks, stage, seed: int, decayed: Callable) -> Tensor:
    """The same steps, written out: whole logits, no pieces, torch's plain AdamW."""
    moving = {n: p for n, p in student.named_parameters() if n in names}
    fresh = [n for n in names if n.startswith(MIXER)]
    groups = [
        {"params": [p], "lr": 0.0, "weight_decay": stage.weight_decay if decayed(n, p) else 0.0}
        for n, p in moving.items()
    ]
    adam = torch.optim.AdamW(groups, betas=stage.betas, fused=False, foreach=False)
    means = {n: torch.zeros_like(p) for n, p in moving.items()}
    steps = stage.tokens // (stage.batch * blocks.length)
    losses = []
    for step in range(steps):
        some = rows_of_step(len(blocks), stage.batch, step, seed)
        tokens, starts = blocks.tokens[some].long(), blocks.starts[some]
        seq = starts.cumsum(1)
        q = student(tokens, seq_idx=seq, use_cache=False).logits[:, :-1].log_softmax(-1)
        with torch.no_grad():
            p = teacher(tokens, seq_idx=seq, use_cache=False).logits[:, :-1].log_softmax(-1)
        here = ~starts[:, 1:]
        kl = (p.exp() * (p - q)).sum(-1)[here].mean()
        ce = F.nll_loss(q[here], tokens[:, 1:][here])
        loss = stage.kl * kl + stage.ce * ce
        losses.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(moving.values()), stage.clip)
        warmup = math.ceil(stage.warmup * steps)
        factor = (step + 1) / warmup
        if step >= warmup:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group, name in zip(adam.param_groups, moving, strict=True):
            group["lr"] = factor * (stage.lr if name in fresh else stage.lr_pretrained)
        adam.step()
        for p in moving.values():
            p.grad = None
        for name, mean in means.items():
            mean.copy_(stage.ema * mean + (1 - stage.ema) * moving[name].detach())
    with torch.no_grad():
        for name, mean in means.items() if stage.ema else ():
            moving[name].copy_(mean / (1 - stage.ema**steps))
    return torch.tensor(losses)


def check_by_hand(**options) -> None:
    told = {"tokens": 640, "ce": 0.5, "lr_pretrained": 1e-4, "weight_decay": 0.1, "clip": 0.3}
    stage = distil_stage(**(told | {"warmup": 0.2, "train": "all"} | options))
    ours, teacher = pair()
    theirs, _ = pair()
    log = distil(
        ours,
        teacher,
        named(ours, "all"),
        rows(),
        stage,
        seed=5,
        fresh=lambda name: name.startswith(MIXER),
    )

    def decayed(name: str, p: Tensor) -> bool:
        return p.dim() == 2 and not name.endswith(("A_log", "dt_bias", ".D"))

    plain = distil_stage(**(stage.model_dump(exclude_unset=True) | {"micro_batch": None}))
    want = by_hand(theirs, teacher, named(ours, "all"), rows(), plain, 5, decayed)
    assert [loss for _, loss in log.losses] == pytest.approx(want.tolist(), rel=1e-4)
    for (name, got), (_, p) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        # Adam divides by the size of a gradient, which magnifies the last bits of a small one.
        torch.testing.assert_close(got, p, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_steps_equal_a_loop_written_by_hand() -> None:
    check_by_hand(micro_batch=3, ema=0.9, checkpointing=True)


@torch.no_grad()
def loss_by_definition(student, teacher, *, tau=1.0, kind="forward", beta=0.5, ce=0.0) -> float:
    """Of all rows, from whole logits in float64."""
    tokens, starts = rows().tokens.long(), rows().starts
    seq, here = starts.cumsum(1), ~starts[:, 1:]
    z, y = (
        model(tokens, seq_idx=seq, use_cache=False).logits[:, :-1][here].double()
        for model in (student, teacher)
    )
    q, p = (z / tau).softmax(-1), (y / tau).softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1).mean()

    m = beta * p + (1 - beta) * q
    found = {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "js": beta * kl(p, m) + (1 - beta) * kl(q, m),
    }[kind]
    return float(tau**2 * found + ce * F.cross_entropy(z, tokens[:, 1:][here]))


@pytest.mark.parametrize(
    ("told", "means"),
    [
        ({"temperature": 3.0}, {"tau": 3.0}),
        ({"divergence": "reverse"}, {"kind": "reverse"}),
        ({"divergence": "js", "beta": 0.2}, {"kind": "js", "beta": 0.2}),
        ({"ce": 0.7}, {"ce": 0.7}),
    ],
    ids=str,
)
def test_a_stage_minimises_what_it_is_told(told, means) -> None:
    student, teacher = pair()
    want = loss_by_definition(student, teacher, **means)
    assert want != pytest.approx(loss_by_definition(student, teacher), rel=1e-2)
    stage = distil_stage(tokens=128, batch=8, **told)
    log = distil(student, teacher, named(student, "mixers"), rows(), stage)
    assert log.losses[0][1] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["decay", "rate", "mean"])
def test_steps_that_differ_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "rate":
        monkeypatch.setattr(trainer, "rate_factor", lambda *_: 1.0)
    if fault == "mean":
        monkeypatch.setattr(Engine, "finish", lambda self: None)
    if fault == "decay":
        monkeypatch.setattr(trainer, "RecurrentMixer", SimpleNamespace(FLOAT32=("weight",)))
    with pytest.raises(AssertionError):
        check_by_hand(ema=0.9)


# What is no number.


def check_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of no number is one that was not taken."""
    stage = {"schedule": "constant", "warmup": 0.0, "lr": 1e-2, "ema": 0.9}
    want, teacher = pair()
    distil(want, teacher, named(want, "mixers"), rows(), distil_stage(tokens=192, **stage))
    right = objectives.next_token_loss
    calls: list[int] = []

    def now_and_then(*args, **options) -> Tensor:
        calls.append(1)
        loss = right(*args, **options)
        return loss * float("nan") if len(calls) == 4 else loss

    monkeypatch.setattr(objectives, "next_token_loss", now_and_then)
    got, _ = pair()
    log = distil(got, teacher, named(got, "mixers"), rows(), distil_stage(tokens=256, **stage))
    assert len(calls) == 4 and log.skipped == 1
    assert len(log.losses) == 3 and all(math.isfinite(loss) for _, loss in log.losses)
    for name, p in want.named_parameters():
        assert_same(got.get_parameter(name).detach(), p.detach(), "exact", name)


def test_a_step_of_no_number_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    check_skipped(monkeypatch)


def test_a_step_that_moves_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.math, "isfinite", lambda value: True)
    with pytest.raises(AssertionError):
        check_skipped(monkeypatch)


def test_a_gradient_of_no_number_counts_though_its_loss_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Engine._norm
    calls: list[int] = []

    def now_and_then(self: Engine, most: float) -> Tensor:
        calls.append(1)
        norm = right(self, most)
        return norm * math.inf if len(calls) == 2 else norm

    monkeypatch.setattr(Engine, "_norm", now_and_then)
    student, teacher = pair()
    stage = distil_stage(tokens=256, clip=1.0)
    log = distil(student, teacher, named(student, "mixers"), rows(), stage)
    assert len(calls) == 4 and log.skipped == 1 and len(log.losses) == 3


def test_the_last_batch_is_kept_for_a_look(tmp_path: Path) -> None:
    student, teacher = pair()
    with torch.no_grad():
        student.get_parameter(MIXER + "D").fill_(float("inf"))
    place = Place(tmp_path / "stages" / "0")
    with pytest.raises(UserError, match=r"the last batch is in .*not-a-number-8.safetensors"):
        distil(student, teacher, named(student, "mixers"), rows(), distil_stage(), 0, place)
    kept = load_file(tmp_path / "stages" / "not-a-number-8.safetensors")
    some = rows_of_step(8, 4, 7, 0)
    assert kept["rows"].tolist() == some.tolist()
    assert torch.equal(kept["tokens"], rows().tokens[some].long())


def test_short_parameters_are_never_stepped() -> None:
    student, teacher = pair()
    student.get_parameter(MIXER + "out_proj.weight").data = torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"torch\.bfloat16; steps need a float32 master"):
        distil(student, teacher, named(student, "mixers"), rows(), distil_stage())


# Layers that take the attention's place by and by.


def hybrid(layers: tuple[int, ...]) -> tuple[TambaForCausalLM, TambaForCausalLM]:
    teacher, student = (tiny_model(["attention"] * 4) for _ in range(2))
    for i in layers:
        torch.manual_seed(i)
        student.model.layers[i] = convert_layer(
            student.model.layers[i], student.config, ConvertOptions(), i
        )
    return student, teacher


def first_losses(stage, layers: tuple[int, ...], n: int) -> list[float]:
    student, teacher = hybrid(layers)
    names = trained_parameters(parameters(student), layers, "mixers")
    log = distil(student, teacher, names, rows(), stage, pairs={i: i for i in layers})
    assert teacher.lm_head.weight.requires_grad
    return [loss for _, loss in log.losses][:n]


def check_replacement() -> None:
    """While layers wait, the student is the one in which they were never converted."""
    told = {"batch": 8, "lr": 1e-12, "tokens": 3 * 128, "warmup": 0.0, "schedule": "constant"}
    stage = distil_stage(**told, replacement="one_by_one", order="top_down", checkpointing=True)
    got = first_losses(stage, (0, 1, 3), 3)
    at_once = distil_stage(**(told | {"tokens": 128}))  # one step
    want = [first_losses(at_once, layers, 1)[0] for layers in ((3,), (1, 3), (0, 1, 3))]
    assert got == pytest.approx(want, rel=1e-4)
    # With no attention of its own the student knows no angles; the teacher does.
    assert first_losses(
        distil_stage(**told, replacement="progressive", shares=(0.5,)), (0, 1, 2, 3), 1
    )[0] == pytest.approx(first_losses(at_once, (0, 2), 1)[0], rel=1e-4)


def test_layers_that_wait_are_the_teachers() -> None:
    check_replacement()


@pytest.mark.slow
def test_layers_that_do_not_wait_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistilObjective, "_stand_ins", lambda self, piece: ({}, None))
    with pytest.raises(AssertionError):
        check_replacement()


def test_a_seed_draws_the_layers_that_come_at_random() -> None:
    told = {"batch": 8, "lr": 1e-12, "tokens": 8 * 128, "replacement": "theseus", "chance": 0.0}
    found = []
    for seed in (3, 3, 4):
        student, teacher = hybrid((0, 1, 3))
        names = trained_parameters(parameters(student), (0, 1, 3), "mixers")
        pairs = {i: i for i in (0, 1, 3)}
        # A step is all rows, so that their order changes nothing.
        log = distil(student, teacher, names, rows(), distil_stage(**told), seed, pairs=pairs)
        found.append([loss for _, loss in log.losses])
    assert found[0] == found[1]
    assert found[0] != pytest.approx(found[2], rel=1e-2)


def test_layers_that_wait_do_not_move() -> None:
    layers = (0, 1, 3)
    student, teacher = hybrid(layers)
    before = parameters(student)
    names = trained_parameters(before, layers, "mixers")
    stage = distil_stage(tokens=64, replacement="one_by_one", order="bottom_up", weight_decay=0.1)
    objective = DistilObjective(
        student,
        LiveTeacher(teacher, torch.float32),
        stage,
        teacher,
        {i: i for i in layers},
        lambda step: [0],
    )
    teacher.requires_grad_(False)
    run_steps(objective, stage, rows(), set(names))
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in names if n.startswith("model.layers.0.")}


# Compiled.


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's tracer causes some itself
def test_compiled_layers_are_one_graph_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers, steps and rows with documents; the graphs run as they are."""
    from torch._dynamo.testing import CompileCounter

    graphs = CompileCounter()
    right = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **told: right(self, backend=graphs, **told)
    )
    counts = []
    for n in (1, 3):
        found = []
        for compiled in (False, True):
            student, teacher = hybrid((0, 1, 3)[:n])
            stage = align_stage(tokens=256, batch=2, compile=compiled)
            torch.compiler.reset()
            graphs.clear()
            found.append(align(student, teacher, {i: i for i in (0, 1, 3)[:n]}, rows(), stage))
        assert found[1].layers == pytest.approx(found[0].layers, rel=1e-4)
        counts.append(graphs.frame_count)
    assert 0 < counts[1] <= counts[0]


# Side by side.


def test_layers_side_by_side_learn_as_one_after_another() -> None:
    layers = (0, 1, 3)
    found = []
    for threads in (1, 3):
        student, teacher = hybrid(layers)
        stage = align_stage(tokens=320, micro_batch=3, clip=0.1, mixing=0.5)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            log = align(student, teacher, {i: i for i in layers}, rows(), stage)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        found.append((log, parameters(student)))
    (one, first), (three, second) = found
    assert three.layers == pytest.approx(one.layers, rel=1e-4)
    for name, p in first.items():
        torch.testing.assert_close(second[name], p, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_mixing_brings_the_matrices_together() -> None:
    ends = []
    for mixing in (0.0, 3.0):
        student, teacher = pair()
        options = {"tokens": 40 * 64, "lr": 2e-2}
        align(student, teacher, PAIRS, rows(), align_stage(mixing=mixing, **options))
        told = align_stage(tokens=64, mixing=1.0, lr=1e-12)
        whole = align(student, teacher, PAIRS, rows(), told).layers[1]
        alone = align(student, teacher, PAIRS, rows(), align_stage(tokens=64, lr=1e-12)).layers[1]
        ends.append(whole - alone)
    assert ends[1] < 0.9 * ends[0]
