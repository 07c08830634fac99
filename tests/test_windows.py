"""Suites over text: windows that slide, perplexity by suite and by position, by plain loops."""

from __future__ import annotations

import json
import math

import pytest
import torch

from models import VOCAB, random_ids, tiny_config, tiny_model
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.evaluate import compare, perplexity, texts, windows
from tamba.evaluate.measure import Models, Options, Request, Subject
from tamba.evaluate.texts import read_enough
from tamba.evaluate.windows import Windows, joined, prepare_kl, prepare_ppl, sliding
from tamba.store import Store
from texts import byte_tokenizer


def blocks(length=12, sizes=(5, 30, 9, 3, 17)):
    documents = [[*random_ids(1, n, seed=n)[0].tolist(), 0] for n in sizes]
    return TokenBlocks.from_tokens(documents, length, separator=0, fill=True, bytes_per_token=2.0)


def subject(role="student", stack="mixed", tokens_at_once=40):
    model = tiny_model(stack, dtype=torch.float64, seed=len(stack))
    return Subject(role, role, model, byte_tokenizer(), role, tokens_at_once)


def run(measure, *subjects, store=None):
    return measure.run(Models(*subjects), lambda *_: Store() if store is None else store)


@torch.no_grad()
def nll_of(model, tokens, target):
    """Of token `target` after all before it."""
    logits = model(torch.tensor([tokens[:target]])).logits[0, -1]
    return -logits.log_softmax(-1)[tokens[target]].item()


def check_sliding(stride):
    """Each token once, in the first window that holds it, after what that holds of its document."""
    length, sizes = 12, (5, 30, 9, 3, 17)
    model = subject().model
    flat, starts = [], []
    for n in sizes:
        starts += [len(flat)] * (n + 1)
        flat += [*random_ids(1, n, seed=n)[0].tolist(), 0]
    total, count = 0.0, 0
    for k in range(1, len(flat)):
        window = max(0, math.ceil((k - length + 1) / stride)) * stride
        begin = max(window, starts[k])
        if begin < k:
            total += nll_of(model, flat[begin : k + 1], k - begin)
            count += 1
    got = run(windows._Perplexity(sliding(blocks(), stride), {"length": length}), subject())
    assert got.settings["scored_tokens"] == count
    assert got.scores["student"]["nll"].value == pytest.approx(total / count, rel=1e-9)


@pytest.mark.parametrize("stride", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 12))])
def test_sliding_windows_score_each_token_once(stride):
    check_sliding(stride)


def test_windows_slide_over_the_end_of_a_text_without_separators():
    """One document that fills its rows: what stands beyond it is no token, and is not scored."""
    text = TokenBlocks.from_tokens([random_ids(1, 16)[0].tolist()], 8, separator=0)
    assert text.n_tokens == 16 and not text.starts[:, 1:].any()
    found = sliding(text, 3)
    assert len(found) == 4 and found.blocks.tokens.min() >= 0
    got = run(windows._Perplexity(found, {"length": 8}), subject())
    assert got.settings["scored_tokens"] == 15


@pytest.mark.slow
def test_tokens_that_are_scored_twice_show(monkeypatch):
    monkeypatch.setattr(
        windows._WindowMeasure, "_counts", lambda self, batch, part, first: batch.predicted
    )
    with pytest.raises(AssertionError):
        check_sliding(5)


def test_whole_stride_is_no_sliding():
    plain, slid = blocks(), sliding(blocks(), 12)
    assert torch.equal(slid.blocks.tokens, plain.tokens)
    with pytest.raises(UserError, match="stride: 13 is not between"):
        sliding(blocks(), 13)


def test_suites_equal_the_functions():
    part = blocks()
    student, teacher = subject(), subject("teacher", "attention")
    got = run(windows._Perplexity(Windows(part), {"length": 12}), student, teacher)
    want = compare(teacher.model, student.model, part)
    scores = got.scores["student"]
    assert scores["perplexity"].value == pytest.approx(want.student.ppl)
    assert scores["bits_per_byte"].value == pytest.approx(want.student.bits_per_byte)
    assert scores["nll"].error == pytest.approx(want.student.standard_error)
    assert (scores["ratio"].value, scores["ratio"].error) == pytest.approx(
        (want.ratio, want.ratio_error)
    )
    # The difference is that of the two means, though windows differ in length.
    assert got.paired["nll"].difference == pytest.approx(want.student.nll - want.teacher.nll)
    assert got.scores["teacher"]["perplexity"].value == pytest.approx(want.teacher.ppl)
    found = run(windows._Divergence(Windows(part), {}), student, teacher).scores["student"]
    assert found["kl"].value == pytest.approx(want.kl)
    assert found["agreement"].value == pytest.approx(want.agreement)


