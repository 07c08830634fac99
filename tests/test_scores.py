"""Scores from hidden states: against brute force in float64, and on models made to be known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models import VOCAB, random_ids, tiny_model
from tamba.analyze import distances
from tamba.analyze.distances import StateScores, counted, scores_of_inputs, state_scores
from tamba.data import Batch, TokenBlocks
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.ops import directions

KINDS = ["attention", "mamba1", "mamba2", "mixed"]
EXACT = 1e-6
"""Of equation 1, in half turns: the bound asked for."""


def rows(n: int = 5, length: int = 24, starts_at: int = 9) -> TokenBlocks:
    starts = torch.zeros(n, length, dtype=torch.bool)
    starts[:, 0] = True
    starts[::2, starts_at] = True
    return TokenBlocks(random_ids(n, length, 5).int(), starts, n * length)


def padded(n: int = 5, length: int = 24) -> tuple[Tensor, Tensor]:
    """Rows of several lengths, padded on the left, on the right and not at all."""
    mask = torch.ones(n, length, dtype=torch.bool)
    mask[0, :7] = False
    mask[1, -9:] = False
    mask[2, :4] = mask[2, -2:] = False
    return random_ids(n, length, 6), mask


def states_of(model: TambaForCausalLM, **inputs: Tensor) -> list[Tensor]:
    """L + 1 states and the normed last one, by the model's own record of them."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        normed = model.model(**inputs).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [*seen[::2], seen[-1], normed]


def brute_force(states: list[Tensor], counts: Tensor) -> dict[str, Tensor]:
    """Equation 1 word for word, in float64: token by token, pair by pair."""
    B, T = counts.shape
    S = len(states)
    cells = torch.full((B, S, S), math.nan, dtype=torch.float64)
    last = cells.clone()
    influence = torch.zeros(B, S - 2, dtype=torch.float64)
    for b in range(B):
        here = [t for t in range(T) if counts[b, t]]
        for low in range(S):
            for high in range(low + 1, S):
                cosines = []
                for t in here:
                    u, v = states[low][b, t].double(), states[high][b, t].double()
                    cosines.append(float(u @ v / (u.norm() * v.norm())))
                angles = [math.acos(max(-1.0, min(1.0, c))) / math.pi for c in cosines]
                cells[b, low, high] = sum(angles) / len(angles)
                last[b, low, high] = angles[-1]
                if high == low + 1 and high < S - 1:
                    influence[b, low] = 1.0 - sum(cosines) / len(cosines)
    error = cells.std(0) / math.sqrt(B)
    return {
        "all": cells.mean(0),
        "error": error,
        "last": last.mean(0),
        "influence": influence.mean(0),
    }


def check(found: StateScores, want: dict[str, Tensor]) -> None:
    L = len(found.block_influence.mean)
    for low in range(L):
        for n in range(1, L - low + 1):
            for name, table in (
                ("all", found.all_tokens.mean),
                ("error", found.all_tokens.error),
                ("last", found.last_token.mean),
            ):
                assert float(table[low, n - 1]) == pytest.approx(
                    float(want[name][low, low + n]), abs=EXACT
                ), (name, low, n)
        assert float(found.after_norm.mean[low]) == pytest.approx(
            float(want["all"][low, L + 1]), abs=EXACT
        )
        assert found.all_tokens.mean[low, L - low :].isnan().all()
    assert float((found.block_influence.mean - want["influence"]).abs().max()) < EXACT


def check_padded(model: TambaForCausalLM) -> None:
    ids, mask = padded()
    with torch.no_grad():  # or the final norm would turn nothing
        model.model.final_norm.weight.uniform_(0.5, 2.0)
    want = brute_force(states_of(model.double(), input_ids=ids, attention_mask=mask), mask)
    model.float()
    parts = (slice(0, 2), slice(2, 5))
    batches = [({"input_ids": ids[p], "attention_mask": mask[p]}, mask[p]) for p in parts]
    found = scores_of_inputs(model, batches)
    assert found.sequences == 5 and found.tokens == int(mask.sum())
    check(found, want)


