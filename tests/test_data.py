"""Text arrives whole, is split without leaks, packed without mixing, and served in one order."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from compare import assert_same
from tamba import data
from tamba.data import Batch, TokenBlocks, read_texts, split_texts, text_digest
from tamba.errors import UserError
from texts import END, byte_tokenizer, document

TEXTS = ["One.\n\nTwo, with ünicode – and more.", "Three.", "Four: \u2028 line separators stay."]


def write_jsonl(path: Path, rows, opener=open) -> Path:
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


# Sources


@pytest.mark.parametrize(
    ("name", "opener"),
    [
        ("a.jsonl", open),
        ("a.jsonl.gz", gzip.open),
        ("a.jsonl.xz", lzma.open),
        ("a.json.gz", gzip.open),
    ],
)
def test_json_lines_give_back_their_texts(tmp_path, name, opener):
    path = write_jsonl(tmp_path / name, ({"text": t, "source": "x"} for t in TEXTS), opener)
    assert read_texts(path) == TEXTS
    assert read_texts(str(path), max_bytes=1) == TEXTS[:1]


def test_another_key(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "hello"}])
    assert read_texts(path, key="body") == ["hello"]


def test_a_folder_is_read_in_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("second", encoding="utf-8-sig")
    write_jsonl(tmp_path / "b" / "1.jsonl", [{"text": "first"}])
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("third")
    (tmp_path / "readme.rst").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    assert read_texts(tmp_path) == ["first", "second", "third"]
    assert read_texts([tmp_path / "c.txt.gz", tmp_path / "b"]) == ["third", "first", "second"]


BAD_FILES = [
    ("missing.txt", None, "no such file or folder"),
    ("python-doc", None, "did you mean 'python-docs'?"),
    ("a.pdf", b"x", "not a kind of text file"),
    ("a.txt", b"", "a.txt: the file is empty"),
    ("a.txt", b" \n ", "the file is empty"),
    ("a.txt", b"one\ntwo\n\xff\xfe", "a.txt:3: not UTF-8"),
    ("a.jsonl", b"", "the file is empty"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON"),
    ("a.jsonl", b'{"text": "x"}\n\n', "a.jsonl:2: not JSON"),
    ("a.jsonl", b'{"text": "x"}\n["text"]\n', "a.jsonl:2: expected a JSON object, got list"),
    (
        "a.jsonl",
        b'{"text": "x"}\n{"test": "x"}\n',
        "a.jsonl:2: no field 'text'; did you mean 'test'?",
    ),
    ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: field 'text' holds int"),
    ("a.jsonl", b'{"text": " "}\n', "a.jsonl:1: field 'text' is empty"),
    ("a.jsonl.gz", b"not gzip", "the packed file is damaged"),
    (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12],
        "the packed file is damaged",
    ),
    ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 99)[:-30], "the packed file is damaged"),
    ("empty/", None, "the folder holds no file of"),
    ("package-docs:nowhere_to_be_found", None, "no such installed package"),
    ("hf://allenai/c4", None, "write hf://datasets/OWNER/NAME/FILE"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / "empty").mkdir()
    source = tmp_path / name if content is not None or name.endswith((".txt", "/")) else name
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_texts(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tables(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "a.parquet"
    rows = [{"text": t, "body": None} for t in TEXTS]
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    assert read_texts(path) == list(TEXTS)
    assert read_texts(tmp_path) == list(TEXTS)
    with pytest.raises(UserError, match=r"a.parquet, row 0: field 'body' holds NoneType"):
        read_texts(path, key="body")
    path.write_bytes(b"no table")
    with pytest.raises(UserError, match=r"a.parquet: "):
        read_texts(path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"a.parquet: needs the package 'datasets'.*tamba\[chat\]"):
        read_texts(path)


def test_data_sets_of_the_hub_are_streamed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*place, **options):
        asked.append((place, options))
        yield from ({"text": f"{i} of many"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_texts(["owner/name/part:some", "owner/other"], limit=2)
    assert found == ["0 of many", "1 of many"] * 2
    assert asked == [
        (("owner/name", "part"), {"streaming": True, "split": "some"}),
        (("owner/other",), {"streaming": True, "split": "train"}),
    ]
    with pytest.raises(UserError, match="owner/name: no such file or folder"):
        read_texts("owner/name")  # there may be no end of it


def test_a_file_of_the_hub(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "shard.json.gz", [{"text": "hello"}], gzip.open)
    asked = {}

    def download(repository, file, **rest):
        asked.update(repository=repository, file=file, **rest)
        return str(path)

    monkeypatch.setattr(data, "hf_hub_download", download)
    assert read_texts("hf://datasets/allenai/c4@main/en/shard.json.gz") == ["hello"]
    assert asked == {
        "repository": "allenai/c4",
        "file": "en/shard.json.gz",
        "repo_type": "dataset",
        "revision": "main",
    }


def test_python_docs_are_prose_each_paragraph_once():
    texts = read_texts("python-docs", max_bytes=330_000)
    assert texts == read_texts("python-docs", max_bytes=330_000)
    paragraphs = [p for text in texts for p in text.split("\n\n")]
    assert len(paragraphs) == len({" ".join(p.casefold().split()) for p in paragraphs}) > 1000
    for p in paragraphs:
        assert len(p.split()) >= 8
        assert ">>>" not in p
        assert "``" not in p
        assert "\n" not in p


def test_package_docs_do_not_import_the_package(tmp_path, monkeypatch):
    package = tmp_path / "explosive"
    package.mkdir()
    words = "This docstring tells in plain words what the module does and why it has to be here."
    (package / "__init__.py").write_text(
        f'"""{words}\n\nTitle\n-----\nNot prose as it stands under a heading, as we see.\n"""\n'
        f'raise RuntimeError("imported")\n'
        f"class A:\n    def f(self):\n        '''{words.replace('module', ':class:`method`')}\n\n"
        f"        >>> f(1) this is an example of the use and not of the prose that we want.\n"
        f"        '''\n"
        f"if True:\n    def g():\n        '''{words.replace('module', '`function <x>`_')}'''\n"
    )
    (package / "broken.py").write_text("def (")
    monkeypatch.syspath_prepend(str(tmp_path))
    (text,) = read_texts("package-docs:explosive")
    assert "explosive" not in sys.modules
    assert text.split("\n\n") == [
        words.replace("module", w) for w in ("module", "method", "function")
    ]


# Splitting


def test_split_shares_no_paragraph_and_loses_none():
    texts = [document(i) for i in range(60)]
    shared = "A paragraph that stands in each of the documents, word for word."
    texts = [f"{text}\n\n{shared if i % 2 else shared.upper()}" for i, text in enumerate(texts)]
    train, held = split_texts(texts, 0.2)

    def marks(side):
        return {" ".join(p.casefold().split()) for text in side for p in text.split("\n\n")}

    assert not marks(train) & marks(held)
    assert marks(train) | marks(held) == marks(texts)
    assert all(text in texts for text in held)
    size = sum(map(len, held)) / sum(map(len, texts))
    assert 0.2 <= size < 0.25


def test_split_depends_on_the_text_alone():
    texts = [document(i) for i in range(30)]
    train, held = split_texts(texts)
    train_again, held_again = split_texts(texts[::-1])
    assert (sorted(train), sorted(held)) == (sorted(train_again), sorted(held_again))
    assert (train, held) == split_texts(texts)


def test_one_long_document_is_cut_at_paragraphs():
    book = "\n\n".join(document(i) for i in range(200))
    train, held = split_texts([book], 0.3)
    assert sorted("\n\n".join(train + held).split("\n\n")) == sorted(book.split("\n\n"))
    assert max(map(len, train + held)) < 30_000


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5])
def test_impossible_shares(share):
    with pytest.raises(UserError, match="held_out"):
        split_texts(TEXTS, share)


def test_too_little_to_split():
    with pytest.raises(UserError, match="too little text"):
        split_texts(["one document"])
    with pytest.raises(UserError, match="too little text"):
        split_texts(["the same", "the same"])


def test_digest_sees_text_and_order():
    assert text_digest(["ab", "c"]) == text_digest(["ab", "c"])
    assert len({text_digest(t) for t in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])}) == 4


# Packing

DOCUMENTS = [[1, 2, 9], [3, 9], [4, 5, 6, 7, 9]]


def pack(length=4, **options):
    return TokenBlocks.from_tokens(DOCUMENTS, length, separator=9, **options)


def check_packing(blocks):
    """Three documents in blocks of four, worked out by hand."""
    batch = next(blocks.batches(10))
    assert_same(batch.tokens, torch.tensor([[1, 2, 9, 3], [9, 4, 5, 6], [7, 9, 9, 9]]), "exact")
    assert_same(
        batch.starts.int(), torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 1]]).int(), "exact"
    )
    assert_same(
        batch.position_ids, torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 0, 0]]), "exact"
    )
    assert_same(
        batch.predicted.int(), torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0]]).int(), "exact"
    )


def test_packing_by_hand():
    blocks = pack(fill=True)
    check_packing(blocks)
    assert (len(blocks), blocks.length, blocks.n_tokens) == (3, 4, 10)
    dropped = pack()
    assert (len(dropped), dropped.n_tokens) == (2, 8)
    assert_same(dropped.tokens, blocks.tokens[:2], "exact")


@pytest.mark.parametrize(
    "fault",
    [
        lambda b: TokenBlocks(b.tokens, torch.zeros_like(b.starts), b.n_tokens),
        lambda b: TokenBlocks(b.tokens, b.starts.roll(1, 1), b.n_tokens),
        lambda b: TokenBlocks(b.tokens, b.starts & (b.tokens != 9), b.n_tokens),
    ],
    ids=["no starts", "starts one late", "filling runs on"],
)
def test_packing_faults_are_seen(fault):
    with pytest.raises(AssertionError):
        check_packing(fault(pack(fill=True)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(2, 7), st.booleans())
def test_packing_keeps_every_token_and_every_start(sizes, length, fill):
    flat = list(range(sum(sizes)))
    documents, at = [], 0
    for size in sizes:
        documents.append(flat[at : at + size])
        at += size
    if len(flat) < (2 if fill else length):
        with pytest.raises(UserError):
            TokenBlocks.from_tokens(documents, length, separator=99, fill=fill)
        return
    blocks = TokenBlocks.from_tokens(documents, length, separator=99, fill=fill)
    n = blocks.n_tokens
    assert n == (len(flat) if fill else len(flat) // length * length)
    assert blocks.tokens.flatten()[:n].tolist() == flat[:n]
    firsts = {d[0] for d in documents} | set(range(0, n, length))
    assert blocks.starts.flatten()[:n].tolist() == [i in firsts for i in range(n)]
    # Filling is neither predicted nor seen.
    assert blocks.starts.flatten()[n:].all()
    assert (blocks.tokens.flatten()[n:] == 99).all()


def test_texts_become_their_tokens():
    tokenizer = byte_tokenizer()
    texts = [document(i, 2) for i in range(70)]
    blocks = TokenBlocks.from_texts(texts, tokenizer, 128, fill=True)
    flat = blocks.tokens.flatten()[: blocks.n_tokens].tolist()
    want = [id_ for text in texts for id_ in [*tokenizer(text)["input_ids"], END]]
    assert flat == want
    assert blocks.bytes_per_token == pytest.approx(sum(map(len, texts)) / len(want), rel=1e-12)
    some = TokenBlocks.from_texts(texts, tokenizer, 128, max_tokens=300)
    assert (some.n_tokens, len(some)) == (256, 2)
    assert_same(some.tokens, blocks.tokens[:2], "exact")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenBlocks.from_texts([], byte_tokenizer(), 8), "no text"),
        (lambda: TokenBlocks.from_texts(["ab"], byte_tokenizer(), 8), "less than one block of 8"),
        (lambda: TokenBlocks.from_texts(["abc"], byte_tokenizer(end=False), 2), "end-of-sequence"),
        (lambda: TokenBlocks.from_texts(["abc"], byte_tokenizer(), 1), "nothing to predict"),
    ],
)
def test_what_cannot_be_packed(call, message):
    with pytest.raises(UserError, match=message):
        call()


# Serving


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch.tokens[:, 0].tolist() for batch in batches]


def many(n: int) -> TokenBlocks:
    tokens = torch.arange(2 * n, dtype=torch.int32).view(n, 2)
    return TokenBlocks(tokens, torch.tensor([[True, False]]).repeat(n, 1), 2 * n)


def test_each_epoch_serves_every_block_once():
    served = ids(many(7).batches(3, shuffle_seed=5, epochs=3))
    assert [len(b) for b in served] == [3] * 7
    flat = [i for b in served for i in b]
    epochs = [flat[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(e) == list(range(0, 14, 2)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert ids(many(7).batches(3, shuffle_seed=6, epochs=3)) != served
    assert ids(many(7).batches(3)) == [[0, 2, 4], [6, 8, 10], [12]]


@pytest.mark.parametrize("skip", [0, 1, 2, 5, 11])
def test_a_resumed_run_sees_what_it_would_have_seen(skip):
    blocks = many(7)
    whole = ids(islice(blocks.batches(3, shuffle_seed=1, epochs=None), 14))
    assert (
        ids(islice(blocks.batches(3, shuffle_seed=1, epochs=None, skip=skip), 14 - skip))
        == whole[skip:]
    )


def test_skipping_past_the_end_serves_nothing():
    assert list(many(7).batches(3, skip=3)) == []


def test_take():
    blocks = pack(fill=True)
    assert (len(blocks.take(2)), blocks.take(2).n_tokens) == (2, 8)
    assert (len(blocks.take(9)), blocks.take(9).n_tokens) == (3, 10)


def test_blocks_survive_a_file(tmp_path):
    blocks = TokenBlocks.from_texts(TEXTS, byte_tokenizer(), 8)
    blocks.save(tmp_path / "blocks.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["blocks.safetensors"]
    again = TokenBlocks.load(tmp_path / "blocks.safetensors")
    assert_same(again.tokens, blocks.tokens, "exact")
    assert_same(again.starts.int(), blocks.starts.int(), "exact")
    assert (again.n_tokens, again.bytes_per_token) == (blocks.n_tokens, blocks.bytes_per_token)


@pytest.mark.parametrize("kind", [SafetensorError, OSError])
def test_a_full_disk_is_the_users_and_leaves_nothing(tmp_path, monkeypatch, kind):
    """The library raises its own error, which is no OSError, for what the disk refuses."""
    blocks = TokenBlocks.from_texts(TEXTS, byte_tokenizer(), 8)
    path = tmp_path / "blocks.safetensors"

    def full(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise kind("No space left on device (os error 28)")

    monkeypatch.setattr(data, "save_file", full)
    with pytest.raises(UserError, match=r"blocks\.safetensors: cannot be written .*No space"):
        blocks.save(path)
    assert not list(tmp_path.iterdir())


def test_the_library_raises_its_own_error_for_an_unwritable_file(tmp_path):
    blocks = TokenBlocks.from_texts(TEXTS, byte_tokenizer(), 8)
    with pytest.raises(UserError, match="cannot be written"):
        blocks.save(tmp_path / "nowhere" / "blocks.safetensors")


def test_a_name_that_the_hub_refuses():
    with pytest.raises(UserError, match="check the address and the network"):
        read_texts("hf://datasets/-owner-/na--me/part.jsonl")


@pytest.mark.parametrize("content", [None, b"", b"rubbish, and long enough to be read as a header"])
def test_a_file_that_holds_no_blocks(tmp_path, content):
    path = tmp_path / "blocks.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="not a file of token blocks"):
        TokenBlocks.load(path)
