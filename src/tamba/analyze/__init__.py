"""Score layers and choose which to convert: `tamba analyze`.

From a recipe, the teacher's layers are scored on the recipe's text and the plan is what `build`
reads. From a model alone, any scores of any causal language model are measured on any text.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tamba.analyze.choice import Budget, plan_of, transplant_plans
from tamba.analyze.distances import StateScores, state_scores
from tamba.analyze.effects import student_pairs
from tamba.analyze.probe import word_probe
from tamba.analyze.study import Settings, Study, files_of, pictures, study, tables_json
from tamba.analyze.swaps import (
    QUICK_STATE_SCORES,
    Analysis,
    analyze_model,
    divided,
    perplexity_ratios,
    swap_scores,
)
from tamba.checkpoint import (
    Checkpoint,
    load_model,
    load_tokenizer,
    open_checkpoint,
    open_model,
)
from tamba.data import TokenBlocks, read_texts, text_digest
from tamba.errors import UserError
from tamba.model.config import AttentionSpec, BlockSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import LayerPlan, PlanEntry
from tamba.plots.layers import can_draw, need_matplotlib
from tamba.recipe import Recipe, as_recipe
from tamba.text import check_lengths, prepare_text, read_text

__all__ = [
    "Analysis",
    "Reading",
    "Settings",
    "StateScores",
    "Study",
    "analyze",
    "analyze_model",
    "check_choice",
    "perplexity_ratios",
    "state_scores",
    "study",
    "swap_scores",
]

PYTHON_DOCS = ("python-docs",)
"""Text that every Python installation carries."""
EFFECTS = "effects.jsonl"
"""The record of finished effects, in the folder."""
_BYTES_PER_TOKEN = 8
"""More than text has with any usual tokenizer."""


@dataclass(frozen=True)
class Reading:
    """What a model alone is analysed with.

    Args:
        texts: sources as `tamba.data.read_texts` takes them.
        length: tokens of a row.
        tokens: to read.
        recall: measure recall too wherever a layer is changed.
        student: a converted model, for the scores ``aligned`` and ``restore``.
        into: a teacher that candidate groups of this model's layers are meant for, and
        replaced: its neighbouring layers that they would stand for.
        dtype: ``float32``, or ``bfloat16`` or ``float16`` for matrix products alone, which some
            machines do faster; None for the type that the weights are stored in, and bfloat16 where
            layers are changed.
        device: None for a GPU where there is one.
    """

    texts: Sequence[str] = PYTHON_DOCS
    length: int = 512
    tokens: int = 32_768
    recall: bool = False
    student: str | None = None
    into: str | None = None
    replaced: Sequence[int] = ()
    dtype: str | None = None
    device: str | None = None


def analyze(
    source: Recipe | str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
    reading: Reading | None = None,
    settings: Settings | None = None,
) -> Analysis | Study:
    """Score the layers of a recipe's teacher, or of a model, and choose which to convert.

    Of a recipe, text to fit and to score on are different rows of its training text, or of its
    held-out text where it trains on none. A call that was cut off goes on with the effects that
    were not finished.

    Args:
        source: a recipe or its file (``*.toml``); or a checkpoint, as `tamba.load` takes it.
        out: the folder to make: `scores.json`, `plan.toml`, pictures and `report.md`; of a recipe
            `record.json` for the report too.
        text: for a recipe, the folder of prepared text; None to prepare it here.
        reading: for a model, the text to read and the models beside it.
        settings: for a model, what to measure and how to choose.

    Raises:
        UserError: more layers to convert than there is attention, a layer to keep that is not
            there, a model, plan or text that cannot be; `out` is not made.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "already exists", "choose another folder or remove it")
    try:
        if isinstance(source, Recipe) or str(source).endswith(".toml"):
            if reading is not None or settings is not None:
                problem = "of a recipe, the recipe says what to measure"
                raise UserError(str(out), problem, "--set does")
            return _analyze_recipe(as_recipe(source), out, text)
        return _analyze_checkpoint(str(source), out, reading or Reading(), settings or Settings())
    finally:
        with contextlib.suppress(OSError):
            _partial(out).rmdir()  # unless finished effects wait in it


