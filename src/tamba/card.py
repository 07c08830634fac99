"""The Hugging Face model card of a run, written from its record."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from tamba.artefact import write_file
from tamba.errors import UserError
from tamba.plots import byte_size
from tamba.report import MIXERS, Record, Score, is_share, number, read_record, score_text

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_card(run: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write the card of a run as Markdown with the front matter that the hub reads.

    Args:
        run: a folder with a ``report.json``, or such a file.
        path: the card; ``README.md`` beside the weights is where the hub looks.

    Raises:
        UserError: there is no record, or `path` cannot be written.
    """
    source, target = Path(run), Path(path)
    record = read_record(source / "report.json" if source.is_dir() else source)
    try:
        write_file(target, model_card(record))
    except OSError as error:
        raise UserError(str(target), error.strerror or str(error)) from error
    return target


def model_card(record: Record) -> str:
    """The card as text. Licence and languages are the base model's and are left to its card."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tamba", "hybrid", *sorted({p.mixer for p in record.plan} & {"mamba1", "mamba2"})],
        base_model=record.teacher if _HUB_NAME.fullmatch(record.teacher or "") else None,
        model_name=record.name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=suite,
                dataset_name=suite,
                metric_type=metric,
                metric_value=round(score.value, 6),
            )
            for suite, scores in _scores(record)
            for metric, score in scores.items()
        ]
        or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_body(record)) + "\n"


def _scores(record: Record) -> Iterator[tuple[str, dict[str, Score]]]:
    p = record.perplexity
    if p:
        known = {"perplexity": Score(value=p.student, n=p.tokens)}
        if p.ratio:
            known["perplexity_ratio"] = Score(value=p.ratio, n=p.tokens, error=p.ratio_error)
        yield "held-out text", known
    for name, suite in record.suites.items():
        if suite.scores.get("student"):
            yield name, suite.scores["student"]


def _layers(record: Record) -> str:
    """What became of the layers, in words; empty where all are kept."""
    made = Counter(
        (x.origin, MIXERS.get(x.mixer, x.mixer)) for x in record.plan if x.origin != "kept"
    )
    if not made:
        return ""
    total = len(record.plan)
    kept = total - made.total()
    if {origin for origin, _ in made} == {"converted"}:
        kinds = " and ".join(sorted(kind for _, kind in made))
        others = ", the others are as before" if kept else ""
        return f"{made.total()} of its {total} layers are {kinds} layers now{others}"
    told = [f"{n} {kind} ({origin})" for (origin, kind), n in sorted(made.items())]
    return f"its {total} layers are {', '.join([*told, *([f'{kept} kept'] if kept else [])])}"


def _body(record: Record) -> Iterator[str]:
    p = record.perplexity
    yield f"# {record.name}"
    yield ""
    if record.teacher and (what := _layers(record)):
        yield (f"A hybrid made from `{record.teacher}` with tamba: {what}.")
        yield ""
    if p and p.ratio and p.teacher:
        yield (
            f"Perplexity on {p.tokens:,} held-out tokens: {number(p.student, 4)}, the base model's "
            f"is {number(p.teacher, 4)} ({number(p.ratio, 4)} times)."
        )
        yield ""
    yield "## Use"
    yield ""
    yield "```python"
    yield "import tamba  # makes the architecture known to transformers"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    yield 'model = AutoModelForCausalLM.from_pretrained("PATH_OR_NAME")'
    yield 'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")'
    yield "```"
    if record.suites:
        yield ""
        yield "## Results"
        yield ""
        yield "| suite | metric | this model | base model | items |"
        yield "|---|---|---|---|---|"
        for name, suite in record.suites.items():
            for metric, score in suite.scores.get("student", {}).items():
                beside = suite.scores.get("teacher", {}).get(metric)
                share = is_share(metric, [s for s in (score, beside) if s])
                other = score_text(beside, share) if beside else ""
                yield f"| {name} | {metric} | {score_text(score, share)} | {other} | {score.n:,} |"
        yield ""
        yield "Each with its standard error."
    if record.memory:
        yield ""
        yield "## Cache of one sequence"
        yield ""
        yield "| tokens | this model | base model |"
        yield "|---|---|---|"
        for point in record.memory:
            other = byte_size(point.teacher) if point.teacher is not None else ""
            yield f"| {point.context:,} | {byte_size(point.student)} | {other} |"
    if record.plan:
        yield ""
        yield "## Layers, bottom first"
        yield ""
        yield ", ".join(
            f"{i} {MIXERS.get(x.mixer, x.mixer)} ({x.origin})" for i, x in enumerate(record.plan)
        )
    yield ""
    yield "## How it was made"
    yield ""
    stages = dict.fromkeys(x.stage for x in record.training)
    if stages:
        last = {s: max(x.tokens for x in record.training if x.stage == s) for s in stages}
        yield "Trained by " + ", ".join(f"{s} ({n:,} tokens)" for s, n in last.items()) + "."
        yield ""
    if record.command:
        yield f"`{record.command}`" + (f", {record.date[:10]}" if record.date else "")
        yield ""
    if record.recipe:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", record.recipe)), default=0))
        yield f"{fence}toml\n{record.recipe.strip()}\n{fence}"
        yield ""
    yield "Versions: " + (", ".join(f"{k} {v}" for k, v in record.versions.items()) or "unknown")
