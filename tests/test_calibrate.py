"""Closed forms: least squares against numpy, a mixer's start against the formulas it rests on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from compare import assert_same, relative_rms
from models import D_MODEL, random_ids, tiny_model
from tamba import calibrate as closed
from tamba.calibrate import MEMORIES, calibrate, fit_output
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.model.block import Block
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import ConvertOptions
from tamba.surgery import convert_layer
from tamba.trace import Seen, places, trace

NEAR = ConvertOptions(conv_activation="silu", gate="random", norm="head")


def rows(n: int = 12, length: int = 24, seed: int = 1) -> TokenBlocks:
    tokens = random_ids(n, length, seed).int()
    starts = torch.zeros(n, length, dtype=torch.bool)
    starts[:, 0] = True
    starts[::3, length // 2] = True
    return TokenBlocks(tokens, starts, n * length)


def watched(
    stack: list[str], layer: int, dtype: torch.dtype = torch.float64
) -> tuple[TambaForCausalLM, Seen]:
    model = tiny_model(stack, dtype=dtype)
    return model, trace(model, rows(), mixers=[layer], heads=True).mixers[layer]


def features(mixer: torch.nn.Module, seen: Seen) -> Tensor:
    """What the output projection is given, [tokens, F], by a way of its own."""
    found: list[Tensor] = []
    hook = mixer.out_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        mixer(seen.inputs, None, places(seen.starts))
    hook.remove()
    return found[0].flatten(0, 1)


def converted(model: TambaForCausalLM, layer: int, options: ConvertOptions) -> Block:
    return convert_layer(model.model.layers[layer], model.config, options, layer)


# Least squares of the output projection.


def check_least_squares(ridge: float, gate: str, kind: str = "mamba2") -> None:
    model, seen = watched(["attention", "attention"], 1)
    options = ConvertOptions(mixer=kind, gate=gate, d_state=4, conv="random")
    mixer = converted(model, 1, options).mixer
    before = {n: p.detach().clone() for n, p in mixer.named_parameters()}
    x, y = features(mixer, seen).numpy(), seen.outputs.flatten(0, 1).numpy()
    left = fit_output(mixer, seen, ridge=ridge, batch_size=5)
    if mixer.out_proj.bias is not None:
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    w0 = before["out_proj.weight"].numpy().T
    if mixer.out_proj.bias is not None:
        w0 = np.concatenate([w0, before["out_proj.bias"].numpy()[None]])
    # The pull as further rows: sqrt(pull) (W - W0) = 0, for weights alone.
    n_weights = mixer.out_proj.in_features
    pull = np.sqrt(ridge * (x[:, :n_weights] ** 2).sum(0).mean())
    rows_of_pull = pull * np.eye(len(w0))[:n_weights]
    a, b = np.concatenate([x, rows_of_pull]), np.concatenate([y, rows_of_pull @ w0])
    want = np.linalg.lstsq(a, b, rcond=None)[0]
    got = mixer.out_proj.weight.detach().T
    assert relative_rms(got, torch.from_numpy(want[:n_weights])) < 1e-7
    if mixer.out_proj.bias is not None:
        assert relative_rms(mixer.out_proj.bias.detach(), torch.from_numpy(want[-1])) < 1e-7
    rest = ((x @ want - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert left == pytest.approx(rest, rel=1e-6)
    for name, parameter in mixer.named_parameters():
        if not name.startswith("out_proj"):
            assert_same(parameter.detach(), before[name], "exact")


@pytest.mark.parametrize("ridge", [1e-6, 0.1])
@pytest.mark.parametrize(
    ("gate", "kind"), [("none", "mamba2"), ("open", "mamba2"), ("none", "mamba1")]
)
def test_least_squares_is_numpys(ridge: float, gate: str, kind: str) -> None:
    check_least_squares(ridge, gate, kind)


def test_sums_that_miss_a_batch_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = closed._Normal.features
    calls: list[int] = []

    def wrong(self: object, x: Tensor) -> None:
        calls.append(1)
        if len(calls) != 2:
            right(self, x)

    monkeypatch.setattr(closed._Normal, "features", wrong)
    with pytest.raises(AssertionError):
        check_least_squares(1e-6, "none")


def test_least_squares_finds_the_planted_projection() -> None:
    model, seen = watched(["attention", "attention"], 0)
    mixer = converted(model, 0, NEAR).mixer
    planted = torch.randn(D_MODEL, D_MODEL, dtype=torch.float64)
    outputs = (features(mixer, seen) @ planted.mT).view_as(seen.outputs)
    left = fit_output(mixer, dataclasses.replace(seen, outputs=outputs), ridge=1e-12)
    assert left < 1e-9
    assert relative_rms(mixer.out_proj.weight.detach(), planted) < 1e-6


# The whole mixer.


def test_calibration_beats_what_it_starts_from() -> None:
    """After the same least squares, the closed-form mixer is nearer than the plain conversion."""
    model, seen = watched(["attention", "attention", "attention"], 1)
    angles = next(iter(model.model._rotary.values()))
    attention = model.model.layers[1].mixer
    plain, whole = (converted(model, 1, NEAR).mixer for _ in range(2))
    before = fit_output(plain, seen, ridge=1e-6)
    after = calibrate(whole, attention, angles, seen, ridge=1e-6, memory_rows=12)
    assert after < before
    # And what it says is left is what is left.
    with torch.no_grad():
        got = whole(seen.inputs, None, places(seen.starts))
    wanted = seen.outputs.flatten(0, 1)
    error = (got.flatten(0, 1) - wanted).square().sum()
    variance = (wanted - wanted.mean(0)).square().sum()
    assert after == pytest.approx(float(error / variance), rel=1e-6)


def linear_attention(model: TambaForCausalLM, seen: Seen, memory: list[float]) -> Tensor:
    """[tokens, H·P]: the sum at the head of calibrate.py, term by term, with decays in place of R.

    Rotations are left out by asking for a model that has none.
    """
    attention, spec = model.model.layers[0].mixer, model.config.block_specs[0].mixer
    u, P = seen.inputs, spec.head_dim
    q, k, v = (
        p(u).unflatten(-1, (-1, P)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    k = k - k.flatten(0, 1).mean(0)
    share = spec.n_heads // spec.n_kv_heads
    out = torch.zeros_like(q)
    for row in range(len(u)):
        for h in range(spec.n_heads):
            for t in range(u.shape[1]):
                for s in range(t, -1, -1):
                    g = h // share
                    score = 1 + q[row, t, h] @ k[row, s, g] / P**0.5
                    out[row, t, h] += np.exp(-(t - s) / memory[h]) * score * v[row, s, g]
                    if seen.starts[row, s]:
                        break
    return out.flatten(-2).flatten(0, 1)


def check_first_order() -> None:
    model = tiny_model(["attention"], dtype=torch.float64)
    spec = dataclasses.replace(model.config.block_specs[0].mixer, rotary_dim=0)
    attention = model.model.layers[0].mixer
    attention.spec, attention.rotary_key = spec, None
    seen = trace(model, rows(3, 10), mixers=[0], heads=True).mixers[0]
    mixer = converted(model, 0, ConvertOptions()).mixer
    calibrate(mixer, attention, None, seen, memory_rows=3)
    memory = (1 / (torch.exp(mixer.A_log) * closed._STEP)).tolist()
    with torch.no_grad():
        want = linear_attention(model, seen, memory) * closed._STEP
    got = features(mixer, seen)
    # The constant's direction lies in the head, so q·e and k·e remain: small where they vary least.
    assert relative_rms(got, want) < 0.5
    assert all(min(abs(m - x) for x in MEMORIES) < 1e-3 for m in memory)
    # Without those two terms it is the sum itself: C and B take one dimension more.
    assert np.corrcoef(got.flatten(), want.flatten())[0, 1] > 0.85


def test_features_are_first_order_attention() -> None:
    check_first_order()


def test_mean_rotation_is_the_mean_over_rotations() -> None:
    model = tiny_model(["attention"], dtype=torch.float64)
    angles = next(iter(model.model._rotary.values()))
    seen = trace(model, rows(), mixers=[0], heads=True).mixers[0]
    attention = model.model.layers[0].mixer
    maps = closed._maps(converted(model, 0, NEAR).mixer, attention, seen)
    u, memory = torch.randn(D_MODEL, dtype=torch.float64), 4.0
    key = torch.randn(8, dtype=torch.float64)
    turned = closed._turn(maps, angles, memory)[1, :, :-1] @ u
    query = maps.q[1] @ u
    total = weights = 0.0
    for d in range(60):
        from tamba.model.rotary import rotate

        cos, sin = angles(torch.tensor([[d, 0]]), torch.float64)
        pair = torch.stack([query, key])[None, None]
        at_d, at_0 = rotate(pair, cos, sin)[0, 0]
        total += float(np.exp(-d / memory) * (at_d @ at_0))
        weights += np.exp(-d / memory)
    assert float(turned @ key) == pytest.approx(total / weights, rel=1e-4)


def test_a_memory_that_was_planted_is_found() -> None:
    """A head that is the recurrence with one of the memories gets that memory."""
    model = tiny_model(["attention", "attention"], dtype=torch.float64)
    attention = model.model.layers[1].mixer
    angles = next(iter(model.model._rotary.values()))
    seen = trace(model, rows(16, 64), mixers=[1], heads=True).mixers[1]
    mixer = converted(model, 1, ConvertOptions()).mixer
    calibrate(mixer, attention, angles, seen)
    wanted = [MEMORIES[i] for i in (1, 3, 0, 4)]
    maps = closed._maps(mixer, attention, seen)
    turned = torch.stack([closed._turn(maps, angles, m)[h] for h, m in enumerate(wanted)])
    closed._write(mixer, maps, torch.tensor(wanted, dtype=torch.float64), turned)
    heads = features(mixer, seen).view_as(seen.heads)
    calibrate(mixer, attention, angles, dataclasses.replace(seen, heads=heads), memory_rows=16)
    found = 1 / (torch.exp(mixer.A_log.detach()) * closed._STEP)
    assert found.tolist() == pytest.approx(wanted, rel=1e-4)


def test_other_forms_are_refused() -> None:
    model, seen = watched(["attention", "attention"], 1)
    mixer = converted(model, 1, ConvertOptions(mixer="mamba1", d_state=4)).mixer
    with pytest.raises(UserError, match="fit = 'output'"):
        calibrate(mixer, model.model.layers[1].mixer, None, seen)


def test_half_precision_comes_near() -> None:
    model, seen = watched(["attention", "attention"], 1, torch.float32)
    angles = next(iter(model.model._rotary.values()))
    exact, half = (converted(model, 1, NEAR).mixer for _ in range(2))
    attention = model.model.layers[1].mixer
    a = calibrate(exact, attention, angles, seen)
    b = calibrate(half, attention, angles, seen, dtype=torch.bfloat16)
    assert b == pytest.approx(a, rel=0.1)


def test_gate_without_a_bias_is_open() -> None:
    model, seen = watched(["attention", "attention"], 1)
    mixer = converted(model, 1, NEAR).mixer
    assert mixer.in_proj.bias is None
    angles = next(iter(model.model._rotary.values()))
    calibrate(mixer, model.model.layers[1].mixer, angles, seen)
    with torch.no_grad():
        z = (seen.inputs @ mixer.in_proj.weight[mixer.slices["z"]].mT).flatten(0, 1)
    # The same for all channels, and as near to the open gate as any linear map of the input comes.
    assert relative_rms(z, z[:, :1].expand_as(z)) < 1e-10
    u = seen.inputs.flatten(0, 1)
    best = u @ torch.linalg.lstsq(u, torch.ones(len(u), 1, dtype=torch.float64)).solution
    missed = float((z[:, 0] / closed.OPEN_GATE - 1).square().mean())
    least = float((best - 1).square().mean())
    assert least <= missed < 1.05 * least + 1e-3


def off_centre() -> tuple[TambaForCausalLM, Seen]:
    """Attention whose inputs, and so its keys, have a mean of the size of their spread."""
    model = tiny_model(["parallel"], dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[0].norm.bias.normal_()
    return model, trace(model, rows(), mixers=[0], heads=True).mixers[0]


def check_keys_centred() -> float:
    model, seen = off_centre()
    attention, mixer = model.model.layers[0].mixer, converted(model, 0, ConvertOptions()).mixer
    angles = next(iter(model.model._rotary.values()))
    left = calibrate(mixer, attention, angles, seen, ridge=1e-6)
    constant = closed._maps(mixer, attention, seen).constant.flatten()
    s = mixer.slices
    with torch.no_grad():
        channels = slice(s["B"].start - s["x"].start, s["B"].stop - s["x"].start)
        B = seen.inputs.flatten(0, 1) @ mixer.in_proj.weight[s["B"]].mT
        B = B * mixer.conv1d.weight[channels, 0, -1] + mixer.conv1d.bias[channels]
    # No activation stands after this convolution: what is left of a mean is the constant.
    assert relative_rms(B.mean(0), constant) < 1e-6, left
    return left


def test_keys_left_off_centre_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    check_keys_centred()
    right = closed._maps

    def wrong(*args: object) -> object:
        maps = right(*args)
        return dataclasses.replace(maps, k_bias=torch.zeros_like(maps.k_bias))

    monkeypatch.setattr(closed, "_maps", wrong)
    with pytest.raises(AssertionError):
        check_keys_centred()
