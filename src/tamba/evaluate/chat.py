"""Conversations: answers in the formats of MT-Bench and AlpacaEval, judged or not; preferences.

Answers are greedy. Without a judge two figures need none: how often a model finds the chosen answer
of a pair likelier than the rejected one, and how likely the teacher finds the student's answers.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tamba import progress
from tamba.decoding import decode
from tamba.errors import UserError, nearest
from tamba.evaluate.judge import PAIRWISE, SINGLE, Judge, Verdicts, judge_from
from tamba.evaluate.measure import ItemMeasure, Items, Models, Request, Role, Stores, Subject
from tamba.evaluate.scoring import loglikelihoods
from tamba.evaluate.statistics import mean_score, pair, ratio_score
from tamba.generate import end_tokens
from tamba.report import Measured, Score
from tamba.store import Store, digest

Messages = list[dict[str, str]]


class _Answers:
    """Answers of each model to questions of one or more turns, a file of them, and their judge."""

    def __init__(
        self, request: Request, questions: dict[str, dict[str, Any]], tool: str, judge: Judge | None
    ) -> None:
        self.questions, self.tool, self.judge = questions, tool, judge
        self.folder = request.folder
        self.new_tokens = request.options.new_tokens or 1024
        self.positions = request.positions
        self.settings: dict[str, Any] = {
            "questions": digest(questions=questions),
            "n": len(questions),
            "new_tokens": self.new_tokens,
            "positions": self.positions,  # those of a teacher may leave less room
            "decoding": "greedy",
            "chat_template": True,
        }
        # A verdict is named by its judge; answers do not depend on it.
        self.judged_by = None if judge is None else judge.identity()

    def run(self, models: Models, stores: Stores) -> Measured:
        begun = time.monotonic()
        answers = {s.role: self._answer(s, stores(s)) for s in models}
        files = {
            f"{s.role} answers": path
            for s in models
            if (path := self._write(s.name, answers[s.role])) is not None
        }
        scores: dict[str, dict[str, Score]] = {
            role: {
                "answer_tokens": mean_score([float(t["tokens"]) for q in found.values() for t in q])
            }
            for role, found in answers.items()
        }
        items: dict[Role, Items] = {}
        wins: list[float] = []
        problem = None
        settings = self.settings | ({"judge": self.judged_by} if self.judge else {})
        if models.teacher is not None:
            likely = self._likelihood(models.teacher, answers, stores(models.teacher))
            scores = {role: scores[role] | likely[role] for role in scores}
        paired = {}
        if self.judge is not None:
            store = stores(models.student)
            verdicts = Verdicts(self.judge, store)
            try:
                self._judged(verdicts, answers, items, wins)
            except UserError as error:
                problem = str(error)  # what was judged until then still counts
            if wins:
                scores["student"]["win_rate"] = mean_score(wins)
            for role, found in items.items():
                if any(found.values()):
                    scores[role] |= _judge_scores(found)
            if "teacher" in items:
                paired = pair(items["student"], items["teacher"], ["score"])
            if verdicts.failed and problem is None:
                name, why = next(iter(verdicts.failed.items()))
                problem = f"{len(verdicts.failed)} verdicts are missing ({name}: {why})"
                problem += "; the same call asks for them"
            settings["judge_usage"] = verdicts.cost()
        return Measured(
            settings=settings,
            scores=scores,
            paired=paired,
            files=files,
            problem=problem,
            seconds=round(time.monotonic() - begun, 3),
        )

    def _answer(self, subject: Subject, store: Store) -> dict[str, list[dict[str, Any]]]:
        """By question, an answer to each turn: its text and the number of its tokens."""
        tokenizer = subject.tokenizer
        ends = end_tokens(subject.model, tokenizer)
        turns = max(len(q["turns"]) for q in self.questions.values())
        total = sum(len(q["turns"]) for q in self.questions.values())
        with progress.task(f"{self.tool}, {subject.role}", total) as advance:
            for turn in range(turns):
                here = [n for n, q in self.questions.items() if len(q["turns"]) > turn]
                todo = [n for n in here if self._key(n, turn) not in store]
                advance(len(here) - len(todo))
                prompts = [chat_tokens(tokenizer, self._messages(n, turn, store)) for n in todo]
                limits = [self._room(n, len(p)) for n, p in zip(todo, prompts, strict=True)]
                for batch in decode(
                    subject.model,
                    prompts,
                    limits,
                    ends=ends,
                    tokens_at_once=4 * subject.tokens_at_once,
                ):
                    done = {}
                    for k, tokens in batch.items():
                        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                        done[self._key(todo[k], turn)] = {"text": text, "tokens": len(tokens)}
                    store.add(done)
                    advance(len(batch))
        return {
            name: [store[self._key(name, turn)] for turn in range(len(q["turns"]))]
            for name, q in self.questions.items()
        }

    def _key(self, name: str, turn: int) -> str:
        """Of an answer, by what was asked so far: it stays when other questions come or go."""
        asked = self.questions[name]["turns"][: turn + 1]
        return f"answer/{digest(asked=asked)[:32]}"

    def _messages(self, name: str, turn: int, store: Mapping[str, Any]) -> Messages:
        messages: Messages = []
        for k, said in enumerate(self.questions[name]["turns"][: turn + 1]):
            messages.append({"role": "user", "content": said})
            if k < turn:
                messages.append({"role": "assistant", "content": store[self._key(name, k)]["text"]})
        return messages

    def _room(self, name: str, prompt: int) -> int:
        if self.positions is None:
            return self.new_tokens
        room = min(self.new_tokens, self.positions - prompt)
        if room < 1:
            raise UserError(
                f"{self.tool}, question {name}",
                f"its {prompt} tokens leave no room in {self.positions} positions",
                "leave it out",
            )
        return room

    def _likelihood(
        self, teacher: Subject, answers: Mapping[Role, Any], store: Store
    ) -> dict[str, dict[str, Score]]:
        """Nats a token that the teacher gives the first answers of each model, its own too."""
        found: dict[str, dict[str, Score]] = {}
        for role, by_name in answers.items():
            names, pairs = [], []
            for name, said in by_name.items():
                asked = {"role": "user", "content": self.questions[name]["turns"][0]}
                context = chat_tokens(teacher.tokenizer, [asked])
                ids = teacher.tokenizer(said[0]["text"], add_special_tokens=False)["input_ids"]
                if ids:
                    names.append(f"likelihood/{digest(tokens=[context, ids])[:32]}")
                    pairs.append((context, ids))
            _score_into(store, names, pairs, teacher, f"{self.tool}, teacher's view of {role}")
            if names:
                values = [(-store[n][0], float(store[n][1])) for n in names]
                found[role] = {"teacher_nll": ratio_score(values)}
            else:
                found[role] = {}
        return found

    def _judged(
        self,
        verdicts: Verdicts,
        answers: Mapping[Role, Any],
        items: dict[Role, Items],
        wins: list[float],
    ) -> None:
        """Fill in scores of each answer, and of each pair 1, 0.5 or 0 for the student."""
        items.update({role: {} for role in answers})
        n = sum(len(q["turns"]) for q in self.questions.values())
        total = n * (len(answers) + 2 * (len(answers) == 2))
        with progress.task(f"{self.tool}, judge", total) as advance:
            for name, question in self.questions.items():
                for turn in range(len(question["turns"])):
                    reference = _reference(question, turn)
                    told = {
                        role: _conversation(question["turns"], found[name], turn)
                        for role, found in answers.items()
                    }
                    for role, text in told.items():
                        prompt = SINGLE.format(reference=reference, conversation=text)
                        said = verdicts.ask(
                            f"verdict/{name}/{turn}/{role}", prompt, r"\[\[(10|[1-9])\]\]"
                        )
                        if said is not None:
                            items[role][f"{name}/{turn}"] = {"score": float(said), "turn": turn}
                        advance()
                    if len(told) == 2:
                        won = self._compared(verdicts, f"verdict/{name}/{turn}", told, reference)
                        wins += [] if won is None else [won]
                        advance(2)

    def _compared(
        self, verdicts: Verdicts, name: str, told: Mapping[Role, str], reference: str
    ) -> float | None:
        """1 where the student wins in both orders or wins and ties, 0 the reverse, else 0.5."""
        points = 0
        for first, second in (("student", "teacher"), ("teacher", "student")):
            prompt = PAIRWISE.format(
                reference=reference,
                first=told[first],  # type: ignore[index]
                second=told[second],  # type: ignore[index]
            )
            said = verdicts.ask(f"{name}/{first} first", prompt, r"\[\[([ABC])\]\]")
            if said is None:
                return None
            if said != "C":
                points += 1 if (first if said == "A" else second) == "student" else -1
        return 0.5 if points == 0 else float(points > 0)

    def _write(self, name: str, answers: Mapping[str, Any]) -> str | None:
        """The file that the tool reads; its path relative to the record's folder."""
        if self.folder is None:
            return None
        safe = re.sub(r"[^\w.-]+", "_", name) or "model"
        if self.tool == "mt_bench":
            place = Path("mt_bench/model_answer") / f"{safe}.jsonl"
            rows = [
                {
                    "question_id": question["id"],
                    "answer_id": digest(model=name, question=key, turns=answers[key])[:22],
                    "model_id": name,
                    "choices": [{"index": 0, "turns": [t["text"] for t in answers[key]]}],
                    "tstamp": 0.0,  # the same file for the same answers
                }
                for key, question in self.questions.items()
            ]
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            place = Path("alpaca_eval") / safe / "model_outputs.json"
            outputs = [
                {
                    "dataset": question["dataset"],
                    "instruction": question["turns"][0],
                    "output": answers[key][0]["text"],
                    "generator": name,
                }
                for key, question in self.questions.items()
            ]
            content = json.dumps(outputs, ensure_ascii=False, indent=1) + "\n"
        path = self.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".partial")
        draft.write_text(content, encoding="utf-8")
        os.replace(draft, path)
        return str(place)


