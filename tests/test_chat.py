"""Answers in the tools' formats, preferences by plain passes, and a judge that misbehaves."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from models import tiny_config
from tamba.errors import UserError
from tamba.evaluate import chat, judge
from tamba.evaluate.chat import prepare_alpaca, prepare_mt_bench, prepare_preference
from tamba.evaluate.judge import Judge, Verdicts, judge_from
from tamba.evaluate.measure import Models, Options, Request, Subject
from tamba.model.modeling import TambaForCausalLM
from tamba.store import Store
from texts import byte_tokenizer

TOKENIZER = byte_tokenizer(chat=True)
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Say a.", "Now b."]},
    {"question_id": 82, "category": "math", "turns": ["1+1?", "2+2?"], "reference": ["2", "4"]},
]


def model_of(stack="mixed"):
    torch.manual_seed(len(stack))
    return TambaForCausalLM(tiny_config(stack, vocab_size=257)).eval()


def subject(role="student", stack="mixed"):
    return Subject(role, f"a {role}", model_of(stack), TOKENIZER, role, 200)


def request(suite, rows, tmp_path, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"student": tiny_config(vocab_size=257)}
    return Request(suite, (str(path),), config, TOKENIZER, Options(**options), tmp_path)


class Fake(BaseHTTPRequestHandler):
    """An endpoint that says what the test wants said."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body["messages"][0]["content"])
        said = self.server.say(body["messages"][0]["content"], len(self.server.asked))
        if isinstance(said, int):
            self.send_response(said)
            self.send_header("Retry-After", self.server.wait)
            self.end_headers()
            return
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        answer = {"choices": [{"message": {"content": said}}], "usage": usage}
        raw = said if isinstance(said, bytes) else json.dumps(answer).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = HTTPServer(("127.0.0.1", 0), Fake)
    httpd.wait = ""
    httpd.asked, httpd.say = [], lambda prompt, n: "Fine. [[7]]"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def at(server, **options):
    return Judge(f"http://127.0.0.1:{server.server_port}", "j", pause=0.0, **options)


def test_answers_in_the_format_of_mt_bench(tmp_path):
    measure = prepare_mt_bench(request("mt_bench", QUESTIONS, tmp_path, new_tokens=5))
    one = subject()
    got = measure.run(Models(one), lambda _: Store())
    rows = [
        json.loads(line)
        for line in (tmp_path / got.files["student answers"]).read_text().splitlines()
    ]
    assert [row["question_id"] for row in rows] == [81, 82]
    assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} == set(rows[0])
    assert rows[0]["model_id"] == "a student"
    for question, row in zip(QUESTIONS, rows, strict=True):
        messages = []
        for asked, said in zip(question["turns"], row["choices"][0]["turns"], strict=True):
            messages.append({"role": "user", "content": asked})
            ids = TOKENIZER.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            out = one.model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=256)
            want = TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
            assert said == want
            messages.append({"role": "assistant", "content": said})


def test_answers_in_the_format_of_alpaca_eval(tmp_path):
    rows = [{"instruction": "Sing."}, {"instruction": "Dance.", "dataset": "d"}]
    got = prepare_alpaca(request("alpaca_eval", rows, tmp_path, new_tokens=3)).run(
        Models(subject()), lambda _: Store()
    )
    found = json.loads((tmp_path / got.files["student answers"]).read_text())
    assert [r["instruction"] for r in found] == ["Sing.", "Dance."]
    assert [r["dataset"] for r in found] == ["alpaca_eval", "d"]
    assert set(found[0]) == {"dataset", "instruction", "output", "generator"}


def test_a_judge_grades_and_compares_in_both_orders(server, tmp_path):
    def say(prompt, n):
        if "Assistant A" in prompt:
            return "The first. [[A]]"  # whoever stands first
        return "Good. [[9]]" if "1+1?" in prompt else "Poor. [[3]]"

    server.say = say
    measure = prepare_mt_bench(request("mt_bench", QUESTIONS, tmp_path, new_tokens=3))
    measure.judge = at(server, price=(1.0, 10.0))
    stores = {"student": Store(), "teacher": Store()}
    models = Models(subject(), subject("teacher", "attention"))
    got = measure.run(models, lambda s: stores[s.role])
    assert got.problem is None
    student = got.scores["student"]
    assert student["score"].value == 6.0 and student["score"].n == 4
    assert student["score, turn 1"].value == 6.0
    # A judge that likes the first place gives no one the better of it.
    assert student["win_rate"].value == 0.5
    assert got.paired["score"].difference == 0.0
    assert len(server.asked) == 4 * 2 + 4 * 2
    assert any("A right answer, for comparison\n\n4" in prompt for prompt in server.asked)
    usage = got.settings["judge_usage"]
    assert usage["prompt_tokens"] == 160 and usage["dollars"] == (160 + 32 * 10) / 1e6
    assert got.scores["student"]["teacher_nll"].n == 2
    # Again: everything is remembered.
    again = measure.run(models, lambda s: stores[s.role])
    assert len(server.asked) == 16 and again.scores == got.scores


