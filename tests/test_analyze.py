"""Scores of layers on models that are made so that the answer is known."""

from __future__ import annotations

import copy

import pytest
import torch

from models import random_ids, tiny_model
from tamba.analyze import analyze_model, perplexity_ratios, swap_scores
from tamba.analyze import swaps as analyze_module
from tamba.analyze.effects import conversion_scores
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import ConvertOptions
from tamba.recipe import Recipe
from tamba.trace import Trace, trace

IDLE, LOUD = 1, 3


def made() -> TambaForCausalLM:
    """Four layers: one does nothing at all, one shouts, the others whisper."""
    model = tiny_model(["attention"] * 4)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            factor = {IDLE: 0.0, LOUD: 4.0}.get(index, 0.05)
            layer.mixer.o_proj.weight *= factor
            layer.mlp.down_proj.weight *= factor
        # Sharp scores: no sum of decays comes near them, fitted or not.
        model.model.layers[LOUD].mixer.q_proj.weight *= 4.0
    return model


def rows(n: int = 8, length: int = 24) -> TokenBlocks:
    starts = torch.zeros(n, length, dtype=torch.bool)
    starts[:, 0] = True
    starts[::2, length // 2] = True
    return TokenBlocks(random_ids(n, length, 5).int(), starts, n * length)


def recipe(score: str, **analyze: object) -> Recipe:
    told = {"score": score, "tokens": 96, "convert": 1} | analyze
    return Recipe.model_validate(
        {
            "name": "made",
            "teacher": {"path": "x"},
            "data": {"train": ("x",)},
            "analyze": told,
        }
    )


def check_order(score: str) -> None:
    found = analyze_model(made(), rows(), recipe(score))
    assert found.order[0] == IDLE and found.order[-1] == LOUD
    assert found.scores[IDLE] == pytest.approx(0.0, abs=1e-4)
    assert list(found.plan.converted) == [IDLE]


@pytest.mark.parametrize("score", ["swap", "least_squares", "own_turn"])
def test_what_matters_scores_highest_and_what_idles_lowest(score: str) -> None:
    check_order(score)


def test_a_score_of_another_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = analyze_module._harm

    def wrong(teacher: object, replaced: dict, blocks: object, reference: Trace, first: int):
        ((_, block),) = replaced.items()
        other = (first + 1) % 4
        reference = trace(teacher, blocks, streams=[other, 4])
        return right(teacher, {other: block}, blocks, reference, other)

    monkeypatch.setattr(analyze_module, "_harm", wrong)
    with pytest.raises(AssertionError):
        check_order("swap")


def check_own_place(model: TambaForCausalLM) -> None:
    """A layer put in its own place does no harm, measured either way."""
    blocks = rows()
    reference = trace(model, blocks, streams=[*range(4), 4])
    for index in range(4):
        same = {index: model.model.layers[index]}
        harm, _ = analyze_module._harm(model, same, blocks, reference, index)
        assert harm == pytest.approx(0.0, abs=1e-5)
    whole = dict(enumerate(model.model.layers))
    assert perplexity_ratios(model, {4: whole}, blocks) == [(4, pytest.approx(1.0, abs=1e-6))]


def test_the_teacher_against_itself_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    # In one type throughout: what is compared is then the same to the bit.
    monkeypatch.setattr(analyze_module, "DTYPE", torch.float32)
    check_own_place(made())
    right = analyze_module._climb
    monkeypatch.setattr(
        analyze_module,
        "_climb",
        lambda teacher, replaced, hidden, tokens, first: right(
            teacher, replaced, hidden * 1.1, tokens, first
        ),
    )
    with pytest.raises(AssertionError):
        check_own_place(made())


def test_a_fit_lowers_the_harm() -> None:
    model, blocks = made(), rows(16)
    plain = swap_scores(model, [LOUD], ConvertOptions(), blocks.take(8))[1]
    fitted = swap_scores(model, [LOUD], ConvertOptions(), blocks.take(8), blocks)[1]
    assert fitted[LOUD][0] < plain[LOUD][0]


def check_harm() -> None:
    """Of a whole model with that layer in it, in float64."""
    model, blocks = made(), rows(6)
    layers, scores = swap_scores(model, [LOUD], ConvertOptions(), blocks)
    swapped = copy.deepcopy(model)
    swapped.model.layers[LOUD] = layers[LOUD]
    batch = next(blocks.batches(6))
    with torch.no_grad():
        said = [m(**batch.inputs, use_cache=False).logits for m in (swapped, model)]
    ours, theirs = (logits.double().log_softmax(-1) for logits in said)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    here = [batch.predicted[row].nonzero()[row % 2 :: 2, 0] for row in range(6)]
    each = [kl[row, places] for row, places in enumerate(here)]
    value, error = scores[LOUD]
    means = torch.stack([row.mean() for row in each])
    assert value == pytest.approx(float(means.mean()), rel=1e-4)
    assert error == pytest.approx(float(means.std()) / 6**0.5, rel=1e-4)


def test_harm_and_its_error_are_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyze_module, "DTYPE", torch.float32)
    check_harm()
    monkeypatch.setattr(analyze_module, "_STRIDE", 1)
    with pytest.raises(AssertionError):
        check_harm()