def _reference(question: Mapping[str, Any], turn: int) -> str:
    given = question.get("reference") or []
    if len(given) <= turn:
        return ""
    return f"\n## A right answer, for comparison\n\n{given[turn]}\n"


def _conversation(asked: Sequence[str], said: Sequence[Mapping[str, Any]], turn: int) -> str:
    return "\n\n".join(
        f"### User\n\n{asked[k]}\n\n### Assistant\n\n{said[k]['text']}" for k in range(turn + 1)
    )


def _judge_scores(items: Items) -> dict[str, Score]:
    found = {"score": mean_score([i["score"] for i in items.values()])}
    for turn in sorted({i["turn"] for i in items.values()}):
        values = [i["score"] for i in items.values() if i["turn"] == turn]
        found[f"score, turn {turn + 1}"] = mean_score(values)
    return found


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """A conversation framed by the chat template, up to where the assistant speaks."""
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ids: list[int] = encoded["input_ids"]
    return ids


# Preferences


class _Preference(ItemMeasure):
    """Whether the chosen answer is likelier, in all and a token."""

    metrics = ("acc", "acc_norm")

    def __init__(self, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
        self.rows, self.settings = rows, settings

    def answer(self, subject: Subject, store: Store) -> Items:
        names, pairs = [], []
        for row in self.rows:
            context = _framed(subject.tokenizer, row["prompt"])
            for side in ("chosen", "rejected"):
                ids = subject.tokenizer(row[side], add_special_tokens=False)["input_ids"]
                # The end belongs to the answer: a short one must be meant to be short.
                pairs.append((context, [*ids, subject.tokenizer.eos_token_id]))
                names.append(digest(tokens=pairs[-1])[:32])
        _score_into(store, names, pairs, subject, f"preference, {subject.role}")
        items: Items = {}
        for k, row in enumerate(self.rows):
            (good, n), (bad, m) = store[names[2 * k]], store[names[2 * k + 1]]
            items[str(k)] = {
                "acc": int(good > bad),
                "acc_norm": int(good / n > bad / m),
                "group": row["group"],
            }
        return items

    def scores(self, items: Items) -> dict[str, Score]:
        found = super().scores(items)
        groups = sorted({i["group"] for i in items.values()})
        for group in groups if len(groups) > 1 else []:
            values = [float(i["acc"]) for i in items.values() if i["group"] == group]
            found[f"acc, {group}"] = mean_score(values)
        return found


def _framed(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    if tokenizer.chat_template:
        return chat_tokens(tokenizer, messages)
    text = "\n\n".join(m["content"] for m in messages) + "\n\n"
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _score_into(
    store: Store,
    names: Sequence[str],
    pairs: Sequence[tuple[list[int], list[int]]],
    subject: Subject,
    label: str,
) -> None:
    """Store [log-likelihood, tokens] of each pair that is not there yet."""
    todo = [k for k, name in enumerate(names) if name not in store]
    positions = subject.model.config.max_position_embeddings
    with progress.task(label, len(names)) as advance:
        advance(len(names) - len(todo))
        for batch in loglikelihoods(
            subject.model,
            [pairs[k] for k in todo],
            tokens_at_once=subject.tokens_at_once,
            max_length=positions,
        ):
            store.add({names[todo[k]]: [r.total, r.tokens] for k, r in batch.items()})
            advance(len(batch))


# What the user gives


def prepare_mt_bench(request: Request) -> _Answers:
    """MT-Bench's questions, JSON lines: ``question_id``, ``category``, ``turns``, ``reference``."""
    path = request.one_file("questions")

    def read(where: str, row: dict[str, Any]) -> dict[str, Any]:
        turns = _field(where, row, "turns", list)
        if not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise UserError(where, "'turns' is no list of texts")
        reference = row.get("reference") or []
        reference = [reference] if isinstance(reference, str) else list(reference)
        number = row.get("question_id")
        if not isinstance(number, int | str):
            raise UserError(where, "needs a 'question_id'", nearest("question_id", map(str, row)))
        return {"id": number, "turns": turns, "reference": reference}

    return _answers(request, _rows(path, read), "mt_bench")


def prepare_alpaca(request: Request) -> _Answers:
    """AlpacaEval's instructions: a JSON list or JSON lines with ``instruction``."""
    path = request.one_file("instructions")

    def read(where: str, row: dict[str, Any]) -> dict[str, Any]:
        text = _field(where, row, "instruction", str)
        return {"turns": [text], "dataset": str(row.get("dataset", "alpaca_eval"))}

    return _answers(request, _rows(path, read), "alpaca_eval")


def prepare_preference(request: Request) -> _Preference:
    """Pairs: ``prompt`` (a text or messages), ``chosen`` and ``rejected`` (a text or messages)."""
    path = request.one_file("pairs")

    def read(where: str, row: dict[str, Any]) -> dict[str, Any]:
        prompt = _field(where, row, "prompt", str | list)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not prompt or not all(
            isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt
        ):
            raise UserError(where, "'prompt' is neither a text nor messages")
        found: dict[str, Any] = {
            "prompt": prompt,
            "group": str(row.get("source", "")).split("/")[0],
        }
        for side in ("chosen", "rejected"):
            said = _field(where, row, side, str | list)
            if isinstance(said, list):
                last = said[-1] if said else None
                said = last.get("content") if isinstance(last, dict) else None
            if not isinstance(said, str) or not said.strip():
                raise UserError(where, f"'{side}' holds no answer")
            found[side] = said
        return found

    rows = list(_rows(path, read).values())[: request.options.limit]
    if request.tokenizer.eos_token_id is None:
        raise UserError("tokenizer", "has no end-of-sequence token, which closes an answer")
    return _Preference(rows, {"pairs": digest(rows=rows), "n": len(rows)})


def _answers(request: Request, questions: dict[str, dict[str, Any]], tool: str) -> _Answers:
    options = request.options
    if not request.tokenizer.chat_template:
        raise UserError(
            f"suite {tool}", "the tokenizer has no chat template", "give a model that chats"
        )
    kept = dict(list(questions.items())[: options.limit])
    judge = None
    if options.judge is not None:
        judge = judge_from(
            options.judge, options.judge_model, options.judge_key, options.judge_price
        )
    return _Answers(request, kept, tool, judge)


def _rows(
    path: Path, read: Callable[[str, dict[str, Any]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Rows by name, each checked by `read`, which is told where it stands. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})") from error
    rows: list[tuple[str, Any]] = []
    try:
        if text.lstrip().startswith("["):
            rows = [(f"{path}: row {k}", row) for k, row in enumerate(json.loads(text), start=1)]
        else:
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    rows.append((f"{path}:{number}", json.loads(line)))
    except ValueError as error:
        raise UserError(
            str(path), f"not JSON after row {len(rows)}", "one JSON object a line is expected"
        ) from error
    found: dict[str, dict[str, Any]] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(where, f"expected a JSON object, got {type(row).__name__}")
        item = read(where, row)
        name = str(item.get("id", len(found)))
        if name in found:
            raise UserError(where, f"'{name}' is there twice")
        found[name] = item
    if not found:
        raise UserError(str(path), "holds no rows")
    return found


def _field(where: str, row: Mapping[str, Any], name: str, kind: Any) -> Any:
    if name not in row:
        raise UserError(
            where, f"needs the field '{name}'", nearest(name, map(str, row)) if row else ""
        )
    if not isinstance(row[name], kind) or (isinstance(row[name], str) and not row[name].strip()):
        raise UserError(where, f"field '{name}' holds {row[name]!r:.40}")
    return row[name]
