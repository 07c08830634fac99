from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import tiny_model
from tamba.errors import UserError
from tamba.generate import generate
from tokens import character_tokenizer

LAYERS = ["mamba2", "attention", "mamba1"]


def greedy(model, ids: list[int], new: int) -> list[int]:
    """The likeliest token, one full pass a token, no cache."""
    out = list(ids)
    for _ in range(new):
        with torch.no_grad():
            out.append(int(model(torch.tensor([out]), use_cache=False).logits[0, -1].argmax()))
        if out[-1] == 1:
            break
    return out[len(ids) :]


def test_greedy_answer_equals_full_passes() -> None:
    model, tokenizer = tiny_model(LAYERS), character_tokenizer()
    pieces: list[str] = []
    found = generate(
        model, "the cat", tokenizer=tokenizer, new_tokens=12, stream=pieces.append, seed=1
    )
    want = greedy(model, tokenizer("the cat")["input_ids"], 12)
    assert found.text == tokenizer.decode(want, skip_special_tokens=True)
    assert "".join(pieces) == found.text
    assert (found.prompt_tokens, found.new_tokens) == (7, len(want))
    assert found.finished == (want[-1] == 1)
    assert found.prefill_seconds > 0 and found.decode_seconds > 0
    assert found.tokens_per_second == pytest.approx((len(want) - 1) / found.decode_seconds)
    # The comparison can fail: another prompt has another answer.
    assert want != greedy(model, tokenizer("the dog")["input_ids"], 12)


def test_an_answer_ends_at_the_end_token() -> None:
    model, tokenizer = tiny_model(LAYERS), character_tokenizer()
    with torch.no_grad():
        # A head that likes the end token best everywhere.
        model.lm_head.weight[:] = 0
        model.model.final_norm.weight[:] = 0
        model.lm_head.bias = torch.nn.Parameter(torch.eye(model.config.vocab_size)[1])
    found = generate(model, "a", tokenizer=tokenizer, new_tokens=5)
    assert (found.new_tokens, found.finished, found.text) == (1, True, "")
    assert found.tokens_per_second is None and found.to_dict()["tokens_per_second"] is None


def test_an_answer_ends_where_positions_do() -> None:
    tokenizer = character_tokenizer()
    for stack, most in (("mixed", 16), ("mamba2", 24)):  # a state has no end
        model = tiny_model(stack, max_position_embeddings=16)
        model.generation_config.eos_token_id = None
        tokenizer.eos_token = None
        found = generate(model, "hello", tokenizer=tokenizer, new_tokens=19)
        assert found.prompt_tokens + found.new_tokens == most and not found.finished


def test_chat_template_frames_the_prompt() -> None:
    model = tiny_model(LAYERS)
    plain, chat = character_tokenizer(), character_tokenizer(chat=True)
    framed = "<system>be nice<|end|><user>hi<|end|><assistant>"
    want = generate(model, framed, tokenizer=chat, chat=False, new_tokens=4)
    got = generate(model, "hi", tokenizer=chat, system="be nice", new_tokens=4)
    assert (got.text, got.prompt_tokens) == (want.text, want.prompt_tokens)
    raw = generate(model, "hi", tokenizer=chat, chat=False, new_tokens=4)
    assert raw.prompt_tokens == 2
    assert generate(model, "hi", tokenizer=plain, new_tokens=4).prompt_tokens == 2
    with pytest.raises(UserError, match="has no chat template"):
        generate(model, "hi", tokenizer=plain, system="be nice")


def test_seed_decides_samples_and_leaves_the_callers_state() -> None:
    model, tokenizer = tiny_model(LAYERS), character_tokenizer()

    def sample(seed: int) -> str:
        return generate(
            model, "hi", tokenizer=tokenizer, new_tokens=16, temperature=1.5, seed=seed
        ).text

    state = torch.random.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    # Among one token, sampling is greedy.
    only = generate(model, "hi", tokenizer=tokenizer, new_tokens=8, temperature=1.0, top_k=1)
    assert only.text == generate(model, "hi", tokenizer=tokenizer, new_tokens=8).text


def test_opens_a_checkpoint(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(LAYERS), character_tokenizer()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    found = generate(tmp_path / "m", "hi", new_tokens=6, device="cpu")
    assert found.text == generate(model, "hi", tokenizer=tokenizer, new_tokens=6).text


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"prompt": " \n"}, "prompt: is empty"),
        ({"new_tokens": 0}, "new_tokens: 0 is not a positive number"),
        ({"temperature": -1.0}, "temperature: -1.0 is not a number of 0 or more"),
        ({"temperature": float("nan")}, "temperature: nan is not a number"),
        ({"temperature": float("inf")}, "temperature: inf is not a number"),
        ({"top_p": 0.0}, "top_p: 0.0 is not above 0"),
        ({"top_k": -1}, "top_k: -1 is below 0"),
        ({"tokenizer": None}, "has no tokenizer"),
    ],
)
def test_wrong_settings(settings: dict, expected: str) -> None:
    given = {"prompt": "hi", "tokenizer": character_tokenizer()} | settings
    with pytest.raises(UserError) as caught:
        generate(tiny_model(LAYERS), **given)
    assert expected in str(caught.value)


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no system') }}"])
def test_a_template_that_cannot_be_used_is_one_line(template: str) -> None:
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat: the tokenizer's chat template says"):
        generate(tiny_model(LAYERS), "hi", tokenizer=tokenizer, new_tokens=1)


def test_bytes_of_the_shell_that_are_no_text() -> None:
    with pytest.raises(UserError, match="prompt: is not UTF-8"):
        generate(tiny_model(LAYERS), "h\udcff", tokenizer=character_tokenizer())
