"""Rows of experiments are recipes that can be read; the rest of them needs a GPU."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from hf_models import tiny_hf_model
from tamba.errors import UserError
from tamba.plan import LayerPlan, PlanEntry
from tokens import character_tokenizer

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
        out=str(tmp_path / "runs"),
        set=["name=mine"],
    )


def test_rows_are_recipes(llama: ModuleType, asked: argparse.Namespace) -> None:
    order = [*range(15, 30), *range(15)]
    bench, scored = llama.Bench(asked), Path(asked.out)
    scored.mkdir()
    (scored / "scores.json").write_text(json.dumps({"order": order}))
    options = llama.read_recipe(llama.RECIPE, bench.inputs).build.convert
    entries = (PlanEntry("convert" if i in order[:23] else "keep", i) for i in range(30))
    (scored / "plan.toml").write_text(LayerPlan(tuple(entries), options).to_toml())
    kept = {}
    for name, row in llama.ROWS.items():
        recipe = bench.recipe(row, seed=3, analysis=scored)
        assert (recipe.name, recipe.seed) == ("mine", 3), name
        kinds = [stage.stage for stage in recipe.train]
        assert kinds == [("least_squares", "align", "distil")[i] for i in row.stages], name
        plan = recipe.layer_plan(llama.LAYERS)
        kept[name] = sum(entry.action == "keep" for entry in plan.entries)
        if row.converted not in (None, 0):
            assert {e.index for e in plan.entries if e.action == "keep"} == {
                *order[row.converted :]
            }
        assert row.finding
    shares = {f"attention-{n}": k for n, k in (("50", 15), ("25", 7), ("12.5", 4), ("0", 0))}
    # Everything else is compared at a quarter of the attention.
    assert kept == dict.fromkeys(kept, 7) | shares | {"teacher-tuned": 30}


def test_the_recipe_for_recall_is_its_row(llama: ModuleType, asked: argparse.Namespace) -> None:
    row = llama.ROWS["recall-25"]
    changes = [*row.changes, *llama.RECALL, f"analyze.convert={row.converted}"]
    changes += ["name=distil-smollm2-recall", "train.1.tokens=3000000", "train.2.tokens=62000000"]
    changes += (teacher := [f"teacher.path={json.dumps(asked.teacher)}"])
    found = llama.read_recipe(llama.RECIPES / "distil-smollm2-recall.toml", teacher)
    assert found.model_dump() == llama.read_recipe(llama.RECIPE, changes).model_dump()
    assert found.model_dump() != llama.read_recipe(llama.RECIPE, changes[1:]).model_dump()


def test_rows_side_by_side_make_what_they_share_once(llama: ModuleType, tmp_path: Path) -> None:
    made = []

    def make(path: Path) -> None:
        path.mkdir()  # fails where two make it
        time.sleep(0.2)
        made.append(path)

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(llama.Shared(tmp_path).once, "text", {}, make) for _ in range(2)]
        found = [one.result() for one in asked]
    assert found[0] == found[1] and made == [found[0].path]


def test_a_wrong_row_shows(llama: ModuleType, asked: argparse.Namespace) -> None:
    with pytest.raises(UserError, match="did you mean"):
        llama.Bench(asked).recipe(llama.Row("", ("analyze.convrt=3",), None), 0, Path())


def test_a_row_from_text_to_figures(
    llama: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of a tiny teacher share what they have in common, and are not made again."""
    tiny_hf_model("llama").save_pretrained(tmp_path / "teacher")
    character_tokenizer().save_pretrained(tmp_path / "teacher")
    nouns = ["cat", "dog", "owl", "fox", "elk", "bee", "ant", "hen"]
    text = [f"the {a} is in the house of the {b}. " * 4 for a in nouns for b in nouns]
    lines = [json.dumps({"text": one}) for one in text]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(llama, "LAYERS", 3)
    small = ["data.length=64", "analyze.tokens=128", "analyze.convert=2", "evaluate.tokens=64"]
    small += ["evaluate.prompts=[]", "train.0.tokens=128", "train.1.tokens=128", "train.1.batch=2"]
    small += ["train.2.tokens=128", "train.2.batch=2"]
    given = ["--train", "text.jsonl", "--heldout", "text.jsonl", "--teacher", "teacher"]
    monkeypatch.chdir(tmp_path)
    asked = llama.parser().parse_args([*given, *(w for s in small for w in ("--set", s))])
    monkeypatch.setattr(llama, "ROWS", {
        "all": llama.Row("", converted=2),
        "fewer": llama.Row("", converted=2, stages=(llama.LEAST_SQUARES, llama.DISTIL)),
        "removed": llama.Row("", converted=1, others="drop", stages=(llama.DISTIL,)),
        "recall": llama.Row("", llama.LOOKUPS, 2, recall=True, stages=(llama.DISTIL,)),
    })  # fmt: skip
    # The probe of recall takes a tokenizer with words.
    chosen = ('analyze.measures=["least_squares"]', 'analyze.choose="lowest least_squares"')
    monkeypatch.setattr(llama, "RECALL", chosen)
    asked.teacher = str(tmp_path / "teacher")
    bench = llama.Bench(asked)
    rows = {name: bench.run(name, 0) for name in llama.ROWS}
    made = sorted(p.name.partition("-")[0] for p in (tmp_path / "runs/shared").glob("*.seconds"))
    assert made == sorted(
        ["train", "heldout", "analysis", "built", "built", "least_squares", "align"]
        + ["train", "analysis", "built"]  # with lookups
        + ["distil"] * 4
    )
    assert [len(row["stages"]) for row in rows.values()] == [3, 2, 1, 1]
    assert rows["all"]["tokens"] == 128 + 128 + 128
    assert rows["removed"]["plan"] == [
        f"keep {i}" for i in (0, 1, 2) if f"keep {i}" in rows["removed"]["plan"]
    ]
    assert len(rows["removed"]["plan"]) == 2 and rows["removed"]["converted"] == 0
    again = bench.run("all", 0)
    assert again["ratio"] == rows["all"]["ratio"] and again["seconds"] == rows["all"]["seconds"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["shrot"], "no row called shrot"),
        (["sft"], "need --prompts and --preferences"),
        (["short", "--train", "nowhere.jsonl"], "no such file or folder"),
        (["short", "--set", "data.lenth=3"], "did you mean 'length'"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    given: list[str],
    said: str,
    llama: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rows", *given, "--teacher", str(tmp_path / "teacher")])
    with pytest.raises(SystemExit) as ended:
        llama.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_record_keeps_one_row_of_a_name_and_seed(llama: ModuleType, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    for row in ({"row": "a", "seed": 0, "x": 1}, {"row": "a", "seed": 1}, {"row": "a", "seed": 0}):
        llama.keep(row, record)
    assert json.loads(record.read_text()) == [{"row": "a", "seed": 1}, {"row": "a", "seed": 0}]


def test_rows_side_by_side_lose_no_other_of_the_record(llama: ModuleType, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    with ThreadPoolExecutor(8) as pool:
        kept = [pool.submit(llama.keep, {"row": "a", "seed": i}, record) for i in range(32)]
        for one in kept:
            one.result()
    assert sorted(row["seed"] for row in json.loads(record.read_text())) == [*range(32)]


def test_the_picture_of_findings_shows_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    figures = importlib.import_module("mamba_in_llama_figures")

    def row(name: str, seed: int, ratio: float) -> dict[str, object]:
        return {"row": name, "seed": seed, "ratio": ratio, "kl": ratio / 4, "attention_kept": 0.25}

    rows = [row("short", i, 1.1 + i / 10) for i in range(3)]
    assert figures.findings(rows) is None  # nothing to compare with
    rows += [row("no-align", 0, 1.4), row("removed", 0, 40.0)]
    figure = figures.findings(rows)
    for axes, one in zip(figure.axes, (1.0, 0.25), strict=True):
        drawn = [text.get_text() for text in axes.texts if text.get_text()[0].isdigit()]
        assert drawn == [f"{value * one:.2f}" for value in (1.2, 1.4, 40.0)]
        # What is far off is an arrow where the others end.
        assert [line.get_marker() for line in axes.lines if line.get_markersize() > 5] == [*"||>"]
        assert axes.get_xlim()[1] < 3 * one
    shares = [row(name, 0, 2.0) | {"tokens": 9} for name in ("attention-12.5", "attention-start")]
    assert figures.budgets(shares) == {9: shares[:1]}


@pytest.mark.parametrize(
    ("held", "said"), [(None, "cannot be read"), ("", "cannot be read"), ("[]", "no row"),
                       ('{"a": 1}', "no record")],
)  # fmt: skip
def test_a_picture_of_no_record_is_refused(
    held: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = tmp_path / "record.json"
    if held is not None:
        record.write_text(held)
    monkeypatch.syspath_prepend(str(ROOT))
    figures = importlib.import_module("mamba_in_llama_figures")
    monkeypatch.setattr("sys.argv", ["figures", str(record), "--out", str(tmp_path / "made")])
    with pytest.raises(SystemExit) as ended:
        figures.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and "record.json" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "made").exists()