@pytest.mark.parametrize("kind", KINDS)
def test_angles_are_equation_1_with_padding(kind: str) -> None:
    check_padded(tiny_model(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_angles_are_equation_1_in_packed_rows(kind: str) -> None:
    model, blocks = tiny_model(kind).double(), rows()
    batch = next(blocks.batches(5))
    want = brute_force(states_of(model, **batch.inputs), counted(batch))
    for size in (1, 3, 5):
        check(state_scores(model.float(), blocks, batch_size=size), want)
        model.double()


def wrong_norm(states: list[Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
    return RIGHT_DIRECTIONS([*states[:-2], states[-1], states[-1]], counts)


def padding_counts(states: list[Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
    unit, lengths = RIGHT_DIRECTIONS(states, torch.ones_like(counts))
    n = int(counts.sum())
    return unit[:n], lengths[:n]


def no_pi(unit: Tensor, cosine: Tensor) -> Tensor:
    return torch.acos(cosine.clamp(-1, 1)) / 3.1415


RIGHT_DIRECTIONS = directions._directions


@pytest.mark.parametrize(
    ("name", "fault"),
    [("_directions", wrong_norm), ("_directions", padding_counts), ("_angles", no_pi)],
)
def test_the_comparison_sees_faults(monkeypatch: pytest.MonkeyPatch, name: str, fault) -> None:
    monkeypatch.setattr(directions, name, fault)
    with pytest.raises(AssertionError):
        check_padded(tiny_model("attention"))


def test_small_angles_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of 1e-5 half turns and nearly half a turn, which float32 arccos cannot tell."""
    angles = torch.tensor([1e-5, 3e-4, 0.25, 1 - 1e-5], dtype=torch.float64)
    u = torch.zeros(4, 16, dtype=torch.float64)
    u[:, 0], v = 1.0, torch.zeros(4, 16, dtype=torch.float64)
    v[:, 0], v[:, 1] = torch.cos(angles * math.pi), torch.sin(angles * math.pi)
    unit = torch.stack([u, v], dim=1).float()

    def apart() -> Tensor:
        return directions._angles(unit, unit @ unit.mT)[:, 0, 1].double() - angles

    assert float(apart().abs().max()) < 1e-7
    monkeypatch.setattr(directions, "_NEAR", 2.0)
    assert float(apart().abs().max()) > 1e-6


def test_separators_and_filling_do_not_count() -> None:
    starts = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 0, 1, 1, 1, 1]], dtype=torch.bool)
    batch = Batch(torch.ones(2, 6, dtype=torch.long), starts)
    assert counted(batch).int().tolist() == [[1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0]]


def hsic(x: Tensor, y: Tensor) -> float:
    """Unbiased HSIC from its definition, sums over distinct indices (Song et al. 2012, eq. 4)."""
    n = len(x)
    K, L = (x @ x.T).tolist(), (y @ y.T).tolist()
    two = three = four = 0.0
    for i in range(n):
        for j in range(n):
            if j == i:
                continue
            two += K[i][j] * L[i][j]
            for k in range(n):
                if k in (i, j):
                    continue
                three += K[i][j] * L[i][k]
                for m in range(n):
                    if m not in (i, j, k):
                        four += K[i][j] * L[k][m]
    a, b, c = n * (n - 1), n * (n - 1) * (n - 2), n * (n - 1) * (n - 2) * (n - 3)
    return two / a + four / c - 2 * three / b


def check_kernels() -> None:
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(8, 3, 5, dtype=torch.float64), dim=-1)
    (got,) = directions._dependence(unit, torch.arange(8)[None])
    for low in range(3):
        for high in range(3):
            want = hsic(unit[:, low], unit[:, high])
            assert float(got[low, high]) == pytest.approx(want, rel=1e-10)


def test_kernel_dependence_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels()
    # The diagonal left in, as the biased estimator has it.
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: self)
    with pytest.raises(AssertionError):
        check_kernels()


def test_kernel_similarity_knows_rotations() -> None:
    torch.manual_seed(0)
    x = torch.randn(2048, 12, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    other = torch.randn(2048, 12, dtype=torch.float64)
    unit = torch.nn.functional.normalize(torch.stack([x, x @ turn, other], dim=1), dim=-1)
    found = distances._alignment(directions._dependence(unit, torch.arange(2048).view(32, 64)))
    assert float(found.mean[0, 1]) == pytest.approx(1.0, abs=1e-9)
    assert abs(float(found.mean[0, 2])) < 4 * float(found.error[0, 2]) < 0.2


def check_batches() -> None:
    model = tiny_model("mixed")
    starts = torch.zeros(12, 80, dtype=torch.bool)
    starts[:, 0] = starts[::3, 30] = True
    blocks = TokenBlocks(random_ids(12, 80, 9).int(), starts, 12 * 80)
    one, all_at_once = (state_scores(model, blocks, batch_size=n) for n in (1, 12))
    for name in ("all_tokens", "last_token", "block_influence", "kernel_similarity"):
        first, second = getattr(one, name), getattr(all_at_once, name)
        for a, b in ((first.mean, second.mean), (first.error, second.error)):
            assert torch.equal(a.isnan(), b.isnan()) and int((~a.isnan()).sum()) >= 7, name
            assert float((a - b).nan_to_num().abs().max()) < EXACT, name


def test_scores_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do their errors: what one device reads at once another reads row by row."""
    check_batches()
    right = directions._groups

    def across_rows(per_row: Tensor) -> Tensor:
        return right(per_row.sum()[None])

    monkeypatch.setattr(directions, "_groups", across_rows)
    with pytest.raises(AssertionError):
        check_batches()


IDLE, LOUD = 1, 3


def made() -> TambaForCausalLM:
    """Four layers: one does nothing, one shouts, the others whisper."""
    model = tiny_model(["attention"] * 4)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            factor = {IDLE: 0.0, LOUD: 4.0}.get(index, 0.05)
            layer.mixer.o_proj.weight *= factor
            layer.mlp.down_proj.weight *= factor
    return model


@pytest.mark.parametrize("score", ["own_turn", "last_turn", "block_influence", "kernel_change"])
def test_an_idle_layer_is_lowest_and_a_loud_one_highest(score: str) -> None:
    found = getattr(state_scores(made(), rows(12)), score).mean
    assert int(found.argmin()) == IDLE and int(found.argmax()) == LOUD
    assert float(found[IDLE]) == pytest.approx(0.0, abs=1e-6)


def test_the_column_of_an_idle_layer_is_its_neighbours() -> None:
    """But for the one cell that is its own turn: a column says more of what is above a layer."""
    found = state_scores(made(), rows(12))
    table = found.all_tokens.mean
    for n in range(1, 3):
        assert float(table[IDLE, n]) == pytest.approx(float(table[IDLE + 1, n - 1]), abs=1e-6)
    assert int(found.column_mean.mean.argmax()) == LOUD


def test_errors_shrink_with_text_and_cover_the_truth() -> None:
    model = tiny_model("mixed")
    starts = torch.zeros(96, 16, dtype=torch.bool)
    starts[:, 0] = True
    blocks = TokenBlocks(random_ids(96, 16, 8).int(), starts, 96 * 16)
    few, many = (state_scores(model, blocks.take(n)).all_tokens[:, 0] for n in (12, 96))
    ratio = float((few.error / many.error).mean())
    assert 1.8 < ratio < 4.4
    assert float(((few.mean - many.mean).abs() / few.error).max()) < 5


def test_memory_does_not_grow_with_text() -> None:
    sums = distances._Sums(3, torch.device("cpu"))

    def size() -> int:
        tables = (sums.all_tokens, sums.last_token, sums.apart)
        return sum(t.total.numel() + t.squares.numel() for t in tables) + sums.kernels.numel()

    before = size()
    for _ in range(20):
        sums.add([torch.randn(2, 8, 4) for _ in range(5)], torch.ones(2, 8, dtype=torch.bool))
    assert size() == before and sums.tokens == 320


def test_what_cannot_be_scored() -> None:
    with pytest.raises(UserError, match="has 1 layer"):
        state_scores(tiny_model(["attention"]), rows())
    model = tiny_model("mixed")
    with torch.no_grad():
        model.model.layers[2].mixer.out_proj.weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"layer 2.*not a finite number, in row 0"):
        state_scores(model, rows())
    model = tiny_model("mixed")
    blocks = rows()
    bad = int(blocks.tokens[3, 5])
    only = (blocks.tokens == bad).nonzero()[0, 0]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = 0.0
    with pytest.raises(UserError, match=rf"embedding.*zero.*row {int(only)}"):
        state_scores(model, blocks, batch_size=2)
    assert bad < VOCAB
    # A GPU tells of it at the end.
    sums = distances._Sums(4, torch.device("cpu"))
    sums.tokens = 32
    for first_row, state in ((0, torch.ones(2, 8, 4)), (2, torch.full((2, 8, 4), math.inf))):
        found = directions.compare([torch.ones(2, 8, 4), state], torch.ones(2, 8, dtype=torch.bool))
        sums.faults.append((first_row, 2, found.fault))
    with pytest.raises(UserError, match=r"layer 0.*not a finite number, in row 2"):
        sums.result()
    none = TokenBlocks(blocks.tokens, torch.ones_like(blocks.starts), 5)
    with pytest.raises(UserError, match="no token that counts"):
        state_scores(tiny_model("mixed"), none)
