"""The command line: verbs, help, exit codes.

A step is imported when its verb is called, so that help is quick; this is the one file that imports
late. What the user gave wrong is one line and exit code 2; an interrupt is exit code 130; an error
of ours keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from tamba.errors import UserError

if TYPE_CHECKING:
    from tamba.inspect import Inspection
    from tamba.recipe import Recipe
    from tamba.report import Perplexity, Record

app = typer.Typer(
    name="tamba",
    help="Turn a pretrained Transformer language model into a Transformer-Mamba hybrid.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# What no check beforehand can promise, and what to do about it.
_FULL = "the disk is full; make room and run this again"
_DENIED = "may not be read or written; check its permissions or choose another place"
_MACHINE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: _DENIED,
}
stdout = Console(soft_wrap=True, highlight=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False)

Number = TypeVar("Number", int, float)
MODEL_HELP = "Checkpoint folder, GGUF file, owner/name on the hub, or package:NAME."
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, e.g. data.length=256."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Dtype = Annotated[
    str | None, typer.Option(help="Type to compute in; as stored if not given.", metavar="TYPE")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from tamba import __version__

        print(f"tamba {__version__}")
        raise typer.Exit


@app.command()
def inspect(
    model: ModelName,
    context: Annotated[
        list[int] | None, typer.Option(help="Context length to give floors for; repeatable.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Memory bandwidth; measured if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is: family, layers, parameters, cache, memory and speed floors."""
    with _quiet_libraries():
        from tamba.inspect import inspect as step

        if bandwidth is not None and not 0 < bandwidth < math.inf:
            raise UserError(
                "--bandwidth", f"{bandwidth} is not a number above 0", "give GB a second"
            )
        if any(length < 0 for length in context or ()):
            raise UserError("--context", "is below 0", "give a number of tokens")
        found = step(
            model,
            contexts=context or None,
            bandwidth=None if bandwidth is None else bandwidth * 1e9,
        )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _show_inspection(found)


