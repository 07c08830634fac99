"""What a model lost and what it gained: the verb, and the measures it calls.

`evaluate` opens checkpoints, has every suite check what it was given, measures, and hands back a
record. Suites and what they are made of are in the files beside this one; `docs/evaluation.md` says
how they fit together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tamba
from tamba import report
from tamba.checkpoint import (
    Checkpoint,
    check_place,
    load_model,
    load_tokenizer,
    open_checkpoint,
)
from tamba.data import Source
from tamba.errors import UserError, nearest
from tamba.evaluate.measure import Measure, Models, Options, Request, Role, Subject
from tamba.evaluate.memory import cache_bytes
from tamba.evaluate.parts import (
    built_entries,
    layers_of,
    memory_of,
    perplexity_of,
    plan_of,
    recipe_of,
)
from tamba.evaluate.perplexity import Comparison, PerplexityResult, compare, perplexity
from tamba.evaluate.suites import SETS, SUITES, Suite, assign_data, find_suites
from tamba.evaluate.texts import check_sources
from tamba.store import Store, digest

__all__ = [
    "SETS",
    "SUITES",
    "Comparison",
    "Options",
    "PerplexityResult",
    "cache_bytes",
    "compare",
    "evaluate",
    "perplexity",
]

_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32_768}
_KEPT = "what is done is kept; the same call goes on"
# Settings that say how much is measured, not what an item's result is.
_AMOUNTS = frozenset(
    {"limit", "cases", "lengths", "left_out", "windows", "n", "questions", "pairs"}
)


def evaluate(
    model: str | os.PathLike[str],
    data: Source | Sequence[Source] = (),
    *,
    suites: Iterable[str] | None = None,
    against: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    tokens_at_once: int | None = None,
    **options: Any,
) -> report.Record:
    """Measure a checkpoint, alone or beside its teacher.

    Args:
        model: a checkpoint of ours or any supported one: folder, hub name or GGUF file.
        data: text and files, each a source of text (see `tamba.data.read_texts`), ``NAME=FILE`` for
            the suite of that name, or a file named after its suite (``lambada.jsonl``).
        suites: names of `SUITES` and `SETS`; ``ppl``, and ``kl`` where there is a teacher, if None.
        against: the teacher.
        out: folder for ``report.json``, ``report.html``, plots, answers, and finished items, from
            which the same call goes on; nothing is written without one.
        dtype: type to compute in; as stored if None.
        device: where; a GPU if there is one.
        tokens_at_once: tokens of a batch; results do not depend on it.
        options: fields of `Options`: ``length``, ``limit``, ``lengths``, ``cases``, ``seed``, ...

    Raises:
        UserError: something is missing or does not fit, before any work; or a suite could not be
            finished, after the others were and the report was written.
    """
    settings = _options(options)
    place = check_place(dtype, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sources = [data] if isinstance(data, str | os.PathLike) else list(data)
    names = list(suites) if suites is not None else ["ppl"] + ["kl"] * (against is not None)
    wanted = find_suites(names)
    _check_lengths(settings, [suite.name for suite, _ in wanted])
    given = assign_data(
        [suite.name for suite, _ in wanted],
        [os.fspath(source) for source in sources],
        [name for name, suite in SUITES.items() if suite.reads_text],
    )
    if out is not None:
        _check_folder(Path(out))
    for suite, _ in wanted:
        if suite.reads_text:
            # A file that is missing or empty shows before anything is fetched.
            check_sources(given[suite.name].get("", ()), settings.text_key)
    opened: dict[Role, Checkpoint] = {"student": open_checkpoint(model)}
    if against is not None:
        opened["teacher"] = open_checkpoint(against)
    tokenizers = {role: load_tokenizer(checkpoint) for role, checkpoint in opened.items()}
    if tokenizers["student"] is None:
        raise UserError(str(model), "has no tokenizer", "put tokenizer.json beside the weights")
    measures: dict[str, tuple[Suite, Measure]] = {}
    for suite, shots in wanted:
        plain = suite.name.partition("@")[0]
        request = Request(
            suite=plain,
            data=given[plain].get("", ()),
            configs={role: checkpoint.tamba_config for role, checkpoint in opened.items()},
            tokenizer=tokenizers["student"],
            options=settings,
            folder=None if out is None else Path(out),
            shots=shots,
            extra={part: files for part, files in given[plain].items() if part},
            others=tuple(t for r, t in tokenizers.items() if r != "student" and t is not None),
        )
        measures[suite.name] = (suite, suite.prepare(request))

    begun = time.monotonic()
    subjects = {
        role: Subject(
            role=role,
            name=os.path.basename(os.fspath(path).rstrip("/")),
            model=load_model(opened[role], dtype, place),
            tokenizer=tokenizers[role] or tokenizers["student"],
            digest=opened[role].digest(),
            tokens_at_once=tokens_at_once or _TOKENS_AT_ONCE.get(place.type, 32_768),
        )
        for role, path in (("student", model), ("teacher", against))
        if role in opened and path is not None
    }
    models = Models(subjects["student"], subjects.get("teacher"))
    seconds = {"load": round(time.monotonic() - begun, 3)}
    teacher = None if models.teacher is None else models.teacher.model
    folder = opened["student"].folder
    record = report.Record.begin(
        name=models.student.name,
        teacher=None if models.teacher is None else models.teacher.name,
        layers=layers_of(models.student.model, folder=folder, teacher=teacher),
        plan=plan_of(models.student.model, built_entries(folder)),
        recipe=recipe_of(folder),
        parameters={role: s.model.num_parameters() for role, s in subjects.items()},
        memory=memory_of(models.student.model, teacher),
        seconds=seconds,
        digests={role: subject.digest for role, subject in subjects.items()},
    )
    problems: dict[str, UserError] = {}
    for name, (suite, measure) in measures.items():
        found = _measured(name, suite, measure, models, out, problems)
        seconds = seconds | {name: found.seconds}
        known = record.suites | {name: found}
        record = record.updated(suites=known, seconds=seconds, perplexity=perplexity_of(known))
        if out is not None:
            report.write_report(record, out, html=False)
    if out is not None:
        report.write_report(record, out)
    for name, error in problems.items():
        suite_name = f"suite {name}"
        where = error.where if error.where == suite_name else f"{suite_name}: {error.where}"
        raise UserError(where, error.problem, error.remedy)
    return record


def _measured(
    name: str,
    suite: Suite,
    measure: Measure,
    models: Models,
    out: str | os.PathLike[str] | None,
    problems: dict[str, UserError],
) -> report.Measured:
    """Run one suite; what stops it is remembered, so that the others still run."""

    def stores(*subjects: Subject) -> Store:
        if out is None:
            return Store()
        what = {k: v for k, v in measure.settings.items() if k not in _AMOUNTS}
        which = [(subject.digest, str(subject.model.dtype)) for subject in subjects]
        mark = digest(models=which, suite=name, what=what, tamba=tamba.__version__)
        return Store(Path(out) / "items" / f"{name}-{mark[:16]}.jsonl")

    try:
        found = measure.run(models, stores)
    except (UserError, torch.OutOfMemoryError) as caught:
        error = caught if isinstance(caught, UserError) else _too_much(models)
        problems[name] = error
        return report.Measured(about=suite.about, settings=measure.settings, problem=str(error))
    if found.problem is not None:
        problems[name] = UserError("not complete", found.problem)
    return found.model_copy(update={"about": suite.about})


def _too_much(models: Models) -> UserError:
    at_once = models.student.tokens_at_once
    return UserError(
        f"{models.student.model.device}",
        f"out of memory with batches of {at_once:,} tokens",
        f"--tokens-at-once {max(1, at_once // 4)} changes no result; {_KEPT}",
    )


def _options(given: Mapping[str, Any]) -> Options:
    try:
        options = Options(**given)
    except TypeError as error:
        raise TypeError(f"evaluate: {error}") from None
    if options.limit is not None and options.limit < 1:
        raise UserError("limit", f"{options.limit} leaves nothing to measure", "use 1 or more")
    if options.new_tokens is not None and options.new_tokens < 1:
        raise UserError("new_tokens", f"{options.new_tokens} is not above 0")
    return options


def _check_lengths(options: Options, wanted: Sequence[str]) -> None:
    """Refuse sizes for a suite that is not asked for or has none, which nobody would miss."""
    if not isinstance(options.lengths, Mapping):
        return
    swept = [name for name in wanted if name == "position" or name in SETS["recall"]]
    for name in options.lengths:
        if name and name not in swept:
            raise UserError(
                f"--lengths {name}",
                "no suite that is asked for has this name and a length",
                nearest(name, swept) if swept else "leave it out",
            )


def _check_folder(out: Path) -> None:
    """Refuse, before hours of work, a folder that could not be written to after them."""
    above = out
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise UserError(str(out), f"{above} is no folder", "choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(str(out), f"{above} may not be written to", "choose another --out")
