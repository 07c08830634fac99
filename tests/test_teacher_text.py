"""A model writes within its budget, in whole documents, the same ones for the same seed."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from compare import assert_same
from models import tiny_model
from tamba import teacher_text
from tamba.errors import UserError
from tamba.teacher_text import REQUESTS, TOPICS, write_blocks
from texts import END, byte_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model(["mamba2_gqa", "attention"], vocab_size=257)


def write(model, length=64, **options):
    defaults = {"tokens": 400, "max_new_tokens": 12, "batch_size": 4}
    tokenizer = byte_tokenizer(chat=True)
    return write_blocks(model, tokenizer, length, **(defaults | options))


def documents(blocks):
    """Texts from start to start, those cut that a block ends, without their ends."""
    edges = [*blocks.starts.flatten().nonzero()[:, 0].tolist(), blocks.tokens.numel()]
    flat = blocks.tokens.flatten().tolist()
    found = [byte_tokenizer().decode(flat[a:b]) for a, b in itertools.pairwise(edges)]
    return [text.removesuffix("<end>") for text in found]


def test_chat_requests_are_answered_in_whole_documents(model):
    assert write(model).n_tokens == 384
    blocks = write(model, 400)
    asked = {f"<user>{r.format(t)}<assistant>" for r in REQUESTS for t in TOPICS}
    found = documents(blocks)
    assert len(found) > 3
    for text in found[:-1]:
        request, _, answer = text.partition("<assistant>")
        assert request + "<assistant>" in asked
        assert len(byte_tokenizer()(answer)["input_ids"]) <= 12 * 3  # bad bytes decode to three


def test_a_seed_repeats_and_leaves_the_callers_random_state_alone(model):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = write(model, seed=3)
    assert_same(torch.get_rng_state(), before, "exact")
    torch.manual_seed(8)
    assert_same(write(model, seed=3).tokens, first.tokens, "exact")
    assert not torch.equal(write(model, seed=4).tokens, first.tokens)


def test_openings_are_continued(model):
    blocks = write(model, 400, openings=["Once upon a time", "There was"], temperature=0.01)
    for text in documents(blocks)[:-1]:
        assert text.startswith(("Once upon a time", "There was"))


def test_what_is_cut_off_has_no_end(model, monkeypatch):
    """Where the teacher would have gone on, a student that learned an end would stop."""
    said = {0: [7, 7, END], 1: [8] * 12}
    monkeypatch.setattr(teacher_text, "decode", lambda *_, **__: iter([said]))
    blocks = write(model, 32, openings=["a"], batch_size=2, tokens=32)
    (tokens,), (starts,) = blocks.tokens.tolist(), blocks.starts.tolist()
    (a,) = byte_tokenizer()("a")["input_ids"]
    texts = [[a, 7, 7, END], [a, *[8] * 12]]
    assert tokens == [*texts[0], *texts[1], *texts[0], *texts[1]][:32]
    assert [i for i, starts_here in enumerate(starts) if starts_here] == [0, 4, 17, 21]


def test_padding_does_not_reach_what_is_written(model):
    # At almost no temperature sampling is greedy, so neighbours of other lengths change nothing.
    alone = write(model, openings=["Hello there"], temperature=1e-6, batch_size=1)
    pair = write(model, openings=["Hello there", "A"], temperature=1e-6, batch_size=2)
    wanted = documents(alone)[0]
    assert wanted in documents(pair)


def test_time_is_a_budget(model):
    begun = time.monotonic()
    blocks = write(model, tokens=None, seconds=0.5, max_new_tokens=64)
    assert time.monotonic() - begun < 10
    assert blocks.n_tokens > 0


def test_what_cannot_write(model):
    with pytest.raises(UserError, match="no budget"):
        write(model, tokens=None)
    with pytest.raises(UserError, match="no chat template"):
        write_blocks(model, byte_tokenizer(), 64, tokens=100)
    with pytest.raises(UserError, match="end-of-sequence"):
        write_blocks(model, byte_tokenizer(end=False), 64, tokens=100)
    with pytest.raises(UserError, match="hold no text"):
        write(model, openings=["  "])
