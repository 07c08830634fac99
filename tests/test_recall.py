"""Recall tasks: prompts to the token, and scores by hand on a model whose next word is known."""

from __future__ import annotations

import random
import re

import pytest
import torch

from models import tiny_model
from tamba.errors import UserError
from tamba.evaluate import recall
from tamba.evaluate.measure import Models, Options, Request, Subject
from tamba.evaluate.recall import TASKS, prepare, whole_words
from tamba.store import Store
from texts import byte_tokenizer

TOKENIZER = byte_tokenizer()


def successor(table: dict[str, str], **options):
    """A model that answers each byte with the one that `table` has for it."""
    model = tiny_model(["mamba2", "attention"], dtype=torch.float64)
    config = type(model.config)(**(model.config.to_dict() | {"vocab_size": 257} | options))
    model = type(model)(config).double().eval()
    ids = {c: TOKENIZER.encode(c)[0] for pair in table.items() for c in pair}
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()  # blocks add nothing: what comes out is the embedding
        generator = torch.Generator().manual_seed(0)
        table_in = torch.nn.functional.normalize(
            torch.randn(257, 32, generator=generator, dtype=torch.float64), dim=-1
        )
        model.model.embed_tokens.weight.copy_(table_in)
        model.model.final_norm.weight.fill_(1.0)
        head = torch.zeros(257, 32, dtype=torch.float64)
        for before, after in table.items():
            head[ids[after]] += table_in[ids[before]]
        model.lm_head.weight = torch.nn.Parameter(head)
    return model


def request(name, config, data=(), **options):
    return Request(name, data, {"student": config}, TOKENIZER, Options(**options))


def measured(name, model, tmp_path=None, text="", store=None, **options):
    data = ()
    if text:
        (tmp_path / "text.txt").write_text(text)
        data = (str(tmp_path / "text.txt"),)
    measure = prepare(request(name, model.config, data, **options))
    subject = Subject("student", "s", model, TOKENIZER, "digest", 64)
    return measure.run(Models(subject), lambda _: Store() if store is None else store)


def test_copying_by_hand(tmp_path):
    cycle = successor({"a": "b", "b": "c", "c": "d", "d": "a"})
    got = measured("copy", cycle, tmp_path, "abcd" * 20, lengths=(3, 9), cases=4)
    assert got.scores["student"]["acc"].value == 1.0
    assert [p.x for p in got.curves["acc"].points["student"]] == [3, 9]
    # Here b may be followed by c or e, and only c is ever said.
    text = "abcdabed" * 20
    got = measured("copy", cycle, tmp_path, text, lengths=(8,), cases=16)
    want = []
    for k in range(16):
        first = random.Random(f"copy 0 8 {k}").randrange(len(text) - 8)
        piece = text[first : first + 8]
        want.append(piece.index("e") - 1 if piece[0] != "e" else 0)
    # Every window of eight holds one e: no copy is whole, and it is right up to the e; where e
    # comes first nothing is known of what follows it.
    assert got.scores["student"]["acc"].value == 0.0
    share = got.curves["right_before_error"].points["student"][0].value
    assert share == pytest.approx(sum(w / 7 for w in want) / 16)


