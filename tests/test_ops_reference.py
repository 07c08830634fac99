"""The readable recurrences against sums written out number by number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compare import assert_same
from ops_cases import conv_arguments, scan_arguments, ssd_arguments
from tamba.ops import reference

START = 3
STARTS = torch.arange(6)[None] == START
PADDING = torch.tensor([1])


def _decay(rate: Tensor, dt: Tensor, source: int, target: int) -> float:
    """What is left at `target` of what token `source` (-1 for the given state) put in."""
    if source < START <= target:
        return 0.0
    return math.exp(sum(float(dt[t]) * float(rate) for t in range(max(source, 0) + 1, target + 1)))


def test_ssd_number_by_number() -> None:
    arguments = ssd_arguments(1, 6, 2, 2, 1, 3, starts=STARTS, padding=PADDING)
    y, state = arguments.call(reference.ssd)
    t = {name: tensor.detach() for name, tensor in arguments.tensors.items()}
    dt = F.softplus(t["dt"] + t["dt_bias"])[0]
    for head in range(2):
        for p in range(2):
            for now in range(1, 6):
                held = [
                    float(t["state"][0, head, p, n]) * _decay(t["A"][head], dt[:, head], -1, now)
                    + sum(
                        _decay(t["A"][head], dt[:, head], s, now)
                        * float(dt[s, head] * t["x"][0, s, head, p] * t["B"][0, s, 0, n])
                        for s in range(1, now + 1)
                    )
                    for n in range(3)
                ]
                want = sum(held[n] * float(t["C"][0, now, 0, n]) for n in range(3))
                want += float(t["D"][head] * t["x"][0, now, head, p])
                assert float(y[0, now, head, p].detach()) == pytest.approx(want, rel=1e-12)
            assert_same(state[0, head, p], torch.tensor(held, dtype=torch.float64), "fp64")


def test_selective_scan_number_by_number() -> None:
    arguments = scan_arguments(1, 6, 2, 1, 3, starts=STARTS, padding=PADDING)
    y, state = arguments.call(reference.selective_scan)
    t = {name: tensor.detach() for name, tensor in arguments.tensors.items()}
    dt = F.softplus(t["dt"] + t["dt_bias"])[0]
    for d in range(2):
        for now in range(1, 6):
            held = [
                float(t["state"][0, d, n]) * _decay(t["A"][d, n], dt[:, d], -1, now)
                + sum(
                    _decay(t["A"][d, n], dt[:, d], s, now)
                    * float(dt[s, d] * t["x"][0, s, d] * t["B"][0, s, 0, n])
                    for s in range(1, now + 1)
                )
                for n in range(3)
            ]
            want = sum(held[n] * float(t["C"][0, now, 0, n]) for n in range(3))
            want += float(t["D"][d] * t["x"][0, now, d])
            want *= float(F.silu(t["z"][0, now, d]))
            assert float(y[0, now, d].detach()) == pytest.approx(want, rel=1e-12)
        assert_same(state[0, d], torch.tensor(held, dtype=torch.float64), "fp64")


def test_convolution_number_by_number() -> None:
    arguments = conv_arguments(1, 6, 2, 3, starts=STARTS, padding=PADDING)
    y, state = arguments.call(reference.causal_conv1d)
    t = {name: tensor.detach() for name, tensor in arguments.tensors.items()}
    for c in range(2):
        # The state stands right before token 1, the first real one.
        line = [float(v) for v in t["state"][0, c]] + [float(v) for v in t["x"][0, 1:, c]]
        for now in range(1, 6):
            places = range(now - 2, now + 1)
            window = [
                0.0 if place < START <= now else value
                for place, value in zip(places, line[now - 1 : now + 2], strict=True)
            ]
            total = float(t["bias"][c])
            total += sum(float(t["weight"][c, k]) * window[k] for k in range(3))
            want = total / (1 + math.exp(-total))
            assert float(y[0, now, c].detach()) == pytest.approx(want, rel=1e-12)
        assert_same(state[0, c], t["x"][0, 4:, c], "exact")


@pytest.mark.parametrize("groups", [1, 2])
def test_a_group_serves_consecutive_heads(groups: int) -> None:
    """Four heads, two groups: heads 0 and 1 use group 0."""
    arguments = ssd_arguments(heads=4, groups=groups, state=False)
    y, _ = arguments.call(reference.ssd)
    share = 4 // groups
    for head in range(4):
        t = arguments.tensors
        one = slice(head, head + 1)
        group = slice(head // share, head // share + 1)
        alone, _ = reference.ssd(
            t["x"][:, :, one],
            t["dt"][:, :, one],
            t["A"][one],
            t["B"][:, :, group],
            t["C"][:, :, group],
            D=t["D"][one],
            dt_bias=t["dt_bias"][one],
            dt_softplus=True,
        )
        assert_same(y[:, :, one], alone, "fp64")
