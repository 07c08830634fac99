"""The Triton loss against its definition: interpreted here, compiled with `-m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from interpreter import DEVICE, kernels  # isort: skip  # before the kernels
from compare import assert_same
from loss_cases import WEIGHTS, arguments, cast, ours, wanted
from tamba.ops import losses
from tamba.ops.kernels import losses as module
from tamba.ops.kernels.tiles import using
from tamba.ops.losses import Top, Weights, most_likely

__all__ = ["kernels"]
pytestmark = [
    pytest.mark.usefixtures("kernels", "tiles"),
    # Where a lane has no number, numpy takes infinity from itself before it is left out.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]


@pytest.fixture
def tiles() -> Iterator[None]:
    """Blocks that a few words fill, and the last of them not quite."""
    small = {"block": 4, "warps": 1, "stages": 1}
    with using({"loss_dense": small, "loss_top": small}):
        yield


def check(w: Weights, c: dict[str, torch.Tensor], top: Top | None = None) -> None:
    got, want = ours(w, cast(c, torch.float32, DEVICE), top), wanted(w, c)
    for name in want:
        assert_same(got[name], want[name], "kernel", name)


@pytest.mark.parametrize(
    "weights",
    [w if w.ce else pytest.param(w, marks=pytest.mark.slow) for w in WEIGHTS],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_definition(weights: Weights) -> None:
    check(weights, arguments(n=3))


def test_targets_may_be_a_view() -> None:
    w, c = WEIGHTS[-1], arguments(n=3)
    want = wanted(w, c)
    c["targets"] = torch.stack([c["targets"], 10 - c["targets"]], dim=1)[:, 0]
    got = ours(w, cast(c, torch.float32, DEVICE) | {"targets": c["targets"].to(DEVICE)})
    for name in want:
        assert_same(got[name], want[name], "kernel", name)


@pytest.mark.parametrize("weights", [WEIGHTS[7], WEIGHTS[-3]], ids=str)
def test_in_slices(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_rows", lambda words: (3, 2))
    check(weights, arguments())


@pytest.mark.parametrize("divergence", ["forward", "js"])
def test_a_teacher_known_by_its_top(divergence: losses.Divergence) -> None:
    w = Weights(0.5, 2.0, 2.5, divergence, top_k=4)
    c = arguments()
    plain = cast(c, torch.float32, DEVICE)
    check(w, c, most_likely(plain["teacher_hidden"], plain["teacher_head"], 4, 2.5))


@pytest.mark.parametrize("name", ["dense", "top"])
def test_another_temperature_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(module, name)

    def wrong(*args: Any, temperature: float, **given: Any) -> None:
        right(*args, temperature=1.01 * temperature, **given)

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError, match="loss"):
        check(Weights(top_k=4 if name == "top" else None), arguments())


def test_words_that_the_teacher_rules_out() -> None:
    """A probability of zero adds nothing to the forward divergence."""
    student = torch.randn(2, 7, device=DEVICE)
    teacher = torch.randn(2, 7, device=DEVICE)
    teacher[:, 5] = -torch.inf
    p, log_q = teacher.double().softmax(-1), student.double().log_softmax(-1)
    want = (p * (torch.where(p > 0, p, 1).log() - log_q)).sum(-1)
    found = torch.empty(2, device=DEVICE)
    grad = student.clone()
    module.dense(
        grad, teacher, None, found, 0, kl=1, ce=0, temperature=1, beta=0.5, divergence="forward",
        grad=True,
    )  # fmt: skip
    assert_same(found, want, "kernel", "loss")
    assert_same(grad, log_q.exp() - p, "kernel", "gradient")


def test_a_loss_alone_is_the_same() -> None:
    c = cast(arguments(), torch.float32, DEVICE)
    for w in (WEIGHTS[0], WEIGHTS[1]):
        want = ours(w, c)["loss"]
        with torch.no_grad():
            got = losses.next_token_loss(**c, weights=w)
        assert_same(got, want, "exact")


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS[:12], ids=str)
def test_half_precision(weights: Weights) -> None:
    c = cast(arguments(n=4, d=16, words=37), torch.bfloat16, "cpu")
    got = ours(weights, cast(c, torch.bfloat16, DEVICE))
    want = wanted(weights, cast(c, torch.float64, "cpu"))
    assert_same(got["loss"], want["loss"], "half", "loss")
    for name in ("gradient of hidden", "gradient of head"):
        assert_same(got[name], want[name], "half_gradient", name)


@pytest.mark.slow
@pytest.mark.parametrize("some", [False, True], ids=["all count", "some count"])
def test_the_operator_is_known_to_the_compiler(some: bool) -> None:
    c = cast(arguments(), torch.float32, DEVICE)
    counted = torch.arange(len(c["hidden"]), device=DEVICE) % 3 > 0 if some else None
    torch.library.opcheck(
        losses._loss_op,
        (
            *c.values(), None, None, None, counted, 1.0, 1.0, 2.0, "js", 0.5, 0, torch.float32,
            True, True, True,
        ),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# torch's compiler warns of much that is not ours.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("weights", [WEIGHTS[-2], WEIGHTS[-4]], ids=str)
def test_float32_weights_under_autocast(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16, the head's gradient summed over slices in float32; compiled or not."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(losses, "_rows", lambda words: (64, 32))
    c = arguments(n=150, d=64, words=331)
    with torch.no_grad():
        for name in ("head", "teacher_head"):
            c[name] *= 64**-0.5
    want = wanted(weights, c)
    given = cast(c, torch.float32, "cuda")
    del given["hidden"], given["head"]
    plain = cast(c, torch.float32, "cuda")

    def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return losses.next_token_loss(hidden, head, **given, weights=weights)

    for call in (loss, torch.compile(loss, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16):
            got = call(plain["hidden"], plain["head"])
        gradients = torch.autograd.grad(got, (plain["hidden"], plain["head"]))
        assert_same(got, want["loss"], "half", "loss")
        assert all(g.dtype == torch.float32 for g in gradients)
        for gradient, name in zip(gradients, ("hidden", "head"), strict=True):
            assert_same(gradient, want[f"gradient of {name}"], "half_gradient", name)
