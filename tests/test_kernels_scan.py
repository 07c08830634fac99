"""The Triton selective scan against the recurrence: interpreted here, compiled with `-m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreter import DEVICE, kernels  # isort: skip  # before the kernels
from compare import assert_same
from ops_cases import Arguments, assert_agree, scan_arguments
from tamba.ops import reference, selective_scan
from tamba.ops.kernels import selective_scan as module
from tamba.ops.kernels.tiles import using

__all__ = ["kernels"]
pytestmark = pytest.mark.usefixtures("kernels")

# One span a row, and as many as there are tiles; an interpreted tile costs its K x N steps.
SIZES = {"tokens": 4, "channels": 32, "per_sm": 1, "least_tiles": 1, "polynomials": 1, "warps": 1}


def tiles(**sizes: int) -> dict[str, dict[str, int]]:
    entry = SIZES | sizes
    names = ("scan_forward", "scan_backward")
    return {f"{name}{bucket}": entry for name in names for bucket in ("", " wide")}


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    if DEVICE.type == "cuda":  # as it runs
        yield
        return
    with using(tiles()):
        yield


def there(arguments: Arguments) -> Arguments:
    """The same on the device under test."""
    tensors = {n: t.detach().to(DEVICE).requires_grad_() for n, t in arguments.tensors.items()}
    masks = {n: None if m is None else m.to(DEVICE) for n, m in arguments.masks.items()}
    return replace(arguments, tensors=tensors, masks=masks)


def case(length: int = 9, d_state: int = 3, channels: int = 4, **options: object) -> Arguments:
    options = {"dtype": torch.float32, **options}
    return there(scan_arguments(2, length, channels, d_state=d_state, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"starts": True, "padding": True},
        pytest.param({"state": False, "groups": 1}, marks=pytest.mark.slow),
        pytest.param({"length": 1, "starts": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_the_recurrence(options: dict[str, object]) -> None:
    arguments = case(**options)  # type: ignore[arg-type]
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp32", "half_gradient")


@pytest.mark.slow
def test_spans_of_a_row_are_chained() -> None:
    arguments = case(length=7, d_state=2, starts=True, padding=torch.tensor([0, 3]))
    with using(tiles(per_sm=1000, tokens=2)):
        assert_agree(selective_scan, reference.selective_scan, arguments, "fp32", "half_gradient")


@pytest.mark.slow
def test_more_states_than_a_pass_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATES", 4)
    arguments = case(length=5, d_state=6)
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp32", "half_gradient")


@pytest.mark.slow
@pytest.mark.parametrize("dt", [-60.0, 1000.0])
def test_tiny_and_huge_steps(dt: float) -> None:
    arguments = case(length=5, starts=True)
    arguments.tensors["dt"].data.add_(dt)
    # Where all decays vanish, so do these gradients: 1e-140 in float64, 0 in float32.
    assert_agree(
        selective_scan,
        reference.selective_scan,
        arguments,
        "half",
        "half_gradient",
        without=("A", "state") if dt > 0 else (),
    )


@pytest.mark.slow
def test_half_precision_and_strided_views() -> None:
    arguments = case(length=5).to(torch.bfloat16, "x", "dt", "B", "C", "z")
    wide = torch.zeros(2, 5, 11, dtype=torch.bfloat16, device=DEVICE)
    wide[..., 3:7] = arguments.tensors["x"].detach()
    arguments.tensors["x"] = wide.requires_grad_()[..., 3:7]
    assert_agree(selective_scan, reference.selective_scan, arguments, "half", "half_gradient")


def test_arguments_of_one_dimension_may_be_views() -> None:
    made = case(length=5, padding=True)
    for name in ("D", "dt_bias"):
        given = made.tensors[name].detach()
        made.tensors[name] = torch.stack([given, given + 7.0], dim=1)[:, 0].requires_grad_()
    made.masks["padding"] = torch.tensor([3, 9, 1, 9], device=DEVICE)[::2]
    assert_agree(selective_scan, reference.selective_scan, made, "fp32", "fp32")


def test_a_wrong_rate_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.forward
    monkeypatch.setattr(module, "forward", lambda x, dt, A, *rest: right(x, dt, A * 1.01, *rest))
    with pytest.raises(AssertionError, match="y"):
        assert_agree(selective_scan, reference.selective_scan, case(length=5), "fp32")


@pytest.mark.slow
def test_repeats_bit_for_bit() -> None:
    arguments = case(length=3, d_state=2, starts=True)
    leaves = list(arguments.tensors.values())
    runs = []
    for _ in range(2):
        y, last = arguments.call(selective_scan)
        runs.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), leaves)])
    for got, want in zip(*runs, strict=True):
        assert_same(got, want, "exact")


@pytest.mark.slow
def test_the_operator_is_known_to_the_compiler() -> None:
    t = case(length=3).tensors
    inputs = (t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], t["z"], t["dt_bias"], True)
    torch.library.opcheck(
        module.scan_op,
        (*inputs, t["state"], None, None, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_the_polynomial_is_a_power_of_two() -> None:
    """The same steps as in the kernel, in float32."""
    x = -torch.rand(100_000) * 130
    clamped = x.clamp(min=-127)
    shifted = clamped + 12582912.0
    f = clamped - (shifted - 12582912.0)
    p = torch.full_like(f, 0.0013333533)
    for c in (0.00966625, 0.055505, 0.24022351, 0.69314714, 1.0):
        p = p * f + c
    got = (p.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
    want = torch.exp2(x.double())
    normal = x > -126
    assert float((got / want - 1)[normal].abs().max()) < 1e-6
    assert float(got[x < -127].abs().max()) == 0.0


def shapes(length: int, d_state: int, channels: int) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries(
        {
            "length": st.integers(1, length),
            "d_state": st.integers(1, d_state),
            "channels": st.integers(1, channels).map(lambda half: 2 * half),
            "groups": st.sampled_from([1, 2]),
            "state": st.booleans(),
            "starts": st.booleans(),
            "padding": st.booleans(),
            "seed": st.integers(0, 1000),
        }
    )


@pytest.mark.slow
@given(shapes(11, 6, 3))
@settings(max_examples=60)
def test_random_shapes(options: dict[str, object]) -> None:
    arguments = case(**options)  # type: ignore[arg-type]
    assert_agree(selective_scan, reference.selective_scan, arguments, "half", "half_gradient")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@given(shapes(300, 24, 60))
@settings(max_examples=500)
def test_many_random_shapes(options: dict[str, object]) -> None:
    arguments = case(**options)  # type: ignore[arg-type]
    assert_agree(selective_scan, reference.selective_scan, arguments, "half", "half_gradient")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_state", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 63, 500, 1000, 4097])
def test_table(length: int, groups: int, d_state: int, dtype: torch.dtype) -> None:
    arguments = case(length, d_state, 96, groups=groups, starts=True, padding=True)
    arguments = arguments.to(dtype, "x", "dt", "B", "C", "z")
    assert_agree(selective_scan, reference.selective_scan, arguments, "half", "half_gradient")