def test_what_is_done_is_not_done_again(monkeypatch):
    part, one = blocks(), subject(tokens_at_once=24)
    store = Store()
    want = run(windows._Perplexity(Windows(part), {"length": 12}), one, store=store)
    assert want.scores["student"]["nll"].value == pytest.approx(perplexity(one.model, part).nll)
    half = Store()
    half.add({name: store[name] for name in list(store)[::2]})
    genuine, seen = windows.token_scores, []

    def counting(models, picked, **options):
        seen.append(len(picked))
        return genuine(models, picked, **options)

    monkeypatch.setattr(windows, "token_scores", counting)
    got = run(windows._Perplexity(Windows(part), {"length": 12}), one, store=half)
    assert seen == [len(part) // 2]
    assert got.scores["student"]["nll"].value == pytest.approx(want.scores["student"]["nll"].value)


def test_loss_by_position(monkeypatch):
    monkeypatch.setattr(windows, "BUCKET", 5)
    part, one = joined(blocks()), subject()
    got = run(windows._ByPosition(part, {}), one).curves["nll"].points["student"]
    assert [p.x for p in got] == [5, 10, 12]
    for point, places in zip(got, (range(1, 5), range(5, 10), range(10, 12)), strict=True):
        losses = [nll_of(one.model, row.tolist(), k) for row in part.blocks.tokens for k in places]
        assert point.value == pytest.approx(sum(losses) / len(losses))
        assert point.n == len(part)
    with pytest.raises(UserError, match="less than one window of 90"):
        joined(blocks(90))


def test_text_is_read_until_there_is_enough(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"text": "{c * 100}"}}\n' for c in "abcdef"))
    assert len(read_enough([file], "text", None)) == 6
    assert len(read_enough([file], "text", 20)) == 2
    # The hub's reader, on a local file: the same rows, no more of them than needed.
    pytest.importorskip("datasets")
    monkeypatch.setattr(texts, "NAMED", {})
    stream = texts._stream(str(file), "text")
    assert [next(stream)[0] for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(UserError, match="no field 'body'"):
        next(texts._stream(str(file), "body"))


def test_tokens_are_those_of_the_vocabulary():
    wide = blocks()
    assert int(wide.tokens.max()) < VOCAB


def request(tmp_path, texts, suite="ppl", **options):
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    configs = {"student": tiny_config("attention"), "teacher": tiny_config("mixed")}
    return Request(suite, (str(file),), configs, byte_tokenizer(), Options(**options))


def check_density(tmp_path):
    """Bytes a token are those of the windows that are measured, not of all text that was read."""
    short, long = ["ab"] * 9, ["c" * 80]  # 2 bytes of 3 tokens, and 80 of 81
    for limit, want in ((1, 8 / 12), (2, 16 / 24), (3, (18 + 9) / 36)):
        got = prepare_ppl(request(tmp_path, short + long, length=12, limit=limit))
        assert len(got.windows) == limit
        assert got.windows.blocks.bytes_per_token == pytest.approx(want, abs=1e-9)


def test_bytes_are_those_of_the_windows(tmp_path, monkeypatch):
    check_density(tmp_path)
    monkeypatch.setattr("tamba.data._bytes_of_last", lambda *rest: 0)
    with pytest.raises(AssertionError):
        check_density(tmp_path)


@pytest.mark.parametrize("stride", [None, 4])
def test_divergence_and_perplexity_see_the_same_windows(tmp_path, stride):
    texts = ["the quick brown fox", "jumps", "over the lazy dog"]
    options = {"length": 12, "stride": stride, "limit": 3}
    ppl = prepare_ppl(request(tmp_path, texts, **options))
    kl = prepare_kl(request(tmp_path, texts, "kl", **options))
    assert len(ppl.windows) == 3 and ppl.windows.digest() == kl.windows.digest()
    with pytest.raises(UserError, match="stride: 13 is not between"):
        prepare_kl(request(tmp_path, texts, "kl", length=12, stride=13))
