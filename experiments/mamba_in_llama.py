"""The findings of *The Mamba in the Llama* (arXiv 2408.15237) at a scale that fits one GPU.

    python experiments/mamba_in_llama.py attention-25 \\
        --train train.jsonl.xz --heldout valid.jsonl --out runs --record distill-smollm2.json

Each row is `recipes/distil-smollm2.toml` with a few keys changed; those of conversations go on with
`recipes/chat-smollm2.toml`. `--list` shows all rows. Rows share what they have in common: text is
tokenized once, layers are scored once, and a stage is run once for all rows that agree up to it.
What is made lies in ``OUT/shared``, so that the same call goes on where it stopped. A row's result
is added to the record, a JSON list, in place of an older one of the same row and seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

import tamba
from tamba.artefact import command_without_folders, versions, write_file
from tamba.checkpoint import load_model, load_tokenizer, open_checkpoint
from tamba.errors import UserError
from tamba.evaluate.scoring import loglikelihoods
from tamba.evaluate.student import evaluate_student
from tamba.generate_data import generate_data
from tamba.recipe import Recipe, read_recipe
from tamba.text import prepare_text, read_text

RECIPES = Path(__file__).parent.parent / "recipes"
RECIPE, CHAT_RECIPE = RECIPES / "distil-smollm2.toml", RECIPES / "chat-smollm2.toml"
LAYERS = 30
LEAST_SQUARES, ALIGN, DISTIL = range(3)
"""Stages of the recipe."""
SFT, DPO = range(2)
"""Stages of the recipe of conversations."""
QUARTER = 23
"""Layers that are converted where a quarter of the attention stays."""
ANSWERS = 1024
"""Prompts that the teacher answers for the rows of conversations."""
HELD_OUT = 24
"""Every which preference is measured on and not trained on; all of ``hhh/`` are."""


@dataclass(frozen=True)
class Row:
    """A variant of the recipe.

    Args:
        finding: what of the paper it looks at.
        changes: ``key=value``, as for ``--set``.
        converted: so many layers, those that harm least by the scores; None where `changes` say.
        others: what becomes of them: ``convert`` or ``drop``.
        stages: of the recipe.
        chat: stages of the recipe of conversations that follow.
        talks: whether answers and preferences are measured too.
        recall: whether layers are chosen by what they cost recall too.
    """

    finding: str
    changes: tuple[str, ...] = ()
    converted: int | None = QUARTER
    others: Literal["convert", "drop"] = "convert"
    stages: tuple[int, ...] = (LEAST_SQUARES, ALIGN, DISTIL)
    chat: tuple[int, ...] = ()
    talks: bool = False
    recall: bool = False


def _plan(actions: list[str]) -> str:
    return f"build.plan={json.dumps(actions)}"


def _every(n: int, *, block: bool = False) -> str:
    """A plan that keeps `n` of the layers by position: at even distances, or the last of them."""
    kept = range(LAYERS - n, LAYERS) if block else [round((i + 0.5) * LAYERS / n) for i in range(n)]
    return _plan([f"{'keep' if i in set(kept) else 'convert'} {i}" for i in range(LAYERS)])


def _distil(**changes: str) -> tuple[str, ...]:
    return tuple(f"train.{DISTIL}.{key}={value}" for key, value in changes.items())


SHORT = (
    f"train.{ALIGN}.tokens=2000000",
    *_distil(tokens="4000000"),
    "evaluate.tokens=200000",
)
LOOKUPS = ("data.lookup_share=0.4",)
RECALL = (
    'analyze.measures=["least_squares"]',
    "analyze.recall=true",
    'analyze.choose="sum least_squares + 0.25 least_squares_recall"',
)
_TUNED = (*SHORT, *_distil(kl="0", ce="1"))
_MAMBA1 = (*SHORT, "build.convert.mixer=mamba1", "build.convert.norm=none")
ROWS = {
    **{
        f"attention-{name}": Row("share of attention (Tables 1, 2, 4)", converted=n)
        for name, n in (("50", 15), ("25", QUARTER), ("12.5", 26), ("0", 30))
    },
    # What recall needs: layers that serve it, and text that asks for it. The first of these is
    # `recipes/distil-smollm2-recall.toml`.
    "recall-25": Row("a quarter, chosen and trained for recall too", LOOKUPS, recall=True),
    "recall-25-chosen": Row("a quarter, chosen for recall too", recall=True),
    "recall-25-trained": Row("a quarter, trained for recall too", LOOKUPS),
    # Short runs at a quarter of the attention, for several seeds each.
    "short": Row("what the rows below are compared with", SHORT, talks=True),
    # Where the weights come from: no closed form, so that what it is worth is not in the way.
    "attention-start": Row("projections of the attention (Table 8)", SHORT, stages=(ALIGN, DISTIL)),
    "random-start": Row(
        "random projections (Table 8)",
        (*SHORT, "build.convert.weights=random"),
        stages=(ALIGN, DISTIL),
    ),
    **{
        name: Row(what, (*SHORT, *changes), stages=(ALIGN, DISTIL))
        for name, what, changes in (
            ("random-conv", "a convolution drawn at random", ("build.convert.conv=random",)),
            ("paper-decay", "decays as the paper draws them", ("build.convert.decay=paper",)),
            ("paper-start", "both", ("build.convert.conv=random", "build.convert.decay=paper")),
        )
    },
    "no-gate": Row(
        "no gate and no norm",
        (*SHORT, "build.convert.gate=none", "build.convert.norm=none"),
        stages=(ALIGN, DISTIL),
    ),
    "no-align": Row("no layer-wise stage", SHORT, stages=(LEAST_SQUARES, DISTIL)),
    "distil-alone": Row("as the paper: neither closed form nor alignment", SHORT, stages=(DISTIL,)),
    "removed": Row(
        "layers left out instead of converted (Table 9)", SHORT, others="drop", stages=(DISTIL,)
    ),
    # What moves.
    "frozen-mlp": Row("only mixers move (Table 7)", (*SHORT, *_distil(train="mixers"))),
    "all-but-mlp": Row("frozen MLPs alone (Table 7)", (*SHORT, *_distil(train="all-but-mlp"))),
    # Where attention stays.
    "interleaved": Row("placement: even distances (Table 7)", (*SHORT, _every(7)), converted=None),
    "block": Row("placement: one block", (*SHORT, _every(7, block=True)), converted=None),
    # In how many steps it goes.
    **{
        name.replace("_", "-"): Row("stepwise (Table 7)", (*SHORT, *_distil(replacement=name)))
        for name in ("progressive", "one_by_one", "theseus")
    },
    # What is learned.
    "reverse-kl": Row("the other direction of KL", (*SHORT, *_distil(divergence="reverse"))),
    "jensen-shannon": Row("between the directions", (*SHORT, *_distil(divergence="js"))),
    "paper-loss": Row("the paper's weights", (*SHORT, *_distil(kl="0.1", ce="1"))),
    "cross-entropy": Row("the text instead of the teacher", _TUNED),
    "teacher-tuned": Row("the teacher, tuned on the same text", _TUNED, 0, stages=(DISTIL,)),
    # Which recurrence.
    "mamba1": Row("Mamba-1 with whole heads kept together", _MAMBA1, stages=(ALIGN, DISTIL)),
    "mamba1-legacy": Row(
        "Mamba-1 with slices as published",
        (*_MAMBA1, "build.convert.slices=legacy"),
        stages=(ALIGN, DISTIL),
    ),
    # Conversations.
    "sft": Row("distilled, then SFT", SHORT, chat=(SFT,), talks=True),
    "dpo": Row("distilled, then DPO", SHORT, chat=(DPO,), talks=True),
    "sft-dpo": Row("distilled, then both", SHORT, chat=(SFT, DPO), talks=True),
}


@dataclass(frozen=True)
class Made:
    """Something in the shared folder and the seconds that it took."""

    path: Path
    seconds: float


class Shared:
    """What rows have in common, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(
        self, kind: str, facts: object, make: Callable[[Path], object], suffix: str = ""
    ) -> Made:
        """`make` called with the path to fill, unless something of these `facts` is there."""
        text = json.dumps([kind, tamba.__version__, facts], sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}{suffix}"
        note = path.with_name(f"{path.name}.seconds")
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of several processes that run rows side by side, one makes it and the others wait.
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not note.exists():
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
                begun = time.monotonic()
                make(path)
                write_file(note, f"{time.monotonic() - begun:.3f}\n")
        return Made(path, float(note.read_text()))


