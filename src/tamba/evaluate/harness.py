"""Tasks of lm-eval on our models: its prompts, metrics and aggregation, our batching and state.

`HarnessLM` is the adapter: what lm-eval asks a model. The suites are lm-eval's own tasks; where a
local file is given, the same task definition reads that instead of the hub's data set. This is the
only file that imports lm-eval.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tamba import progress
from tamba.decoding import decode
from tamba.errors import UserError, nearest
from tamba.evaluate.measure import Items, Measure, Models, Request, Role, Stores, Subject
from tamba.evaluate.scoring import loglikelihoods
from tamba.evaluate.statistics import exponential, mean_score, pair
from tamba.generate import end_tokens
from tamba.report import Measured, Score
from tamba.store import Store, digest

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
except ImportError:
    lm_eval, TemplateLM = None, object

FEWSHOT_SEED = 1234
"""lm-eval's own, so that worked examples are the same."""


@dataclass(frozen=True)
class HarnessTask:
    """One task of lm-eval.

    Args:
        task: lm-eval's name.
        folder: where in lm-eval's tasks it is defined; scanning all of them takes a minute.
        fields: of a local row, with what each must be; see `_FIELDS`.
        shots: worked examples, where the caller does not say.
        overrides: settings of the task that are changed, with the reason in `note`.
    """

    task: str
    folder: str
    about: str
    fields: Mapping[str, str] = field(default_factory=dict)
    shots: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)
    runs_code: bool = False


_ARC = {"question": "text", "choices": "choices", "answerKey": "text"}
TASKS: dict[str, HarnessTask] = {
    "lambada": HarnessTask(
        "lambada_openai", "lambada", "last word of a passage", {"text": "two words"}
    ),
    "winogrande": HarnessTask(
        "winogrande",
        "winogrande",
        "whom a pronoun means, by the end of the sentence",
        {"sentence": "blank", "option1": "text", "option2": "text", "answer": "1 or 2"},
    ),
    "piqa": HarnessTask(
        "piqa",
        "piqa",
        "everyday physics, two choices",
        {"goal": "text", "sol1": "text", "sol2": "text", "label": "0 or 1"},
    ),
    "hellaswag": HarnessTask("hellaswag", "hellaswag", "how a scene goes on, four choices"),
    "arc_easy": HarnessTask("arc_easy", "arc", "school science, easy part", _ARC),
    "arc_challenge": HarnessTask("arc_challenge", "arc", "school science, hard part", _ARC),
    "mmlu": HarnessTask("mmlu", "mmlu/default", "57 subjects, four choices"),
    "openbookqa": HarnessTask("openbookqa", "openbookqa", "science facts, four choices"),
    "truthfulqa": HarnessTask("truthfulqa_mc2", "truthfulqa", "true against popular answers"),
    "pubmedqa": HarnessTask("pubmedqa", "pubmedqa", "biomedical yes, no or maybe"),
    "race": HarnessTask("race", "race", "reading comprehension, four choices"),
    "gsm8k": HarnessTask(
        "gsm8k",
        "gsm8k",
        "school mathematics, generated",
        {"question": "text", "answer": "worked answer"},
        shots=5,
    ),
    "crux": HarnessTask(
        "cruxeval_output",
        "cruxeval",
        "what a Python function returns, generated",
        shots=2,
        # Ten samples at temperature 0.2 in lm-eval; the article answers once, greedily.
        overrides={"repeats": 1, "generation_kwargs": {"do_sample": False, "max_gen_toks": 1024}},
        runs_code=True,
    ),
}

SETS: dict[str, tuple[str, ...]] = {
    # E-Tamba, Table 2.
    "e-tamba": ("lambada", "winogrande"),
    # The Mamba in the Llama, Table 3 (zero shot) and Table 4 (with worked examples).
    "mamba-in-the-llama": (
        "winogrande",
        "piqa",
        "hellaswag",
        "arc_easy",
        "arc_challenge",
        "mmlu",
        "openbookqa",
        "truthfulqa",
        "pubmedqa",
        "race",
        "arc_challenge@25",
        "hellaswag@10",
        "mmlu@5",
        "winogrande@5",
        "gsm8k@0",
        "crux",
    ),
}
"""Suites of a paper; ``NAME@N`` is a task with N worked examples."""


