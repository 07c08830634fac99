from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamba.errors import UserError
from tamba.plan import (
    E_TAMBA,
    ConvertOptions,
    LayerPlan,
    PlanEntry,
    e_tamba_plan,
    parse_entries,
    preset_plan,
    read_plan,
    uniform_plan,
    write_plan,
)

ENTRIES = st.builds(
    PlanEntry, st.sampled_from(["keep", "transplant"]), st.integers(0, 200), note=st.text()
) | st.one_of(
    st.builds(
        PlanEntry,
        st.just("convert"),
        st.integers(0, 200),
        st.sampled_from([None, "mamba1", "mamba2"]),
    ),
    st.builds(
        PlanEntry,
        st.just("reinitialize"),
        st.integers(0, 200),
        source=st.sampled_from([None, "teacher", "donor"]),
    ),
)


@given(st.lists(ENTRIES, min_size=1, max_size=8), st.sampled_from(["teacher", "donor"]))
def test_written_plans_read_back(tmp_path_factory, entries, head) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    plan = LayerPlan(tuple(entries), ConvertOptions(conv="random", d_conv=3), head=head)
    write_plan(plan, path)
    assert read_plan(path) == plan
    assert [p.name for p in path.parent.iterdir()] == ["plan.toml"]


def test_the_file_is_for_people(tmp_path: Path) -> None:
    plan = LayerPlan(
        (PlanEntry("keep", 0, note="loss 3.21\nwithout it"), PlanEntry("convert", 1, "mamba1"))
    )
    text = plan.to_toml()
    assert '  "keep 0",            # loss 3.21 without it\n  "convert 1 mamba1",\n]' in text
    # A person may comment a line out: the layer is dropped.
    (tmp_path / "plan.toml").write_text(text.replace('  "keep 0"', '  # "keep 0"'))
    edited = read_plan(tmp_path / "plan.toml")
    assert edited.entries == (PlanEntry("convert", 1, "mamba1"),)
    assert edited.dropped(3) == (0, 2)


def test_a_plan_may_leave_the_form_of_mixers_to_the_recipe(tmp_path: Path) -> None:
    plan = uniform_plan(2, 0.5)
    (tmp_path / "plan.toml").write_text(plan.to_toml(options=False))
    wanted = ConvertOptions(gate="random", norm="head")
    assert read_plan(tmp_path / "plan.toml", wanted) == replace(plan, convert=wanted)
    # Where both say it, all they differ in is named, in one order.
    write_plan(plan, tmp_path / "plan.toml")
    with pytest.raises(UserError) as told:
        read_plan(tmp_path / "plan.toml", wanted)
    assert "convert.gate: is 'none' here and 'random' in the recipe, norm 'none' and 'head'" in str(
        told.value
    )


def kept(plan: LayerPlan) -> list[int]:
    return [e.index for e in plan.entries if e.action == "keep"]


# The layers that stayed attention in the released checkpoints, by their share.
PUBLISHED = {
    0.5: list(range(1, 32, 2)),
    0.25: list(range(3, 32, 4)),
    0.125: [7, 15, 23, 31],
    0.0: [],
}


@pytest.mark.parametrize("share", PUBLISHED)
def test_uniform_plan_gives_the_published_layers(share: float) -> None:
    plan = uniform_plan(32, share)
    assert kept(plan) == PUBLISHED[share]
    assert plan.converted == tuple(i for i in range(32) if i not in PUBLISHED[share])
    assert [e.index for e in plan.entries] == list(range(32))


def test_uniform_plan_of_other_sizes() -> None:
    assert [i for i in range(32) if i not in kept(uniform_plan(32, 0.75))] == list(range(0, 32, 4))
    assert kept(uniform_plan(28, 0.5)) == list(range(1, 28, 2))
    assert kept(uniform_plan(30, 1)) == list(range(30))
    with pytest.raises(UserError, match="cannot keep a share of"):
        uniform_plan(32, 1.5)


