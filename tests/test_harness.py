"""Our adapter gives what lm-eval's own wrapper gives, and its tasks run on local rows."""

from __future__ import annotations

import json
import math

import pytest
import torch

from models import tiny_config
from tamba.errors import UserError
from tamba.evaluate import harness
from tamba.evaluate.harness import SETS, TASKS, HarnessLM, prepare
from tamba.evaluate.measure import Models, Options, Request, Subject
from tamba.model.modeling import TambaForCausalLM
from tamba.store import Store
from texts import byte_tokenizer

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

TOKENIZER = byte_tokenizer(chat=True)


def model_of(stack="mixed", **options):
    torch.manual_seed(0)
    given = {"vocab_size": 257, "eos_token_id": 256, **options}
    return TambaForCausalLM(tiny_config(stack, **given)).eval()


def subject(model, tokens_at_once=200):
    return Subject("student", "tiny", model, TOKENIZER, "digest", tokens_at_once)


def instances(kind, arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


PAIRS = [
    ("Question: what?\nAnswer:", " this"),
    ("Question: what?\nAnswer:", " that one"),
    ("Question: what?\nAnswer:", " t"),
    ("", "no context"),
    ("a space at the end ", "moves"),
    ("x" * 150, "longer than the positions"),
]


def check_likelihoods(ours, theirs):
    """Both kinds of likelihood; float32 on both sides, batches of other shapes."""
    for kind, arguments in (
        ("loglikelihood", PAIRS),
        ("loglikelihood_rolling", [("some text",), ("long " * 60,)]),
    ):
        requests = instances(kind, arguments)
        got = getattr(ours, kind)(requests, disable_tqdm=True)
        want = getattr(theirs, kind)(requests, disable_tqdm=True)
        for g, w in zip(got, want, strict=True):
            g, w = (g, w) if isinstance(g, tuple) else ((g,), (w,))
            assert g[0] == pytest.approx(w[0], rel=1e-5, abs=1e-4)
            assert g[1:] == w[1:]


def test_likelihoods_equal_those_of_lm_evals_wrapper(monkeypatch):
    model = model_of(max_position_embeddings=96)
    theirs = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=2)
    check_likelihoods(HarnessLM(subject(model)), theirs)
    genuine = HarnessLM._encode_pair
    monkeypatch.setattr(HarnessLM, "_encode_pair", lambda self, c, t: genuine(self, c.rstrip(), t))
    with pytest.raises(AssertionError):
        check_likelihoods(HarnessLM(subject(model)), theirs)


def test_answers_equal_those_of_lm_evals_wrapper():
    model = model_of(max_position_embeddings=96)
    until = {"until": ["e", "zz"], "max_gen_toks": 12, "do_sample": False}
    requests = instances(
        "generate_until",
        [("first", until), ("the second prompt", until), ("third", until | {"max_gen_toks": 3})],
    )
    got = HarnessLM(subject(model)).generate_until(requests)
    theirs = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=2)
    assert got == theirs.generate_until(requests, disable_tqdm=True)
    sampled = instances("generate_until", [("a", {"until": [], "temperature": 0.5})])
    with pytest.raises(UserError, match="asks for sampling"):
        HarnessLM(subject(model)).generate_until(sampled)


def test_stored_requests_are_not_asked_again(tmp_path, monkeypatch):
    model, path = model_of(), tmp_path / "items.jsonl"
    requests = instances("loglikelihood", PAIRS[:4])
    want = HarnessLM(subject(model), Store(path)).loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr(harness, "loglikelihoods", lambda model, pairs, **_: iter(()))
    again = HarnessLM(subject(model), Store(path)).loglikelihood(requests, disable_tqdm=True)
    assert again == want


