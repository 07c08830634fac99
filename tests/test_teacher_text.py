"""A model writes within its budget, in whole documents, the same ones for the same seed."""

from __future__ import annotations

import time

import pytest
import torch

from compare import assert_same
from models import tiny_model
from tamba.errors import UserError
from tamba.teacher_text import REQUESTS, TOPICS, write_blocks
from texts import byte_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model(["mamba2_gqa", "attention"], vocab_size=257)


def write(model, **options):
    defaults = {"tokens": 400, "max_new_tokens": 12, "batch_size": 4}
    tokenizer = byte_tokenizer(chat=True)
    return write_blocks(model, tokenizer, 64, **(defaults | options))


def documents(blocks):
    """Token lists between ends, the last one possibly cut."""
    text = byte_tokenizer().decode(blocks.tokens.flatten().tolist())
    return text.split("<end>")


def test_chat_requests_are_answered_in_whole_documents(model):
    blocks = write(model)
    assert blocks.n_tokens == 384
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
    blocks = write(model, openings=["Once upon a time", "There was"], temperature=0.01)
    for text in documents(blocks)[:-1]:
        assert text.startswith(("Once upon a time", "There was"))


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
