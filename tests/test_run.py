"""The order of steps and what is left out, with stand-ins for the steps; and the whole way."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tamba
from hf_models import tiny_hf_model
from models import tiny_config, tiny_model
from tamba import run as run_module
from tamba.errors import UserError
from tamba.evaluate import perplexity
from tamba.model.modeling import TambaForCausalLM
from tamba.recipe import Recipe, read_recipe
from tamba.report import read_record
from tamba.run import Step, run, steps_of
from tamba.text import read_text
from tokens import character_tokenizer

RECIPE = """
name = "small"
[teacher]
path = "teacher"
[data]
train = ["text.txt"]
heldout = ["text.txt"]
length = 16
heldout_share = 0.3
[analyze]
convert = 1
[[train]]
stage = "align"
tokens = 100
lr = 1e-3
[evaluate]
tokens = 64
prompts = ["hi"]
new_tokens = 4
"""
ALL = ["text", "heldout", "analyze", "build", "train", "evaluate"]
FITTED = ["analyze", "build", "train", "evaluate"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(["attention"] * 3).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "weights").write_text("1")
    (tmp_path / "text.txt").write_text("Some text.")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


class Steps:
    """Stand-ins for the work of every step, and what was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.drawn = 0
        self.fail_in = ""
        real = steps_of

        def stand_ins(recipe: Recipe) -> list[Step]:
            drawn = {"drawn": ("page.html",), "draw": self.draw}
            return [
                dataclasses.replace(s, work=self.work(s), **(drawn if s.draw else {}))
                for s in real(recipe)
            ]

        monkeypatch.setattr(run_module, "steps_of", stand_ins)

    def work(self, step: Step):
        def write(recipe: Recipe, out: Path) -> None:
            if step.name == self.fail_in:
                raise KeyboardInterrupt
            self.done.append(step.name)
            (out / step.artefact).write_text(step.name)
            if step.draw:
                self.draw(recipe, out)

        return write

    def draw(self, recipe: Recipe, out: Path) -> None:
        self.drawn += 1
        (out / "page.html").write_text((out / "report.json").read_text())

    def run(self, folder: Path, *overrides: str, **options: bool) -> list[str]:
        """The steps that a run of the recipe does."""
        self.done.clear()
        run(read_recipe(folder / "recipe.toml", overrides), folder / "out", **options)
        return list(self.done)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def test_second_run_does_nothing(folder: Path, steps: Steps) -> None:
    assert steps.run(folder) == ALL
    assert steps.run(folder) == []
    assert steps.run(folder, force=True) == ALL
    assert (folder / "out" / "recipe.toml").read_text() == RECIPE


