"""`tamba analyze` on models and recipes: what it writes, what it refuses, and what it draws."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tamba
import tamba.analyze as analyze_module
from models import tiny_config, tiny_model
from tamba import cli
from tamba.analyze import Reading, Settings, effects
from tamba.analyze.choice import Budget
from tamba.data import TokenBlocks, read_texts
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import ConvertOptions, read_plan
from tamba.plots import to_bytes
from tamba.plots.layers import heat_maps, plan_stack, score_bars
from tamba.recipe import read_recipe
from tokens import character_tokenizer

TEXT = "the cat is in the house, and the dog is not. " * 40


def checkpoint(folder: Path, stack: str | list[str] = "mixed") -> Path:
    tiny_model(stack, max_position_embeddings=512).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tamba", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


READ = ["--text", "text.txt", "--length", "32", "--tokens", "512"]


def test_a_model_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["analyze", "model", "--out", "out", *READ, "--scores", "states,drop"]
    assert call(monkeypatch, *arguments, "--convert", "2", "--effect-tokens", "64") == 0
    scores = json.loads((folder / "out" / "scores.json").read_text())
    for name in ("all_tokens", "last_token"):
        table = scores["angular_distance"][name]
        assert [len(row) for row in table] == [7, 6, 5, 4, 3, 2, 1]
        errors = scores["angular_distance"]["standard_error"][name]
        assert [len(row) for row in errors] == [7, 6, 5, 4, 3, 2, 1]
        assert all(0 <= v <= 1 for row in table for v in row)
    for name in (
        "own_turn",
        "column_mean",
        "block_influence",
        "kernel_change",
        "drop",
        "drop_loss",
    ):
        assert len(scores[name]) == len(scores["standard_error"][name]) == 7
    assert scores["own_turn"] == [row[0] for row in scores["angular_distance"]["all_tokens"]]
    text = scores["text"]
    assert (text["rows"], text["length"], text["effect_rows"]) == (16, 32, 2)
    assert 0 < text["tokens"] <= 512
    assert scores["rank_correlation"]["spearman"]["drop"]["drop"] == pytest.approx(1.0)
    # Attention is in layers 1, 3 and 5: the two whose loss moves least are converted.
    two = sorted(sorted((1, 3, 5), key=lambda i: scores["drop"][i])[:2])
    assert scores["choice"] == {"strategy": "lowest drop", "layers": two}
    plan = read_plan(folder / "out" / "plan.toml")
    assert list(plan.converted) == two and plan.n_layers == 7
    # No layer was converted to find this out, so any recipe may say into what.
    form = ConvertOptions(gate="random", norm="head")
    assert read_plan(folder / "out" / "plan.toml", form).convert == form
    first = (folder / "out" / "plan.toml").read_text().splitlines()[0]
    assert first.startswith("# model: 2 of 7 layers chosen by `lowest drop`")
    report = (folder / "out" / "report.md").read_text()
    assert "Chosen by `lowest drop`" in report and "| drop |" in report
    found = {p.name for p in (folder / "out").iterdir()}
    pictures = {f"{n}.{e}" for n in ("distances", "scores", "plan") for e in ("png", "svg")}
    assert found == pictures | {"scores.json", "plan.toml", "report.md", "effects.jsonl"}
    assert not list(folder.glob(".*.partial"))


@pytest.mark.slow
def test_numbers_are_those_of_the_pass(folder: Path) -> None:
    found = tamba.analyze("model", "out", reading=Reading(["text.txt"], 32, 512))
    model, tokenizer = tamba.load("model")
    texts = read_texts("text.txt")
    blocks = TokenBlocks.from_texts(texts, tokenizer, 32, max_tokens=512)
    again = tamba.analyze.state_scores(model, blocks)
    assert torch.equal(
        found.states.all_tokens.mean.nan_to_num(), again.all_tokens.mean.nan_to_num()
    )
    assert found.states.sequences == 16


def test_a_call_that_was_cut_off_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(["text.txt"], 32, 256)
    settings = Settings(("drop",), effect_tokens=64, budget=Budget(1))
    right, done = effects._climbed, []

    def counting(*arguments: object):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments[2])
        return right(*arguments)

    monkeypatch.setattr(effects, "_climbed", counting)
    with pytest.raises(KeyboardInterrupt):
        tamba.analyze("model", "out", reading=reading, settings=settings)
    assert not (folder / "out").exists()
    first = list(done)
    done.clear()
    tamba.analyze("model", "out", reading=reading, settings=settings)
    assert sorted(first + done) == list(range(7)) and len(done) == 3


@pytest.mark.slow
def test_a_donor_and_the_plans_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(folder / "donor", ["mamba1", "mamba2"] * 3)
    into = ["--groups", "2", "--into", "model", "--replace", "3-5"]
    assert call(monkeypatch, "analyze", "donor", "--out", "out", *READ, *into) == 0
    scores = json.loads((folder / "out" / "scores.json").read_text())
    names = [f"{g['first']}-{g['last']}" for g in scores["groups"]]
    assert names and "choice" not in scores and not (folder / "out" / "plan.toml").exists()
    plans = {p.stem: read_plan(p) for p in (folder / "out" / "plans").iterdir()}
    assert set(plans) == {*names, "none", "fresh"}
    assert [str(e) for e in plans["none"].entries] == ["keep 0", "keep 1", "keep 2", "keep 6"]
    for plan in plans.values():
        plan.check(7, 6)


RECIPE = """
name = "small"
[teacher]
path = "model"
[data]
train = ["text.txt"]
heldout = ["text.txt"]
length = 32
[analyze]
tokens = 64
measures = ["states", "swap"]
choose = "lowest swap"
convert = 1
"""


@pytest.mark.slow
def test_a_recipe_chooses_by_a_strategy(folder: Path) -> None:
    (folder / "text.txt").write_text("\n\n".join(TEXT[i:] for i in range(30)))
    (folder / "recipe.toml").write_text(RECIPE.replace('heldout = ["text.txt"]\n', ""))
    recipe = read_recipe(folder / "recipe.toml")
    tamba.analyze(recipe, folder / "analysis")
    scores = json.loads((folder / "analysis" / "scores.json").read_text())
    record = json.loads((folder / "analysis" / "record.json").read_text())
    assert record["scores"] == scores["swap"] and record["score_name"] == "swap"
    # Two rows to fit on and two to score on, however much text there is to train on.
    assert scores["text"]["rows"] == 4 and scores["text"]["effect_rows"] == 2
    plan = recipe.layer_plan(7, folder / "analysis")
    assert list(plan.converted) == scores["choice"]["layers"]
    report = tamba.build(recipe, folder / "student", analysis=folder / "analysis")
    made = [i for i, entry in enumerate(report.layers) if entry.startswith("convert")]
    assert made == list(plan.converted) and len(made) == 1


@pytest.mark.parametrize("given", [["--scores", "drop"], ["--length", "512"], ["--recall"]])
def test_a_recipe_is_not_told_what_a_model_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list
) -> None:
    monkeypatch.setattr(analyze_module, "open_model", None)
    (folder / "recipe.toml").write_text(RECIPE)
    # Even what is the default: who says it means it to count.
    assert call(monkeypatch, "analyze", "recipe.toml", "--out", "out", *given) == 2
    said = capsys.readouterr().err
    assert given[0] in said and "--set" in said and "Traceback" not in said


def test_a_type_that_is_asked_for_reaches_effects(folder: Path) -> None:
    settings = Settings(("drop",), effect_tokens=64, budget=Budget(1))
    wide = Reading(["text.txt"], 32, 256, dtype="float32")
    found = tamba.analyze("model", "wide", reading=wide, settings=settings)
    assert found.text["effect_rows"] == 2
    plain = Reading(["text.txt"], 32, 256)
    short = tamba.analyze("model", "short", reading=plain, settings=settings)
    model, tokenizer = tamba.load("model", torch.float32)
    blocks = TokenBlocks.from_texts(read_texts("text.txt"), tokenizer, 32, max_tokens=256)
    text = TokenBlocks(blocks.tokens[2:4], blocks.starts[2:4], 64)
    want = {i: c.kl for i, c in effects.drop_scores(model, text, dtype=None).items()}
    assert {i: c.kl for i, c in found.changes["drop"].items()} == want
    assert {i: c.kl for i, c in short.changes["drop"].items()} != want


def test_a_student_that_kept_some_attention(folder: Path) -> None:
    """Scores of some layers are written; a choice that needs all is refused before any work."""
    checkpoint(folder / "teacher", ["attention"] * 3)
    checkpoint(folder / "student", ["attention", "mamba2", "mamba2"])
    reading = Reading(["text.txt"], 32, 256, student="student")
    settings = Settings(("aligned", "restore"), effect_tokens=32)
    found = tamba.analyze("teacher", "some", reading=reading, settings=settings)
    assert found.choice is None and not (folder / "some" / "plan.toml").exists()
    scores = json.loads((folder / "some" / "scores.json").read_text())
    for name in ("aligned", "restore"):
        assert [value is None for value in scores[name]] == [True, False, False]
    # Kept, the layer without a score is in nobody's way.
    kept = replace(settings, measures=("restore",), always_keep=(0,))
    found = tamba.analyze("teacher", "kept", reading=reading, settings=kept)
    assert found.choice is not None and found.choice.strategy == "lowest restore"
    assert len(found.choice.layers) == 1 and 0 not in found.choice.layers
    also = replace(settings, measures=("aligned", "states"))
    found = tamba.analyze("teacher", "also", reading=reading, settings=also)
    assert found.choice is not None and found.choice.strategy == "lowest own_turn"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"choose": "lowest aligned"}, "layer 0 has no score 'aligned'"),
        ({"budget": Budget(1)}, "has not converted every layer"),
    ],
)
def test_a_choice_that_no_score_allows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict, words: str
) -> None:
    monkeypatch.setattr(analyze_module, "load_model", None)
    checkpoint(folder / "teacher", ["attention"] * 3)
    checkpoint(folder / "student", ["attention", "mamba2", "mamba2"])
    reading = Reading(["text.txt"], 32, 256, student="student")
    with pytest.raises(UserError, match=words):
        tamba.analyze("teacher", "out", reading=reading, settings=Settings(("aligned",), **given))


def test_a_recipe_without_measures_is_drawn_where_it_can_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = RECIPE.replace('heldout = ["text.txt"]\n', "").splitlines()[:-3]
    (folder / "small.toml").write_text("\n".join([*lines, 'score = "own_turn"', "convert = 1"]))
    recipe = read_recipe(folder / "small.toml")
    tamba.analyze(recipe, folder / "drawn")
    names = {"scores.json", "record.json", "plan.toml"}
    pictures = {f"{n}.{e}" for n in ("distances", "scores", "plan") for e in ("png", "svg")}
    assert {p.name for p in (folder / "drawn").iterdir()} == names | pictures
    scores = json.loads((folder / "drawn" / "scores.json").read_text())
    tables = scores["angular_distance"]
    for name in ("all_tokens", "last_token"):
        assert [len(row) for row in tables[name]] == [7, 6, 5, 4, 3, 2, 1]
        assert [len(row) for row in tables["standard_error"][name]] == [7, 6, 5, 4, 3, 2, 1]
    turns, errors = tables["all_tokens"], tables["standard_error"]["all_tokens"]
    known = [i for i, value in enumerate(scores["own_turn"]) if value is not None]
    assert [scores["own_turn"][i] for i in known] == [turns[i][0] for i in known]
    assert [scores["standard_error"]["own_turn"][i] for i in known] == [errors[i][0] for i in known]
    monkeypatch.setattr(analyze_module, "can_draw", lambda: False)
    tamba.analyze(recipe, folder / "plain")
    assert {p.name for p in (folder / "plain").iterdir()} == names
    for name in ("scores.json", "plan.toml"):
        assert (folder / "drawn" / name).read_text() == (folder / "plain" / name).read_text()


def test_a_recipe_that_cannot_be_is_refused_before_the_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analyze_module, "load_model", None)
    lines = RECIPE.replace('heldout = ["text.txt"]\n', "").splitlines()[:-3]
    quick = "\n".join([*lines, 'score = "own_turn"', "convert = 1"])
    (folder / "text.txt").write_text(TEXT[:40])
    (folder / "short.toml").write_text(quick)
    with pytest.raises(UserError, match="cannot be divided into text to fit"):
        tamba.analyze(read_recipe(folder / "short.toml"), folder / "out")
    checkpoint(folder / "single", ["attention"])
    (folder / "text.txt").write_text(TEXT)
    (folder / "one.toml").write_text(quick.replace("model", "single", 1))
    with pytest.raises(UserError, match=r"one.toml.*analyze.score.*there is one"):
        tamba.analyze(read_recipe(folder / "one.toml"), folder / "out")
    assert not (folder / "out").exists()


WRONG = {
    "unknown score": (["--scores", "sttes"], "did you mean 'states'"),
    "no such layer to keep": (["--keep", "9"], "there is no layer 9"),
    "too many layers": (["--convert", "4"], "4 layers are to be replaced and 3 can be"),
    "strategy without its score": (["--choose", "lowest drop"], "there is no score 'drop'"),
    "unknown strategy": (["--choose", "hihgest drop"], "there is none called 'hihgest'"),
    "plan of no such layer": (["--choose", "explicit 8"], "there is no layer 8"),
    "text too short": (["--length", "400", "--tokens", "400"], None),
    "row beyond the positions": (["--length", "513", "--tokens", "600"], "beyond the model's 512"),
    "fewer tokens than a row": (["--tokens", "16"], "do not fill one row of 32"),
    "aligned without a student": (["--scores", "aligned"], "takes a converted student"),
    "recall without effects": (["--recall"], "ask for drop too"),
    "group larger than the model": (["--groups", "8"], "no group of 8"),
    "donor of another width": (
        ["--groups", "2", "--into", "wide", "--replace", "0-1"],
        "is 32 wide and the teacher 40",
    ),
    "donor of another tokenizer": (
        ["--groups", "2", "--into", "other", "--replace", "0-1"],
        "has another tokenizer",
    ),
    "nothing kept": (
        ["--groups", "2", "--into", "model", "--replace", "0-6"],
        "keeps no layer of the teacher",
    ),
    "layers that the teacher lacks": (
        ["--groups", "2", "--into", "model", "--replace", "5-7"],
        "no layers 5 to 7",
    ),
    "layers of no teacher": (["--groups", "2", "--replace", "3-5"], "names layers of no model"),
    "groups for nothing": (["--groups", "2", "--into", "model"], "which layers groups stand for"),
    "one row for effects": (
        ["--scores", "drop,least_squares", "--tokens", "32"],
        "cannot be divided into text to fit",
    ),
    "a student of another depth": (
        ["--scores", "aligned", "--student", "donor"],
        "has 3 layers and the teacher 7",
    ),
    "no run of layers": (["--groups", "2", "--replace", "5..7"], "is no run of layers"),
    "a run downwards": (["--groups", "2", "--replace", "7-5"], "'7-5' is no run of layers"),
    "fewer layers than none": (["--convert", "-1"], "'--convert'"),
    "settings of a recipe": (["--set", "analyze.tokens=3"], "changes a recipe"),
    "unknown type": (["--dtype", "int8"], "'int8' is not one to compute in"),
    "missing text": (["--text", "nowhere.txt"], "no such file"),
    "a folder in a file": (["--out", "text.txt/out"], "cannot be written (Not a directory)"),
    "no folder for effects": (
        ["--out", "text.txt/out", "--scores", "drop"],
        "cannot be written (Not a directory)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_told_before_any_work(
    folder: Path,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    arguments, words = WRONG[case]
    monkeypatch.setattr(analyze_module, "load_model", None)  # nobody came as far as the weights
    if "wide" in arguments:
        config = tiny_config("attention", hidden_size=40)
        TambaForCausalLM(config).save_pretrained("wide")
    if "donor" in arguments:
        checkpoint(folder / "donor", "mamba1")
    if "other" in arguments:
        shutil.copytree(made, folder / "other")
        file = folder / "other" / "tokenizer.json"
        file.write_text(file.read_text().replace('"a"', '"ä"'))
    if case == "text too short":
        (folder / "text.txt").write_text(TEXT[:300])
        words = "less than one block of 400"
    read = [f for f in zip(READ[::2], READ[1::2], strict=True) if f[0] not in arguments]
    given = [word for pair in read for word in pair]
    assert call(monkeypatch, "analyze", "model", "--out", "out", *given, *arguments) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert not (folder / "out").exists()


def test_text_is_set_aside_only_where_layers_are_fitted(folder: Path) -> None:
    """One row is enough to leave layers out; with more, the rows scored are the same either way."""
    alone, some = Reading(["text.txt"], 32, 32), Reading(["text.txt"], 32, 256)
    found = tamba.analyze("model", "one", reading=alone, settings=Settings(("drop",)))
    assert found.text["effect_rows"] == 1 and found.changes["drop"][0].kl_error is None
    told = Settings(("drop",), effect_tokens=96)
    plain = tamba.analyze("model", "plain", reading=some, settings=told)
    told = replace(told, measures=("drop", "least_squares"))
    fitted = tamba.analyze("model", "fitted", reading=some, settings=told)
    assert plain.changes["drop"] == fitted.changes["drop"]
    assert plain.text["effect_rows"] == fitted.text["effect_rows"] == 3
    told = Settings(("drop",), effect_tokens=192)
    more = tamba.analyze("model", "more", reading=some, settings=told)
    assert more.text["effect_rows"] == 6


@pytest.mark.parametrize("given", [{"choose": "uniform"}, {"budget": Budget(2)}])
def test_nothing_to_convert_is_said(folder: Path, given: dict) -> None:
    checkpoint(folder / "donor", "mamba1")
    with pytest.raises(UserError, match="attention to convert, and there is none"):
        tamba.analyze(
            "donor", "out", reading=Reading(["text.txt"], 32, 64), settings=Settings(**given)
        )


def test_as_little_text_as_there_can_be(folder: Path) -> None:
    """Two tokens give no kernel and no error, and pictures all the same."""
    found = tamba.analyze("model", "out", reading=Reading(["text.txt"], 2, 2))
    assert found.scores()[0]["kernel_change"] == [None] * 7
    assert json.loads((folder / "out" / "scores.json").read_text())["own_turn"][0] is not None


def test_a_model_of_one_layer(folder: Path) -> None:
    checkpoint(folder / "one", ["attention"])
    with pytest.raises(UserError, match=r"^one: has 1 layer, and layers are compared"):
        tamba.analyze("one", "out", reading=Reading(["text.txt"], 32, 512))


# Pictures.


def table(n_layers: int) -> list[list[float]]:
    return [[0.4 * n / n_layers for n in range(1, n_layers - i + 1)] for i in range(n_layers)]


@pytest.mark.parametrize("n_layers", [2, 24, 64])
def test_heat_maps_show_every_cell_in_the_papers_place(n_layers: int) -> None:
    figure = heat_maps({"all tokens": table(n_layers), "last token": table(n_layers)}, "Distance")
    first, second, scale = figure.axes
    (image,) = first.get_images()
    cells = image.get_array()
    assert image.origin == "lower" and (~cells.mask).sum() == n_layers * (n_layers + 1) // 2
    # x is l, y is n, and n = 1 lies lowest.
    assert cells[0, n_layers - 1] == pytest.approx(0.4 / n_layers)
    assert cells[n_layers - 1, 0] == pytest.approx(0.4)
    assert image.get_extent() == [-0.5, n_layers - 0.5, 0.5, n_layers + 0.5]
    assert first.get_xlabel() == "layer l" and first.get_ylabel().startswith("n")
    assert image.get_clim() == second.get_images()[0].get_clim() == (0.0, pytest.approx(0.4))
    # Darker is further.
    dark, light = (image.cmap(x)[:3] for x in (1.0, 0.0))
    assert sum(dark) < 0.6 < 2.5 < sum(light)
    assert scale.get_ylabel() == "angle, half turns"
    assert figure.get_label().startswith("Distance: mean angle")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_drawn_twice_is_the_same_bytes(kind: str) -> None:
    figure = heat_maps({"all tokens": table(24), "last token": table(24)}, "Distance")
    assert to_bytes(figure, kind) == to_bytes(figure, kind)


def test_bars_and_stack() -> None:
    values = [None, 1.0, 0.5, 0.001]
    figure = score_bars({"drop_loss": (values, [None, 0.1, None, 0.0])}, "Scores", chosen=[3])
    (ax,) = figure.axes
    bars = [patch for patch in ax.patches if patch.get_height() > 0]
    assert [b.get_x() + b.get_width() / 2 for b in bars] == pytest.approx([1.0, 2.0, 3.0])
    assert ax.get_yscale() == "log" and ax.get_title("left") == "drop loss, log scale"
    assert bars[2].get_facecolor() != bars[1].get_facecolor()
    assert "drop_loss is highest at layer 1" in figure.get_label()
    stack = plan_stack([("keep", 0), ("transplant", 25), ("convert", 2)], "Plan")
    words = [text.get_text() for text in stack.axes[0].texts]
    assert {"0", "25", "2", "keep 1", "transplant 1", "convert 1"} <= set(words)
    assert "bottom first: keep 0, transplant 25, convert 2" in stack.get_label()


def test_a_ratio_at_its_limit_does_not_flatten_the_others() -> None:
    values = [50.0, 2.0, 1.0, 50.0, None]
    lines = {"drop_ratio": (values, [None, 0.5, 0.1, None, None])}
    (ax,) = score_bars(lines, "Scores", limits={"drop_ratio": 50.0}).axes
    # Two errors above the highest inside; nothing is left empty below.
    assert ax.get_ylim() == pytest.approx((0.0, 1.25 * 3.0))
    (marks,) = [c for c in ax.collections if len(c.get_offsets()) == 2]
    assert [x for x, _ in marks.get_offsets()] == [0.0, 3.0]
    assert ax.get_title("left") == "drop ratio, marked: 50 or more"
    (plain,) = score_bars(lines, "Scores").axes
    assert plain.get_ylim()[1] > 50.0
    only = {"drop_ratio": ([50.0, 50.0], [None, None])}
    (ax,) = score_bars(only, "Scores", limits={"drop_ratio": 50.0}).axes
    assert ax.get_ylim()[1] > 50.0 and ax.get_title("left") == "drop ratio"
    log = {"drop_ratio": ([50.0, 2.0, 0.01], [None] * 3)}
    (ax,) = score_bars(log, "Scores", limits={"drop_ratio": 50.0}).axes
    assert ax.get_yscale() == "log" and ax.get_ylim()[1] < 5.0