def test_scores_that_are_wrong_show(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "_graded", lambda case, tokens, tokenizer: {"acc": 1})
    with pytest.raises((AssertionError, KeyError)):
        test_copying_by_hand(tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_is_right_and_another_is_not(task):
    """What each task takes for right, said to it; and the same with one character changed."""
    config = successor({"a": "b"}).config
    size = {"needle": 300, "copy": 12}.get(task, 6)
    measure = prepare(request(task, config, lengths=(size,), cases=3))
    for drawn, case in measure.cases.values():
        assert drawn == size
        answer = list(case.answer) if case.answer else TOKENIZER.encode(f" {case.text}>\n")
        assert len(answer) <= case.new_tokens
        assert recall._graded(case, answer, TOKENIZER)["acc"] == 1
        if case.answer:
            wrong = [*answer[:-1], answer[-1] + 1]
        else:
            last = case.text[-1]
            wrong = TOKENIZER.encode(f" {case.text[:-1]}{'1' if last != '1' else '2'}>\n")
            # More digits are another number.
            longer = TOKENIZER.encode(f" {case.text}7>\n")
            assert recall._graded(case, longer, TOKENIZER)["acc"] == 0
        assert recall._graded(case, wrong, TOKENIZER)["acc"] == 0
        assert recall._graded(case, answer[:-2], TOKENIZER)["acc"] == 0 or not case.answer


def prompt_of(task, size, **options):
    measure = prepare(request(task, successor({"a": "b"}).config, lengths=(size,), **options))
    return [case for _, case in measure.cases.values()]


def test_prompts_are_what_the_paper_says():
    for case in prompt_of("copy", 20, cases=2):
        ids = case.prompt
        assert len(ids) == 41 and ids[:20] == ids[20:40] and ids[40] == ids[0]
        assert list(case.answer) == ids[1:20] and case.new_tokens == 19
        assert set(ids) <= set(whole_words(TOKENIZER))
    for case in prompt_of("phonebook", 7, cases=2):
        *book, asked = TOKENIZER.decode(case.prompt).split("\n")
        found = dict(re.fullmatch(r"<(\w+), (\d{3}-\d{3}-\d{4})>", line).groups() for line in book)
        assert len(found) == 7
        name = re.fullmatch(r"<(\w+),", asked)[1]
        assert found[name] == case.text
        assert list(found).index(name) / 6 == case.place
    for case in prompt_of("needle", 400, cases=2):
        assert len(case.prompt) == 400
        assert TOKENIZER.decode(case.prompt).count(case.text) == 1
    for case in prompt_of("mqar", 5, cases=2):
        pairs = dict(zip(case.prompt[0:10:2], case.prompt[1:10:2], strict=True))
        assert len(case.prompt) == 10 + 2 * 4 + 1 and len(pairs) == 5
        assert case.answer == (pairs[case.prompt[-1]],)
        assert case.prompt[-1] not in case.prompt[10:-1:2]


def test_cases_depend_on_seed_task_and_size_alone():
    few, many = prompt_of("phonebook", 6, cases=2), prompt_of("phonebook", 6, cases=4)
    assert many[:2] == few
    assert prompt_of("phonebook", 6, cases=2, seed=1) != few


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    model = successor({"a": "b", "b": "a"})
    path = tmp_path / "items.jsonl"
    options = {"tmp_path": tmp_path, "text": "ab" * 20, "lengths": (4, 6), "cases": 3}
    want = measured("copy", model, store=Store(path), **options)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    # Cut short in the middle of a line, as the end of a process leaves it.
    path.write_text("".join(lines[:4]) + lines[4][:9])
    genuine, asked = recall.decode, []

    def counting(model, prompts, *args, **kwargs):
        asked.extend(prompts)
        return genuine(model, prompts, *args, **kwargs)

    monkeypatch.setattr(recall, "decode", counting)
    got = measured("copy", model, store=Store(path), **options)
    assert len(asked) == 2
    assert (got.scores, got.curves) == (want.scores, want.curves)
    assert len(path.read_text().splitlines()) == 6


def test_lengths_beyond_the_positions():
    config = successor({"a": "b"}, max_position_embeddings=100).config
    with pytest.raises(UserError, match="is beyond the model's 100 positions"):
        prepare(request("copy", config, lengths=(8, 40), cases=1))
    measure = prepare(request("copy", config, cases=1))
    assert measure.settings["lengths"] == [8, 16, 32]
    assert measure.settings["left_out"][0] == 64
    with pytest.raises(UserError, match="no length fits"):
        prepare(request("needle", config, cases=1))