CHANGES = {
    "analyze.convert=2": FITTED,
    "build.convert.conv=random": FITTED,
    "train.0.lr=2e-3": ["train", "evaluate"],
    "evaluate.new_tokens=5": ["evaluate"],
    "output.shard_bytes=1000": ["build", "train", "evaluate"],
    "output.html=false": ["evaluate"],
    "data.length=32": ALL,
    "data.rows=1": ALL,
    "data.heldout_share=0.4": ALL,
    "seed=1": ALL,
    # What is no longer divided is fitted to as a whole.
    'evaluate.texts=["other.txt"]': ALL,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_repeats_what_rests_on_it(folder: Path, steps: Steps, change: str) -> None:
    (folder / "other.txt").write_text("one")
    steps.run(folder)
    assert steps.run(folder, change) == CHANGES[change]
    assert steps.run(folder, change) == []


APART = ('data.heldout=["other.txt"]', "data.length=64")
APART_CHANGES = {
    'data.heldout=["third.txt"]': ["heldout", "evaluate"],
    'evaluate.texts=["third.txt"]': ["heldout", "evaluate"],
    # Nothing is divided.
    "data.heldout_share=0.4": ["evaluate"],
    "data.lookup_share=0.5": ["text", *FITTED],
    'data.train=["third.txt"]': ["text", *FITTED],
}


@pytest.mark.parametrize("change", APART_CHANGES)
def test_other_text_to_measure_on_trains_nothing(folder: Path, steps: Steps, change: str) -> None:
    for name in ("other.txt", "third.txt"):
        (folder / name).write_text(name)
    assert steps.run(folder, *APART) == ALL
    assert steps.run(folder, *APART, change) == APART_CHANGES[change]
    assert steps.run(folder, *APART, change) == []


def test_text_to_measure_on_that_changes_trains_nothing(folder: Path, steps: Steps) -> None:
    (folder / "other.txt").write_text("one")
    steps.run(folder, *APART)
    (folder / "other.txt").write_text("another one")
    assert steps.run(folder, *APART) == ["heldout", "evaluate"]
    # Cut off between the two, it goes on there.
    (folder / "other.txt").write_text("a third")
    steps.fail_in = "evaluate"
    with pytest.raises(KeyboardInterrupt):
        steps.run(folder, *APART)
    steps.fail_in = ""
    assert steps.run(folder, *APART) == ["evaluate"]


def test_a_teacher_writes_once(folder: Path, steps: Steps) -> None:
    (folder / "other.txt").write_text("one")
    written = ('data.train=["teacher-written"]', 'data.heldout=["teacher-written"]')
    assert steps.run(folder, *written) == ["write", *ALL]
    assert steps.run(folder, *written, 'evaluate.texts=["other.txt"]') == ALL
    assert steps.run(folder, *written, "data.written_tokens=99") == ["write", *ALL]


def test_a_lost_page_is_drawn_again_and_nothing_else_is_done(folder: Path, steps: Steps) -> None:
    steps.run(folder)
    assert steps.drawn == 1
    (folder / "out" / "page.html").unlink()
    assert steps.run(folder) == [] and steps.drawn == 2
    assert (folder / "out" / "page.html").read_text() == "evaluate"
    assert steps.run(folder) == [] and steps.drawn == 2


def test_changed_files_are_inputs(folder: Path, steps: Steps) -> None:
    steps.run(folder)
    (folder / "text.txt").write_text("Other text, longer.")
    assert steps.run(folder) == ALL
    (folder / "teacher" / "weights").write_text("22")
    assert steps.run(folder) == ALL
    # Comments are none.
    (folder / "recipe.toml").write_text("# a remark\n" + RECIPE)
    assert steps.run(folder) == []


def test_a_missing_artefact_is_made_again(folder: Path, steps: Steps) -> None:
    steps.run(folder)
    (folder / "out" / "student").unlink()
    # The report rests on the student; what it is made of is unchanged, so the others stay.
    assert steps.run(folder)[0] == "train"


def test_what_no_run_made_is_not_touched(folder: Path, steps: Steps) -> None:
    for name in ("student", "text", "report.json", "report.html", "plots", "recipe.toml"):
        (folder / "out" / name).mkdir(parents=True)
        (folder / "out" / name / "precious").write_text("mine")
        for force in (False, True):
            with pytest.raises(UserError, match=f"{name}: already exists and was not made by"):
                steps.run(folder, force=force)
        assert (folder / "out" / name / "precious").read_text() == "mine"
        assert [p.name for p in (folder / "out").iterdir()] == [name]
        shutil.rmtree(folder / "out")
    assert steps.done == []


@pytest.mark.parametrize("content", ["{ not json", "[]", "{}", '{"steps": 3, "begun": []}'])
def test_a_damaged_memory_makes_nothing_ours(folder: Path, steps: Steps, content: str) -> None:
    steps.run(folder)
    (folder / "out" / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json: already exists and was not made by"):
        steps.run(folder)
    assert steps.done == [] and (folder / "out" / "student").read_text() == "train"


def test_what_an_interrupted_step_left_is_known(folder: Path, steps: Steps) -> None:
    steps.run(folder)
    steps.fail_in = "build"
    with pytest.raises(KeyboardInterrupt):
        steps.run(folder, "build.convert.conv=random")
    # The step was cut off after it had made something; the student of the run before is ours too.
    (folder / "out" / "built").write_text("half")
    assert (folder / "out" / "student").exists()
    steps.fail_in = ""
    assert steps.run(folder) == ["analyze", "build", "train", "evaluate"]


def test_artefacts_of_other_recipes_stay_known(folder: Path, steps: Steps) -> None:
    steps.run(folder)
    a, b = RECIPE.index("[[train]]"), RECIPE.index("[evaluate]")
    (folder / "recipe.toml").write_text(RECIPE[:a] + RECIPE[b:])
    # What was trained is not what was built, though both are called the student.
    assert steps.run(folder) == ["build", "evaluate"]
    (folder / "recipe.toml").write_text(RECIPE)
    assert steps.run(folder) == ["build", "train", "evaluate"]


def test_an_interrupted_run_goes_on(folder: Path, steps: Steps) -> None:
    steps.fail_in = "train"
    with pytest.raises(KeyboardInterrupt):
        steps.run(folder)
    assert steps.done == ["text", "heldout", "analyze", "build"]
    steps.fail_in = ""
    assert steps.run(folder) == ["train", "evaluate"]


def test_a_failed_repeat_leaves_no_stale_result(folder: Path, steps: Steps) -> None:
    steps.run(folder)
    steps.fail_in = "train"
    with pytest.raises(KeyboardInterrupt):
        steps.run(folder, "train.0.lr=2e-3")
    # The old student is gone, and the old recipe does not find itself done.
    assert not (folder / "out" / "student").exists()
    steps.fail_in = ""
    assert steps.run(folder) == ["train", "evaluate"]


def test_shorter_ways(folder: Path, steps: Steps) -> None:
    (folder / "recipe.toml").write_text(
        RECIPE.replace("[analyze]", "[build]\nplan='uniform 0.5'\n[analyze]")
    )
    assert steps.run(folder) == ["text", "heldout", "build", "train", "evaluate"]
    a, b = RECIPE.index("[[train]]"), RECIPE.index("[evaluate]")
    (folder / "recipe.toml").write_text(RECIPE[:a] + RECIPE[b:])
    assert steps.run(folder) == ["analyze", "build", "evaluate"]


def test_how_many_layers_may_not_be_known_before(folder: Path, steps: Steps) -> None:
    told = ["analyze.convert=0", "analyze.choose=sum swap", 'analyze.measures=["swap"]']
    assert steps.run(folder, *told, "analyze.cache_bytes=100_000") == ALL


def test_which_layers_are_not_known_before(folder: Path, steps: Steps) -> None:
    """An order of layers is checked when they are chosen."""
    order = 'stage = "distil"\nreplacement = "one_by_one"\norder = [2]\nbatch = 1'
    path = folder / "recipe.toml"
    path.write_text(RECIPE.replace('stage = "align"', order))
    assert steps.run(folder) == ALL
    path.write_text(path.read_text().replace("convert = 1", "convert = 0"))
    with pytest.raises(UserError, match=r"distil\): order names layers that are not converted"):
        steps.run(folder, 'build.plan=["convert 0", "keep 1", "keep 2"]')


def test_refused_before_any_work(folder: Path, steps: Steps) -> None:
    with pytest.raises(UserError, match=r"data\.heldout: names no text to measure on"):
        steps.run(folder, "data.heldout=[]")
    assert not (folder / "out").exists()
    (folder / "out").write_text("a file")
    with pytest.raises(UserError, match="out: cannot be made"):
        steps.run(folder)
    assert steps.done == []


def transplant(folder: Path) -> list[str]:
    """A donor of another width beside the teacher, and what takes a layer of it."""
    wide = tiny_config(["mamba1"], hidden_size=40)
    TambaForCausalLM(wide).save_pretrained(folder / "donor")
    return ["donor.path=donor", 'build.plan=["keep 0", "transplant 0"]']


def csv(folder: Path) -> list[str]:
    (folder / "table.csv").write_text("a,b")
    return ['data.train=["text.txt", "table.csv"]']


def truncated(folder: Path) -> list[str]:
    weights = folder / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return []


# What every step would come to hours later, said before the first begins.
FORESEEN = {
    "no such layer": ('build.plan=["keep 0", "convert 99"]', "no layer 99"),
    "too many layers": ("analyze.convert=4", "4 layers are to be converted and 3 can be"),
    "no such layer to keep": ("analyze.always_keep=[3]", "there is no layer 3"),
    "a donor of another width": (transplant, "the donor is 40 wide and the teacher 32"),
    "weights cut short": (truncated, "fetch"),
    "text of no known kind": (csv, r"table\.csv: not a kind of text file"),
    "no such text": ('data.train=["text.txt", "txet.txt"]', "did you mean 'text.txt'"),
    "no such package": ('data.train=["package-docs:none_such"]', "pip install none_such"),
    "rows that cannot be cut": ("train.0.length=5", "length = 5 does not divide the 16 tokens"),
    "a type without gradients": ("train.0.dtype=float16", "float16 gradients vanish"),
    "rows that say nothing twice": (
        "data.lookup_share=0.5",
        "takes rows of 64 tokens or more, and these have 16",
    ),
    "nothing to align": ("build.plan=uniform 1.0", "the plan converts no layer"),
}


@pytest.mark.parametrize(("what", "message"), FORESEEN.values(), ids=FORESEEN.keys())
def test_foreseen_before_the_first_step(
    folder: Path, steps: Steps, what: str | Callable[[Path], list[str]], message: str
) -> None:
    overrides = [what] if isinstance(what, str) else what(folder)
    with pytest.raises(UserError, match=message):
        steps.run(folder, *overrides)
    assert steps.done == [] and not (folder / "out").exists()


def test_hears_of_each_step(folder: Path, steps: Steps) -> None:
    recipe = read_recipe(folder / "recipe.toml")
    heard: list[tuple[str, str]] = []
    run(recipe, folder / "out", report=lambda step, what: heard.append((step, what)))
    assert [h for h in heard if h[1] == "begun"] == [(name, "begun") for name in ALL]
    heard.clear()
    run(recipe, folder / "out", report=lambda step, what: heard.append((step, what)))
    assert heard == [(name, "skipped") for name in ALL]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A tiny Llama, text for it, and a recipe whose every step is the real one.

    The weights are pickled, which every step that opens them must have been allowed to read.
    """
    tiny_hf_model("llama").save_pretrained(tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    character_tokenizer().save_pretrained(tmp_path / "teacher")
    nouns = ["cat", "dog", "owl", "fox", "elk", "bee", "ant", "hen", "ram", "cow", "pig", "yak"]
    paragraphs = [f"the {a} is in the house of the {b}. " * 4 for a in nouns for b in nouns]
    lines = [json.dumps({"text": text}) for text in paragraphs]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    more = '[[train]]\nstage = "distil"\ntokens = 512\nlr = 1e-3\n'
    recipe = RECIPE.replace("text.txt", "text.jsonl").replace("tokens = 100", "tokens = 1000")
    recipe = recipe.replace("[analyze]", "[analyze]\ntokens = 512")
    recipe = recipe.replace("[data]", "allow_pickle = true\n[data]")
    (tmp_path / "recipe.toml").write_text(recipe + more)
    return tmp_path


def test_the_whole_way(real: Path) -> None:
    path = run(real / "recipe.toml", real / "out")
    record = read_record(path)
    assert record.perplexity and record.layers and record.parameters
    assert record.perplexity.tokens > 30 and record.perplexity.kl is not None
    assert (record.layers.total, record.layers.converted) == (3, 1)
    assert [p.origin for p in record.plan].count("converted") == 1
    # The layer whose score is lowest is the one that was converted.
    chosen = min(range(3), key=lambda i: record.scores[i] or 0)
    assert record.plan[chosen].origin == "converted"
    assert {point.stage for point in record.training} >= {"distil"}
    assert record.answer == record.chat[0].student
    steps = ["text", "heldout", "analyze", "build", "train"]
    assert list(record.seconds)[:5] == steps and set(record.digests) == set(steps)
    assert {"python", "torch", "transformers"} <= set(record.versions)
    assert record.recipe == (real / "out" / "recipe.toml").read_text()
    assert (real / "out" / "report.html").exists()
    assert record.name in (real / "out" / "student" / "README.md").read_text()
    # The student is a checkpoint like any other, and the report's figure is its figure.
    model, tokenizer = tamba.load(real / "out" / "student")
    assert model.config.layer_types.count("linear_attention") == 1 and tokenizer is not None
    heldout = read_text(real / "out" / "heldout").heldout
    assert heldout is not None
    again = perplexity(model, heldout.take(64 // 16))
    assert again.ppl == pytest.approx(record.perplexity.student, rel=1e-5)
    # Nothing is left over but what was promised, and nothing is done twice.
    names = {p.name for p in (real / "out").iterdir()}
    folders = {"analysis", "built", "heldout", "plots", "student", "text"}
    assert names == folders | {"recipe.toml", "report.html", "report.json", "run.json"}
    heard: list[str] = []
    pages = [real / "out" / "report.html", real / "out" / "student" / "README.md"]
    before = [page.read_text() for page in pages]
    for page in pages:
        page.unlink()
    run(real / "recipe.toml", real / "out", report=lambda step, what: heard.append(what))
    assert heard == ["skipped"] * 6
    assert [page.read_text() for page in pages] == before
    # Whether there is a page is the recipe's to say.
    shutil.rmtree(real / "out" / "plots")
    pages[0].unlink()
    run(read_recipe(real / "recipe.toml", ["output.html=false"]), real / "out")
    assert not pages[0].exists() and not (real / "out" / "plots").exists()
    # What an analysis of another recipe found is not this one's.
    other = read_recipe(real / "recipe.toml", ['build.plan=["keep 0", "convert 1", "keep 2"]'])
    record = read_record(run(other, real / "out"))
    assert (real / "out" / "analysis").exists() and not record.scores
    assert len(record.frontier) == 1 and record.training
