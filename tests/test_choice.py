"""Choosing layers: the papers' lists, budgets, groups of a donor, and agreement of scores."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from models import tiny_config
from tamba.analyze import choice
from tamba.analyze.choice import (
    Budget,
    Facts,
    Group,
    choose,
    donor_groups,
    plan_of,
    rank_correlations,
    transplant_plans,
)
from tamba.errors import UserError
from tamba.evaluate.memory import cache_bytes
from tamba.plan import E_TAMBA, ConvertOptions, read_plan, uniform_plan, write_plan


def facts(n: int, keep: tuple[int, ...] = ()) -> Facts:
    free = tuple(i for i in range(n) if i not in keep)
    return Facts(n, free, (100,) * n, (10,) * n, keep)


def chosen(strategy: str, n: int, layers: int | None, **given: object) -> list[int]:
    return list(choose(strategy, facts(n), Budget(layers), **given).layers)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125])
def test_uniform_lists_are_those_of_the_papers(share: float) -> None:
    want = uniform_plan(32, share).converted
    assert tuple(chosen("uniform", 32, len(want))) == want
    kept = sorted(set(range(32)) - set(want))
    assert kept == list(range(int(1 / share) - 1, 32, int(1 / share)))


LISTS = {
    # 12 layers, 4 dropped: figure 1 of Sajjad et al., counted from 0.
    "top": [8, 9, 10, 11],
    "bottom": [0, 1, 2, 3],
    "alternate odd": [4, 6, 8, 10],
    "alternate even": [5, 7, 9, 11],
    "symmetric": [4, 5, 6, 7],
}


@pytest.mark.parametrize("strategy", LISTS)
def test_drop_strategies(strategy: str) -> None:
    assert chosen(strategy, 12, 4) == LISTS[strategy]
    assert sorted(chosen(strategy, 12, 12)) == list(range(12))


def test_jamba_keeps_one_layer_in_eight() -> None:
    kept = sorted(set(range(32)) - set(chosen("jamba", 32, None)))
    assert kept == [4, 12, 20, 28]


def test_e_tamba_reads_pythia() -> None:
    """Columns that fade upwards, and a last layer that stands out: layers 12 to 22 go."""
    columns = [0.5] * 12 + [0.2] * 11 + [0.45]
    assert chosen("e-tamba", 24, 11, scores={"column_mean": columns}) == list(range(12, 23))
    columns[23] = 0.0
    assert chosen("e-tamba", 24, 11, scores={"column_mean": columns}) == list(range(12, 23))


def test_plans_say_why_a_layer_stays() -> None:
    known = facts(4, keep=(3,))
    found = choose("e-tamba a", known, Budget(1), {"a": [3.0, 1.0, 2.0, None]})
    notes = [entry.note for entry in plan_of(found, known, ConvertOptions()).entries]
    assert notes == ["a 3", "a 1", "a 2", "is kept, as asked"]


def test_gromov_takes_the_block_of_least_distance() -> None:
    table = [[1.0] * (8 - low) for low in range(8)]
    table[3][2] = 0.1
    assert chosen("gromov", 8, 3, distances={"last_token": table}) == [3, 4, 5]
    told = choose("gromov", facts(8), Budget(3), distances={"last_token": table})
    assert told.why == dict.fromkeys((3, 4, 5), "3 to 5 together turn by 0.1 (last_token)")
    table[5][2] = 0.05
    assert chosen("gromov last_token", 8, 3, distances={"last_token": table}) == [5, 6, 7]
    with pytest.raises(UserError, match="no distances 'all_tokens'"):
        chosen("gromov all_tokens", 8, 3, distances={"last_token": table})
    kept = choose("gromov", facts(8, keep=(6,)), Budget(3), distances={"last_token": table})
    assert kept.layers == (3, 4, 5)


def test_lowest_and_ratio() -> None:
    scores = {"a": [3.0, 1.0, 2.0, 0.5], "b": [6.0, 0.0, 1.0, 2.0], "none": [None] * 4}
    assert chosen("lowest a", 4, 2, scores=scores) == [1, 3]
    # 0.5, capped, 2, 0.25: layer 1 changes text by nothing, which is noise.
    assert chosen("ratio a/b", 4, 2, scores=scores) == [0, 3]
    assert chosen("contribution", 4, 1, scores={"block_influence": scores["a"]}) == [3]
    why = choose("lowest a", facts(4), Budget(1), scores).why
    assert why[3] == "a 0.5"
    with pytest.raises(UserError, match="layer 0 has no score 'none'"):
        chosen("lowest none", 4, 1, scores=scores)


def test_sums_of_weighted_scores() -> None:
    scores = {"a": [3.0, 1.0, 2.0, 0.5], "b": [0.0, 8.0, 2.0, 8.0]}
    assert chosen("sum a", 4, 2, scores=scores) == [1, 3]
    # 3, 5, 3, 4.5; of equals the lower layer.
    assert chosen("sum a + 0.5 b", 4, 1, scores=scores) == [0]
    assert chosen("sum 1 a + 0.5 b", 4, 2, scores=scores) == [0, 2]
    assert choose("sum a+0.5 b", facts(4), Budget(1), scores).why[3] == "a+0.5 b 4.5"


def test_budget_of_bytes_converts_as_few_as_it_takes() -> None:
    scores = {"a": [3.0, 1.0, 2.0, 0.5]}
    for strategy in ("lowest a", "top", "uniform", "e-tamba a"):
        found = choose(strategy, facts(4), Budget(cache_bytes=230), scores)
        assert len(found.layers) == 2, strategy
        assert facts(4).cache_bytes(found.layers) == 220
    assert choose("top", facts(4), Budget(cache_bytes=400)).layers == ()
    with pytest.raises(UserError, match="leaves a cache of 40 bytes"):
        choose("top", facts(4), Budget(cache_bytes=39))
    with pytest.raises(UserError, match=r"leaves a cache of 310 bytes with 1 layers"):
        choose("top", facts(4), Budget(layers=1, cache_bytes=300))


def test_bytes_are_those_of_the_cache() -> None:
    """Beside the figures that reports give, for every kind of layer and after conversion."""
    for context in (3, 64):
        config = tiny_config("mixed")
        known = Facts.of(config, ConvertOptions(), context=context)
        assert known.free == (1, 3, 5)
        assert known.cache_bytes(()) == cache_bytes(config, context)
    assert Facts.of(config, ConvertOptions(), always_keep=(3,)).free == (1, 5)


WRONG = {
    "lowst a": "did you mean 'lowest'",
    "lowest b": "there is no score 'b'",
    "ratio a": "names no two scores",
    "sum a + b": "there is no score 'b'",
    "sum a + half a": "'half a' is no weight and score",
    "sum a +": "there is no score ''",
    "sum 2 3 a": "'2 3 a' is no weight and score",
    "explicit": "names no layers",
    "explicit 1,9": "there is no layer 9",
    "explicit 2": "layer 2 is kept, as asked",
    "explicit 3": "layer 3 has no attention",
    "explicit 0": "replaces 1 layers, not 2",
    "alternate sideways": "neither even nor odd",
    # In a recipe's plan it is a share to keep; here it would be no share of anything.
    "uniform 0.25": "'0.25' after 'uniform' means nothing; the budget says how many",
    "top 3": "'3' after 'top' means nothing",
}


@pytest.mark.parametrize("strategy", WRONG)
def test_wrong_strategies_say_so(strategy: str) -> None:
    with pytest.raises(UserError) as caught:
        known = Facts(4, (0, 1), always_keep=(2,))
        choose(strategy, known, Budget(2), {"a": [1.0] * 4})
    assert WRONG[strategy] in str(caught.value)


def test_more_than_there_is() -> None:
    with pytest.raises(UserError, match="5 layers are to be replaced and 4 can be"):
        chosen("top", 4, 5)
    with pytest.raises(UserError, match="does not say how many"):
        chosen("top", 4, None)
    with pytest.raises(UserError, match="no 4 neighbouring layers below the last"):
        chosen("e-tamba a", 4, 4, scores={"a": [1.0] * 4})


def test_a_plan_says_why_a_layer_is_no_choice() -> None:
    config = tiny_config("mixed")
    known = Facts.of(config, ConvertOptions(), always_keep=(3,))
    found = plan_of(choose("top", known, Budget(1)), known, ConvertOptions())
    assert found.converted == (5,)
    assert [entry.note for entry in found.entries[:4]] == [
        "has no attention",
        "",
        "has no attention",
        "is kept, as asked",
    ]


def test_a_plan_reads_back(tmp_path) -> None:
    found = choose("lowest a", facts(4), Budget(2), {"a": [3.0, 1.0, 2.0, 0.5]})
    plan = plan_of(found, facts(4), ConvertOptions())
    write_plan(plan, tmp_path / "plan.toml")
    assert read_plan(tmp_path / "plan.toml") == plan
    assert plan.converted == (1, 3)
    assert '"convert 3",  # a 0.5' in (tmp_path / "plan.toml").read_text()


def fading(n_layers: int, seams: tuple[int, ...]) -> list[list[float]]:
    """Distances of a stream that turns a little at every layer and anew at each seam."""

    def turn(low: int, high: int) -> float:
        within = sum(low <= s < high for s in seams)
        return 0.01 * (high - low) + 0.1 * within

    return [[turn(i, i + n) for n in range(1, n_layers - i + 1)] for i in range(n_layers)]


def test_groups_of_the_paper() -> None:
    found = donor_groups(fading(48, ()), 12)
    assert [str(g) for g in found] == ["3-14", "14-25", "25-36", "36-47"]


def brute_groups(table: list[list[float]], size: int, count: int) -> float:
    step = max(1, size - 1)
    starts = range(len(table) - size + 1)
    return max(
        sum(table[s][size - 1] for s in some)
        for some in itertools.combinations(starts, count)
        if all(b - a >= step for a, b in itertools.pairwise(some))
    )


def check_groups() -> None:
    drawn = random.Random(0)
    for size, count in ((1, 3), (2, 3), (4, 2), (5, 3), (16, 1)):
        table = [[drawn.random() for _ in range(16 - low)] for low in range(16)]
        found = donor_groups(table, size, count=count)
        assert all(g.last - g.first == size - 1 for g in found)
        assert all(b.first >= a.first + max(1, size - 1) for a, b in itertools.pairwise(found))
        assert sum(g.turn for g in found) == pytest.approx(brute_groups(table, size, count))


def test_groups_are_the_best_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    check_groups()
    # Taking the largest first is not enough.
    monkeypatch.setattr(
        choice, "donor_groups", lambda table, size, count: greedy(table, size, count)
    )
    monkeypatch.setitem(globals(), "donor_groups", choice.donor_groups)
    with pytest.raises(AssertionError):
        check_groups()


def greedy(table: list[list[float]], size: int, count: int) -> list[Group]:
    found: list[Group] = []
    for first in sorted(range(len(table) - size + 1), key=lambda s: -table[s][size - 1]):
        if all(abs(first - g.first) >= max(1, size - 1) for g in found) and len(found) < count:
            found.append(Group(first, first + size - 1, table[first][size - 1]))
    return sorted(found, key=lambda g: g.first)


def test_too_many_groups() -> None:
    with pytest.raises(UserError, match="no group of 9"):
        donor_groups(fading(8, ()), 9)
    with pytest.raises(UserError, match="3 groups of 4 do not fit"):
        donor_groups(fading(8, ()), 4, count=3)


def test_plans_are_the_rows_of_table_1() -> None:
    groups = donor_groups(fading(48, ()), 12)
    plans = transplant_plans(24, range(12, 23), groups, controls=range(25, 37))
    assert list(plans) == ["3-14", "14-25", "25-36", "36-47", "none", "fresh"]
    for name, plan in plans.items():
        assert plan.entries == E_TAMBA[name], name


def test_transplants_that_cannot_be() -> None:
    groups = [Group(0, 1, 0.5)]
    with pytest.raises(UserError, match="no neighbouring layers"):
        transplant_plans(8, [1, 3], groups)
    with pytest.raises(UserError, match="no layers 7 to 8"):
        transplant_plans(8, [7, 8], groups)
    with pytest.raises(UserError, match="keeps no layer"):
        transplant_plans(2, [0, 1], groups)


def check_correlations() -> None:
    stats = pytest.importorskip("scipy.stats")
    drawn = random.Random(1)
    scores = {
        name: [round(drawn.random(), digits) for _ in range(20)]
        for name, digits in (("a", 9), ("b", 1), ("c", 1))
    }
    found = choice.rank_correlations(scores)
    for x, y in itertools.product(scores, scores):
        want = stats.spearmanr(scores[x], scores[y]).statistic
        assert found["spearman"][x][y] == pytest.approx(want, abs=1e-12)
        want = stats.kendalltau(scores[x], scores[y]).statistic
        assert found["kendall"][x][y] == pytest.approx(want, abs=1e-12)


def test_rank_correlations_are_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    check_correlations()
    monkeypatch.setattr(choice, "_ranks", list)  # Pearson of the values themselves
    with pytest.raises(AssertionError):
        check_correlations()


def test_correlations_where_there_are_none() -> None:
    found = rank_correlations({"a": [1.0, 2.0, None], "b": [2.0, 2.0, 1.0], "c": [5.0, 1.0, 0.0]})
    assert found["kendall"]["a"]["b"] is None and found["spearman"]["a"]["b"] is None
    assert found["kendall"]["a"]["c"] == found["spearman"]["a"]["c"] == pytest.approx(-1.0)
    assert not math.isnan(found["spearman"]["c"]["b"] or math.nan)
