"""The small E-Tamba experiment: its driver on toy models, and its page against its record."""

from __future__ import annotations

import itertools
import json
import lzma
import math
import random
import re
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tamba.checkpoint import open_checkpoint
from tamba.errors import UserError
from tamba.evaluate import SUITES, Options
from tamba.evaluate.measure import Request
from tamba.plan import LayerPlan, parse_entries, read_plan
from tamba.recipe import read_recipe
from tamba.sections import read_toml, validate

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import e_tamba_figures as figures  # noqa: E402
import e_tamba_lessons as lessons  # noqa: E402
import e_tamba_mini as driver  # noqa: E402
import e_tamba_tables as printed  # noqa: E402

RECIPES = ROOT / "recipes" / "e-tamba-mini"
RECORD = ROOT / "benchmarks" / "results" / "e-tamba-mini.json"
PAGE = ROOT / "docs" / "results" / "e-tamba.md"
TOY = """
[models]
d_model = 32
heads = 2
base_layers = 4
donor_layers = 6
d_state = 4
vocabulary = 192
positions = 128

[text]
length = 48
rows = 4
measured = 16

[pretrain]
steps = 12
seconds = 60
lr = 3e-3
warmup = 0.1

[transplant]
replaced = 2
group = 2
choose = "e-tamba column_mean"

[finetune]
rates = [1e-3]
warmup = 0.03
seeds = [0]
search_steps = 1
grid_steps = 1
final_steps = 1

[optimizer]
betas = [0.9, 0.95]
weight_decay = 0.1
clip = 1.0

[recall]
cases = 2
few = 1
copy_lengths = [4]
phonebook = [2]
places = 400

[teach]
rows = 3
steps = 3
seconds = 60
rates = [1e-3, 1e-4]
warmup = 0.1
copy_length = 6
phonebook = 2
held_out = 4
held_out_copy = 4
held_out_phonebook = 2

[memory]
contexts = [8, 16]

[shapes]
d_model = 32
heads = 2
base_layers = 24
donor_layers = 48
d_state = 4
vocabulary = 192
positions = 32
"""


def settings(text: str, folder: Path) -> Any:
    path = folder / "settings.toml"
    path.write_text(text)
    read = validate(driver.Settings, read_toml(path)[1], "settings.toml")
    driver.check(read, "settings.toml")
    return read


@pytest.mark.parametrize("name", ["experiment", "smoke"])
def test_settings_load_strictly(name: str, tmp_path: Path) -> None:
    text = (RECIPES / f"{name}.toml").read_text()
    settings(text, tmp_path)
    with pytest.raises(UserError, match="hedas"):
        settings(text.replace("heads =", "hedas =", 1), tmp_path)