def actions(row: Row, order: list[int]) -> list[str]:
    """The plan of a row without one of its own: `order` names layers, least harm first."""
    assert row.converted is not None
    chosen = set(order[: row.converted])
    lines = {i: f"{row.others} {i}" if i in chosen else f"keep {i}" for i in range(LAYERS)}
    return [line for line in lines.values() if not line.startswith("drop")]


class Bench:
    """Runs rows."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.shared = Shared(Path(asked.out) / "shared")
        sides = ("train", asked.train), ("heldout", asked.heldout)
        self.inputs = [
            f"data.{key}={json.dumps([str(Path(p).resolve()) for p in paths])}"
            for key, paths in sides
            if paths
        ]
        if asked.teacher:
            self.inputs.append(f"teacher.path={json.dumps(asked.teacher)}")

    def recipe(self, row: Row, seed: int, analysis: Path) -> Recipe:
        """The recipe of a row whose layers are scored in `analysis`; what the caller sets wins."""
        plan = []
        if row.recall:
            plan = [f"build.plan={json.dumps(str((analysis / 'plan.toml').resolve()))}"]
        elif row.converted is not None:
            order = json.loads((analysis / "scores.json").read_text())["order"]
            plan = [_plan(actions(row, order))]
        changes = [*self.inputs, f"seed={seed}", *plan, *row.changes, *self.asked.set]
        return read_recipe(RECIPE, changes).with_stages(row.stages)

    def chat_recipe(self, row: Row, recipe: Recipe) -> Recipe:
        """What follows `recipe` in a row of conversations."""
        answers, (train, _, _) = self.answers(recipe), self.preferences()
        data = zip((SFT, DPO), (answers, train), strict=True)
        changes = [f"train.{stage}.data={json.dumps([str(path)])}" for stage, path in data]
        teacher = json.dumps(recipe.teacher.path)
        changes += [f"teacher.path={teacher}", f"seed={recipe.seed}"]
        return read_recipe(CHAT_RECIPE, changes).with_stages(row.chat)

    # --- what rows share

    def text(self, recipe: Recipe, side: Literal["train", "heldout"]) -> Made:
        keys = ["teacher", f"data.{side}", "data.rows", "data.length", "data.heldout_share"]
        keys += ["data.lookup_share"] if side == "train" else []
        return self.shared.once(
            side,
            recipe.digest(*keys),
            lambda path: prepare_text(recipe, sides=[side]).save(path),
        )

    def analysis(self, row: Row) -> Made:
        """Scores of the layers, with the first seed, of text without lookups unless it has some."""
        changes = [*RECALL, f"analyze.convert={row.converted}"] if row.recall else []
        changes += [change for change in row.changes if change in LOOKUPS]
        recipe = read_recipe(RECIPE, [*self.inputs, *changes, *self.asked.set])
        text = self.text(recipe, "train").path
        return self.shared.once(
            "analysis",
            [text.name, recipe.digest("teacher", "analyze", "build")],
            lambda path: tamba.analyze(recipe, path, text=text),
        )

    def answers(self, recipe: Recipe) -> Path:
        """Conversations that the teacher finished."""
        prompts, teacher = self.asked.prompts, recipe.model_path("teacher")
        made = self.shared.once(
            "answers",
            [recipe.digest("teacher"), prompts, ANSWERS],
            lambda path: generate_data(
                teacher, path, prompts=prompts, limit=ANSWERS, new_tokens=128, dtype="bfloat16"
            ),
            suffix=".jsonl",
        )
        return made.path

    def preferences(self) -> tuple[Path, Path, Path]:
        """Pairs to train on, to measure on, and of people's own to measure on."""
        lines = Path(self.asked.preferences).read_text(encoding="utf-8").splitlines(keepends=True)
        people: list[str] = []
        tasks: list[str] = []
        for line in lines:
            of_people = str(json.loads(line).get("source", "")).startswith("hhh/")
            (people if of_people else tasks).append(line)
        parts = {
            "train": [line for i, line in enumerate(tasks) if i % HELD_OUT],
            "tasks": tasks[::HELD_OUT],
            "people": people,
        }
        self.shared.folder.mkdir(parents=True, exist_ok=True)
        paths = {name: self.shared.folder / f"preferences-{name}.jsonl" for name in parts}
        for name, part in parts.items():
            write_file(paths[name], "".join(part))
        return paths["train"], paths["tasks"], paths["people"]

    def students(self, row: Row, recipe: Recipe) -> list[Made]:
        """The student as built, and after each stage."""
        sources = ("seed", "teacher", "build", "output.shard_bytes")
        facts: list[Any] = [recipe.digest(*sources)]
        made = [self.shared.once("built", facts, lambda path: tamba.build(recipe, path))]
        text = self.text(recipe, "train").path
        stages: list[tuple[Recipe, Path | None, int]] = [
            (recipe, text, i) for i in range(len(recipe.train))
        ]
        if row.chat:
            after = self.chat_recipe(row, recipe)
            stages += [(after, None, i) for i in range(len(after.train))]
        for of, words, i in stages:
            before, stage = made[-1].path, of.train[i]
            facts = [*facts, words and words.name, of.with_stages([i]).digest("train")]

            def train(
                path: Path,
                of: Recipe = of,
                before: Path = before,
                words: Path | None = words,
                i: int = i,
            ) -> None:
                tamba.train(of, path, student=before, text=words, stages=[i])

            made.append(self.shared.once(stage.stage, facts, train))
        return made

    # --- a row

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """One row, from text to figures."""
        row = ROWS[name]
        analysis = self.analysis(row)
        recipe = self.recipe(row, seed, analysis.path)
        made = self.students(row, recipe)
        blocks = read_text(self.text(recipe, "heldout").path).heldout
        assert blocks is not None
        student = made[-1].path
        record = evaluate_student(recipe, student, blocks, recipe.layer_plan(LAYERS))
        logs = [
            stage
            for one in made[1:]
            for stage in json.loads((one.path / "train.json").read_text())["stages"]
        ]
        found, layers = record.perplexity, record.layers
        assert found is not None and layers is not None
        tokens, seconds = sum(s["tokens"] for s in logs), sum(one.seconds for one in made[1:])
        return {
            "row": name,
            "finding": row.finding,
            "seed": seed,
            "attention_kept": sum(e.action == "keep" for e in recipe.layer_plan(LAYERS).entries)
            / LAYERS,
            "converted": layers.converted,
            "ratio": found.ratio,
            "ratio_error": found.ratio_error,
            "kl": found.kl,
            "agreement": found.agreement,
            "teacher_ppl": found.teacher,
            "student_ppl": found.student,
            "heldout_tokens": found.tokens,
            "tokens": tokens,
            "seconds": analysis.seconds + made[0].seconds + seconds,
            "seconds_of": {"analysis": analysis.seconds, "build": made[0].seconds}
            | {
                f"{i} {log['stage']}": one.seconds
                for i, (log, one) in enumerate(zip(logs, made[1:], strict=True))
            },
            "tokens_per_second": tokens / seconds,
            "stages": [{k: s[k] for k in s if k not in ("losses", "layers")} for s in logs],
            "losses": [s["losses"][-1] for s in logs if s["losses"]],
            "plan": [str(entry) for entry in recipe.layer_plan(LAYERS).entries],
            "answer": (record.answer or "")[:200],
        } | self.beyond(row, recipe, student)

    def beyond(self, row: Row, recipe: Recipe, student: Path) -> dict[str, Any]:
        """What else was asked for, of the student and the teacher."""
        asked, teacher = self.asked, recipe.model_path("teacher")
        found: dict[str, Any] = {}
        if asked.lambada:
            lines = Path(asked.lambada).read_text(encoding="utf-8").splitlines()
            texts = [json.loads(line)["text"] for line in lines]
            models = ("teacher", teacher), ("student", student)
            found["lambada"] = {who: lambada(path, texts) for who, path in models}
        if asked.phonebook:
            record = tamba.evaluate(
                student, suites=["phonebook"], against=teacher, lengths=asked.phonebook, cases=300
            )
            found["phonebook"] = {
                metric: {role: [p.model_dump() for p in points] for role, points in by_role.items()}
                for metric, by_role in _curves(record).items()
            }
        if row.talks and asked.preferences:
            _, tasks, people = self.preferences()
            for name, pairs in (("tasks", tasks), ("people", people)):
                found[f"preference_{name}"] = _scores(
                    tamba.evaluate(
                        student, [f"preference={pairs}"], suites=["preference"], against=teacher
                    )
                )["preference"]
        if row.talks and asked.questions:
            found["answers"] = _scores(
                tamba.evaluate(
                    student,
                    [f"mt_bench={asked.questions}"],
                    suites=["mt_bench"],
                    against=teacher,
                    new_tokens=128,
                )
            )["mt_bench"]
        return found