@given(st.integers(2, 100), st.integers(0, 100))
def test_uniform_plan_is_even(n: int, percent: int) -> None:
    layers = kept(uniform_plan(n, percent / 100))
    assert abs(len(layers) - n * percent / 100) <= 0.5 + 1e-9
    if layers:
        assert layers[-1] == n - 1
    if len(layers) < n:
        assert 0 not in layers
    gaps = {b - a for a, b in zip([-1, *layers], layers, strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def layers_of(name: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for entry in e_tamba_plan(name).entries:
        found.setdefault(entry.action, []).append(entry.index)
    return found


def test_e_tamba_compositions() -> None:
    bottom, top = list(range(12)), [23]
    assert layers_of("12+12+1") == {"keep": bottom + top, "transplant": list(range(25, 37))}
    assert layers_of("11+12+1") == {"keep": bottom[:11] + top, "transplant": list(range(25, 37))}
    # Table 1: nothing, fresh layers, and the four groups of twelve.
    assert layers_of("none") == {"keep": bottom + top}
    assert layers_of("fresh") == {"keep": bottom + top, "reinitialize": list(range(25, 37))}
    for name, first in (("3-14", 3), ("14-25", 14), ("25-36", 25), ("36-47", 36)):
        assert layers_of(name) == {
            "keep": bottom + top,
            "transplant": list(range(first, first + 12)),
        }


# Parameters of a layer of Pythia-1.4B and of Mamba-1.4B, of a table of 50,304 rows, of a LayerNorm:
# with the two models' known totals as a check on them.
PYTHIA, MAMBA, TABLE, NORM = 50_358_272, 26_441_728, 103_022_592, 4_096


def test_e_tamba_parameter_counts() -> None:
    assert 24 * PYTHIA + 2 * TABLE + NORM == 1_414_647_808
    assert 48 * MAMBA + 50_280 * 2048 + 2048 == 1_372_178_432
    totals = {}
    for name in E_TAMBA:
        plan = e_tamba_plan(name)
        plan.check(24, 48)
        layers = sum(PYTHIA if e.source == "teacher" else MAMBA for e in plan.entries)
        totals[name] = layers + 2 * TABLE + NORM
    assert totals["12+12+1"] == 1_178_007_552
    assert totals["11+12+1"] == 1_127_649_280
    assert totals["none"] == 860_706_816
    assert totals["fresh"] == totals["3-14"] == totals["36-47"] == totals["12+12+1"]


def test_entries_in_words() -> None:
    lines = ["keep 0", "convert 1", "convert 2 mamba1", "transplant 25", "reinitialize 12"]
    entries = parse_entries([*lines, "reinitialize teacher 3"], "plan")
    assert [str(e) for e in entries[:5]] == lines
    assert [e.source for e in entries] == ["teacher"] * 3 + ["donor"] * 2 + ["teacher"]
    plan = LayerPlan(entries)
    assert plan.converted == (1, 2) and plan.needs_donor
    assert [plan.mixer_of(e) for e in entries[1:3]] == ["mamba2", "mamba1"]


@pytest.mark.parametrize(
    "line, expected",
    {
        "": "plan[1]: is empty",
        "kep 1": "unknown action 'kep'; did you mean 'keep'?",
        "keep": "expected a layer number after 'keep', found nothing",
        "keep one": "found 'one'",
        "keep -1": "found '-1'",
        "keep 1 mamba2": "'mamba2' after 'keep 1' means nothing",
        "convert 1 mamba3": "unknown mixer 'mamba3'; did you mean 'mamba",
        "keep donor 1": "'keep' takes a layer of the teacher, not of the donor",
    }.items(),
)
def test_wrong_entries(line: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_entries(["keep 0", line], "plan")
    assert expected in str(caught.value) and str(caught.value).startswith("plan[1]")


def test_a_plan_must_fit_its_models() -> None:
    plan = LayerPlan(parse_entries(["keep 0", "convert 30", "transplant 5"], "p"), name="plan.toml")
    plan.check(31, 6)
    with pytest.raises(UserError) as caught:
        plan.check(30, 6)
    assert str(caught.value) == (
        "plan.toml: layers[1] 'convert 30': the teacher has no layer 30; its layers are 0 to 29"
    )
    with pytest.raises(UserError, match=r"layers\[2\] 'transplant 5': the donor has no layer 5"):
        plan.check(31, 5)
    with pytest.raises(UserError, match="needs a donor and there is none; add \\[donor\\]"):
        plan.check(31, None)
    with pytest.raises(UserError, match="head: needs a donor"):
        LayerPlan(plan.entries[:2], head="donor", name="plan.toml").check(31, None)
    with pytest.raises(UserError, match="has no layers"):
        LayerPlan(())


@pytest.mark.parametrize(
    "content, expected",
    {
        'layers = ["keep 0"]\nhed = "donor"': "hed: unknown key; did you mean 'head'?",
        'layers = ["keep 0"]\nhead = "doner"': "should be 'teacher' or 'donor', got \"doner\"",
        'layers = ["kep 0"]': "layers[0]: unknown action 'kep'",
        "layers = []": "has no layers",
        'head = "donor"': "layers: missing",
        'layers = ["keep 0"]\n[convert]\nconv = "x"': "convert.conv: should be",
        "layers = [": "is not valid TOML",
    }.items(),
)
def test_wrong_plan_files(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "plan.toml").write_text(content)
    with pytest.raises(UserError) as caught:
        read_plan(tmp_path / "plan.toml")
    assert expected in str(caught.value) and str(tmp_path / "plan.toml") in str(caught.value)


def test_presets_by_name() -> None:
    assert preset_plan("uniform 0.5", 32) == uniform_plan(32, 0.5)
    assert preset_plan("e-tamba  fresh", 24) == e_tamba_plan("fresh")
    for text in ("uniform", "uniform 2", "uniform 1/0", "e-tamba", "e-tamba 9", "other 1", ""):
        with pytest.raises(UserError):
            preset_plan(text, 32)