WRONG = {
    "all layers go": ("replaced = 2", "replaced = 3", "3 of 4 layers cannot go"),
    "group of one": ("group = 2", "group = 1", "no groups of 1"),
    "heads": ("heads = 2", "heads = 3", "3 do not divide 32"),
    "positions": ("contexts = [8, 16]", "contexts = [8, 512]", "are fewer than 512"),
    "one context": ("contexts = [8, 16]", "contexts = [8]", "name two or more"),
    "no seed": ("seeds = [0]", "seeds = []", "name one at least"),
    "no rate to teach at": ("rates = [1e-3, 1e-4]", "rates = []", "name one at least"),
    "judged beyond what is taught": ("held_out_copy = 4", "held_out_copy = 8", "not among"),
    "no row for text": ("rows = 3", "rows = 1", "half text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_line(case: str, tmp_path: Path) -> None:
    old, new, words = WRONG[case]
    with pytest.raises(UserError, match=words) as error:
        settings(TOY.replace(old, new, 1), tmp_path)
    assert "\n" not in str(error.value)


# What models are taught.


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Some hundred words, each a token after a space; else a token a character."""
    words = [f" {a}{b}{c}" for a, b, c in itertools.product("bdgklm", "aeiou", "nrst")]
    marks = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>,-\n "
    vocabulary = {t: i for i, t in enumerate(["<|endoftext|>", "[unk]", *words, *marks])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" [a-z]{3,}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="[unk]"
    )


SIZES = {"copy": (3, 8), "phonebook": (2, 5)}


@pytest.fixture(scope="module")
def scored() -> dict[str, list[Any]]:
    """Cases as the suites of `tamba evaluate` draw them."""
    config = driver.base_config(
        driver.Shape(
            d_model=16, heads=2, base_layers=2, donor_layers=2, d_state=4, vocabulary=190,
            positions=512,
        )
    )  # fmt: skip
    found = {}
    for task, sizes in SIZES.items():
        options = Options(lengths={task: sizes}, cases=20)
        request = Request(
            suite=task, data=(), configs={"student": config}, tokenizer=word_tokenizer(),
            options=options,
        )  # fmt: skip
        measure: Any = SUITES[task].prepare(request)
        found[task] = [case for _, case in measure.cases.values()]
    return found


def read_book(text: str) -> tuple[list[str], list[str], str]:
    """Names, numbers, and the name asked for, of a prompt."""
    entries = re.findall(r"<(\w+), ([\d-]+)>", text)
    return [n for n, _ in entries], [n for _, n in entries], text.rpartition("<")[2][:-1]


def test_lessons_begin_as_scored_cases_do(scored: dict[str, list[Any]]) -> None:
    tokenizer = word_tokenizer()
    maker = lessons.Lessons(tokenizer, scored)
    for case in scored["copy"]:
        length = len(case.prompt) // 2
        random_words = maker.copy(random.Random(0), length)
        whole = random_words.tokens[:length] * 2 + random_words.tokens[:1]
        assert len(whole) == len(case.prompt) and random_words.tokens[: 2 * length + 1] == whole
        assert len(random_words.tokens) == len(case.prompt) + len(case.answer)
        assert set(case.prompt) <= set(maker.words)
    for case in scored["phonebook"]:
        names, numbers, asked = read_book(tokenizer.decode(case.prompt))
        document = maker.book(names, numbers, [names.index(asked)])
        first = document.answers[0]
        assert document.tokens[:first] == case.prompt
        said = tokenizer.decode([document.tokens[i] for i in document.answers])
        assert said == f" {case.text}>"
        assert document.tokens != maker.book(names[::-1], numbers, [0]).tokens


def leaked(documents: list[Any], scored: dict[str, list[Any]], tokenizer: Any) -> list[str]:
    """Names, numbers and lists of documents that are in a scored case too."""
    text = "".join(tokenizer.decode(case.prompt) for case in scored["phonebook"])
    known = set(re.findall(r"[A-Z][a-z]+|[\d-]{12}", text))
    lists = {tuple(c.prompt[: len(c.prompt) // 2]) for c in scored["copy"]}
    found = []
    for document in documents:
        text = tokenizer.decode(document.tokens)
        found += known.intersection(re.findall(r"[A-Z][a-z]+|[\d-]{12}", text))
        third = tuple(document.tokens[: len(document.tokens) // 3])
        found += ["a list"] * (third in lists)
    return found


def test_nothing_that_is_scored_is_taught(scored: dict[str, list[Any]]) -> None:
    tokenizer = word_tokenizer()
    maker = lessons.Lessons(tokenizer, scored)
    longest = {task: max(sizes) for task, sizes in SIZES.items()}
    taught = list(itertools.islice(maker.documents("a seed", longest), 300))
    taught += [d for task in SIZES for d in maker.held_out(task, longest[task], 30)]
    assert leaked(taught, scored, tokenizer) == []
    names, numbers, _ = read_book(tokenizer.decode(scored["phonebook"][0].prompt))
    assert leaked([maker.book(names, numbers, [0])], scored, tokenizer)
    words = scored["copy"][0].prompt[:3]
    assert leaked([lessons.Document(words * 3, [])], scored, tokenizer) == ["a list"]

    class Twice(random.Random):
        """Draws a scored list first."""

        def choices(self, *args: Any, **kwargs: Any) -> Any:
            self.drawn = getattr(self, "drawn", 0) + 1
            return list(words) if self.drawn == 1 else super().choices(*args, **kwargs)

    rng = Twice(0)
    assert maker.copy(rng, 3).tokens[:3] != words and rng.drawn == 2


def determined(tokens: list[int], answers: list[int]) -> bool:
    """Whether each answer follows from what was there before: the same words, or the same name."""
    tokenizer = word_tokenizer()
    text = tokenizer.decode(tokens)
    if "<" not in text.replace("<|endoftext|>", ""):
        length = len(tokens) // 3
        return all(i > length and tokens[i] == tokens[i - length] for i in answers)
    entries = re.findall(r"<(\w+), ([\d-]+)>", text)
    first, again = dict[str, str](), ""
    for name, number in entries:
        if name in first:
            again += f" {number}>"
        if first.setdefault(name, number) != number:
            return False
    return again == tokenizer.decode([tokens[i] for i in answers])


def test_answers_are_what_earlier_tokens_determine(scored: dict[str, list[Any]]) -> None:
    maker = lessons.Lessons(word_tokenizer(), scored)
    longest = {"copy": 9, "phonebook": 6}
    documents = list(itertools.islice(maker.documents("a seed", longest), 60))
    assert all(determined(d.tokens, d.answers) for d in documents)
    assert not any(determined(d.tokens, [1, *d.answers]) for d in documents)
    # Rows hold these documents one after another, and the marks go with them.
    tokens, answers = maker.rows(3, 200, "a seed", longest)
    flat: list[int] = []
    places: list[int] = []
    for document in documents:
        if len(flat) < 200:
            places += [len(flat) + i for i in document.answers]
            flat += [*document.tokens, 0]
    assert tokens[0].tolist() == flat[:200]
    assert answers[0].nonzero().flatten().tolist() == [i for i in places if i < 200]
    for task, size in longest.items():
        for document in maker.held_out(task, size, 5):
            assert document.answers[-1] == len(document.tokens) - 1
            assert task == "phonebook" or len(document.answers) == size - 1


def test_each_step_learns_from_as_many_answers() -> None:
    answers = torch.rand(8, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    places, share = lessons.batches_of_answers(answers, 2, 0)
    per_step = answers.view(4, 80)
    assert places.shape == (4, int(per_step.sum(1).min()))
    for step, found in enumerate(places):
        assert per_step[step, found].all() and len(set(found.tolist())) == len(found)
    assert share == pytest.approx(places.numel() / int(answers.sum()))


def test_lessons_count_their_answers_alone() -> None:
    torch.manual_seed(0)
    shape = driver.Shape(
        d_model=16, heads=2, base_layers=2, donor_layers=2, d_state=4, vocabulary=40, positions=64
    )
    model = driver.new_model(driver.base_config(shape), 0, torch.device("cpu"))
    # A new head takes all tokens for equally likely, wherever it looks.
    model.lm_head.weight.data *= 20
    loss = driver.Loss(torch.device("cpu"), 1, shape)
    text, taught = torch.randint(2, 40, (2, 2, 12))
    answers = torch.tensor([4, 8, 20])
    with torch.no_grad():
        parts = loss.taught(model, text, taught, answers)
        ids = torch.cat([text, taught])
        with torch.autocast("cpu", torch.bfloat16):
            said = model(input_ids=ids).logits.float().log_softmax(-1)
    nats = -said[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    # Place 20 is token 8 of the second row, which has 12.
    of_answers = torch.stack([nats[2, 3], nats[2, 7], nats[3, 7]]).mean()
    assert parts[0].item() == pytest.approx(nats[:2].mean().item(), rel=2e-2)
    assert parts[1].item() == pytest.approx(of_answers.item(), rel=2e-2)
    with torch.no_grad():
        shifted = loss.taught(model, text, taught, answers - 1)[1].item()
    assert shifted != pytest.approx(of_answers.item(), rel=5e-2)


# The whole of it, with models that some hundred words are enough for.


def text_of(folder: Path) -> Path:
    """Streams of words that follow one another by a rule, so that there is something to learn."""
    tokens = folder / "tokens"
    tokens.mkdir()
    (tokens / "tokens.json").write_text("{}")
    word_tokenizer().backend_tokenizer.save(str(tokens / "tokenizer.json"))
    order = np.random.default_rng(0)
    for name in ("pretrain", "finetune", "analysis", "general", "choice", "report"):
        steps = order.integers(1, 4, size=48 * 24)
        ids = (2 + np.cumsum(steps) % 36).astype(np.uint16)
        with lzma.open(tokens / f"{name}.npy.xz", "wb", preset=0) as file:
            np.save(file, ids)
    return tokens


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.toml").write_text(TOY)
    arguments = ["--tokens", str(text_of(folder)), "--out", str(folder / "out"), "--smoke"]
    assert driver.main([*arguments, "--settings", str(folder / "toy.toml")]) == 0
    return folder


@pytest.mark.slow
def test_the_driver_does_all_of_it(toy: Path) -> None:
    record = json.loads((toy / "out" / driver.RECORD).read_text())
    rows, not_run = record["rows"], record["not_run"]
    assert not_run == {}
    taught = {n: row for n, row in rows.items() if n.startswith("taught/")}
    assert [n.split("/")[1] for n in taught][1:] == ["base", "donor", "fitted", "fresh", "none"]
    for name, row in taught.items():
        # The better of the rates, by what no case is scored on; all learned from the same answers.
        found = [rows[n] for n in row["of"]]
        judged = [sum(task["nll"] for task in r["held_out"].values()) for r in found]
        assert len(found) == 2 and row["lr"] == found[judged.index(min(judged))]["lr"]
        assert row["answers"] == rows["taught/base/0"]["answers"] and len(row["loss"]) == 3
        assert [p["n"] for p in rows[f"recall/{name}"]["copy"]] == [2]
        assert (toy / "out" / "work" / row["model"]).is_dir()
    systems = [n.split("/")[1] for n in rows if n.startswith("grid/") and n.endswith("/0")]
    assert systems[:2] == ["none", "fresh"] and systems[-2:] == ["fitted", "shuffled"]
    assert {n.split("/")[1] for n in rows if n.startswith("final/")} >= {"base", "donor", "fitted"}
    for role in ("base", "donor"):
        # The sum over rows of what the whole model loses, and its spread.
        costs, doubt = (rows["analysis"][role][k] for k in ("drop_loss", "drop_loss_error"))
        assert len(costs) == len(doubt) and min(doubt) > 0 and max(map(abs, costs)) > max(doubt)
    assert len(rows["starts/fitted"]["own_turn"]) == 4 and rows["starts/none"]["own_turn"]
    # Nothing is drawn in a fitted layer, so seeds begin alike.
    assert (toy / "out" / "work" / "students" / "fitted").is_dir()
    for text in printed.tables(rows).values():
        assert len({line.count("|") for line in text.splitlines()}) == 1


@pytest.mark.slow
def test_the_driver_makes_the_rows_that_it_is_asked_for(toy: Path) -> None:
    out = toy / "part"
    shutil.copytree(toy / "out", out)
    for row in out.glob("rows/*.json"):
        if row.name.startswith(("search", "final", "teaching", "taught", "recall", "memory")):
            row.unlink()
    shutil.rmtree(out / "work" / "final")
    arguments = ["--tokens", str(toy / "tokens"), "--out", str(out), "--smoke"]
    arguments += ["--settings", str(toy / "toy.toml"), "--only"]
    before = set(json.loads((toy / "out" / driver.RECORD).read_text())["rows"])

    def made(*names: str) -> tuple[set[str], dict[str, str]]:
        assert driver.main([*arguments, *names]) == 0
        record = json.loads((out / driver.RECORD).read_text())
        assert set(record["rows"]) | set(record["not_run"]) <= before
        assert len(record["calls"]) > 1 and names[-1] in record["command"]
        rows = record["rows"]
        return {n for n in rows if n.startswith(("final", "t", "rec"))}, record["not_run"]

    # Without a search there is no rate, rather than one that nobody tried.
    rows, why = made("final/base/0")
    assert rows == set() and "no rate was tried" in why["final/base/0"]
    assert why["final/none/0"] == "was not asked for"
    rows, _ = made("search/*", "final/fresh/0", "taught/fresh/*", "teaching/*/0.001")
    assert rows == {"final/fresh/0", "teaching/fresh/0.001", "taught/fresh/0"}
    rows, _ = made("recall/taught/*")
    assert "recall/taught/fresh/0" in rows and len(rows) == 4


def test_rows_that_nobody_asked_for_are_said_to_be_left_out(tmp_path: Path) -> None:
    about = {"settings": {}, "text": {}, "command": "it"}
    rows = driver.Rows(tmp_path / "rows", tmp_path / "it.json", about, 60, ["final/*/1"])
    for name in ("speed", "pretrain/base", "final/base/0", "final/base/1"):
        rows.do(name, 1, lambda: {"steps": 3})
    assert list(rows.rows) == ["speed", "pretrain/base", "final/base/1"]
    assert rows.not_run == {"final/base/0": "was not asked for"}
    with pytest.raises(UserError, match="no row is called 'fianl/base'"):
        driver.check_names(["speed", "*/0", "fianl/base"])


def test_mixers_learn_at_their_share_of_the_rate() -> None:
    """Tuned and taught alike: at a share of nothing they stay, and all else moves."""
    wanted = validate(driver.Settings, tomllib.loads(TOY), "it")
    base = driver.base_config(wanted.models)
    donor = driver.donor_config(wanted.models, wanted.models.vocabulary)
    plan = parse_entries(["keep 0", "transplant 0"], "it")
    config = driver.spliced_config(LayerPlan(plan), base, donor)
    ids = torch.randint(2, 38, (4, 48), generator=torch.Generator().manual_seed(0))
    loss = driver.Loss(torch.device("cpu"), 1, wanted.models)

    def moved(share: float) -> dict[bool, bool]:
        model = driver.new_model(config, 0, torch.device("cpu"))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        run = driver.Budgeted(2, 1e-2, 0.1, 0, mixers=share)
        driver.train(model, itertools.repeat((ids,)), run, wanted, loss, "it", graph=False)
        found: dict[bool, list[bool]] = {True: [], False: []}
        for name, p in model.named_parameters():
            found["layers.1.mixer" in name].append(not torch.equal(p, before[name]))
        return {mixer: any(changed) for mixer, changed in found.items()}

    assert moved(0.0) == {True: False, False: True}
    assert moved(0.5) == {True: True, False: True}


def test_teaching_keeps_the_share_that_tuning_found_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = validate(driver.Settings, tomllib.loads(TOY), "it")
    about = {"settings": {}, "text": {}, "command": "it"}
    rows = driver.Rows(tmp_path / "rows", tmp_path / "it.json", about, 60)
    rows.rows |= {"speed": {"base": 0.1, "donor": 0.1, "scale": 1.0}}
    for rate, nll in (("0.001", 2.0), ("0.001 mixers 0.1", 1.0)):
        rows.rows[f"search/fitted/{rate}"] = {"choice": {"nll": nll}}
    rows.rows["search/fresh/0.001"] = {"choice": {"nll": 1.0}}
    found = driver.Experiment(wanted, text_of(tmp_path), tmp_path / "work", rows, "cpu")
    found.plans = {name: LayerPlan(parse_entries(["keep 0"], "it")) for name in ("fitted", "fresh")}
    taught = {}

    def note(model: Any, rate: Any, seed: int, label: str) -> dict[str, Any]:
        taught[label] = rate
        raise UserError(label, "is enough")

    monkeypatch.setattr(found, "load", lambda folder: None)
    monkeypatch.setattr(found, "_teach", note)
    for system in ("fitted", "fresh"):
        (found.work / "final" / system / "0").mkdir(parents=True)
    found.teach(0, ["fitted", "fresh"])
    assert {label: (rate.lr, rate.mixers) for label, rate in taught.items()} == {
        "teach fitted 0 0.001": (1e-3, 0.1),
        "teach fitted 0 0.0001": (1e-4, 0.1),
        "teach fresh 0 0.001": (1e-3, 1.0),
        "teach fresh 0 0.0001": (1e-4, 1.0),
    }


def test_what_a_layer_costs_is_the_loss_of_a_model_without_it(tmp_path: Path) -> None:
    wanted = validate(driver.Settings, tomllib.loads(TOY), "it")
    about = {"settings": {}, "text": {}, "command": "it"}
    rows = driver.Rows(tmp_path / "rows", tmp_path / "it.json", about, 60)
    found = driver.Experiment(wanted, text_of(tmp_path), tmp_path / "work", rows, "cpu")
    model = driver.new_model(driver.base_config(wanted.models), 0, torch.device("cpu")).eval()
    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.data *= 100 * (index + 1)
    blocks = found.streams["analysis"].take(3)
    costs, errors = found._drop(model, blocks)

    def nats() -> torch.Tensor:
        ids = blocks.tokens.long()
        with torch.no_grad():
            said = model(input_ids=ids).logits.double().log_softmax(-1)
        return -said[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mean(1)

    whole = nats()
    model.model.layers = torch.nn.ModuleList(b for i, b in enumerate(model.model.layers) if i != 2)
    apart = nats() - whole
    assert costs[2] == pytest.approx(apart.mean().item(), abs=1e-5)
    assert errors[2] == pytest.approx(apart.std().item() / 3**0.5, abs=1e-5)
    assert abs(costs[1] - costs[2]) > 1e-4 and errors[2] > 1e-4


@pytest.mark.slow
def test_a_second_call_goes_on_where_the_first_stopped(toy: Path) -> None:
    arguments = ["--tokens", str(toy / "tokens"), "--out", str(toy / "out"), "--smoke"]
    arguments += ["--settings", str(toy / "toy.toml")]
    before = json.loads((toy / "out" / driver.RECORD).read_text())["rows"]
    name = "taught/fresh/0"
    lost = [name, f"recall/{name}", before[name]["model"]]
    for gone in lost:
        (toy / "out" / "rows" / f"{gone.replace('/', '__')}.json").unlink()
    # The first of two calls has no time for them; its checkpoint was written and its row was not.
    assert driver.main([*arguments, "--seconds", "0"]) == 0
    record = json.loads((toy / "out" / driver.RECORD).read_text())
    assert set(record["not_run"]) == set(lost) and set(before) - set(record["rows"]) == set(lost)
    assert driver.main(arguments) == 0
    record = json.loads((toy / "out" / driver.RECORD).read_text())
    assert record["not_run"] == {} and set(record["rows"]) == set(before)
    for gone in lost:
        kept, again = before[gone], record["rows"][gone]
        for task, found in kept.get("held_out", {}).items():
            assert again["held_out"][task] == pytest.approx(found), gone


@pytest.mark.slow
def test_fitted_layers_begin_nearer_to_the_base_than_converted_ones(toy: Path) -> None:
    rows = json.loads((toy / "out" / driver.RECORD).read_text())["rows"]
    loss = {name: rows[f"starts/{name}"]["choice"]["nll"] for name in ("fitted", "converted")}
    work = toy / "out" / "work"
    ids = torch.from_numpy(np.random.default_rng(1).integers(2, 38, size=(4, 48)))

    def logits(folder: Path) -> torch.Tensor:
        model = driver.load_model(open_checkpoint(folder), torch.float32, "cpu")
        with torch.no_grad():
            return model(input_ids=ids).logits.log_softmax(-1)

    base = logits(work / "base")
    apart = {n: (logits(work / "students" / n) - base).norm().item() for n in loss}
    # Without the fit the two are one model; in a toy the sums are small, and so is the gain.
    assert apart["fitted"] < 0.85 * apart["converted"]
    assert loss["fitted"] < loss["converted"]


# What the page and the recipe say.


def test_the_plan_has_the_parameters_of_the_record() -> None:
    rows = printed.read_rows(RECORD)
    wanted = validate(driver.Settings, read_toml(RECIPES / "experiment.toml")[1], "it")
    models = {
        "base": driver.base_config(wanted.models),
        "donor": driver.donor_config(wanted.models, wanted.models.vocabulary),
    }
    for role, config in models.items():
        assert driver.parameters(config) == rows[f"pretrain/{role}"]["parameters"]
    plan = read_plan(RECIPES / "plan.toml")
    plan.check(12, 24)
    assert [str(e) for e in plan.entries] == rows["final/13-18/0"]["plan"]

    def counts(plan: Any) -> Any:
        spliced = driver.spliced_config(plan, models["base"], models["donor"])
        return driver.parameters(spliced)

    assert counts(plan) == rows["final/13-18/0"]["parameters"]
    total = f"{counts(plan)['total']:,}"
    assert total in (RECIPES / "plan.toml").read_text() and total in PAGE.read_text()
    shorter = replace(plan, entries=plan.entries[:-1])
    assert counts(shorter) != rows["final/13-18/0"]["parameters"]


def test_the_recipe_of_the_hybrid_loads(tmp_path: Path) -> None:
    text = (RECIPES / "hybrid.toml").read_text()
    with pytest.raises(UserError, match=r"teacher\.path: no such file"):
        read_recipe(RECIPES / "hybrid.toml")
    for role in ("base", "donor"):
        (tmp_path / role).mkdir()
        text = text.replace(f"../../runs/e-tamba-mini/work/{role}", role)
    (tmp_path / "hybrid.toml").write_text(text)
    (tmp_path / "plan.toml").write_text((RECIPES / "plan.toml").read_text())
    recipe = read_recipe(tmp_path / "hybrid.toml")
    assert [e.index for e in recipe.layer_plan(12).entries] == [*range(6), *range(13, 19), 11]


def on_page(rows: dict[str, Any], page: str) -> bool:
    return all(text in page for text in printed.tables(rows).values())


def test_the_page_holds_the_tables_of_the_record() -> None:
    rows, page = printed.read_rows(RECORD), PAGE.read_text()
    assert on_page(rows, page)
    for name in json.loads(RECORD.read_text())["not_run"]:
        assert f"`{name}`" in page
    rows["teaching/fitted/0.0015"]["mixers"] = 0.1
    assert "`teaching/fitted/0.0015`, mixers × 0.1 |" in printed.teaching(rows)
    rows = printed.read_rows(RECORD)
    rows["grid/fresh/1"]["report"]["ppl"] += 1.0
    assert not on_page(rows, page)


def test_a_record_of_some_rows_is_drawn_as_far_as_it_goes() -> None:
    rows = printed.read_rows(RECORD)
    some = {n: row for n, row in rows.items() if n.startswith(("grid/13-18", "grid/none"))}
    assert set(figures.drawn(some)) == set()
    fresh = {n: row for n, row in rows.items() if n.startswith("grid/fresh")}
    assert set(figures.drawn(fresh)) == set()
    assert set(figures.drawn(some | fresh)) == {"ablation"}


def test_paired_differences_are_those_of_a_hand_count() -> None:
    ours = {"0": {"nll": 1.5}, "1": {"nll": 2.0}, "2": {"nll": 9.0}}
    theirs = {"0": {"nll": 1.0}, "1": {"nll": 1.9}}
    apart = printed.paired(ours, theirs)
    assert apart == pytest.approx([0.5, 0.1])
    mean, error = printed.mean_error(apart)
    # Two values: half of their distance, over the root of two, times the root of two.
    assert (mean, error) == pytest.approx((0.3, math.dist([0.5], [0.1]) / 2))
    assert printed.said(apart, 2, "+") == "+0.30 ± 0.20"
    assert printed.said([], 2) == "–"
