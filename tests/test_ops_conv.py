"""The causal convolution: tiles of shifted products against a window that slides token by token."""

from __future__ import annotations

import importlib
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compare import assert_same
from ops_cases import a_start_in_each_row, assert_agree, assert_splits_agree, conv_arguments
from tamba.ops import causal_conv1d, reference

module = importlib.import_module("tamba.ops.conv")


@pytest.fixture(params=["one tile", "many tiles"], autouse=True)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything with the tile sizes of real use, and with the smallest."""
    if request.param == "many tiles":
        monkeypatch.setattr(module, "_TILE", 1)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 37])
def test_tiles_equal_the_sliding_window(length: int, width: int) -> None:
    arguments = conv_arguments(length=length, width=width, starts=True, padding=True)
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "fp64", "fp64")


@pytest.mark.parametrize("masks", [{}, {"starts": True}, {"padding": True}], ids=str)
@pytest.mark.parametrize("length", [1, 2, 37])
def test_without_state_and_with_each_mask_alone(length: int, masks: dict[str, bool]) -> None:
    arguments = conv_arguments(length=length, state=False, **masks)
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "fp64", "fp64")


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("length", [1, 37])
def test_equals_the_convolution_of_torch(length: int, activation: str | None) -> None:
    arguments = conv_arguments(length=length, activation=activation, dtype=torch.float32)
    t = arguments.tensors
    inputs = torch.cat([t["state"], t["x"].mT], dim=-1)
    want = F.conv1d(inputs, t["weight"][:, None], t["bias"], groups=6).mT
    want = F.silu(want) if activation else want
    got, state = arguments.call(causal_conv1d)
    assert_same(got, want, "fp32")
    assert_same(state, inputs[..., -3:], "exact")


@pytest.mark.parametrize("length", [1, 37])
def test_bfloat16_inputs(length: int) -> None:
    arguments = conv_arguments(length=length, starts=True, padding=True)
    arguments = arguments.to(torch.float32).to(torch.bfloat16, "x", "state")
    y, state = arguments.call(causal_conv1d)
    assert y.dtype == state.dtype == torch.bfloat16
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "half", "half_gradient")


@pytest.mark.parametrize("starts", [[0], [1], [2, 3, 4], [12], list(range(13))], ids=str)
def test_documents_anywhere(starts: list[int]) -> None:
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[1, starts] = True
    arguments = conv_arguments(starts=mask)
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "fp64", "fp64")


@pytest.mark.parametrize("padding", [[0, 1], [4, 12], [13, 11]], ids=str)
def test_padding_is_skipped(padding: list[int]) -> None:
    arguments = conv_arguments(padding=torch.tensor(padding), starts=True)
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "fp64", "fp64")
    y, state = arguments.call(causal_conv1d)
    for row, pads in enumerate(padding):
        starts = arguments.masks["starts"]
        assert starts is not None
        apart, last = arguments.call(
            causal_conv1d, x=arguments.tensors["x"][:, pads:], starts=starts[:, pads:], padding=None
        )
        assert_same(y[row, pads:], apart[row], "fp64")
        assert_same(state[row], last[row], "fp64")


def test_padded_positions_hold_anything() -> None:
    arguments = conv_arguments(padding=torch.tensor([5, 13]), starts=True)
    hidden = ~arguments.real
    y, state = arguments.call(causal_conv1d)
    arguments.tensors["x"].data[hidden] = 3.0
    again, last = arguments.call(causal_conv1d)
    assert_same(again[~hidden], y[~hidden], "exact")
    assert_same(last, state, "exact")
    assert_same(state[1], arguments.tensors["state"][1], "exact")


def test_any_split_equals_one_call() -> None:
    arguments = conv_arguments(starts=True, padding=True)
    for cuts in combinations(range(14), 2):
        assert_splits_agree(causal_conv1d, arguments, list(cuts))
    assert_splits_agree(causal_conv1d, arguments, list(range(1, 13)))


@pytest.mark.parametrize("state", [True, False])
def test_no_tokens(state: bool) -> None:
    arguments = conv_arguments(length=0, state=state)
    y, last = arguments.call(causal_conv1d)
    assert y.shape == (2, 0, 6)
    want = arguments.tensors["state"] if state else torch.zeros(2, 6, 3, dtype=torch.float64)
    assert_same(last, want, "exact")


def test_gradients_by_finite_differences() -> None:
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[0, 3] = True
    arguments = conv_arguments(2, 6, 2, 3, starts=starts, padding=torch.tensor([0, 2]))
    names = list(arguments.tensors)
    real = arguments.real[..., None]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        y, state = arguments.call(causal_conv1d, **dict(zip(names, tensors, strict=True)))
        return y * real, state

    assert torch.autograd.gradcheck(run, tuple(arguments.tensors.values()), fast_mode=False)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    arguments = conv_arguments(
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 40)),
        channels=draw(st.integers(1, 6)),
        width=draw(st.integers(2, 5)),
        state=draw(st.booleans()),
        starts=draw(st.booleans()),
        padding=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", None])),
        seed=draw(st.integers(0, 1000)),
    )
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "fp64", "fp64")


def _off_by_one(**k: Any) -> tuple[Tensor, Tensor]:
    return causal_conv1d(**{**k, "weight": k["weight"].roll(1, 1)})


FAULTS = {
    "off by one": _off_by_one,
    "taps reversed": lambda **k: causal_conv1d(**{**k, "weight": k["weight"].flip(1)}),
    "bias dropped": lambda **k: causal_conv1d(**{**k, "bias": None}),
    "activation dropped": lambda **k: causal_conv1d(**{**k, "activation": None}),
    "state dropped": lambda **k: causal_conv1d(**{**k, "state": None}),
    "state reversed": lambda **k: causal_conv1d(**{**k, "state": k["state"].flip(-1)}),
    "starts ignored": lambda **k: causal_conv1d(**{**k, "starts": None}),
    "starts one late": lambda **k: causal_conv1d(**{**k, "starts": k["starts"].roll(1, 1)}),
    "padding ignored": lambda **k: causal_conv1d(**{**k, "padding": None}),
    "padding one short": lambda **k: causal_conv1d(**{**k, "padding": (k["padding"] - 1).clamp(0)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str) -> None:
    arguments = conv_arguments(starts=a_start_in_each_row(), padding=torch.tensor([3, 0]))
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "fp64")
    with pytest.raises(AssertionError):
        assert_agree(FAULTS[fault], reference.causal_conv1d, arguments, "fp64")


@pytest.mark.parametrize("name", ["x", "weight", "bias", "state"])
def test_a_lost_gradient_is_seen(name: str) -> None:
    def faulty(**k: Any) -> tuple[Tensor, Tensor]:
        return causal_conv1d(**{**k, name: k[name].detach() + 0 * k[name]})

    with pytest.raises(AssertionError, match=f"gradient of {name}"):
        assert_agree(faulty, reference.causal_conv1d, conv_arguments(), "fp64", "fp64")


def test_an_early_state_makes_a_convolution_of_documents_wrong() -> None:
    """The window that a call leaves behind forgets what came before the last document."""
    starts = torch.zeros(2, 13, dtype=torch.bool)
    starts[:, 12] = True
    arguments = conv_arguments(starts=starts)
    _, state = arguments.call(causal_conv1d)
    assert_same(state[..., :2], torch.zeros(2, 6, 2, dtype=torch.float64), "exact")
    assert_same(state[..., 2], arguments.tensors["x"][:, 12], "exact")


def test_wrong_arguments_are_named() -> None:
    arguments = conv_arguments()
    with pytest.raises(ValueError, match=r"weight \(5, 4\)"):
        arguments.call(causal_conv1d, weight=arguments.tensors["weight"][1:])
    with pytest.raises(ValueError, match="gelu"):
        arguments.call(causal_conv1d, activation="gelu")
    for name, wrong in (
        ("starts", torch.zeros(2, 1, dtype=torch.bool)),
        ("padding", torch.zeros(1, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=rf"{name} \({', '.join(map(str, wrong.shape))}"):
            arguments.call(causal_conv1d, **{name: wrong})