def test_a_preference_for_one_model_wins(server):
    answers = {
        "student": {"81": [{"text": "good", "tokens": 1}]},
        "teacher": {"81": [{"text": "bad", "tokens": 1}]},
    }
    server.say = lambda prompt, n: (
        "[[5]]" if "Assistant A" not in prompt
        else "[[A]]" if prompt.index("good") < prompt.index("bad") else "[[B]]"
    )  # fmt: skip
    measure = chat._Answers.__new__(chat._Answers)
    measure.questions, measure.tool = {"81": {"turns": ["Say."]}}, "mt_bench"
    wins: list[float] = []
    measure._judged(Verdicts(at(server), Store()), answers, {}, wins)
    assert wins == [1.0]


@pytest.mark.parametrize("rubbish", ["no verdict", "[[11]] [[x]]", b"<html>", b"{}", 500])
def test_rubbish_is_asked_again_then_left_out(rubbish, server):
    server.say = lambda prompt, n: rubbish if n < 3 else "At last. [[4]]"
    verdicts = Verdicts(at(server), Store())
    assert verdicts.ask("q", "grade", r"\[\[(10|[1-9])\]\]") == "4"
    server.say = lambda prompt, n: rubbish
    assert verdicts.ask("r", "grade this", r"\[\[(10|[1-9])\]\]") is None
    assert list(verdicts.failed) == ["r"] and len(server.asked) == 6


def test_what_holds_no_verdict_has_its_price_and_other_judges_have_theirs(server):
    store = Store()
    verdicts = Verdicts(at(server, price=(1.0, 10.0)), store)
    server.say = lambda prompt, n: "hm" if n < 3 else "[[4]]"
    assert verdicts.ask("q", "grade", r"\[\[(\d)\]\]") == "4"
    assert verdicts.cost()["prompt_tokens"] == 30 and verdicts.cost()["completion_tokens"] == 6
    # Another judge in the same store: what the first one cost is not said again.
    other = Verdicts(replace(at(server), model="other"), store)
    assert other.ask("q", "grade", r"\[\[(\d)\]\]") == "4" and other.cost()["prompt_tokens"] == 10


def test_a_busy_judge_says_when_to_come_back(server, monkeypatch):
    waits = []
    monkeypatch.setattr(judge.time, "sleep", waits.append)
    server.say = lambda prompt, n: 429 if n < 3 else "[[4]]"
    server.wait = "7"
    assert Verdicts(at(server), Store()).ask("q", "x", r"\[\[(\d)\]\]") == "4"
    assert waits == [7.0, 7.0]
    # Longer than is reasonable, or not in seconds.
    for said, want in (("86400", 60.0), ("Fri, 31 Dec 1999 23:59:59 GMT", at(server).pause)):
        server.asked, server.wait = [], said
        waits.clear()
        assert Verdicts(at(server), Store()).ask("q", said, r"\[\[(\d)\]\]") == "4"
        assert waits[0] == want


def test_a_judge_that_stays_silent_is_given_up_and_work_is_kept(server, tmp_path):
    server.say = lambda prompt, n: "Fine. [[7]]" if n <= 2 else 503
    measure = prepare_mt_bench(request("mt_bench", QUESTIONS * 1, tmp_path, new_tokens=2))
    measure.judge = at(server, attempts=1, patience=2)
    store = Store(tmp_path / "items.jsonl")
    got = measure.run(Models(subject()), lambda _: store)
    assert "2 verdicts in a row failed" in got.problem and "is kept" in got.problem
    assert (tmp_path / got.files["student answers"]).is_file()
    assert got.scores["student"]["score"].n == 2  # what was judged until then
    asked = len(server.asked)
    server.say = lambda prompt, n: "[[7]]"
    again = measure.run(Models(subject()), lambda _: Store(tmp_path / "items.jsonl"))
    assert again.problem is None and again.scores["student"]["score"].value == 7.0
    assert len(server.asked) == asked + 2


@pytest.mark.parametrize("usage", [{"prompt_tokens": {}}, {"prompt_tokens": "many"}, [1], None])
def test_odd_bills_cost_no_verdict(usage, server):
    answer = {"choices": [{"message": {"content": "[[7]]"}}], "usage": usage}
    server.say = lambda prompt, n: json.dumps(answer).encode()
    verdicts = Verdicts(at(server, price=(1.0, 1.0)), Store())
    assert verdicts.ask("q", "x", r"\[\[(\d)\]\]") == "7"
    assert verdicts.cost()["dollars"] == 0


