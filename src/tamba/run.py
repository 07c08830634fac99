"""The whole way from a recipe to a report, leaving out what has not changed.

Each step leaves one artefact in the output folder. Beside them, ``run.json`` remembers for each
step a digest of what went into it: the recipe sections it reads, the files those name, the
artefacts of earlier steps, and the version of tamba. A step whose digest and artefact are still
there is skipped. It also lists every artefact that a run began: only those are ever replaced. A
step may leave a ``record.json`` in its artefact with sections of the final record (scores,
frontier, training losses); the report gathers them.

Steps are called by their public names, so that one that is skipped is not even imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tamba
from tamba.artefact import write_file
from tamba.errors import UserError
from tamba.recipe import WRITTEN, ChatStage, Distil, Recipe, as_recipe

Report = Callable[[str, str], None]
"""``report(step, what)``: `what` is ``skipped``, ``begun`` or the time that the step took."""


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Args:
        sections: of the recipe, or keys of them, that it reads.
        needs: steps whose artefacts it reads.
        artefact: file or folder that it leaves, inside the output folder.
        work: does it, given the recipe and the output folder.
        texts: keys of the recipe whose files it reads.
        also: what else decides what it leaves.
        drawn: what is made of the artefact alone, and made again where it is missing.
        draw: makes that.
    """

    name: str
    sections: tuple[str, ...]
    needs: tuple[str, ...]
    artefact: str
    work: Callable[[Recipe, Path], None]
    texts: tuple[Literal["train", "texts"], ...] = ()
    also: tuple[Any, ...] = ()
    drawn: tuple[str, ...] = ()
    draw: Callable[[Recipe, Path], None] | None = None


def run(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    force: bool = False,
    report: Report | None = None,
) -> Path:
    """Analyse, build, train and measure as the recipe says.

    Args:
        recipe: a recipe or the path of one.
        out: folder for all artefacts: ``text/`` and ``heldout/``, ``analysis/`` (where layers are
            chosen by score), ``built/`` and ``student/``, ``report.json``, ``report.html``,
            ``recipe.toml``.
        force: do every step again.
        report: hears of each step.

    Returns:
        The path of ``report.json``.

    Raises:
        UserError: what the steps raise, or `out` cannot be written to or holds, under the name of
            an artefact, what no run made.
    """
    recipe = as_recipe(recipe)
    recipe.check_inputs()
    if not recipe.text_sources("texts"):
        raise UserError(recipe.where("data.heldout"), "names no text to measure on", "name some")
    out = Path(out)
    say = report or (lambda step, what: None)
    steps = steps_of(recipe)
    if out.exists() and not out.is_dir():
        raise UserError(str(out), "cannot be made (a file stands there)", "choose another --out")
    state = _read_state(out)
    _refuse_foreign(out, steps, state)
    _check_models(recipe)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            str(out), f"cannot be made ({error.strerror})", "choose another --out"
        ) from None
    done = {} if force else state.steps
    digests: dict[str, str] = {}
    for step in steps:
        digest = digests[step.name] = _digest(step, recipe, digests)
        known = done.get(step.name, {})
        if known.get("digest") == digest and (out / step.artefact).exists():
            say(step.name, "skipped")
            if step.draw and not all((out / name).exists() for name in step.drawn):
                step.draw(recipe, out)
            continue
        # What rests on the artefact that is about to go is no longer done.
        gone = _resting_on(step.name, steps)
        done = {s.name: done[s.name] for s in steps if s.name in done and s.name not in gone}
        state = _State(done, state.begun | {step.artefact})
        _write_state(out, state)
        _remove(out / step.artefact)
        say(step.name, "begun")
        begun = time.monotonic()
        step.work(recipe, out)
        seconds = time.monotonic() - begun
        done[step.name] = {"digest": digest, "seconds": round(seconds, 3)}
        _write_state(out, _State(done, state.begun))
        say(step.name, f"{seconds:.1f} s")
    write_file(out / "recipe.toml", recipe.text)
    return out / "report.json"


def _check_models(recipe: Recipe) -> None:
    """Ask each step, before the first begins, whether it can do with these models what it is told.

    Reads headers alone. Raises UserError.
    """
    from tamba.analyze import check_choice
    from tamba.build import open_models, student_config
    from tamba.checkpoint import parameter_specs
    from tamba.text import check_lengths, check_text
    from tamba.train import check_stages

    check_text(recipe)
    teacher, donor = open_models(recipe)
    config = teacher.tamba_config
    check_lengths(recipe, config)
    if recipe.build.plan == "analyze":
        # Which layers is not known yet; any as many show whether they can be converted at all.
        plan = check_choice(recipe, config.block_specs)
        recipe = _without_order(recipe)
    else:
        plan = recipe.layer_plan(config.num_hidden_layers)
    student = student_config(teacher, plan, donor)
    for model in (teacher, donor):
        if model is not None:
            _ = model.parameters
    check_stages(recipe, student, parameter_specs(student), config, plan)


