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
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tamba.errors import UserError

if TYPE_CHECKING:
    from tamba.inspect import Inspection
    from tamba.recipe import Recipe
    from tamba.report import Perplexity

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

MODEL_HELP = "Checkpoint folder, GGUF file, or owner/name on the hub."
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
        from tamba.inspect import CONTEXTS
        from tamba.inspect import inspect as step

        if bandwidth is not None and not 0 < bandwidth < math.inf:
            raise UserError("--bandwidth", f"{bandwidth} is not above 0", "give GB a second")
        if any(length < 0 for length in context or ()):
            raise UserError("--context", "is below 0", "give a number of tokens")
        found = step(
            model,
            contexts=context or CONTEXTS,
            bandwidth=None if bandwidth is None else bandwidth * 1e9,
        )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _show_inspection(found)


@app.command()
def analyze(recipe: RecipeFile, out: OutFolder, overrides: Set = None) -> None:
    """Score the teacher's layers and choose which to convert: scores, plots, plan.toml."""
    settings = _read(recipe, overrides)
    with _step():
        from tamba.analyze import analyze as step

        step(settings, out)
    stderr.print(f"wrote {out}")


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
) -> None:
    """Repair the student by the recipe's stages."""
    settings = _read(recipe, overrides)
    with _step():
        from tamba.train import train as step

        step(settings, out, student=student)
    stderr.print(f"wrote {out}")


@app.command()
def evaluate(
    model: ModelName,
    text: Annotated[
        list[str],
        typer.Option(help="Text to measure on: .txt, .jsonl, a folder, python-docs; repeatable."),
    ],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The teacher to compare with.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens a window.", min=2)] = 1024,
    limit: Annotated[int | None, typer.Option(help="Most windows to measure.", min=1)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.html and plots.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on text, alone or beside the teacher."""
    with _step():
        from tamba.evaluate import evaluate as step

        record = step(
            model,
            text,
            against=against,
            length=length,
            limit=limit,
            out=out,
            dtype=dtype,
            device=device,
        )
    if as_json:
        print(record.model_dump_json(indent=2))
        return
    assert record.perplexity is not None
    stdout.print(_perplexity_line(record.perplexity))


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

    with _step():
        from tamba.run import run as step

        report = step(settings, out, force=force, report=say)
    stdout.print(str(report), markup=False)


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


def _perplexity_line(found: Perplexity) -> str:
    line = f"perplexity {found.student:.4g}"
    if found.teacher is not None:
        line += f", teacher {found.teacher:.4g}, ratio {found.ratio:.4g}"
    return f"{line} over {found.tokens:,} tokens"


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep what libraries would print out of the output; errors still come as errors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield


@contextlib.contextmanager
def _step() -> Iterator[None]:
    """Quiet libraries, and progress on stderr."""
    with _quiet_libraries():
        from tamba.progress import shown

        with shown(stderr):
            yield


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
