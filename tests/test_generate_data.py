"""A model answers prompts: each once, the same wherever the run was cut, in files that are read."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import tamba
from models import tiny_model
from tamba.chats import conversation_of, read_rows
from tamba.data import read_texts
from tamba.errors import UserError
from tamba.generate_data import _places, generate_data
from tamba.store import Store
from texts import END, byte_tokenizer

PROMPTS = ["What is a river?", "Why?", "Tell me of the quick brown fox.", "Where does it run?"]


@pytest.fixture(scope="module")
def model():
    made = tiny_model(["mamba2_gqa", "attention"], vocab_size=257, max_position_embeddings=128)
    made.generation_config.eos_token_id = END
    return made


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": p}], "source": "mine"} for p in PROMPTS]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write(model, out, prompts=(), **options):
    defaults = {"new_tokens": 12, "tokens_at_once": 100, "temperature": 1.0}
    tokenizer = byte_tokenizer(chat=True)
    return generate_data(model, out, prompts=prompts, tokenizer=tokenizer, **(defaults | options))


def test_rows_are_chats_and_text(model, prompts, tmp_path):
    out = tmp_path / "data.jsonl"
    written = write(model, out, prompts)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["messages"][0]["content"] for r in rows] == PROMPTS
    assert written.rows == len(rows) == 4 and not written.left_out
    assert {r["source"] for r in rows} == {"mine"}
    assert {r["finish"] for r in rows} <= {"stop", "length"}
    assert written.unfinished == sum(r["finish"] == "length" for r in rows)
    for row, text in zip(read_rows(out), read_texts(out), strict=True):
        chat = conversation_of(row)
        assert chat.cut == (row.fields["finish"] == "length")
        asked, said = (m["content"] for m in chat.messages)
        assert text == f"<user>{asked}<assistant>{said}"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("gigabytes", "places"),
    [(1, 16_384), (8, 61_035), (80, 131_072)],
    ids=["least", "an eighth", "most"],
)
def test_a_batch_has_room_on_the_card(model, monkeypatch, gigabytes, places):
    card = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    config = SimpleNamespace(block_specs=[SimpleNamespace(cache_bytes=lambda n, b: 4096 * n * b)])
    assert _places(config, torch.device("cuda")) == places
    assert _places(config, torch.device("cpu")) == 16_384


def test_a_run_that_was_cut_writes_what_it_would_have(model, prompts, tmp_path, monkeypatch):
    whole = tmp_path / "whole.jsonl"
    write(model, whole, prompts)
    add = Store.add
    for cut in range(4):
        out = tmp_path / f"cut{cut}.jsonl"
        left = [cut]

        def dies(self, results, left=left):
            for name, result in results.items():
                if name != "settings" and not left[0]:
                    with self.path.open("a") as file:
                        file.write('{"id": "half a li')
                    raise KeyboardInterrupt
                left[0] -= name != "settings"
                add(self, {name: result})

        monkeypatch.setattr(Store, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            write(model, out, prompts)
        assert not out.exists()
        monkeypatch.setattr(Store, "add", add)
        write(model, out, prompts)
        assert out.read_bytes() == whole.read_bytes()
    again = tmp_path / "other.jsonl"
    write(model, again, prompts, seed=1)
    assert again.read_bytes() != whole.read_bytes()


def test_an_unfinished_run_with_other_settings_is_not_mixed_in(model, prompts, tmp_path):
    out = tmp_path / "data.jsonl"
    store = Store(tmp_path / ".data.jsonl.unfinished")
    store.add({"settings": {"temperature": 0.1}})
    with pytest.raises(UserError, match=r"unfinished run with another .*temperature"):
        write(model, out, prompts)


def test_what_is_left_out_is_counted(model, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["one", "two", "one ", "x" * 200]))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": " "}) + "\n")
    written = write(model, tmp_path / "data.jsonl", [path, rows])
    assert written.rows == 2
    assert written.left_out == {
        "prompts that came before": 1,
        "prompts of more than 116 tokens": 1,
        "empty prompts": 1,
    }
    assert "left out: 1 empty prompts" in str(written)


def test_answers_that_came_before_are_left_out(model, prompts, tmp_path, monkeypatch):
    said = iter(["long " * 20, "Yes.", "long  " * 20, "Yes."])
    read = tamba.generate_data._Writer._read

    def same(self, tokens, ends):
        return read(self, tokens, ends) | {"text": next(said)}

    monkeypatch.setattr(tamba.generate_data._Writer, "_read", same)
    written = write(model, tmp_path / "data.jsonl", prompts)
    assert written.left_out == {"answers that came before": 1} and written.rows == 3


def test_a_model_writes_its_own_prompts(model, tmp_path):
    out = tmp_path / "data.jsonl"
    written = write(model, out, magpie=12, new_tokens=60)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert written.rows == len(rows) > 0
    assert {r["source"] for r in rows} == {"magpie"}
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant"]
    assert len({r["messages"][0]["content"] for r in rows}) == len(rows)
    assert sum(written.left_out.values()) + written.rows == 12


def test_what_cannot_be_is_said_before_work(model, prompts, tmp_path):
    out = tmp_path / "data.jsonl"
    for options, said in (
        ({}, "there are none"),
        ({"prompts": prompts, "new_tokens": 128}, "fill the model's 128 positions"),
        ({"prompts": prompts, "limit": 0}, "limit"),
        ({"prompts": prompts, "top_p": 2.0}, "top_p"),
        ({"prompts": prompts, "prompt_tokens": 3}, r"none can be asked \(4 prompts of more"),
        ({"prompts": tmp_path / "no.jsonl"}, "no such file"),
    ):
        with pytest.raises(UserError, match=said):
            write(model, out, **options)
        assert not list(tmp_path.glob(".*")) and not out.exists()
    with pytest.raises(UserError, match="no chat template"):
        generate_data(model, out, prompts=prompts, tokenizer=byte_tokenizer())
    out.touch()
    with pytest.raises(UserError, match="already exists"):
        write(model, out, prompts)


def test_a_word_that_the_model_lacks_is_named_before_it_writes(prompts, tmp_path):
    small = tiny_model(["attention"], vocab_size=60, max_position_embeddings=128)
    with pytest.raises(UserError, match=r"prompts.jsonl:1: holds token number \d+, .* 60 words"):
        write(small, tmp_path / "out.jsonl", prompts)
    with pytest.raises(UserError, match=r"chat template: holds token number \d+"):
        write(small, tmp_path / "own.jsonl", magpie=2)
    assert not (tmp_path / ".out.jsonl.unfinished").exists()