def prepare(request: Request) -> Measure:
    """A task of `TASKS`, checked. Raises UserError."""
    name = request.suite.partition("@")[0]
    task = TASKS[name]
    if lm_eval is None:
        raise UserError(f"suite {name}", "needs lm-eval", "pip install 'tamba[eval]'")
    if task.runs_code and not request.options.allow_code:
        raise UserError(
            f"suite {name}", "runs code that the model writes", "allow it with --allow-code"
        )
    if request.options.chat and not request.tokenizer.chat_template:
        raise UserError("--chat", "the tokenizer has no chat template", "leave it out")
    if request.tokenizer.eos_token_id is None:
        raise UserError(
            f"suite {name}",
            "the tokenizer has no end-of-sequence token",
            "lm-eval's tasks need one",
        )
    shots = task.shots if request.shots is None else request.shots
    rows = _read_rows(request.one_file("rows"), task) if request.data else None
    examples = request.extra.get("train", ())
    train = _read_rows(Path(examples[0]), task) if examples else None
    if rows is not None and shots and train is None and len(rows) <= shots:
        raise UserError(
            f"--data {name}", f"{len(rows)} rows do not give {shots} worked examples and a question"
        )
    settings: dict[str, Any] = {
        "task": task.task,
        "lm_eval": lm_eval.__version__,
        "shots": shots,
        "fewshot_seed": FEWSHOT_SEED,
        "limit": request.options.limit,
        "chat_template": request.options.chat,
        "data": "hub" if rows is None else digest(rows=rows),
    }
    if rows is not None and shots:
        settings["examples"] = "the same file" if train is None else digest(rows=train)
    if task.overrides:
        settings["overrides"] = dict(task.overrides)
    return _HarnessMeasure(name, task, rows, train, shots, settings)


class _HarnessMeasure:
    def __init__(
        self,
        name: str,
        task: HarnessTask,
        rows: list[dict[str, Any]] | None,
        train: list[dict[str, Any]] | None,
        shots: int,
        settings: dict[str, Any],
    ) -> None:
        self.name, self.task, self.rows, self.train, self.shots = name, task, rows, train, shots
        self.settings = settings

    def run(self, models: Models, stores: Stores) -> Measured:
        begun = time.monotonic()
        items: dict[Role, Items] = {}
        with _quiet():
            loaded = self._load()
            for subject in models:
                lm = HarnessLM(subject, stores(subject), label=f"{self.name}, {subject.role}")
                items[subject.role] = self._ask(lm, loaded)
        scores: dict[str, dict[str, Score]] = {r: _scores(found) for r, found in items.items()}
        paired = (
            pair(items["student"], items["teacher"], sorted(scores["student"]))
            if "teacher" in items
            else {}
        )
        return Measured(
            settings=self.settings,
            scores=scores,
            paired=paired,
            seconds=round(time.monotonic() - begun, 3),
        )

    def _load(self) -> Any:
        """lm-eval's tasks, on local rows where there are any."""
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml

        folder = Path(lm_eval.__file__).parent / "tasks" / self.task.folder
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        overrides = dict(self.task.overrides)
        if self.rows is not None:
            overrides |= _local(self.rows, self.train, self.shots)
        spec: str | dict[str, Any] = self.task.task
        if overrides:
            path = manager.task_index[self.task.task].yaml_path
            spec = load_yaml(path, resolve_func=True) | overrides
        try:
            loaded = manager.load([spec])
        except Exception as error:  # the hub's client and lm-eval raise many kinds
            if self.rows is not None:
                raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"suite {self.name}",
                f"its data cannot be fetched ({why})",
                f"check the network, or give a file with --data {self.name}=FILE",
            ) from error
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", self.shots)
            task.set_fewshot_seed(FEWSHOT_SEED)
        return loaded

    def _ask(self, lm: HarnessLM, loaded: Any) -> Items:
        from lm_eval.evaluator import evaluate

        chat = bool(self.settings["chat_template"])
        found = evaluate(
            lm,
            loaded,
            limit=self.settings["limit"],
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=self.task.runs_code,
        )
        items: Items = {}
        for task, samples in found["samples"].items():
            for sample in samples:
                item = items.setdefault(f"{task}/{sample['doc_id']}", {})
                for metric in sample["metrics"]:
                    value = sample[metric]
                    # Of an item, lm-eval keeps a log-likelihood under the aggregate's name.
                    metric = "loglikelihood" if metric == "perplexity" else metric
                    if sample["filter"] != "none":
                        metric = f"{metric} ({sample['filter']})"
                    if isinstance(value, int | float):
                        item[metric] = float(value)
        return items


