"""Rows of many forms become conversations, and masks cover answers exactly."""

from __future__ import annotations

import gzip
import json
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tamba import chats
from tamba.chats import (
    Conversation,
    Row,
    answer_tokens,
    check_chats,
    conversation_of,
    preference_of,
    prompt_of,
    prompt_tokens,
    read_rows,
)
from tamba.errors import UserError
from tamba.recipe import data_set
from texts import END, byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<end>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<end>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
ASKS = "two and two?"
USER = {"role": "user", "content": ASKS}
SAID = {"role": "assistant", "content": "four"}
THREE = [
    {"role": "system", "content": "be brief"},
    USER,
    SAID,
    {"role": "user", "content": "and three?"},
    {"role": "assistant", "content": "seven <|user|> of course"},
]


def tokenizer(template):
    made = byte_tokenizer()
    made.chat_template = template
    return made


def runs(ids, mask):
    """The text of each run of masked tokens."""
    found, current = [], []
    for token, masked in [*zip(ids, mask, strict=True), (0, False)]:
        if masked:
            current.append(token)
        elif current:
            found.append(byte_tokenizer().decode(current))
            current = []
    return found


def test_rows_of_many_forms_hold_the_same():
    for fields in (
        {"messages": [USER, SAID]},
        {"conversations": [{"from": w, "value": v} for w, v in (("human", ASKS), ("gpt", "four"))]},
        {"prompt": USER["content"], "completion": "four"},
        {"prompt": [USER], "response": [SAID]},
        {"instruction": USER["content"], "input": "", "output": "four"},
        {"question": USER["content"], "answer": "four"},
    ):  # fmt: skip
        row = Row("here", fields)
        assert conversation_of(row) == Conversation("here", (USER, SAID))
        assert prompt_of(row) == (USER,)
    row = Row("here", {"system": "be brief", "question": "a?", "chosen": "b", "rejected": "c"})
    assert [m["role"] for m in preference_of(row).prompt] == ["system", "user"]
    row = Row("here", {"instruction": "Sum", "input": "2 2", "output": "4"})
    assert prompt_of(row)[0]["content"] == "Sum\n\n2 2"


def test_preferences_of_several_forms():
    bad = {"role": "assistant", "content": "five"}
    for fields in (
        {"prompt": [USER], "chosen": [SAID], "rejected": [bad]},
        {"prompt": USER["content"], "chosen": "four", "rejected": "five"},
        {"prompt": USER["content"], "chosen": [USER, SAID], "rejected": [USER, bad]},
        {"chosen": [USER, SAID], "rejected": [USER, bad]},
    ):
        pair = preference_of(Row("here", fields))
        assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (SAID,), (bad,))
    turns = {"chosen": THREE, "rejected": [*THREE[:-1], bad]}
    assert preference_of(Row("here", turns)).prompt == tuple(THREE[:-1])


@pytest.mark.parametrize(
    ("read", "fields", "said"),
    [
        (prompt_of, {"txet": "a"}, "'txet'"),
        (conversation_of, {"messages": [USER]}, "does not end with an answer"),
        (conversation_of, {"messages": [USER, {"role": "assistant", "content": " "}]}, "empty"),
        (conversation_of, {"prompt": "a"}, "holds no conversation"),
        (conversation_of, {"messages": ["a"]}, "neither text nor messages"),
        (conversation_of, {"messages": [{"role": "user"}]}, "lacks role or content"),
        (preference_of, {"prompt": "a", "chosen": "b", "rejected": "b "}, "do not differ"),
        (preference_of, {"prompt": "a", "chosen": "", "rejected": "b"}, "chosen answer is empty"),
        (preference_of, {"prompt": "a"}, "holds no preference"),
    ],
)
def test_rows_that_cannot_be_used_are_named(read, fields, said):
    with pytest.raises(UserError, match=f"file:7: .*({said})"):
        read(Row("file:7", fields))


@pytest.mark.parametrize("template", [CHATML, PLAIN], ids=["marked", "by prefix"])
def test_masks_cover_answers_and_their_ends(template):
    made = tokenizer(template)
    ids, mask = answer_tokens(made, Conversation("here", tuple(THREE)), [END])
    assert ids == made.apply_chat_template(THREE, return_dict=True)["input_ids"]
    assert runs(ids, mask) == ["four<end>", "seven <|user|> of course<end>"]
    asked = prompt_tokens(made, THREE[:2], "here")
    assert ids[: len(asked)] == asked and not any(mask[: len(asked)])
    # A mask that begins a token early is told apart.
    early = [*mask[1:], False]
    assert runs(ids, early) != runs(ids, mask)


@pytest.mark.parametrize("template", [CHATML, PLAIN], ids=["marked", "by prefix"])
def test_an_answer_that_was_cut_off_has_no_end(template):
    made = tokenizer(template)
    ids, mask = answer_tokens(made, Conversation("here", (USER, SAID), cut=True), [END])
    assert runs(ids, mask) == ["four"] and mask[-1]