def test_timeouts_and_refusals(server, monkeypatch):
    release = threading.Event()

    def slow(prompt, n):
        release.wait(5)
        return "[[7]]"

    server.say = slow
    verdicts = Verdicts(at(server, timeout=0.05, attempts=1), Store())
    assert verdicts.ask("q", "x", r"\[\[(\d)\]\]") is None
    assert "timed out" in verdicts.failed["q"]
    release.set()
    monkeypatch.setattr(judge.Verdicts, "_post", judge.Verdicts._post)
    refused = Verdicts(at(server), Store())
    server.say = lambda prompt, n: 401
    before = len(server.asked)
    assert refused.ask("q", "x", r"\[\[(\d)\]\]") is None
    assert "401" in refused.failed["q"] and len(server.asked) == before + 1  # no use in asking more


def test_judges_are_named_in_full(monkeypatch):
    for given, message in (
        (("localhost:8000", "m", None, None), "is no address"),
        (("http://localhost", None, None, None), "--judge-model"),
        (("http://localhost", "m", "NO_SUCH_KEY", None), "has no NO_SUCH_KEY"),
    ):
        with pytest.raises(UserError, match=message):
            judge_from(*given)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    assert judge_from("http://h/v1/", "m", "JUDGE_KEY", None).key == "secret"


def test_other_questions_cost_the_answered_ones_nothing(tmp_path, monkeypatch):
    """Fewer, more and in another order: each question is answered once."""
    asked = []
    genuine = chat.decode

    def counting(model, prompts, *rest, **options):
        asked.extend(map(tuple, prompts))
        return genuine(model, prompts, *rest, **options)

    monkeypatch.setattr(chat, "decode", counting)
    store, one = Store(), subject()

    def answers(rows):
        measure = prepare_mt_bench(request("mt_bench", rows, tmp_path, new_tokens=3))
        got = measure.run(Models(one), lambda *_: store)
        lines = (tmp_path / got.files["student answers"]).read_text().splitlines()
        return {row["question_id"]: row["choices"] for row in map(json.loads, lines)}

    first = answers(QUESTIONS[:1])
    both = answers(QUESTIONS[::-1])
    assert both[81] == first[81] and len(asked) == len(set(asked)) == 4
    # Another question under the same number is another question.
    answers([QUESTIONS[0] | {"turns": ["Say c.", "Now d."]}])
    assert len(asked) == 6


@torch.no_grad()
def test_preferences_by_plain_passes(tmp_path):
    rows = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "source": "a/x"},
        {
            "prompt": [{"role": "user", "content": "1?"}],
            "chosen": [{"role": "assistant", "content": "one"}],
            "rejected": [{"role": "assistant", "content": "two, I think"}],
            "source": "b/y",
        },
    ]
    one = subject()
    got = prepare_preference(request("preference", rows, tmp_path)).run(
        Models(one), lambda _: Store()
    )
    right = []
    for question, *answers in (("Hi", "Hello", "No"), ("1?", "one", "two, I think")):
        found = []
        for answer in answers:
            context = TOKENIZER.encode(f"<user>{question}<assistant>")
            ids = torch.tensor([[*context, *TOKENIZER.encode(answer), 256]])
            logp = one.model(ids).logits[0].log_softmax(-1)
            places = torch.arange(len(context) - 1, ids.shape[1] - 1)
            found.append(logp[places, ids[0, len(context) :]].sum().item())
        right.append(found[0] > found[1])
    assert got.scores["student"]["acc"].value == sum(right) / 2
    assert {"acc, a", "acc, b"} <= set(got.scores["student"])


@pytest.mark.parametrize(
    ("prepare", "row", "message"),
    [
        (prepare_mt_bench, {"question_id": 1}, "needs the field 'turns'"),
        (prepare_mt_bench, {"question_id": 1, "turns": [3]}, "no list of texts"),
        (prepare_mt_bench, {"turns": ["a"]}, "needs a 'question_id'"),
        (prepare_alpaca, {"instructions": "a"}, "did you mean 'instructions'"),
        (prepare_preference, {"prompt": "a", "chosen": "b"}, "needs the field 'rejected'"),
        (prepare_preference, {"prompt": "a", "chosen": " ", "rejected": "b"}, "field 'chosen'"),
    ],
)
def test_fields_are_checked(prepare, row, message, tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl:1") as caught:
        prepare(request("x", [row], tmp_path))
    assert message in str(caught.value)


def test_a_question_twice_and_a_tokenizer_that_does_not_chat(tmp_path):
    with pytest.raises(UserError, match="'81' is there twice"):
        prepare_mt_bench(request("mt_bench", [QUESTIONS[0]] * 2, tmp_path))
    asked = request("mt_bench", QUESTIONS, tmp_path)
    mute = Request(asked.suite, asked.data, asked.configs, byte_tokenizer(), asked.options)
    with pytest.raises(UserError, match="no chat template"):
        prepare_mt_bench(mute)