def _without_order(recipe: Recipe) -> Recipe:
    """The same without names of layers to replace, which can be checked when they are chosen."""
    stages = (
        stage.model_copy(update={"order": "spread"}) if isinstance(stage, Distil) else stage
        for stage in recipe.train
    )
    return recipe.model_copy(update={"train": tuple(stages)})


def steps_of(recipe: Recipe) -> list[Step]:
    """The steps that a recipe asks for, in order."""
    models = ("seed", "teacher", "donor")
    # Not all of [output]: whether there is a page is no reason to train again.
    shards = ("output.shard_bytes",)
    steps: list[Step] = []
    written: tuple[str, ...] = ()
    if WRITTEN in (*recipe.text_sources("train"), *recipe.text_sources("texts")):
        keys = ("length", "written_tokens", "written_openings", "written_temperature")
        sections = ("seed", "teacher", *(f"data.{key}" for key in keys))
        steps.append(Step("write", sections, (), "written.safetensors", _write))
        written = ("write",)
    # Each side is an input of its own: other text to measure on is no reason to train again.
    train, heldout = recipe.text_sources("train"), recipe.text_sources("texts")
    divided = [(train.index(s), heldout.index(s)) for s in train if s in heldout]
    share = recipe.data.heldout_share if divided else None
    read = ("seed", "teacher", "data.length", "data.text_key", "data.rows")
    if train:
        needs = written if WRITTEN in train else ()
        also: tuple[Any, ...] = ([i for i, _ in divided], share)
        ours = (*read, "data.train", "data.lookup_share")
        steps.append(Step("text", ours, needs, "text", _text, ("train",), also))
    needs = written if WRITTEN in heldout else ()
    also = (recipe.evaluate.texts or recipe.data.heldout, [i for _, i in divided], share)
    steps.append(Step("heldout", read, needs, "heldout", _heldout, ("texts",), also))
    before: tuple[str, ...] = ()
    if recipe.build.plan == "analyze":
        steps.append(
            Step("analyze", (*models, "analyze", "build"), ("text",), "analysis", _analyze)
        )
        before = ("analyze",)
    built = "built" if recipe.train else "student"
    steps.append(Step("build", (*models, "build", *shards), before, built, _build))
    if recipe.train:
        needed = ("text", "build") if train else ("build",)
        steps.append(Step("train", (*models, "train", *shards), needed, "student", _train))
    last = ("heldout", *before, steps[-1].name)
    everything = tuple(Recipe.model_fields)
    pages = ("report.html", "plots") if recipe.output.html else ()
    drawn = (*pages, "student/README.md")
    steps.append(
        Step("evaluate", everything, last, "report.json", _evaluate, drawn=drawn, draw=_draw)
    )
    return steps


def _resting_on(name: str, steps: Iterable[Step]) -> set[str]:
    """The step and those that read what it leaves, or what is made of that."""
    found = {name}
    for step in steps:
        if found & set(step.needs):
            found.add(step.name)
    return found


def _write(recipe: Recipe, out: Path) -> None:
    from tamba.text import write_text

    write_text(recipe).save(out / "written.safetensors")


def _text(recipe: Recipe, out: Path) -> None:
    _prepare(recipe, out, "train", "text")


def _heldout(recipe: Recipe, out: Path) -> None:
    _prepare(recipe, out, "heldout", "heldout")


def _prepare(recipe: Recipe, out: Path, side: Literal["train", "heldout"], name: str) -> None:
    from tamba.data import TokenBlocks
    from tamba.text import prepare_text

    key: Literal["train", "texts"] = "train" if side == "train" else "texts"
    written = None
    if WRITTEN in recipe.text_sources(key):
        written = TokenBlocks.load(out / "written.safetensors")
    prepare_text(recipe, sides=[side], written=written).save(out / name)


def _analyze(recipe: Recipe, out: Path) -> None:
    tamba.analyze(recipe, out / "analysis", text=out / "text")


def _build(recipe: Recipe, out: Path) -> None:
    tamba.build(
        recipe, out / ("built" if recipe.train else "student"), analysis=_analysis(recipe, out)
    )


def _train(recipe: Recipe, out: Path) -> None:
    # Stages on conversations need no other text.
    text = out / "text" if recipe.data.train else None
    tamba.train(recipe, out / "student", student=out / "built", text=text)


