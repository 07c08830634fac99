"""SSD on Triton against the recurrence in float64: in the interpreter here, compiled on a GPU."""

from __future__ import annotations

import importlib.util
import logging
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import interpreter
from compare import Kind, assert_same
from ops_cases import Arguments, assert_agree, ssd_arguments
from tamba.ops import backend, reference, ssd
from tamba.ops.kernels import ssd as module
from tamba.ops.kernels import tiles

kernels = interpreter.kernels
pytestmark = [
    pytest.mark.usefixtures("kernels"),
    # What numpy says where a compiled kernel says nothing: log2(0), 2^inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Small tiles: several chunks, segments and parts at lengths that the interpreter gets through.
SMALL = {
    "ssd_scan": {"chunk": 16, "head_dim": 16, "per_sm": 40, "warps": 4, "stages": 1},
    "ssd_segments": {"head_dim": 16, "per_sm": 30, "warps": 4, "stages": 1},
    "ssd_states": {"head_dim": 16, "per_sm": 80, "warps": 4, "stages": 1},
    "ssd_grads": {
        **{"chunk": 16, "head_dim": 16, "states": 1, "per_sm": 80},
        **{"warps": 4, "stages": 1},
    },
}


def arguments(
    length: int = 40,
    heads: int = 2,
    head_dim: int = 16,
    groups: int = 1,
    d_state: int = 16,
    *,
    batch: int = 1,
    gate: bool = True,
    dtype: torch.dtype = torch.float32,
    **given: Any,
) -> Arguments:
    made = ssd_arguments(batch, length, heads, head_dim, groups, d_state, **given)
    if gate:
        generator = torch.Generator().manual_seed(3)
        made.tensors["z"] = torch.randn(made.tensors["x"].shape, generator=generator)
    made = made.to(torch.float32)
    return made if dtype == torch.float32 else made.to(dtype, "x", "B", "C", *["z"] * gate)


def truth(z: Tensor | None = None, **given: Any) -> tuple[Tensor, Tensor]:
    y, state = reference.ssd(**given)
    return y if z is None else y * torch.nn.functional.silu(z), state


# Their gradients are sums over all tokens of terms that cancel: the rounding of the terms says
# nothing about the sums, on plain torch no more than here. `test_gradients_that_are_sums` has them.
SUMS = ("A", "dt_bias")


def agree(
    made: Arguments,
    kind: Kind = "kernel",
    gradient: Kind | None = "kernel",
    without: tuple[str, ...] = SUMS,
) -> None:
    assert_agree(ssd, truth, made, kind, gradient, without=without)


@pytest.mark.parametrize(
    "length, groups, d_state, head_dim, given",
    [
        (1, 1, 16, 16, {}),
        (40, 2, 16, 32, {"state": False, "gate": False}),
        (63, 1, 32, 16, {"starts": True, "padding": True, "batch": 2}),
        (70, 4, 16, 16, {"starts": True, "heads": 4}),
    ],
)
def test_outputs_and_gradients(
    length: int, groups: int, d_state: int, head_dim: int, given: dict[str, Any]
) -> None:
    given = {"heads": 2, **given}
    agree(arguments(length, head_dim=head_dim, groups=groups, d_state=d_state, **given))


def test_segments_and_parts_add_up() -> None:
    with tiles.using(SMALL):
        agree(arguments(50, 2, 32, starts=True, padding=True))


def sliced(percent: int) -> dict[str, Any]:
    """Two heads a slice, and one in the last; a program has one of them, so some have none."""
    return {**SMALL, "ssd_grads": {**SMALL["ssd_grads"], "states": percent}}


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    "heads, groups, percent, starts, slices",
    [
        (5, 1, 100, False, (1, 2)),
        (5, 1, 100, True, (1, 2)),
        (6, 2, 200, True, (2, 2)),
        (3, 3, 160, False, (2, 1)),
    ],
)
def test_slices_of_heads_add_up(
    heads: int,
    groups: int,
    percent: int,
    starts: bool,
    slices: tuple[int, int],
    at_once: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`at_once`: what segments add is there for all heads, not for those of a slice."""
    monkeypatch.setattr(module, "_ADDED_SHARE", 100.0 if at_once else 0.0)
    found, whole = [], module.Call.slices
    monkeypatch.setattr(
        module.Call, "slices", lambda *given: found.append(whole(*given)) or found[-1]
    )
    with tiles.using(sliced(percent)):
        agree(arguments(40, heads, groups=groups, starts=starts))
    assert set(found) == {slices}


def test_a_slice_that_forgets_those_before_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = module._grads

    def forgetful(grid: Any, given: Any, *rest: Any) -> None:
        *others, _fresh = given
        launch(grid, (*others, 1), *rest)

    monkeypatch.setattr(module, "_grads", forgetful)
    with tiles.using(sliced(100)), pytest.raises(AssertionError, match=r"gradient of [BC]"):
        agree(arguments(40, 5))


def test_bfloat16() -> None:
    made = arguments(40, dtype=torch.bfloat16, starts=True)
    y, state = made.call(ssd)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    agree(made, "half", "half_gradient")


@pytest.mark.parametrize("shift", [-60.0, 6.0, 1000.0])
def test_tiny_and_huge_steps(shift: float) -> None:
    made = arguments(40, starts=True)
    made.tensors["dt"].data.add_(shift)
    agree(made)


@pytest.mark.slow
def test_small_decays_after_huge_ones_keep_their_digits() -> None:
    made = arguments(64, gate=False, state=False)
    dt = torch.full((1, 64, 2), 1e-3)
    dt[:, :20] = 400.0
    made.tensors["dt"].data.copy_(dt)
    made.tensors["dt_bias"].data.zero_()
    made.tensors["A"].data.fill_(-1.0)
    made = Arguments(made.tensors, {}, {"dt_softplus": False})
    y, _ = made.call(ssd)
    want, _ = made.to(torch.float64).call(truth)
    assert_same(y[:, 20:], want[:, 20:], "kernel")


def small_steps_after_large_ones() -> Arguments:
    """Decays of 2^-120 and then of 2^-0.03 in one chunk: sums of their logs beyond 2,000.

    None vanishes, so that all are terms of one running sum.
    """
    made = arguments(32, gate=False)
    dt = torch.full((1, 32, 2), 0.02)
    dt[:, :18] = 85.0
    made.tensors["dt"].data.copy_(dt)
    made.tensors["dt_bias"].data.zero_()
    made.tensors["A"].data.copy_(-torch.tensor([1.0, 0.97]))
    return Arguments(made.tensors, {}, {"dt_softplus": False})


@pytest.mark.parametrize("chunk", [16, 32])
def test_differences_of_large_sums_keep_their_digits(chunk: int) -> None:
    with tiles.using({"ssd_grads": {**SMALL["ssd_grads"], "chunk": chunk}}):
        agree(small_steps_after_large_ones())


def test_sums_of_one_float_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.Call.steps

    def rounded(call: module.Call, *given: Any) -> module.Steps:
        steps = whole(call, *given)
        steps.low.zero_()
        return steps

    monkeypatch.setattr(module.Call, "steps", rounded)
    made = small_steps_after_large_ones()
    exact = made.to(torch.float64)
    # Not the last state, nor what comes through it: their decays are of the exact sums.
    # All in one chunk, whose sums are the larger the longer it is.
    long = {"ssd_grads": {**SMALL["ssd_grads"], "chunk": 32}}
    with tiles.using(long):
        results = [
            (y, *torch.autograd.grad(y.sum(), [a.tensors[n] for n in "xBC"]))
            for a, f in ((made, ssd), (exact, truth))
            for y, _ in [a.call(f)]
        ]
    for got, want in zip(*results, strict=True):
        with pytest.raises(AssertionError, match="kernel"):
            assert_same(got, want, "kernel")


@pytest.mark.slow
def test_limits_of_dt() -> None:
    made = arguments(20)
    made.options["dt_limit"] = (0.3, 0.9)
    agree(made)


@pytest.mark.slow
def test_gradients_that_are_sums() -> None:
    """Alike signs: nothing cancels, and what is left to compare is the sum."""
    made = arguments(40, state=False)
    for name in ("x", "B", "C", "D", "z"):
        made.tensors[name].data.abs_()
    exact = made.to(torch.float64)
    names = (*SUMS, "D")
    got, want = (
        torch.autograd.grad(a.call(f)[0].sum(), [a.tensors[n] for n in names])
        for a, f in ((made, ssd), (exact, truth))
    )
    for name, a, b in zip(names, got, want, strict=True):
        assert_same(a, b, "kernel", name)


@pytest.mark.parametrize("starts", [[0], [31, 32], [15, 16, 17, 39]], ids=str)
def test_documents_anywhere(starts: list[int]) -> None:
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[0, starts] = True
    agree(arguments(40, starts=mask))


@pytest.mark.slow
def test_gradient_of_only_one_result() -> None:
    made = arguments(20)
    leaves, exact = made.tensors, made.to(torch.float64)
    for index in (0, 1):
        got = torch.autograd.grad(
            made.call(ssd)[index].sum(), list(leaves.values()), allow_unused=True
        )
        want = torch.autograd.grad(
            exact.call(truth)[index].sum(), list(exact.tensors.values()), allow_unused=True
        )
        for name, a, b in zip(leaves, got, want, strict=True):
            zeros = torch.zeros_like(leaves[name])
            assert_same(zeros if a is None else a, zeros if b is None else b, "kernel", name)


@pytest.mark.slow
def test_the_same_call_gives_the_same_bits() -> None:
    made = arguments(50, starts=True)
    with tiles.using(SMALL):
        first, second = (
            (*results, *torch.autograd.grad([r.sum() for r in results], list(tensors)))
            for tensors in [made.tensors.values()] * 2
            for results in [made.call(ssd)]
        )
    for a, b in zip(first, second, strict=True):
        assert_same(a, b, "exact")


@pytest.mark.slow
def test_a_row_of_nan_stays_in_its_row() -> None:
    made = arguments(21, batch=2)
    alone = made.call(ssd)[0][0]
    for name in ("x", "B", "C", "z"):
        made.tensors[name].data[1] = float("nan")
    assert_same(made.call(ssd)[0][0], alone, "exact")


@pytest.mark.slow
def test_views_of_a_projection() -> None:
    made = arguments(20, dtype=torch.float32)
    names = ("x", "z", "B", "C")
    flat = torch.cat([made.tensors[n].detach().flatten(2) for n in names], dim=-1)
    parts = flat.split([made.tensors[n].shape[2] * made.tensors[n].shape[3] for n in names], -1)
    views = {
        n: p.unflatten(-1, made.tensors[n].shape[2:]) for n, p in zip(names, parts, strict=True)
    }
    assert all(module._readable(v) is v for v in views.values())
    want, got = made.call(ssd), made.call(ssd, **views)
    assert_same(got[0], want[0], "exact")
    odd = {n: made.tensors[n].detach().mT.contiguous().mT for n in names}
    assert_same(made.call(ssd, **odd)[0], want[0], "exact")


def test_arguments_of_one_dimension_may_be_views() -> None:
    """One number for every head, every second one of a longer list: kernels know no such stride."""
    made = arguments(5, batch=2, padding=True)
    for name in ("D", "dt_bias"):
        given = made.tensors[name].detach()
        wide = torch.stack([given, given + 7.0], dim=1)
        made.tensors[name] = wide[:, 0].requires_grad_()
    made.masks["padding"] = torch.tensor([3, 9, 1, 9])[::2]
    agree(made)
    made.tensors["D"] = torch.tensor([0.7]).expand(2).requires_grad_()
    agree(made)


def test_autocast_changes_nothing() -> None:
    made = arguments(20)
    want = made.call(ssd)
    with torch.autocast(interpreter.DEVICE.type, torch.bfloat16):
        got = made.call(ssd)
    assert_same(got[0], want[0], "exact")


@pytest.mark.slow
def test_compiled_in_one_graph() -> None:
    made = arguments(20)
    leaves = list(made.tensors.values())
    want = made.call(ssd)
    compiled = torch.compile(lambda: made.call(ssd), backend="aot_eager", fullgraph=True)
    got = compiled()
    assert_same(got[0], want[0], "exact")
    for a, b in zip(
        torch.autograd.grad(got[0].sum(), leaves),
        torch.autograd.grad(want[0].sum(), leaves),
        strict=True,
    ):
        assert_same(a, b, "exact")


def test_the_operator_keeps_its_promises_to_torch() -> None:
    t = {n: v.detach() for n, v in arguments(20).tensors.items()}
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")
    options = (None, None, True, -float("inf"), float("inf"), True)
    torch.library.opcheck(
        torch.ops.tamba.ssd.default,
        (*(t[n] for n in names), *options),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_unusual_sizes_run_on_torch_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    backend._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "tamba"):
        agree(arguments(9, head_dim=24))
    assert "head_dim 24" in caplog.text


FAULTS: dict[str, dict[str, Any]] = {
    name: {name: None} for name in ("z", "D", "dt_bias", "state", "starts", "padding")
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str) -> None:
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, 9] = True
    made = arguments(20, starts=starts, padding=torch.tensor([3]))
    with pytest.raises(AssertionError):
        assert_agree(lambda **k: ssd(**{**k, **FAULTS[fault]}), truth, made, "kernel")


def test_what_no_program_writes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN in tests, so that a launch that is left out shows."""
    monkeypatch.setattr(module, "_segments", lambda *_: None)
    with tiles.using(SMALL), pytest.raises(AssertionError):
        agree(arguments(40), gradient=None)
    monkeypatch.setattr(module, "_grads", lambda *_: None)
    with pytest.raises(AssertionError, match="gradient of"):
        agree(arguments(20))


def test_a_long_sequence_needs_no_kernel_that_a_short_one_did_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Constants decide what is compiled, and a kernel with nothing to do is compiled as well."""
    asked: dict[int, set[tuple[Any, ...]]] = {1: set(), 50: set()}
    launch, idle = module._Launcher.__call__, []

    def recorded(launcher: Any, grid: Any, arguments: Any, constants: Any, *rest: Any) -> None:
        asked[length].add((launcher, *constants.items()))
        idle.extend([length] * (not grid[0]))
        launch(launcher, grid, arguments, constants, *rest)

    monkeypatch.setattr(module._Launcher, "__call__", recorded)
    for length in asked:
        with tiles.using(SMALL):
            y, _ = arguments(length).call(ssd)
            y.sum().backward()
    assert asked[1] == asked[50]
    assert set(idle) == {1}  # and so the short one alone would not have asked for all


def _random_case(data: st.DataObject, longest: int, sizes: list[int]) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 2, 3]))
    made = arguments(
        draw(st.integers(1, longest)),
        groups * draw(st.integers(1, 2)),
        draw(st.sampled_from(sizes)),
        groups,
        draw(st.sampled_from(sizes)),
        batch=draw(st.integers(1, 2)),
        gate=draw(st.booleans()),
        state=draw(st.booleans()),
        starts=draw(st.booleans()),
        padding=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    with tiles.using(SMALL if draw(st.booleans()) else {}):
        # Of one head the gradient of D is a single sum, which may be next to nothing by chance.
        agree(made, without=(*SUMS, "D"))


@settings(max_examples=4, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_random_shapes(data: st.DataObject) -> None:
    _random_case(data, 48, [16])


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_many_random_shapes(data: st.DataObject) -> None:
    _random_case(data, 100, [16, 32, 64])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("marks", [pytest.param(None, marks=gpu)], ids=["gpu"])
def test_compiled_kernels(marks: None, sizes: tuple[int, int], dtype: str) -> None:
    """A few rows of `benchmarks/ssd_gradients.py`, which has them all."""
    path = Path(__file__).parents[1] / "benchmarks" / "ssd_gradients.py"
    table = importlib.util.module_from_spec(spec_from_file_location("ssd_gradients", path))
    table.__loader__.exec_module(table)
    # At 4097 tokens a program has several heads of a group; with large steps their spans differ.
    for seed, (groups, length, dt) in enumerate(
        [(1, 63, -4.0), (4, 1000, -30.0), (4, 4097, 1.0)]
        + [(groups, 4097, dt) for groups in (1, 2) for dt in (-4.0, 1.0, 1.0, 100.0, 100.0)]
    ):
        case = {"dtype": dtype, "N": sizes[0], "P": sizes[1], "G": groups, "T": length, "dt": dt}
        errors = table.measure(case, seed)
        # A state that all but vanishes has a gradient near the smallest numbers there are.
        names = set(errors) - set(table.SUMS) - ({"d_state"} if dt >= 1 else set())
        bound = 1.2 * table.BOUNDS[dtype]  # the table says how near each is
        over = {k: errors[k] for k in names if not errors[k] <= bound}
        assert not over, (case, over)
