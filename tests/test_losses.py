"""The loss on next-token distributions, against probabilities as they are defined."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compare import assert_same
from loss_cases import WEIGHTS, arguments, ours, wanted
from tamba.ops import losses
from tamba.ops.losses import Weights, most_likely, next_token_loss


def check(w: Weights) -> None:
    got, want = ours(w, arguments()), wanted(w, arguments())
    for name in want:
        assert_same(got[name], want[name], "fp64", name)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_loss_and_gradients_are_those_of_the_definition(weights: Weights) -> None:
    check(weights)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_divergence_the_other_way_round_is_seen(
    divergence: losses.Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = losses._between

    def wrong(log_p: Tensor, log_q: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        other = {"forward": "reverse", "reverse": "forward"}[weights.divergence]
        return right(log_p, log_q, replace(weights, divergence=other))

    monkeypatch.setattr(losses, "_between", wrong)
    with pytest.raises(AssertionError, match="loss"):
        check(Weights(divergence=divergence))


def test_a_rest_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses._over_top

    def wrong(student: Tensor, top: losses.Top, weights: Weights) -> tuple[Tensor, Tensor]:
        return right(student, top._replace(log_rest=torch.full_like(top.log_rest, -40)), weights)

    monkeypatch.setattr(losses, "_over_top", wrong)
    with pytest.raises(AssertionError, match="loss"):
        check(Weights(top_k=4))


@pytest.mark.parametrize("at_once", [(2, 1), (4, 3)])
@pytest.mark.parametrize("weights", [WEIGHTS[0], WEIGHTS[-2]], ids=str)
def test_slices_of_any_size(
    weights: Weights, at_once: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = len(arguments()["head"])
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", at_once[0] * words)
    monkeypatch.setattr(losses, "_WIDE_AT_ONCE", at_once[1] * words)
    check(weights)


def some_of(given: dict[str, Tensor], which: Tensor) -> dict[str, Tensor]:
    of_positions = ("hidden", "targets", "teacher_hidden")
    return {n: t[which] if n in of_positions else t for n, t in given.items()}


def check_counted(w: Weights) -> None:
    counted = torch.tensor([True, False, False, True, True])
    given = arguments()
    want = next_token_loss(**some_of(given, counted), weights=w)
    gradients = torch.autograd.grad(want, [given["hidden"], given["head"]])
    got = next_token_loss(**given, counted=counted, weights=w)
    assert_same(got, want, "fp64", "loss")
    found = torch.autograd.grad(3 * got, [given["hidden"], given["head"]])
    for name, a, b in zip(("hidden", "head"), found, gradients, strict=True):
        assert_same(a, 3 * b, "fp64", name)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_positions_that_do_not_count_change_nothing(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_counted(weights)
    words = len(arguments()["head"])
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", 2 * words)
    check_counted(weights)
    with pytest.raises(ValueError, match="counted"):
        next_token_loss(**arguments(), counted=torch.ones(2, dtype=torch.bool), weights=weights)
    monkeypatch.setattr(losses, "_count", lambda n, counted: n)
    with pytest.raises(AssertionError, match="loss"):
        check_counted(weights)


def check_not_a_number(w: Weights, top: bool) -> None:
    """Whatever stands at positions that do not count."""
    counted = torch.tensor([True, False, False, True, True])
    given = arguments()
    if top:
        of = given.pop("teacher_hidden"), given.pop("teacher_head")
        given["teacher_top"] = most_likely(*of, 4, w.temperature)
    want = next_token_loss(**given, counted=counted, weights=w)
    gradients = torch.autograd.grad(want, [given["hidden"], given["head"]])
    for bad in (math.nan, math.inf):
        spoilt = dict(given)
        hidden = given["hidden"].detach().clone()
        hidden[~counted] = bad
        spoilt["hidden"] = hidden.requires_grad_()
        spoilt["targets"] = given["targets"].masked_fill(~counted, -100)
        if top:
            kept = given["teacher_top"]
            spoilt["teacher_top"] = losses.Top(
                kept.indices.masked_fill(~counted[:, None], -1),
                *(t.masked_fill(~counted.view(-1, *[1] * (t.dim() - 1)), bad) for t in kept[1:]),
            )
        else:
            above = given["teacher_hidden"].clone()
            above[~counted] = bad
            spoilt["teacher_hidden"] = above
        got = next_token_loss(**spoilt, counted=counted, weights=w)
        found = torch.autograd.grad(got, [spoilt["hidden"], spoilt["head"]])
        for name, a, b in zip(("loss", "hidden", "head"), (got, *found), (want, *gradients),
                              strict=True):  # fmt: skip
            assert_same(a.detach(), b.detach(), "exact", name)


@pytest.mark.parametrize("top", [False, True], ids=["live", "top"])
@pytest.mark.parametrize("weights", [WEIGHTS[-2], WEIGHTS[0]], ids=str)
def test_positions_that_do_not_count_need_not_be_numbers(
    weights: Weights, top: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_not_a_number(weights, top)
    monkeypatch.setattr(losses, "_only", lambda rows, counted, part: rows)
    with pytest.raises(AssertionError, match="head"):
        check_not_a_number(weights, top)


def test_the_words_by_hand() -> None:
    """Two positions and three words, with nothing but the calculator's functions."""
    student, teacher = [[1.0, 0.0, -1.0], [0.5, 2.0, 0.0]], [[0.0, 1.0, 0.0], [2.0, 2.0, -2.0]]
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        q = [math.exp(x) / sum(map(math.exp, s)) for x in s]
        p = [math.exp(x) / sum(map(math.exp, t)) for x in t]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    eye = torch.eye(3, dtype=torch.float64)
    got = next_token_loss(
        torch.tensor(student, dtype=torch.float64),
        eye,
        teacher_hidden=torch.tensor(teacher, dtype=torch.float64),
        teacher_head=eye,
    )
    assert float(got) == pytest.approx(total / 2, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_a_teacher_known_by_its_top_is_the_live_one(
    divergence: losses.Divergence, temperature: float
) -> None:
    w = Weights(0.5, 2.0, temperature, divergence, top_k=4)
    c = arguments()
    top = most_likely(c["teacher_hidden"], c["teacher_head"], 4, temperature)
    assert top.indices.dtype == torch.int32
    total = torch.cat([top.log_probs, top.log_rest[:, None]], -1).exp().sum(-1)
    assert_same(total, torch.ones_like(total), "fp64", "total probability")
    got, want = ours(w, arguments(), top), ours(w, arguments())
    for name in want:
        assert_same(got[name], want[name], "fp64", name)


def test_all_tokens_but_one_are_all_tokens() -> None:
    c = arguments()
    words = len(c["head"])
    few, full = ours(Weights(top_k=words - 1), c), ours(Weights(), arguments())
    more = ours(Weights(top_k=words + 5), arguments())
    for name in full:
        assert_same(few[name], full[name], "fp64", name)
        assert_same(more[name], full[name], "exact", name)
    coarser = [float(ours(Weights(top_k=k), arguments())["loss"]) for k in range(1, words)]
    assert coarser == sorted(coarser)  # merging outcomes never adds divergence


def test_a_sure_student_keeps_the_digits_of_the_rest() -> None:
    """Where the rest of the student's mass is e^-30, it is not 1 minus the others'."""
    logits = torch.full((1, 6), -30.0)
    logits[0, 0] = 0.0
    c = {"hidden": logits.requires_grad_(), "head": torch.eye(6)}
    teacher = torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0, 0.0]])
    top = most_likely(teacher, torch.eye(6), 2)

    def found(dtype: torch.dtype) -> Tensor:
        hidden = c["hidden"].detach().to(dtype).requires_grad_()
        given = losses.Top(top.indices, top.log_probs.to(dtype), top.log_rest.to(dtype))
        loss = next_token_loss(hidden, c["head"].to(dtype), teacher_top=given)
        return torch.cat([loss.detach()[None], torch.autograd.grad(loss, hidden)[0][0]])

    assert_same(found(torch.float32), found(torch.float64), "fp32")