def _analyze_recipe(recipe: Recipe, out: Path, text: str | Path | None) -> Analysis | Study:
    checkpoint = open_model(recipe)
    wanted = recipe.analyze
    check_choice(recipe, checkpoint.tamba_config.block_specs)
    check_lengths(recipe, checkpoint.tamba_config)
    settings, probe = None, None
    if wanted.measures or wanted.choose:
        settings = Settings(
            wanted.measures or ("states",),
            wanted.tokens,
            convert=recipe.build.convert,
            choose=wanted.choose,
            budget=Budget(wanted.convert or None, wanted.cache_bytes),
            always_keep=wanted.always_keep,
            seed=recipe.seed,
        )
        need_matplotlib()
        settings.check(checkpoint.tamba_config, recall=wanted.recall, where=checkpoint.location)
        if wanted.recall:
            probe = word_probe(_tokenizer(checkpoint), seed=recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepared = prepare_text(recipe) if text is None else read_text(text)
    blocks = prepared.train or prepared.heldout
    if blocks is None:
        raise UserError(recipe.where("data.heldout"), "names no text", "scores need some")
    if settings is None or settings.fits:
        divided(blocks, wanted.tokens)
    if settings is not None:
        # What `divided` will take: a recipe's text is as long as its training.
        blocks = blocks.take(max(2, 2 * (wanted.tokens // blocks.length)))
    dtype = None if recipe.teacher.dtype is None else getattr(torch, recipe.teacher.dtype)
    _make_room(out)
    teacher = load_model(checkpoint, dtype, device)
    if settings is None:
        found = analyze_model(teacher, blocks, recipe)
        _write(out, _files(found, Path(checkpoint.location).stem))
        return found
    facts = {"rows": len(blocks), "length": blocks.length}
    known = study(
        teacher, blocks, settings, probe=probe, record=_partial(out) / EFFECTS, text=facts
    )
    files = files_of(known, _plan_text(known, teacher, settings))
    values, _ = known.scores()
    word, _, name = known.choice.strategy.partition(" ") if known.choice else ("", "", "")
    if word == "lowest" and name in values:
        record = {"scores": values[name], "score_name": name.replace("_", " ")}
        files["record.json"] = json.dumps(record, indent=1) + "\n"
    _write(out, files)
    return known


def _analyze_checkpoint(source: str, out: Path, reading: Reading, settings: Settings) -> Study:
    need_matplotlib()
    checkpoint = open_checkpoint(source)
    student = None if reading.student is None else open_checkpoint(reading.student)
    config = checkpoint.tamba_config
    pairs = None
    if student is not None:
        pairs = student_pairs(config, student.tamba_config, student.location)
    settings.check(config, student=pairs, recall=reading.recall, where=checkpoint.location)
    _check_reading(reading, settings, config)
    into = None if reading.into is None else _receiver(reading, checkpoint)
    tokenizer = _tokenizer(checkpoint)
    texts = read_texts(list(reading.texts), max_bytes=reading.tokens * _BYTES_PER_TOKEN)
    blocks = TokenBlocks.from_texts(texts, tokenizer, reading.length, max_tokens=reading.tokens)
    if settings.fits:
        divided(blocks, settings.effect_tokens)
    probe = word_probe(tokenizer, seed=settings.seed) if reading.recall else None
    device = reading.device or ("cuda" if torch.cuda.is_available() else "cpu")
    wide = reading.dtype if reading.dtype == "float32" else None
    if reading.dtype is not None:
        settings = replace(settings, dtype=getattr(torch, reading.dtype))
    _make_room(out)
    model = load_model(checkpoint, wide, device)
    other = None if student is None else load_model(student, wide, device)
    found = study(
        model,
        blocks,
        settings,
        probe=probe,
        student=other,
        record=_partial(out) / EFFECTS,
        text={
            "sources": ", ".join(map(str, reading.texts)),
            "rows": len(blocks),
            "length": blocks.length,
            "sha256": text_digest(texts),
        },
    )
    # Scores that converted no layer hold for every form of mixer: which one, the recipe says.
    files = files_of(found, _plan_text(found, model, settings, form=settings.converts))
    if into is not None:
        plans = transplant_plans(into, reading.replaced, found.groups)
        files |= {f"plans/{name}.toml": plan.to_toml(options=False) for name, plan in plans.items()}
    _write(out, files)
    return found


def _check_reading(reading: Reading, settings: Settings, config: TambaConfig) -> None:
    positions = config.positions
    if positions is not None and reading.length > positions:
        raise UserError(
            "length",
            f"{reading.length} is beyond the model's {positions} positions",
            "ask for less",
        )
    if reading.dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(
            "dtype", f"'{reading.dtype}' is not one to compute in", "float32, bfloat16 or float16"
        )
    if reading.tokens < reading.length:
        raise UserError(
            "tokens",
            f"{reading.tokens} do not fill one row of {reading.length}",
            "read more, or shorter rows",
        )
    if reading.replaced and reading.into is None:
        raise UserError("replace", "names layers of no model", "say which with into")
    if reading.into is not None and not reading.replaced:
        raise UserError(
            "into", "does not say which layers groups stand for", "say e.g. replace 12-22"
        )
    effects = set(settings.measures) - {"states"}
    if reading.recall and not effects:
        raise UserError("recall", "is measured where layers are changed", "ask for drop too")
    if reading.student is not None and not effects & {"aligned", "restore"}:
        raise UserError("student", "has no use", "ask for aligned or restore")
    if reading.into is not None and settings.groups is None:
        raise UserError("into", "takes groups of layers", "say how many layers make a group")


def _tokenizer(checkpoint: Checkpoint) -> Any:
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(
            checkpoint.location, "has no tokenizer", "put tokenizer.json beside the weights"
        )
    return tokenizer


def _receiver(reading: Reading, donor: Checkpoint) -> int:
    """The layers of the teacher that groups are for, after looking whether they can be."""
    assert reading.into is not None
    teacher = open_checkpoint(reading.into)
    config = teacher.tamba_config
    if config.d_model != donor.tamba_config.d_model:
        raise UserError(
            donor.location,
            f"is {donor.tamba_config.d_model} wide and the teacher {config.d_model}",
            "give models of one width",
        )
    ours, theirs = load_tokenizer(donor), load_tokenizer(teacher)
    if ours is not None and theirs is not None and ours.get_vocab() != theirs.get_vocab():
        raise UserError(
            donor.location,
            "has another tokenizer than the teacher",
            "give models that were trained on the same tokens",
        )
    transplant_plans(config.num_hidden_layers, reading.replaced, [])
    return config.num_hidden_layers


def _plan_text(
    found: Study, model: TambaForCausalLM, settings: Settings, *, form: bool = True
) -> str | None:
    """`plan.toml`; `form` says in it how layers are converted."""
    if found.choice is None:
        return None
    plan = plan_of(found.choice, settings.facts(model.config), settings.convert)
    n = len(found.choice.layers)
    said = f"{found.title}: {n} of {found.n_layers} layers chosen by `{found.choice.strategy}`"
    text = plan.to_toml(options=form)
    return f"# {' '.join(said.split())}; scores.json has the numbers.\n{text}"


def check_choice(recipe: Recipe, specs: Sequence[BlockSpec]) -> LayerPlan:
    """Refuse layers to keep or to convert that the teacher does not have.

    Args:
        recipe: its ``analyze`` section says how many, and which are left alone.
        specs: the teacher's layers.

    Returns:
        A plan of the form that the analysis will write; which layers it converts means nothing,
        nor how many where that is not known before.

    Raises:
        UserError: a layer to keep that is not there, more to convert than there is attention, or
            one layer to compare with others.
    """
    wanted = recipe.analyze
    for layer in wanted.always_keep:
        if not 0 <= layer < len(specs):
            raise UserError(
                recipe.where("analyze.always_keep"),
                f"there is no layer {layer}",
                f"the teacher's are 0 to {len(specs) - 1}",
            )
    free = [
        i
        for i, spec in enumerate(specs)
        if isinstance(spec.mixer, AttentionSpec) and i not in wanted.always_keep
    ]
    if wanted.convert > len(free):
        raise UserError(
            recipe.where("analyze.convert"),
            f"{wanted.convert} layers are to be converted and {len(free)} can be",
            "convert fewer or keep fewer",
        )
    if len(specs) < 2 and not wanted.measures and wanted.score in QUICK_STATE_SCORES:
        raise UserError(
            recipe.where("analyze.score"),
            f"'{wanted.score}' compares layers, and there is one",
            "take swap, or a teacher of two layers or more",
        )
    some = free[: wanted.convert or 1]  # by `cache_bytes` it may be any number
    entries = (PlanEntry("convert" if i in some else "keep", i) for i in range(len(specs)))
    return LayerPlan(tuple(entries), recipe.build.convert, name=recipe.where("build.convert"))


def _files(found: Analysis, title: str) -> dict[str, str | bytes]:
    """What the quick analysis of a recipe leaves; pictures only where they can be drawn."""
    record = {
        "scores": found.scores,
        "score_name": "KL (nats/token)" if found.frontier else found.score,
        "frontier": [
            {"converted": n, "ratio": ratio, "stage": found.score} for n, ratio in found.frontier
        ],
    }
    scores = {
        "score": found.score,
        "scores": found.scores,
        # By the names that `tamba analyze MODEL` writes too.
        found.score: found.scores,
        "standard_error": {found.score: found.errors},
        "choice": {
            "strategy": f"lowest {found.score}",
            "layers": list(found.plan.converted),
        },
        "order": found.order,
        "frontier": found.frontier,
    }
    tables = {} if found.states is None else found.states.distances()
    if found.states is not None:
        scores |= tables_json(found.states)
    drawn: dict[str, bytes] = {}
    if can_draw():
        bars = {found.score: (found.scores, found.errors)}
        entries = [(entry.action, entry.index) for entry in found.plan.entries]
        drawn = pictures(title, tables, bars, entries)
    return {
        **drawn,
        "scores.json": json.dumps(scores, indent=1) + "\n",
        "record.json": json.dumps(record, indent=1) + "\n",
        "plan.toml": found.plan.to_toml(),
    }


def _partial(out: Path) -> Path:
    """Where the folder is made; effects that were finished wait here for the next call."""
    return out.absolute().parent / f".{out.absolute().name}.partial"


def _make_room(out: Path) -> None:
    """Refuse a folder that cannot be made, before any work."""
    with _told(out):
        _partial(out).mkdir(parents=True, exist_ok=True)


@contextmanager
def _told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise UserError(str(out), problem, "choose another folder or free some room") from error


def _write(out: Path, files: Mapping[str, str | bytes]) -> None:
    """The folder, whole or not at all."""
    partial = _partial(out)
    with _told(out):
        try:
            _clear(partial)
            for name, content in files.items():
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except OSError:
            _clear(partial)
            raise


def _clear(partial: Path) -> None:
    """Leave nothing but finished effects."""
    for path in partial.iterdir() if partial.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != EFFECTS:
            path.unlink(missing_ok=True)