def _curves(record: Any) -> dict[str, Any]:
    return {name: curve.points for name, curve in record.suites["phonebook"].curves.items()}


def _scores(record: Any) -> dict[str, Any]:
    return {
        suite: {
            role: {metric: score.model_dump() for metric, score in scores.items()}
            for role, scores in found.scores.items()
        }
        for suite, found in record.suites.items()
    }


def lambada(path: str | Path, texts: list[str]) -> float:
    """Share of texts whose last word is the greedy choice, token by token."""
    checkpoint = open_checkpoint(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(checkpoint, "bfloat16", device), load_tokenizer(checkpoint)
    pairs = []
    for text in texts:
        context = text.rsplit(" ", 1)[0]
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        head = tokenizer(context, add_special_tokens=False)["input_ids"]
        pairs.append((whole[: len(head)], whole[len(head) :]))
    found = loglikelihoods(model, pairs, tokens_at_once=4096 if device == "cpu" else 65_536)
    return sum(item.greedy for batch in found for item in batch.values()) / len(pairs)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("rows", nargs="*", help="names of rows; --list shows them")
    made.add_argument("--list", action="store_true", help="what rows there are")
    made.add_argument("--train", nargs="+", default=[], help="text to train on")
    made.add_argument("--heldout", nargs="+", default=[], help="text to measure on")
    made.add_argument("--teacher", help="checkpoint; by default what the recipe names")
    made.add_argument("--out", default="runs", help="folder of the runs")
    made.add_argument("--record", type=Path, help="JSON list to add the results to")
    made.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="all rows of one, then next"
    )
    made.add_argument("--seconds", type=float, help="begin no row after so many")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    made.add_argument("--lambada", help="JSON lines with `text`, the last word to be guessed")
    made.add_argument("--phonebook", type=int, nargs="+", help="lengths in entries")
    made.add_argument("--prompts", help="prompts that the teacher answers, for SFT")
    made.add_argument("--preferences", help="pairs of answers, for DPO and to measure")
    made.add_argument("--questions", help="questions of MT-Bench, to measure")
    return made