def _scores(items: Items) -> dict[str, Score]:
    """The mean of each metric, and the perplexity of lm-eval where items have likelihoods."""
    found = {}
    for metric in sorted({m for item in items.values() for m in item}):
        values = [item[metric] for item in items.values() if metric in item]
        found[metric] = mean_score(values)
        if metric == "loglikelihood":
            found["perplexity"] = exponential(mean_score([-v for v in values]))
    return found


class HarnessLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """What lm-eval asks of a language model, for one of ours.

    Strings become tokens as in lm-eval's own wrapper of Hugging Face models, so results are the
    same; batches are cut by tokens, beginnings that requests share are computed once, and results
    are stored as they come.

    Args:
        store: finished requests.
        label: what the progress bar says.
    """

    def __init__(
        self, subject: Subject, store: Store | None = None, label: str = "lm-eval"
    ) -> None:
        super().__init__()
        self.subject = subject
        self.tokenizer = subject.tokenizer
        self.model = subject.model
        self.store = Store() if store is None else store
        self.label = label
        self.batch_size = 1  # lm-eval prints it
        self._device = subject.model.device

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Longest input, in tokens."""
        return int(self.model.config.max_position_embeddings)

    @property
    def max_gen_toks(self) -> int:
        """Longest answer, where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return self.subject.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            # A text that begins with the token already gets no second one.
            special = {"add_special_tokens": False} if string.startswith(prefix) else {}
        else:
            special = {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **special)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        names = [digest(tokens=[context, target]) for _, context, target in requests]
        new = list({name: i for i, name in enumerate(names) if name not in self.store}.items())
        pairs = [(requests[i][1], requests[i][2]) for _, i in new]
        with progress.task(self.label, len(names)) as advance:
            advance(len(names) - len(new))
            for batch in loglikelihoods(
                self.model,
                pairs,
                tokens_at_once=self.subject.tokens_at_once,
                max_length=self.max_length,
            ):
                self.store.add({new[k][0]: [r.total, r.greedy] for k, r in batch.items()})
                advance(len(batch))
        return [(float(self.store[n][0]), bool(self.store[n][1])) for n in names]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        # Its bar counts tokenizing alone; ours counts what takes the time.
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            parts = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [(None, context, target) for context, target in parts]
            counts.append(len(parts))
        totals = iter(total for total, _ in self._loglikelihood_tokens(windows))
        return [math.fsum(next(totals) for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        names = [digest(prompt=r.args[0], options=r.args[1]) for r in requests]
        new = list({name: i for i, name in enumerate(names) if name not in self.store}.items())
        prompts, limits, stops = [], [], []
        for _, i in new:
            prompt, options = requests[i].args
            until, limit = self._generation_options(options)
            room = self.max_length - limit
            if room < 1:
                raise UserError(
                    self.label,
                    f"answers of {limit} tokens leave no room in {self.max_length} positions",
                )
            prompts.append(self.tok_encode(prompt)[-room:])
            limits.append(limit)
            stops.append(until)
        # A stop word may begin inside one token and end inside another.
        tails = [max(map(len, until), default=0) + 8 for until in stops]

        def complete(index: int, tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens[-tails[index] :])
            return any(word in text for word in stops[index])

        with progress.task(self.label, len(names)) as advance:
            advance(len(names) - len(new))
            for batch in decode(
                self.model,
                prompts,
                limits,
                ends=end_tokens(self.model, self.tokenizer),
                stop=complete,
                tokens_at_once=4 * self.subject.tokens_at_once,
            ):
                done = {}
                for k, tokens in batch.items():
                    text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                    for word in stops[k]:
                        text = text.split(word)[0]
                    done[new[k][0]] = text
                self.store.add(done)
                advance(len(batch))
        return [str(self.store[name]) for name in names]

    def _generation_options(self, options: Mapping[str, Any]) -> tuple[list[str], int]:
        """Words that end an answer, and its most tokens."""
        if options.get("do_sample") or (options.get("temperature") or 0) > 0:
            raise UserError(
                self.label, "the task asks for sampling; answers are greedy here", "choose another"
            )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        eos = self.tokenizer.decode(self.eot_token_id)
        limit = next(
            (
                int(options[key])
                for key in ("max_gen_toks", "max_new_tokens", "max_tokens")
                if options.get(key)
            ),
            self.max_gen_toks,
        )
        return [word for word in [*until, eos] if word], limit


# Local rows


def _read_rows(path: Path, task: HarnessTask) -> list[dict[str, Any]]:
    """Rows of a JSON lines file that the task can read. Raises UserError with the line."""
    rows: list[dict[str, Any]] = []
    try:
        # Not `splitlines`: texts may hold other separators of lines, unescaped.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(where, "not JSON", "one JSON object a line is expected") from error
        if not isinstance(row, dict):
            raise UserError(where, f"expected a JSON object, got {type(row).__name__}")
        for name, kind in task.fields.items():
            if name not in row:
                hint = nearest(name, map(str, row)) if row else ""
                raise UserError(where, f"{task.task} needs the field '{name}'", hint)
            if not _FIELDS[kind](row[name]):
                raise UserError(where, f"field '{name}' is {row[name]!r:.60}, expected {kind}")
        if "choices" in task.fields and row["answerKey"] not in row["choices"]["label"]:
            raise UserError(where, f"answerKey {row['answerKey']!r} is no label of the choices")
        rows.append(row)
    if not rows:
        raise UserError(str(path), "holds no rows")
    return rows


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_FIELDS = {
    "text": _is_text,
    "two words": lambda v: _is_text(v) and " " in v.strip(),
    "blank": lambda v: _is_text(v) and "_" in v,
    "1 or 2": lambda v: v in ("1", "2"),
    "0 or 1": lambda v: v in (0, 1) and not isinstance(v, bool),
    "worked answer": lambda v: _is_text(v) and "####" in v,
    "choices": lambda v: (
        isinstance(v, dict)
        and isinstance(v.get("text"), list)
        and isinstance(v.get("label"), list)
        and len(v["text"]) == len(v["label"]) > 1
    ),
}


def _local(
    rows: list[dict[str, Any]], train: list[dict[str, Any]] | None, shots: int
) -> dict[str, Any]:
    """Settings that make a task read these rows instead of the hub's data set."""
    from datasets import Dataset, DatasetDict

    splits = {"test": Dataset.from_list(rows)}
    if train is not None:
        splits["train"] = Dataset.from_list(train)
    examples = None if not shots else "train" if train is not None else "test"
    return {
        "custom_dataset": lambda **_: DatasetDict(splits),
        "dataset_kwargs": None,
        "training_split": "train" if train is not None else None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": examples,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets report to loggers; only their errors are let through, and no second bar
    runs through ours."""
    logs = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    before = [(log, log.level) for log in logs]
    from datasets.utils import logging as datasets_logging
    from lm_eval.api import task as asking

    bar = getattr(asking, "tqdm", None)
    try:
        if bar is not None:
            asking.tqdm = functools.partial(bar, disable=True)
        for log in logs:
            log.setLevel(logging.ERROR)
        datasets_logging.disable_progress_bar()
        yield
    finally:
        if bar is not None:
            asking.tqdm = bar
        for log, level in before:
            log.setLevel(level)