def test_ce_is_torchs() -> None:
    c = arguments()
    got = next_token_loss(c["hidden"], c["head"], c["targets"], weights=Weights(0.0, 1.0))
    want = torch.nn.functional.cross_entropy(c["hidden"] @ c["head"].mT, c["targets"])
    assert_same(got.detach(), want.detach(), "fp64")


def test_only_what_learns_has_a_gradient() -> None:
    want = wanted(Weights(), arguments())
    for frozen, learns in (("head", "hidden"), ("hidden", "head")):
        c = arguments()
        c[frozen] = c[frozen].detach()
        (got,) = torch.autograd.grad(next_token_loss(**c) * 3, c[learns])
        assert_same(got, 3 * want[f"gradient of {learns}"], "fp64")
    with torch.no_grad():
        assert not next_token_loss(**arguments()).requires_grad


def test_half_precision_products() -> None:
    c = arguments(n=50, words=40)
    c = {k: v.detach().float() if v.is_floating_point() else v for k, v in c.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = next_token_loss(**c)
    want = next_token_loss(**c)
    assert got.dtype == torch.float32
    # Sums and softmax are wide: what is off are the products' 8 bits alone.
    assert 0 < float((got - want).abs() / want) < 0.02


def test_no_positions_give_nothing() -> None:
    c = arguments(n=0)
    got = ours(Weights(1.0, 1.0), c)
    assert float(got["loss"]) == 0
    assert got["gradient of hidden"].shape == c["hidden"].shape
    assert not got["gradient of head"].any()
    assert most_likely(c["teacher_hidden"], c["teacher_head"], 2).indices.shape == (0, 2)


@pytest.mark.filterwarnings("default")
def test_compiled_without_a_graph_break() -> None:
    c, w = arguments(), Weights(1.0, 1.0, top_k=3)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return next_token_loss(**(c | {"hidden": hidden, "head": head}), weights=w) * 2

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(c["hidden"], c["head"]), (c["hidden"], c["head"]))
    want = torch.autograd.grad(loss(c["hidden"], c["head"]), (c["hidden"], c["head"]))
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, "exact")
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": None}, "give targets"),
        ({"teacher_head": None}, "give teacher_hidden and teacher_head"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets"),
        ({"teacher_head": torch.zeros(12, 4)}, "11 and 12 words"),
        ({"teacher_top": (torch.zeros(5, 4), torch.zeros(5, 4), torch.zeros(5))}, "or teacher_top"),
        (
            {
                "teacher_hidden": None,
                "teacher_top": losses.Top(torch.zeros(5, 4), torch.zeros(5, 3), torch.zeros(5)),
            },
            "expected teacher_top",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next_token_loss(**(arguments() | change), weights=Weights(1.0, 1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [{"temperature": 0.0}, {"divergence": "left"}, {"beta": 1.0}, {"top_k": 0}], ids=str
)
def test_weights_out_of_range(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        Weights(**given)  # type: ignore[arg-type]


def test_more_most_likely_tokens_than_words() -> None:
    c = arguments()
    with pytest.raises(ValueError, match="1 to 10"):
        most_likely(c["teacher_hidden"], c["teacher_head"], 11)