def main() -> None:
    """Run the rows that were asked for."""
    asked = parser().parse_args()
    if asked.list or not asked.rows:
        for name, row in ROWS.items():
            print(f"{name:16} {row.finding}")
        return
    if unknown := [name for name in asked.rows if name not in ROWS]:
        parser().error(f"no row called {', '.join(unknown)}; --list shows them")
    if any(ROWS[name].chat for name in asked.rows) and not (asked.prompts and asked.preferences):
        # Said here, not after everything that comes before conversations.
        parser().error("rows of conversations need --prompts and --preferences")
    command = command_without_folders("python experiments/mamba_in_llama.py", sys.argv[1:])
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    bench, begun = Bench(asked), time.monotonic()
    for seed in asked.seeds:
        for name in asked.rows:
            if asked.seconds is not None and time.monotonic() - begun > asked.seconds:
                print(f"{name}, seed {seed}: not begun", flush=True)
                continue
            started = time.monotonic()
            try:
                found = bench.run(name, seed)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)
            found |= {
                "command": command,
                "hardware": hardware,
                "versions": versions(),
                "date": datetime.now(UTC).date().isoformat(),
            }
            print(
                f"{name}, seed {seed}: ratio {found['ratio']:.4f}, KL {found['kl']:.4f}, "
                f"{found['tokens_per_second']:,.0f} tokens/s, {time.monotonic() - started:.0f} s",
                flush=True,
            )
            keep(found, asked.record)


def keep(row: dict[str, Any], record: Path | None) -> None:
    """Add a row to the record, in place of an older one."""
    if record is None:
        return
    # Of several processes that run rows side by side, none must lose another's.
    with FileLock(record.with_name(f".{record.name}.lock")):
        rows = json.loads(record.read_text()) if record.exists() else []
        rows = [r for r in rows if (r["row"], r["seed"]) != (row["row"], row["seed"])] + [row]
        write_file(record, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