ROWS = {
    "lambada": [{"text": "the cat sat on the mat"}, {"text": "a dog ran to the dog"}],
    "winogrande": [
        {"sentence": "Ann beat Bob as _ ran fast.", "option1": "Ann", "option2": "Bob", "answer": a}
        for a in "12"
    ],
    "piqa": [{"goal": "open it", "sol1": "push", "sol2": "sing to it", "label": 0}],
    "arc_easy": [
        {
            "id": "x",
            "question": "What is wet?",
            "choices": {"text": ["sand", "water", "air"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
    ],
    "gsm8k": [
        {"question": f"{n} and 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in (1, 2)
    ],
}


def measured(name, rows, tmp_path, model=None, shots=None, **options):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = model or model_of()
    request = Request(
        name, (str(path),), {"student": model.config}, TOKENIZER, Options(**options), shots=shots
    )
    return prepare(request).run(Models(subject(model)), lambda _: Store())


@torch.no_grad()
def likelihood(model, context, target):
    ids = torch.tensor([TOKENIZER.encode(context + target)])
    start = len(TOKENIZER.encode(context))
    logp = model(ids).logits[0].log_softmax(-1)
    return logp[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]].sum().item()


def test_local_rows_by_hand(tmp_path, capsys):
    model = model_of()
    (row,) = ROWS["arc_easy"]
    found = [
        likelihood(model, f"Question: {row['question']}\nAnswer:", f" {t}")
        for t in row["choices"]["text"]
    ]
    got = measured("arc_easy", [row], tmp_path, model).scores["student"]
    assert got["acc"].value == float(max(found) == found[1])
    by_length = [f / len(t) for f, t in zip(found, row["choices"]["text"], strict=True)]
    assert got["acc_norm"].value == float(max(by_length) == by_length[1])

    got = measured("lambada", ROWS["lambada"], tmp_path, model).scores["student"]
    want = [
        likelihood(model, *(f"{text.rpartition(' ')[0]}", f" {text.rpartition(' ')[2]}"))
        for text in (row["text"] for row in ROWS["lambada"])
    ]
    assert got["perplexity"].value == pytest.approx(math.exp(-sum(want) / 2), rel=1e-4)
    assert got["acc"].n == 2

    row = ROWS["winogrande"][0]
    found = [likelihood(model, f"Ann beat Bob as {who}", " ran fast.") for who in ("Ann", "Bob")]
    got = measured("winogrande", ROWS["winogrande"], tmp_path, model).scores["student"]
    # The same sentence with either answer: one of the two is right.
    assert got["acc"].value == 0.5 and found[0] != found[1]
    got = measured("winogrande", [row], tmp_path, model).scores["student"]
    assert got["acc"].value == float(found[0] > found[1])
    assert "it/s" not in capsys.readouterr().err  # no bar of lm-eval among ours


@pytest.mark.slow
def test_generated_answers_and_worked_examples(tmp_path):
    got = measured("gsm8k", ROWS["gsm8k"], tmp_path, shots=1)
    assert set(got.scores["student"]) == {
        "exact_match (strict-match)",
        "exact_match (flexible-extract)",
    }
    assert got.settings["examples"] == "the same file"
    with pytest.raises(UserError, match="2 rows do not give 5 worked examples"):
        measured("gsm8k", ROWS["gsm8k"], tmp_path)


BAD = {
    "a missing field": ({"option2": None}, "needs the field 'option2'"),
    "a misspelt field": ({"option2": None, "option_2": "b"}, "did you mean 'option_2'"),
    "no blank": ({"sentence": "Nobody ran."}, "field 'sentence' is 'Nobody ran.', expected blank"),
    "another answer": ({"answer": "3"}, "expected 1 or 2"),
}


@pytest.mark.parametrize("change", BAD)
def test_fields_are_checked(change, tmp_path):
    changes, message = BAD[change]
    row = {k: v for k, v in (ROWS["winogrande"][0] | changes).items() if v is not None}
    with pytest.raises(UserError, match=r"winogrande.jsonl:2") as caught:
        measured("winogrande", [ROWS["winogrande"][0], row], tmp_path)
    assert message in str(caught.value)


def test_a_text_may_hold_other_separators_of_lines(tmp_path):
    """JSON lines end at a newline; U+2028 and its kin may stand in a text as they are."""
    path = tmp_path / "lambada.jsonl"
    path.write_text('{"text": "one\u2028two\x85 three"}\n{"text": "four five"}\n', encoding="utf-8")
    rows = harness._read_rows(path, harness.TASKS["lambada"])
    assert [row["text"] for row in rows] == ["one\u2028two\x85 three", "four five"]


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    plain = byte_tokenizer()
    plain.eos_token = None
    request = Request("lambada", (), {"student": model_of().config}, plain, Options())
    with pytest.raises(UserError, match="no end-of-sequence token"):
        prepare(request)


def test_rows_that_are_none(tmp_path):
    for text, message in (
        ("", "holds no rows"),
        ("{", "not JSON"),
        ("3", "expected a JSON object"),
    ):
        (tmp_path / "piqa.jsonl").write_text(text)
        config = {"student": model_of().config}
        with pytest.raises(UserError, match=message):
            prepare(Request("piqa", (str(tmp_path / "piqa.jsonl"),), config, TOKENIZER, Options()))
    with pytest.raises(UserError, match="answerKey 'Z'"):
        measured("arc_easy", [ROWS["arc_easy"][0] | {"answerKey": "Z"}], tmp_path)


def test_what_must_be_allowed_or_there(monkeypatch):
    config = {"student": model_of().config}
    with pytest.raises(UserError, match="--allow-code"):
        prepare(Request("crux", (), config, TOKENIZER, Options()))
    with pytest.raises(UserError, match="no chat template"):
        prepare(Request("piqa", (), config, byte_tokenizer(), Options(chat=True)))
    monkeypatch.setattr(harness, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'tamba\[eval\]'"):
        prepare(Request("piqa", (), config, TOKENIZER, Options()))


def test_sets_are_those_of_the_papers():
    assert SETS["e-tamba"] == ("lambada", "winogrande")
    names = [name.partition("@") for name in SETS["mamba-in-the-llama"]]
    assert all(plain in TASKS and (not at or n.isdigit()) for plain, at, n in names)
    assert sum(not at for _, at, _ in names) == 11  # ten tasks of Table 3, and crux
