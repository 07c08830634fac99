"""The Triton convolution against the sliding window: interpreted here, compiled with `-m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreter import DEVICE, kernels  # isort: skip  # before the kernels
from compare import assert_same
from ops_cases import Arguments, assert_agree, conv_arguments
from tamba.ops import causal_conv1d, reference
from tamba.ops.kernels import conv as module
from tamba.ops.kernels import conv_tiles
from tamba.ops.kernels.tiles import using

__all__ = ["kernels"]
pytestmark = pytest.mark.usefixtures("kernels", "tiles")

# Tiles and spans that a few tokens and channels fill.
SMALL = {"tokens": 4, "channels": 8, "per_sm": 64, "least_tiles": 1, "warps": 1}


@pytest.fixture
def tiles() -> Iterator[None]:
    if DEVICE.type == "cuda":  # as it runs
        yield
        return
    tile = {"tokens": 2, "runs": 2, "channels": 8, "tiles": 2, "warps": 1}
    walk, tiled = ("conv_forward", "conv_backward"), ("conv_tile_forward", "conv_tile_backward")
    with using(dict.fromkeys(walk, SMALL) | dict.fromkeys(tiled, tile)):
        yield


def there(arguments: Arguments) -> Arguments:
    """The same on the device under test."""
    tensors = {n: t.detach().to(DEVICE).requires_grad_() for n, t in arguments.tensors.items()}
    masks = {n: None if m is None else m.to(DEVICE) for n, m in arguments.masks.items()}
    return replace(arguments, tensors=tensors, masks=masks)


@pytest.mark.parametrize(
    "case",
    [
        {"starts": True, "padding": True},
        {"width": 2, "state": False, "starts": True},
        {"length": 2, "channels": 11, "width": 3, "activation": None},
        pytest.param({"length": 1, "starts": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_the_sliding_window(case: dict[str, object]) -> None:
    arguments = there(conv_arguments(dtype=torch.float32, **case))  # type: ignore[arg-type]
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "fp32", "fp32")


@pytest.mark.slow
def test_half_precision_and_strided_views() -> None:
    arguments = there(conv_arguments(dtype=torch.float32, starts=True, channels=12))
    arguments = arguments.to(torch.bfloat16, "x", "state")
    wide = torch.zeros(2, 13, 31, dtype=torch.bfloat16, device=DEVICE)
    wide[..., 4:16] = arguments.tensors["x"].detach()
    arguments.tensors["x"] = wide.requires_grad_()[..., 4:16]
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "half", "half_gradient")


def test_arguments_of_one_dimension_may_be_views() -> None:
    made = there(conv_arguments(dtype=torch.float32, padding=True))
    bias = made.tensors["bias"].detach()
    made.tensors["bias"] = torch.stack([bias, bias + 7.0], dim=1)[:, 0].requires_grad_()
    made.masks["padding"] = torch.tensor([3, 9, 1, 9], device=DEVICE)[::2]
    assert_agree(causal_conv1d, reference.causal_conv1d, made, "fp32", "fp32")


LAYER = {"width": 4, "state": False, "channels": 512 if DEVICE.type == "cuda" else 16}


@pytest.mark.parametrize("length", [11, pytest.param(2, marks=pytest.mark.slow)])
def test_the_layer_s_own_case_goes_by_tiles(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, four taps, bias, SiLU; a gradient of the last window goes another way."""
    ran = []
    for name in ("forward", "backward"):
        right = getattr(conv_tiles, name)
        monkeypatch.setattr(
            conv_tiles, name, lambda *a, name=name, right=right: [ran.append(name), right(*a)][1]
        )
    arguments = there(conv_arguments(dtype=torch.float32, length=length, **LAYER))
    arguments = arguments.to(torch.bfloat16, "x")
    y, _ = arguments.call(causal_conv1d)
    want, _ = arguments.to(torch.float64).call(reference.causal_conv1d)
    assert_same(y, want, "half", "y")
    leaves = list(arguments.tensors.values())
    got = torch.autograd.grad(y.float().square().sum(), leaves)
    truth = arguments.to(torch.float64)
    y, _ = truth.call(reference.causal_conv1d)
    want = torch.autograd.grad(y.square().sum(), list(truth.tensors.values()))
    for name, a, b in zip(arguments.tensors, got, want, strict=True):
        assert_same(a, b, "half_gradient", name)
    assert ran == ["forward", "backward"]
    arguments = there(conv_arguments(dtype=torch.float32, length=length, **LAYER))
    arguments = arguments.to(torch.bfloat16, "x")
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "half", "half_gradient")


def test_a_wrong_tile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = there(conv_arguments(dtype=torch.float32, **LAYER)).to(torch.bfloat16, "x")
    right = conv_tiles.forward
    monkeypatch.setattr(
        conv_tiles, "forward", lambda x, weight, bias: right(x, weight.flip(1).contiguous(), bias)
    )
    with pytest.raises(AssertionError, match="y"):
        assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "half")


def test_a_wrong_tap_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = there(conv_arguments(dtype=torch.float32))
    right = module.forward
    monkeypatch.setattr(
        module, "forward", lambda x, weight, *rest: right(x, weight.flip(1).contiguous(), *rest)
    )
    with pytest.raises(AssertionError, match="y"):
        assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "fp32")


@pytest.mark.slow
def test_repeats_bit_for_bit() -> None:
    arguments = there(conv_arguments(dtype=torch.float32, length=5, starts=True))
    y, last = arguments.call(causal_conv1d)
    leaves = list(arguments.tensors.values())
    once = torch.autograd.grad(y.sum() + last.sum(), leaves)
    y, last = arguments.call(causal_conv1d)
    for got, want in zip(torch.autograd.grad(y.sum() + last.sum(), leaves), once, strict=True):
        assert_same(got, want, "exact")


@pytest.mark.slow
def test_the_operator_is_known_to_the_compiler() -> None:
    t = there(conv_arguments(dtype=torch.float32, length=5)).tensors
    inputs = (t["x"], t["weight"], t["bias"], True, t["state"], None, None)
    torch.library.opcheck(
        module.conv_op,
        inputs,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def shapes(length: int) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2),
            "length": st.integers(1, length),
            "channels": st.integers(1, 20),
            "width": st.integers(2, 4),
            "state": st.booleans(),
            "starts": st.booleans(),
            "padding": st.booleans(),
            "activation": st.sampled_from(["silu", None]),
            "seed": st.integers(0, 1000),
        }
    )


@pytest.mark.slow
@given(shapes(9))
@settings(max_examples=100)
def test_random_shapes(case: dict[str, object]) -> None:
    arguments = there(conv_arguments(dtype=torch.float32, **case))  # type: ignore[arg-type]
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "fp32", "fp32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@given(shapes(300))
@settings(max_examples=500)
def test_many_random_shapes(case: dict[str, object]) -> None:
    arguments = there(conv_arguments(dtype=torch.float32, **case))  # type: ignore[arg-type]
    assert_agree(causal_conv1d, reference.causal_conv1d, arguments, "half", "half_gradient")
