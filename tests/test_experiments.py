"""Rows of experiments are recipes that can be read; the rest of them needs a GPU."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from tamba.errors import UserError
from tamba.recipe import read_recipe

ROOT = Path(__file__).parent.parent / "experiments"


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("mamba_in_llama")


@pytest.fixture
def asked(tmp_path: Path) -> argparse.Namespace:
    for name in ("teacher", "train.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text("")
    return argparse.Namespace(
        train=[str(tmp_path / "train.jsonl")],
        heldout=[str(tmp_path / "heldout.jsonl")],
        teacher=str(tmp_path / "teacher"),
        set=["name=mine"],
    )


def test_rows_are_recipes(llama: ModuleType, asked: argparse.Namespace) -> None:
    converted = set()
    for name, row in llama.ROWS.items():
        recipe = read_recipe(llama.RECIPE, llama.overrides(row, asked, seed=3))
        assert (recipe.name, recipe.seed) == ("mine", 3), name
        kinds = [stage.stage for stage in recipe.train]
        assert kinds[llama.ALIGN] == "align" and kinds[llama.DISTIL] == "distil"
        if recipe.build.plan != "analyze":
            plan = recipe.layer_plan(llama.LAYERS)
            assert len(plan.entries) == llama.LAYERS
            converted.add(len(plan.converted))
        assert row.finding
    assert converted == {23}  # placements are compared at one share of attention


def test_a_wrong_row_shows(llama: ModuleType, asked: argparse.Namespace) -> None:
    with pytest.raises(UserError, match="did you mean"):
        read_recipe(llama.RECIPE, llama.overrides(llama.Row("", ("analyze.convrt=3",)), asked, 0))


def test_a_record_keeps_one_row_of_a_name_and_seed(llama: ModuleType, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    for row in ({"row": "a", "seed": 0, "x": 1}, {"row": "a", "seed": 1}, {"row": "a", "seed": 0}):
        llama.keep(row, record)
    assert json.loads(record.read_text()) == [{"row": "a", "seed": 1}, {"row": "a", "seed": 0}]