@app.command()
def analyze(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe (.toml), or a checkpoint.")
    ],
    out: OutFolder,
    overrides: Set = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to read: .txt, .jsonl, a folder; python-docs if not given."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens a row.", min=2)] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens to read.", min=2)] = 32_768,
    scores: Annotated[
        str,
        typer.Option(
            help="Of states, drop, swap, least_squares, aligned, restore; commas between."
        ),
    ] = "states",
    recall: Annotated[
        bool, typer.Option("--recall", help="Measure recall too where layers are changed.")
    ] = False,
    effect_tokens: Annotated[
        int, typer.Option(help="Tokens that effects are scored on.", min=1)
    ] = 4096,
    student: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Converted, for aligned and restore.")
    ] = None,
    choose: Annotated[
        str, typer.Option(metavar="STRATEGY", help="How to choose, e.g. 'lowest drop', uniform.")
    ] = "",
    convert: Annotated[
        int | None,
        typer.Option(help="Layers to convert; half of the attention if not given.", min=0),
    ] = None,
    cache_bytes: Annotated[
        int | None,
        typer.Option(help="Convert until 8,192 tokens take no more than this.", min=1),
    ] = None,
    keep: Annotated[list[int] | None, typer.Option(help="A layer to keep; repeatable.")] = None,
    groups: Annotated[
        int | None, typer.Option(help="Find groups of so many layers to transplant.", min=1)
    ] = None,
    into: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Write plans that put groups into it,")
    ] = None,
    replace: Annotated[
        str | None, typer.Option(metavar="A-B", help="in place of these layers of it.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Of matrix products; if not given as stored, bfloat16 where layers are changed.",
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Score layers and choose which to convert: scores, heat maps, report, plan.toml."""
    recipe = _read(Path(source), overrides) if source.endswith(".toml") else None
    if recipe is None and overrides:
        raise UserError("--set", "changes a recipe, and there is none", "name a .toml file")
    if recipe is not None:
        for name in context.params:
            given = context.get_parameter_source(name)
            told = given is not None and given.name == "COMMANDLINE"
            if told and name not in ("source", "out", "overrides"):
                raise UserError(
                    f"--{name.replace('_', '-')}",
                    "is for a model, and a recipe says itself what to measure",
                    "change the recipe with --set, e.g. --set analyze.convert=8",
                )
    with _step(goes_on=True):
        from tamba.analyze import PYTHON_DOCS, Reading, Settings
        from tamba.analyze import analyze as step
        from tamba.analyze.choice import Budget

        if recipe is not None:
            step(recipe, out)
        else:
            reading = Reading(
                text or PYTHON_DOCS,
                length,
                tokens,
                recall=recall,
                student=student,
                into=into,
                replaced=_layer_run(replace),
                dtype=dtype,
                device=device,
            )
            settings = Settings(
                tuple(scores.replace(",", " ").split()),
                effect_tokens,
                choose=choose,
                budget=None if convert is cache_bytes is None else Budget(convert, cache_bytes),
                always_keep=tuple(keep or ()),
                groups=groups,
            )
            step(source, out, reading=reading, settings=settings)
    stderr.print(f"wrote {out}")


def _layer_run(words: str | None) -> range:
    """The layers that ``12-22`` means, both ends among them."""
    if words is None:
        return range(0)
    first, dash, last = words.partition("-")
    if first.isdigit() and (last.isdigit() or not dash):
        layers = range(int(first), int(last or first) + 1)
        if layers:
            return layers
    raise UserError("--replace", f"'{words}' is no run of layers", "write e.g. 12-22")


@app.command()
def build(
    recipe: RecipeFile,
    out: OutFolder,
    plan: Annotated[
        Path | None, typer.Option(help="A plan file, instead of the recipe's build.plan.")
    ] = None,
    overrides: Set = None,
) -> None:
    """Make the student: copy, convert, transplant, drop and reinitialize layers."""
    changes = list(overrides or ())
    if plan is not None:
        changes.append(f"build.plan={json.dumps(str(plan.resolve()))}")
    settings = _read(recipe, changes)
    with _step():
        from tamba.build import build as step

        report = step(settings, out)
    typer.echo(str(report))
    stderr.print(f"wrote {out}")


@app.command()
def train(
    recipe: RecipeFile,
    out: OutFolder,
    student: Annotated[
        Path, typer.Option(help="The checkpoint that `tamba build` wrote.", show_default=False)
    ],
    overrides: Set = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Only this stage, by kind or number from 0; repeatable."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="The text/ of a `tamba run`; prepared if not given."),
    ] = None,
) -> None:
    """Repair the student by the recipe's stages, or by some of them."""
    settings = _read(recipe, overrides)
    with _step(goes_on=True):
        from tamba.progress import leads
        from tamba.train import train as step

        step(settings, out, student=student, text=text, stages=stage or ())
    if leads():
        stderr.print(f"wrote {out}")


def _list_suites(wanted: bool) -> None:
    if not wanted:
        return
    with _quiet_libraries():
        from tamba.evaluate import SETS, SUITES
    width = max(map(len, (*SUITES, *SETS)))
    for name, known in SUITES.items():
        print(f"{name:<{width}} {known.about}" + (f" (reads {known.data})" if known.data else ""))
    for name, members in SETS.items():
        print(f"{name:<{width}} = {','.join(members)}")
    raise typer.Exit


@app.command()
def evaluate(
    model: ModelName,
    suite: Annotated[
        list[str] | None,
        typer.Option(metavar="NAMES", help="What to measure, e.g. ppl,kl,lambada; see --list."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "--text",
            metavar="FILE",
            help="Text (.txt, .jsonl, a folder, python-docs, hf://..), or NAME=FILE for a suite.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The teacher to compare with.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the report; a run that was interrupted goes on there."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Most windows or items of a suite.", min=1)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens a window of text; 1024, or the model's positions.", min=2),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Slide windows by so many tokens.", min=1)
    ] = None,
    lengths: Annotated[
        list[str] | None,
        typer.Option(metavar="[SUITE=]N,N", help="Sizes of recall tasks; window of position."),
    ] = None,
    cases: Annotated[int, typer.Option(help="Cases at each size of a recall task.", min=1)] = 30,
    contexts: Annotated[
        str | None, typer.Option(metavar="N,N", help="Contexts of memory and speed.")
    ] = None,
    batches: Annotated[str, typer.Option(metavar="N,N", help="Batches of memory and speed.")] = "1",
    new_tokens: Annotated[int | None, typer.Option(help="Longest answer in chat.", min=1)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Chat template in lm-eval's tasks.")] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run code that the model writes (crux).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the recall tasks.", min=0)] = 0,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible address that judges chat.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its model.")] = None,
    judge_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with its key.")
    ] = None,
    judge_price: Annotated[
        str | None, typer.Option(metavar="IN,OUT", help="Dollars a million tokens.")
    ] = None,
    text_key: Annotated[
        str, typer.Option(help="Field of JSON lines that holds the text.")
    ] = "text",
    tokens_at_once: Annotated[
        int | None, typer.Option(help="Tokens of a batch; changes no result.", min=1)
    ] = None,
    _listing: Annotated[
        bool,
        typer.Option(
            "--list", is_eager=True, callback=_list_suites, help="List suites and sets, and exit."
        ),
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure quality, recall, memory and speed, alone or beside the teacher."""
    with _step(goes_on=out is not None):
        from tamba.evaluate import evaluate as step

        record = step(
            model,
            data or [],
            suites=[n for s in suite for n in s.split(",") if n] if suite else None,
            against=against,
            out=out,
            limit=limit,
            length=length,
            stride=stride,
            lengths=_by_suite("--lengths", lengths or []),
            cases=cases,
            contexts=_numbers("--contexts", contexts, int),
            batches=_numbers("--batches", batches, int),
            new_tokens=new_tokens,
            chat=chat,
            allow_code=allow_code,
            seed=seed,
            judge=judge,
            judge_model=judge_model,
            judge_key=judge_key,
            judge_price=_price(judge_price),
            text_key=text_key,
            tokens_at_once=tokens_at_once,
            dtype=dtype,
            device=device,
        )
    if as_json:
        print(record.model_dump_json(indent=2))
    else:
        for line in _evaluation_lines(record):
            stdout.print(line, markup=False)
    if out is not None:
        stderr.print(f"wrote {out}")


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What to say; - reads it from stdin.")
    ],
    new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among this share of probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the chat template, or not.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt; text on stdout as it comes, speed on stderr."""
    if prompt == "-":
        prompt = sys.stdin.read()
    with _quiet_libraries():
        from tamba.generate import generate as step

        found = step(
            model,
            prompt,
            new_tokens=new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            chat=chat,
            system=system,
            stream=None if as_json else _write_now,
            dtype=dtype,
            device=device,
        )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(flush=True)
    speed = found.tokens_per_second
    stderr.print(
        f"[dim]prompt {found.prompt_tokens} tokens in {found.prefill_seconds:.2f} s · answer "
        f"{found.new_tokens} tokens" + (f" at {speed:.1f} tokens/s" if speed else "") + "[/dim]"
    )


@app.command("generate-data")
def generate_data(
    model: ModelName,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="JSON lines to write.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Prompts: .jsonl, .txt, .parquet, a folder, OWNER/NAME[:SPLIT] (hub)."),
    ] = None,
    magpie: Annotated[
        int, typer.Option(metavar="N", help="Prompts that the model writes itself.", min=0)
    ] = 0,
    limit: Annotated[int | None, typer.Option(help="Most prompts of a source.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    prompt_tokens: Annotated[int | None, typer.Option(help="Longest prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among this share of probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of sampling.", min=0)] = 0,
    tokens_at_once: Annotated[
        int | None,
        typer.Option(help="Places of a batch, prompts and answers; by the device.", min=1),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Let a model answer prompts: training data for its student. Goes on where it was cut off."""
    with _step(goes_on=True):
        from tamba.generate_data import generate_data as step

        written = step(
            model,
            out,
            prompts=prompts or (),
            magpie=magpie,
            limit=limit,
            new_tokens=new_tokens,
            prompt_tokens=prompt_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            tokens_at_once=tokens_at_once,
            dtype=dtype,
            device=device,
        )
    if as_json:
        print(json.dumps(written.to_dict(), indent=2))
    else:
        print(written)
    stderr.print(f"wrote {out}")


@app.command()
def run(
    recipe: RecipeFile,
    out: OutFolder,
    force: Annotated[bool, typer.Option("--force", help="Do every step again.")] = False,
    overrides: Set = None,
) -> None:
    """Do the whole way, leaving out steps whose inputs have not changed."""
    settings = _read(recipe, overrides)

    def say(step: str, what: str) -> None:
        match what:
            case "begun":
                stderr.print(f"[bold]{step}[/bold]")
            case "skipped":
                stderr.print(f"[bold]{step}[/bold] [dim]unchanged, skipped[/dim]")
            case _:
                stderr.print(f"[dim]{step} took {what}[/dim]")

    with _step(goes_on=True):
        from tamba.run import run as step

        report = step(settings, out, force=force, report=say)
    for line in _run_lines(report):
        stderr.print(line, markup=False)
    stdout.print(str(report), markup=False)


@app.command()
def bench(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="kernels, cold-start or model.")
    ] = "kernels",
    device: Device = None,
    rows: Annotated[
        list[str] | None, typer.Option(help="A row's id, or what ids begin with; repeatable.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="How often the sides of a row take turns.")
    ] = None,
    limit_seconds: Annotated[
        float | None, typer.Option(help="Begin no row after so many seconds.")
    ] = None,
    peers: Annotated[
        Path | None, typer.Option(help="Folder of unpacked archives of libraries to measure.")
    ] = None,
    compile_seconds: Annotated[
        float, typer.Option(help="How long kernels of others may be compiled beforehand.")
    ] = 120.0,
    seed: Annotated[int | None, typer.Option(help="Of the random arguments.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the record.")] = None,
    tables: Annotated[
        Path | None,
        typer.Option(help="Measure nothing: fill a document's tables from the records of --out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the operators, a new process or whole models, beside other libraries."""
    if tables is not None:
        from tamba.bench import fill

        if out is None or not out.is_dir():
            raise UserError("--out", "is no folder of records", "name the folder of the records")
        if not tables.is_file():
            raise UserError(str(tables), "no such document", "name a Markdown file")
        tables.write_text(fill(tables.read_text(), out))
        stderr.print(f"wrote {tables}")
        return
    with _step():
        from tamba.bench import bench as step
        from tamba.bench import line

        record = step(
            suite,
            device=device,
            rows=rows or (),
            rounds=rounds,
            limit_seconds=limit_seconds,
            peers_folder=peers,
            compile_seconds=compile_seconds,
            seed=seed,
            out=out,
            report=lambda row: None if as_json else stdout.print(line(row), markup=False),
        )
    if as_json:
        print(json.dumps(record, indent=1))
    if out is not None:
        stderr.print(f"wrote {out}")


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders with a report.json, or such files."),
    ],
    out: OutFolder,
    card: Annotated[
        Path | None,
        typer.Option(help="Also write a Hugging Face model card, of one run, into this file."),
    ] = None,
) -> None:
    """Draw a run's page again, or one page that compares several; or write a model card."""
    with _step():
        from tamba.report import report as step

        if card is not None:
            from tamba.card import write_card

            if len(runs) != 1:
                raise UserError("--card", f"{len(runs)} runs were given", "a card is of one run")
            write_card(runs[0], card)
        page = step(runs, out)
    stdout.print(str(page), markup=False)


def main() -> None:
    """Run the command line; the program `tamba`."""
    try:
        app()
    except UserError as error:
        stderr.print(f"tamba: {error}", markup=False, style="red")
        sys.exit(2)
    except OSError as error:
        if error.errno not in _MACHINE:
            raise
        where = error.filename or "output"
        stderr.print(f"tamba: {where}: {_MACHINE[error.errno]}", markup=False, style="red")
        sys.exit(2)


def _read(recipe: Path, overrides: list[str] | None) -> Recipe:
    from tamba.recipe import read_recipe

    return read_recipe(recipe, overrides or ())


def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _numbers(flag: str, text: str | None, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise UserError(flag, f"'{text}' is no list of numbers", "e.g. 64,128") from None


def _by_suite(flag: str, given: list[str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for text in given:
        suite, _, numbers = text.rpartition("=")
        sizes = _numbers(flag, numbers, int)
        if not sizes:
            raise UserError(flag, f"'{text}' holds no numbers", "e.g. copy=64,128")
        found[suite] = (*found.get(suite, ()), *sizes)
    return found


def _price(text: str | None) -> tuple[float, float] | None:
    found = _numbers("--judge-price", text, float)
    if text is not None and len(found) != 2:
        raise UserError("--judge-price", f"'{text}' is not two numbers", "e.g. 0.15,0.60")
    return None if text is None else (found[0], found[1])


def _run_lines(report: Path) -> Iterator[str]:
    """What came out of a run, for who waited for it; `report` has the rest."""
    from tamba.report import read_record

    record = read_record(report)
    if record.layers is not None:
        yield f"{record.layers.converted} of {record.layers.total} layers converted"
    if record.perplexity is not None:
        yield _perplexity_line(record.perplexity)
    for said in record.chat:
        yield said.prompt
        yield from (
            f"  {who}: {' '.join(answer.split())}"
            for who, answer in (("teacher", said.teacher), ("student", said.student))
            if answer is not None
        )
    if (page := report.with_name("report.html")).exists():
        yield f"all of it, with plots: {page}"


def _perplexity_line(found: Perplexity) -> str:
    line = f"perplexity {found.student:.4g}"
    if found.teacher is not None:
        line += f", teacher {found.teacher:.4g}, ratio {found.ratio:.4g}"
    return f"{line} over {found.tokens:,} tokens"


def _evaluation_lines(record: Record) -> Iterator[str]:
    """What was found, a line a metric with both models on it; perplexity in one of its own."""
    from tamba.report import cell

    if record.perplexity is not None:
        yield _perplexity_line(record.perplexity)
    for name, measured in record.suites.items():
        if name == "ppl":
            continue
        for metric, curve in measured.curves.items():
            for role, points in curve.points.items():
                values = "  ".join(f"{p.x:g}: {p.value:.3g}" for p in points)
                yield f"{_metric(name, metric)} by {curve.axis}, {role}: {values}"
        scored = (metric for scores in measured.scores.values() for metric in scores)
        for metric in dict.fromkeys((*scored, *measured.paired)):
            known = {r: scores[metric] for r, scores in measured.scores.items() if metric in scores}
            parts = []
            for role, score in known.items():
                error = f" ± {score.error:.2g}" if score.error is not None else ""
                parts.append(f"{role} {score.value:.4g}{error}")
            if (paired := measured.paired.get(metric)) is not None:
                parts.append(
                    f"difference {paired.difference:+.4g} [{paired.low:+.3g}, {paired.high:+.3g}] "
                    f"p {paired.p:.3g} ({paired.test})"
                )
            counts = sorted({score.n for score in (*known.values(), paired) if score is not None})
            n = " and ".join(f"{count:,}" for count in counts)
            yield f"{_metric(name, metric)}: {', '.join(parts)} (n {n})"
        if bill := measured.settings.get("judge_usage"):
            told = ", ".join(f"{k.replace('_', ' ')} {v:,.6g}" for k, v in bill.items())
            yield f"{name} judge: {told}"
        for row in measured.rows:
            yield f"{name}: " + ", ".join(
                f"{k.replace('_', ' ')} {cell(k, v)}" for k, v in row.items()
            )


def _metric(suite: str, metric: str) -> str:
    return suite if metric == suite else f"{suite} {metric.replace('_', ' ')}"


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep what libraries would print out of the output; errors still come as errors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    transformers.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # every try of a hub that cannot be reached
    transformers.logging.disable_progress_bar()
    yield


@contextlib.contextmanager
def _step(*, goes_on: bool = False) -> Iterator[None]:
    """Quiet libraries, and progress on stderr; `goes_on`, after an interrupt, where it was."""
    with _quiet_libraries():
        from tamba.progress import leads, shown

        try:
            with shown(stderr):
                yield
        except KeyboardInterrupt:
            if leads():
                more = "; the same command goes on with what is done" if goes_on else ""
                stderr.print(f"tamba: interrupted{more}")
            raise


def _show_inspection(found: Inspection) -> None:
    for label, value in _rows(found):
        stdout.print(f"[bold]{label:<11}[/bold] {escape(value)}")


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "model", found.model
    yield "family", f"{found.family}, {found.dtype}"
    yield "layers", f"{len(found.layers)}: {_runs(found.layers)}"
    yield (
        "width",
        f"{found.d_model}, vocabulary {found.vocab_size:,}{', tied' if found.tied else ''}",
    )
    yield "positions", f"{found.max_positions:,}"
    parts = ", ".join(f"{name} {_count(n)}" for name, n in found.parameters_by_part.items() if n)
    yield "parameters", f"{found.parameters:,} ({parts})"
    yield "weights", _bytes(found.weight_bytes)
    yield (
        "cache",
        f"{_bytes(found.cache_bytes_per_token)} a token, state {_bytes(found.state_bytes)}",
    )
    if found.bandwidth:
        yield "bandwidth", f"{found.bandwidth / 1e9:.1f} GB/s"
    for floor in found.floors:
        speed = floor.tokens_per_second
        most = f", decoding at most {speed:,.1f} tokens/s" if speed else ""
        yield f"at {floor.context:,}", f"memory at least {_bytes(floor.memory_bytes)}{most}"


def _runs(kinds: tuple[str, ...]) -> str:
    """Equal neighbours counted: ``3 attention, 2 mamba2, 1 attention``."""
    runs: list[tuple[str, int]] = []
    for kind in kinds:
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + 1)
        else:
            runs.append((kind, 1))
    return ", ".join(f"{n} {kind}" for kind, n in runs)


def _count(n: int) -> str:
    for size, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(n)


def _bytes(n: int) -> str:
    size, units = float(n), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
