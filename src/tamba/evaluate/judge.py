"""A judge behind any endpoint that speaks OpenAI's chat-completions protocol.

Answers are judged one by one (1 to 10), or two side by side in both orders, so that a preference
for the first place cancels. Every verdict is stored as it comes; a judge that cannot be reached or
answers rubbish costs its own verdicts alone, until it has failed several times in a row.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tamba.errors import UserError
from tamba.store import Store, digest

SINGLE = """You grade the answer of an assistant to a user. Think of helpfulness, relevance, \
accuracy, depth and level of detail. Give your reasons in a few sentences, then end with a line \
that holds nothing but a whole number from 1 (useless) to 10 (excellent) in double brackets: [[5]]
{reference}
## Conversation

{conversation}

Grade the last answer of the assistant."""

PAIRWISE = """Two assistants answer the same user. Say whose last answer is better, by \
helpfulness, relevance, accuracy, depth and level of detail; neither order nor length counts. \
Give your reasons in a few sentences, then end with a line that holds nothing but [[A]], [[B]], \
or [[C]] for a tie.
{reference}
## Assistant A

{first}

## Assistant B

{second}"""


@dataclass(frozen=True)
class Judge:
    """Where the judge is and how it is asked.

    Args:
        url: base address, e.g. ``https://api.example.org/v1``.
        key: sent as a bearer token, if any.
        price: dollars for a million tokens in and out, where the cost is to be shown.
        attempts: for each verdict, with growing pauses.
        patience: verdicts in a row that may fail before the judge is given up.
    """

    url: str
    model: str
    key: str | None = None
    price: tuple[float, float] | None = None
    timeout: float = 120.0
    attempts: int = 3
    pause: float = 1.0
    patience: int = 3

    def identity(self) -> dict[str, Any]:
        """What decides a verdict beside the question."""
        return {"model": self.model, "prompts": digest(single=SINGLE, pairwise=PAIRWISE)[:16]}


def judge_from(url: str, model: str | None, key_name: str | None, price: Any) -> Judge:
    """A judge as the user names it. Raises UserError."""
    if not re.match(r"https?://[^/]+", url):
        raise UserError("--judge", f"'{url}' is no address", "e.g. http://localhost:8000/v1")
    if not model:
        raise UserError("--judge", "which model judges is not said", "name it with --judge-model")
    key = None
    if key_name:
        key = os.environ.get(key_name)
        if not key:
            raise UserError("--judge-key", f"the environment has no {key_name}", "export it")
    return Judge(url.rstrip("/"), model, key, price)


_LATER = (408, 409, 425, 429)
"""Statuses of a refusal that may be none a little later."""
_LONGEST_WAIT = 60.0


def _asked_to_wait(error: urllib.error.HTTPError) -> float:
    """Seconds that a busy server asks for, within reason; 0 where it does not say."""
    said = error.headers.get("Retry-After", "") if error.headers else ""
    return min(float(said), _LONGEST_WAIT) if said.isdigit() else 0.0


class Verdicts:
    """Asks a judge and remembers what it said.

    Attributes:
        failed: why verdicts are missing, by their names.
    """

    def __init__(self, judge: Judge, store: Store) -> None:
        self.judge = judge
        self.store = store
        self.failed: dict[str, str] = {}
        self._row = 0
        self._used: list[Mapping[str, int]] = []

    def ask(self, name: str, prompt: str, pattern: str) -> str | None:
        """The verdict, what `pattern` captures at its last match; None where there is none.

        Raises:
            UserError: as many verdicts in a row have failed as the judge is given patience for.
        """
        key = f"{name}/{digest(prompt=prompt, judge=self.judge.identity())[:16]}"
        if key in self.store:
            self._used.append(self.store[key]["usage"])
            return str(self.store[key]["verdict"])
        problem = ""
        pause = 0.0
        for attempt in range(self.judge.attempts):
            if attempt:
                time.sleep(max(pause, self.judge.pause * 2 ** (attempt - 1)))
            pause = 0.0
            try:
                said, usage = self._post(prompt)
            except (OSError, ValueError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
                if isinstance(error, urllib.error.HTTPError):
                    if 400 <= error.code < 500 and error.code not in _LATER:
                        break  # asking again changes nothing
                    pause = _asked_to_wait(error)
                continue
            # What holds no verdict has its price too.
            self._used.append(usage)
            found = re.findall(pattern, said)
            if found:
                self._row = 0
                self.store.add({key: {"verdict": found[-1], "said": said, "usage": usage}})
                return str(found[-1])
            problem = f"no verdict in {said!r:.80}"
        self.failed[name] = problem
        self._row += 1
        if self._row >= self.judge.patience:
            raise UserError(
                f"judge {self.judge.url}",
                f"{self._row} verdicts in a row failed ({problem})",
                "what is done is kept; run this again once it answers",
            )
        return None

    def _post(self, prompt: str) -> tuple[str, dict[str, int]]:
        body = {
            "model": self.judge.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 1024,
        }
        headers = {"Content-Type": "application/json"}
        if self.judge.key:
            headers["Authorization"] = f"Bearer {self.judge.key}"
        request = urllib.request.Request(
            f"{self.judge.url}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=self.judge.timeout) as answer:
            data = json.loads(answer.read())
        try:
            said = data["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError("not a chat completion") from error
        if not isinstance(said, str):
            raise ValueError("the completion holds no text")
        usage = data.get("usage") if isinstance(data.get("usage"), Mapping) else {}
        counts = {side: usage.get(f"{side}_tokens") for side in ("prompt", "completion")}
        # What is no number costs nothing that could be shown; the verdict counts all the same.
        return said, {k: int(n) if isinstance(n, int | float) else 0 for k, n in counts.items()}

    def cost(self) -> dict[str, float]:
        """Tokens in and out of all that was asked here, stored verdicts among it, and dollars where
        prices are known."""
        tokens = {
            f"{side}_tokens": float(sum(used[side] for used in self._used))
            for side in ("prompt", "completion")
        }
        if self.judge.price is None:
            return tokens
        prices = zip(tokens.values(), self.judge.price, strict=True)
        return tokens | {"dollars": sum(count * price for count, price in prices) / 1e6}