def _evaluate(recipe: Recipe, out: Path) -> None:
    from tamba.checkpoint import open_model
    from tamba.evaluate.student import evaluate_student
    from tamba.report import FrontierPoint, write_report
    from tamba.text import read_text

    heldout = read_text(out / "heldout").heldout
    assert heldout is not None, "run refuses a recipe without held-out text"
    n_teacher = len(open_model(recipe).tamba_config.layers or [])
    plan = recipe.layer_plan(n_teacher, _analysis(recipe, out))
    known: dict[str, Any] = {}
    # Artefacts of this recipe alone: a run of another one may have left its analysis here.
    for step in steps_of(recipe):
        known |= _sections(out / step.artefact / "record.json")
    record = evaluate_student(recipe, out / "student", heldout, plan, **known)
    steps = _read_state(out).steps
    digests = {name: str(step["digest"]) for name, step in steps.items()}
    seconds = {name: float(step["seconds"]) for name, step in steps.items()}
    frontier = list(record.frontier)
    if record.perplexity and record.perplexity.ratio and record.layers:
        point = FrontierPoint(
            converted=record.layers.converted,
            ratio=record.perplexity.ratio,
            stage="as delivered",
            chosen=True,
        )
        frontier.append(point)
    record = record.updated(seconds=seconds | record.seconds, digests=digests, frontier=frontier)
    write_report(record, out, html=False)
    _draw(recipe, out)


def _draw(recipe: Recipe, out: Path) -> None:
    """The pages of the record, for people."""
    from tamba.card import write_card
    from tamba.report import read_record, write_report

    if recipe.output.html:
        write_report(read_record(out / "report.json"), out)
    write_card(out, out / "student" / "README.md")


def _analysis(recipe: Recipe, out: Path) -> Path | None:
    return out / "analysis" if recipe.build.plan == "analyze" else None


def _sections(path: Path) -> dict[str, Any]:
    """What a step left for the record, or nothing."""
    if not path.exists():
        return {}
    sections: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return sections


def _digest(step: Step, recipe: Recipe, earlier: dict[str, str]) -> str:
    """SHA-256 of everything that goes into a step, as hexadecimal digits."""
    inputs = {
        "tamba": tamba.__version__,
        "step": [step.name, step.artefact],
        "recipe": recipe.digest(*step.sections),
        "also": step.also,
        "files": {key: _fingerprint(path) for key, path in _files(step, recipe).items()},
        "steps": {name: earlier[name] for name in step.needs},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _files(step: Step, recipe: Recipe) -> dict[str, Path]:
    """Files and folders of this machine that a step reads, by the key that names them."""
    named: dict[str, str] = {"teacher": recipe.model_path("teacher")}
    if recipe.donor:
        named["donor"] = recipe.model_path("donor")
    for key in step.texts:
        named |= {f"{key}[{i}]": s for i, s in enumerate(recipe.text_sources(key))}
    if step.name == "write" and recipe.data.written_openings:
        openings = recipe.locate(recipe.data.written_openings, "data.written_openings")
        named["openings"] = str(openings)
    if step.name == "train":
        for stage in recipe.train:
            if isinstance(stage, ChatStage):
                named |= {name: name for name in recipe.chat_sources(stage)}
    plan = recipe.build.plan
    if "build" in step.sections and isinstance(plan, str) and plan.endswith(".toml"):
        named["plan"] = str(recipe.locate(plan, "build.plan"))
    return {key: Path(name) for key, name in named.items() if Path(name).exists()}


def _fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file: weights are too large to read for this."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = ((str(p.relative_to(path)), p.stat()) for p in files)
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


@dataclass(frozen=True)
class _State:
    """What ``run.json`` remembers.

    Args:
        steps: digest and seconds of each step that is done.
        begun: artefacts that a run made or began to make, whatever became of them.
    """

    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    begun: frozenset[str] = frozenset()


def _read_state(out: Path) -> _State:
    """The state that a run left; an empty one where there is none.

    Raises:
        UserError: there is a ``run.json``, but not one that says what runs made.
    """
    path = out / "run.json"
    if not os.path.lexists(path):
        return _State()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        steps, begun = found["steps"], found["begun"]
        if all(isinstance(step, dict) for step in steps.values()):
            return _State(steps, frozenset(map(str, begun)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise _foreign(path)


def _refuse_foreign(out: Path, steps: list[Step], state: _State) -> None:
    """Refuse to replace what no run began. Raises UserError."""
    names = [step.artefact for step in steps if step.artefact not in state.begun]
    if not state.begun:
        names += ["report.html", "plots", "recipe.toml"]
    elif "report.json" not in state.begun:
        names += ["report.html", "plots"]
    for name in names:
        if os.path.lexists(out / name):
            raise _foreign(out / name)


def _foreign(path: Path) -> UserError:
    return UserError(
        str(path),
        "already exists and was not made by tamba run",
        "choose another --out or remove it",
    )


def _write_state(out: Path, state: _State) -> None:
    data = {"steps": state.steps, "begun": sorted(state.begun)}
    write_file(out / "run.json", json.dumps(data, indent=2) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