def sentence_pieces():
    """A tokenizer that puts a space before each text, as those of Llama 2 and Zephyr do."""
    words = {w: i for i, w in enumerate(["<unk>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz<|>?\n"])}
    made = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    return fast


def check_pieces():
    made = sentence_pieces()
    turns = tuple(m | {"content": "yes no"} for m in THREE)
    ids, mask = answer_tokens(made, Conversation("here", turns), [made.eos_token_id])
    # One space before the first text, and none where an answer begins or has ended.
    assert ids == made.apply_chat_template(list(turns), return_dict=True)["input_ids"]
    said = [made.convert_ids_to_tokens(i) for i, m in zip(ids, mask, strict=True) if m]
    assert said == [*"yes▁no", "</s>"] * 2
    for n in (2, 4):
        asked = prompt_tokens(made, turns[:n], "here")
        assert ids[: len(asked)] == asked and mask[len(asked)] and not mask[len(asked) - 1]


def test_answers_have_the_tokens_of_the_text_that_they_stand_in():
    check_pieces()


def test_answers_with_tokens_of_their_own_are_seen(monkeypatch):
    monkeypatch.setattr(chats, "_cut_whole", lambda *_: None)
    with pytest.raises(AssertionError):
        check_pieces()


def test_a_token_that_spans_a_cut_is_cut():
    """The prompt ends with a space, which the whole text's tokens join to the answer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(letters)} | {"Ġf": 256, "<end>": 257}
    made = Tokenizer(models.BPE(vocab=words, merges=[("Ġ", "f")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    fast.chat_template = PLAIN.replace("'|>' }}", "'|> ' }}").replace(
        "assistant|>{", "assistant|> {"
    )
    ids, mask = answer_tokens(fast, Conversation("here", (USER, SAID)), [257])
    asked = prompt_tokens(fast, (USER,), "here")
    assert ids[: len(asked)] == asked and not any(mask[: len(asked)])
    assert ids[len(asked) : len(asked) + 5] == [*fast("four")["input_ids"], 257]
    assert 256 in fast.apply_chat_template([USER, SAID], return_dict=True)["input_ids"]


def test_a_template_that_writes_earlier_turns_anew_is_refused():
    forgets = (
        "{% for m in messages %}<{{ m['role'] }}>{% if loop.last or m['role'] != 'assistant' %}"
        "{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    made = tokenizer(forgets)
    with pytest.raises(UserError, match=r"here: .*message 2 otherwise"):
        answer_tokens(made, Conversation("here", tuple(THREE)), [END])
    assert answer_tokens(made, Conversation("here", (USER, SAID)), [END])[1]
    strict = tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match=r"here: .*no system role"):
        prompt_tokens(strict, [USER], "here")


def test_sources(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "one.jsonl").write_text(lines)
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "three.txt").write_text("c\n\nd\n")
    files = [tmp_path / n for n in ("one.jsonl", "two.jsonl.gz", "three.txt")]
    found = list(read_rows(files))
    assert [prompt_of(r)[0]["content"] for r in found] == list("ababcd")
    assert found[-1].where == f"{files[2]}:3" and found[-1].source == "three.txt"
    assert len(list(read_rows(files, limit=1))) == 3
    assert len(list(read_rows(tmp_path))) == 6
    for name, said in ((str(tmp_path / "x.jsonl"), "no such file"), (tmp_path / "y.csv", "known")):
        (tmp_path / "y.csv").touch()
        with pytest.raises(UserError, match=said):
            check_chats([name])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="holds no rows"):
        list(read_rows(tmp_path / "empty.txt"))


def test_parquet_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"messages": [USER, SAID]}] * 3).to_parquet(str(path))
    found = [conversation_of(r).messages for r in read_rows(path, limit=2)]
    assert found == [(USER, SAID)] * 2
    (tmp_path / "more.txt").write_text("c\n")
    assert len(list(read_rows(tmp_path))) == 4


def test_a_missing_file_is_no_data_set(tmp_path, monkeypatch):
    """``OWNER/NAME`` may be either; a name that ends as files do is a file's, and the hub is not
    asked for it."""
    monkeypatch.chdir(tmp_path)
    for name in ("chats/train.jsonl", "chats/train.parquet", "chats/train.jsonl.xz"):
        with pytest.raises(UserError, match=f"{name}: no such file or folder"):
            check_chats([name])
        assert data_set(name) is None
    assert data_set("owner/name.v2") == (("owner/name.v2",), "train")
    assert data_set("owner/name:test") == (("owner/name",), "test")
    assert data_set("owner/name/part:test") == (("owner/name", "part"), "test")
    assert data_set("a/b/c/d") is data_set("../a") is data_set("a") is None


def test_the_hub_is_streamed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*place, **options):
        asked.append((place, options))
        yield from ({"prompt": str(i)} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = list(read_rows("owner/name:train_sft", limit=3))
    assert [r.where for r in found] == [f"owner/name:train_sft, row {i}" for i in range(3)]
    assert asked == [(("owner/name",), {"streaming": True, "split": "train_sft"})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"tamba\[chat\]"):
        list(read_rows("owner/name"))