@pytest.mark.parametrize("fitted", [False, True])
def test_a_recipe_and_a_study_measure_the_same(fitted: bool) -> None:
    """The quick score of a recipe is the effect of that name, rows of unlike documents or not."""
    model, blocks = made(), rows(12)
    score = blocks.take(6)
    score.starts[0, 3:] = True  # next to nothing to predict
    fit = TokenBlocks(blocks.tokens[6:], blocks.starts[6:], 6 * 24) if fitted else None
    quick = swap_scores(model, range(4), ConvertOptions(), score, fit)[1]
    effects = conversion_scores(model, score, ConvertOptions(), fit=fit)
    for layer, (value, error) in quick.items():
        found = effects[layer]
        assert (value, error) == pytest.approx((found.kl, found.kl_error), rel=1e-6, abs=1e-12)


def test_numbers_that_are_not_finite_choose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(bad: str, words: str) -> None:
        model = made()
        with torch.no_grad():
            model.get_parameter(bad)[0, 0] = torch.nan
        with pytest.raises(UserError, match=words):
            analyze_model(model, rows(), recipe("swap"))

    check("model.layers.2.mlp.down_proj.weight", "layer 2: gives a hidden state .* in row 0")
    # Without that look the layer is not found, and without the next one NaN would be ranked.
    monkeypatch.setattr(analyze_module, "check_finite", lambda *_: None)
    check("model.layers.2.mlp.down_proj.weight", "converted: gives no finite numbers in row 0")


def test_angles_are_those_of_the_formula() -> None:
    model, blocks = made(), rows(4)
    scored = analyze_model(model, blocks, recipe("own_turn", tokens=48)).states
    assert scored is not None
    table, blocks = scored.all_tokens.mean, TokenBlocks(blocks.tokens[2:], blocks.starts[2:], 48)
    states = trace(model, blocks, streams=range(5), dtype=torch.float32).streams
    for low in range(4):
        for high in range(low + 1, 5):
            a, b = states[low].double(), states[high].double()
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1)
            want = float((torch.arccos(cosine) / torch.pi).mean())
            assert float(table[low, high - low - 1]) == pytest.approx(want, abs=5e-3)
    assert table.isnan().sum() == 6
    assert float(table[IDLE, 0]) < 1e-3


def test_what_is_kept_is_not_chosen() -> None:
    found = analyze_model(made(), rows(), recipe("own_turn", always_keep=(IDLE,), convert=2))
    assert IDLE not in found.plan.converted and LOUD not in found.plan.converted
    assert found.scores[IDLE] is None and found.plan.entries[IDLE].note == "is kept, as asked"
    with pytest.raises(UserError, match="is 1 row, which cannot be divided"):
        analyze_model(made(), rows(1), recipe("own_turn"))


def test_a_layer_that_is_kept_stands_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not converted to be scored, as the error says, and is in no set of the frontier."""
    right = analyze_module._converted

    def broken(teacher: object, index: int, *rest: object):
        layer = right(teacher, index, *rest)
        if index == IDLE:
            layer.mixer.out_proj.weight.data[:] = torch.nan
        return layer

    monkeypatch.setattr(analyze_module, "_converted", broken)
    with pytest.raises(UserError, match=r"layer 1 converted: .*keep it with analyze\.always_keep"):
        analyze_model(made(), rows(), recipe("swap"))
    sets: dict = {}

    def seen(teacher: object, found: dict, blocks: object) -> list:
        sets.update(found)
        return []

    monkeypatch.setattr(analyze_module, "perplexity_ratios", seen)
    found = analyze_model(made(), rows(), recipe("swap", always_keep=(IDLE,), convert=2))
    assert IDLE not in found.order and set(sets[2]) == set(found.plan.converted)
    assert all(IDLE not in layers for layers in sets.values())
