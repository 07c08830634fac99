from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from killed import assert_killed, die
from models import tiny_model
from tamba import text as text_module
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.recipe import Recipe, read_recipe
from tamba.text import RecipeText, prepare_text, read_text, write_text
from tokens import character_tokenizer

WORDS = [
    "apple",
    "bear",
    "cloud",
    "drum",
    "echo",
    "fern",
    "gold",
    "hill",
    "iron",
    "jade",
    "kite",
    "lamp",
    "moon",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model(["mamba2", "attention"], max_position_embeddings=512)
    model.save_pretrained(tmp_path / "teacher")
    character_tokenizer(chat=True).save_pretrained(tmp_path / "teacher")
    for name, words in (("a", WORDS), ("b", WORDS[::-1])):
        lines = [json.dumps({"text": f"{w} {name} " * 12}) for w in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def recipe_of(folder: Path, train: list[str], heldout: list[str], more: str = "") -> Recipe:
    (folder / "recipe.toml").write_text(
        f"""name = "t"
[teacher]
path = "teacher"
[build]
plan = ["keep 0"]
[data]
train = {train}
heldout = {heldout}
length = 16
heldout_share = 0.25
written_tokens = 640
{more}"""
    )
    return read_recipe(folder / "recipe.toml")


def words_in(blocks: TokenBlocks) -> set[str]:
    said = character_tokenizer().decode(blocks.tokens.flatten().tolist(), skip_special_tokens=True)
    return {word for word in WORDS if word in said}


def test_no_more_documents_than_asked_for(folder: Path) -> None:
    found = prepare_text(recipe_of(folder, ["a.jsonl", "b.jsonl"], [], "rows = 2"), sides=["train"])
    assert found.train and words_in(found.train) == {*WORDS[:2], *WORDS[-2:]}


def test_rows_that_are_too_short_to_say_anything_twice(folder: Path) -> None:
    recipe = recipe_of(folder, ["a.jsonl"], ["b.jsonl"], "lookup_share = 0.5")
    with pytest.raises(UserError, match=r"data.lookup_share: takes rows of 64 .* these have 16"):
        prepare_text(recipe)


def test_a_shared_source_is_divided_by_document(folder: Path) -> None:
    found = prepare_text(recipe_of(folder, ["a.jsonl"], ["a.jsonl"]))
    assert found.train and found.heldout
    train, heldout = words_in(found.train), words_in(found.heldout)
    assert train | heldout == set(WORDS) and not train & heldout
    assert found.train.length == found.heldout.length == 16


def test_other_sources_stay_whole(folder: Path) -> None:
    found = prepare_text(recipe_of(folder, ["a.jsonl"], ["b.jsonl"]))
    assert found.train and found.heldout
    assert words_in(found.train) == words_in(found.heldout) == set(WORDS)
    assert prepare_text(recipe_of(folder, [], ["b.jsonl"])).train is None
    # Text to measure on may be named apart.
    recipe = recipe_of(folder, ["a.jsonl"], ["a.jsonl"], '[evaluate]\ntexts = ["b.jsonl"]')
    found = prepare_text(recipe)
    assert found.train and words_in(found.train) == set(WORDS)


@pytest.mark.parametrize("shared", ["a.jsonl", "teacher-written"])
def test_each_side_alone_is_what_it_is_beside_the_other(folder: Path, shared: str) -> None:
    recipe = recipe_of(folder, [shared, "b.jsonl"], [shared])
    both = prepare_text(recipe)
    written = write_text(recipe) if shared == "teacher-written" else None
    train = prepare_text(recipe, sides=["train"], written=written)
    heldout = prepare_text(recipe, sides=["heldout"], written=written)
    assert train.heldout is None and heldout.train is None
    for got, want in ((train.train, both.train), (heldout.heldout, both.heldout)):
        assert got and want and torch.equal(got.tokens, want.tokens)


def save_half_of_a_text(path: Path) -> None:
    save = TokenBlocks.save

    def killed(self: TokenBlocks, path: Path) -> None:
        save(self, path)
        die()

    TokenBlocks.save = killed  # type: ignore[method-assign]
    rows = TokenBlocks(torch.zeros(1, 4).long(), torch.ones(1, 4).bool(), 4)
    RecipeText(rows, rows).save(path)


def test_text_is_there_as_a_whole_or_not_at_all(folder: Path) -> None:
    """A process that is killed between the two files leaves nothing under the name."""
    assert_killed(save_half_of_a_text, folder / "text")
    assert (folder / ".text.partial" / "train.safetensors").exists()
    assert not (folder / "text").exists()
    # The next one clears up and is whole.
    rows = TokenBlocks(torch.zeros(1, 4).long(), torch.ones(1, 4).bool(), 4)
    RecipeText(None, rows).save(folder / "text")
    assert read_text(folder / "text").train is None and not (folder / ".text.partial").exists()
    with pytest.raises(UserError, match="text: already exists"):
        RecipeText(rows, rows).save(folder / "text")


def test_sources_are_mixed_without_loss(folder: Path) -> None:
    both = prepare_text(recipe_of(folder, ["a.jsonl", "b.jsonl"], [])).train
    one = prepare_text(recipe_of(folder, ["a.jsonl"], [])).train
    two = prepare_text(recipe_of(folder, ["b.jsonl"], [])).train
    assert both and one and two
    rows = torch.cat([one.tokens, two.tokens]).tolist()
    assert sorted(both.tokens.tolist()) == sorted(rows) and both.tokens.tolist() != rows
    assert both.n_tokens == one.n_tokens + two.n_tokens
    assert both.starts[:, 0].all()


def test_the_teacher_writes(folder: Path) -> None:
    found = prepare_text(recipe_of(folder, ["teacher-written"], ["teacher-written"]))
    assert found.train and found.heldout
    assert (len(found.train), len(found.heldout)) == (30, 10)
    # Prompts are framed as the teacher's chat template says.
    said = character_tokenizer().decode(found.train.tokens.flatten().tolist())
    assert "<user>" in said and "<assistant>" in said


def test_a_pickled_teacher_is_read_where_the_recipe_allows_it(folder: Path) -> None:
    weights = folder / "teacher" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    recipe = recipe_of(folder, ["teacher-written"], [])
    with pytest.raises(UserError, match="not read unless asked for"):
        prepare_text(recipe)
    said = recipe.file.read_text().replace("[build]", "allow_pickle = true\n[build]")
    recipe.file.write_text(said)
    assert prepare_text(read_recipe(recipe.file)).train


@pytest.mark.parametrize("ends_at", [3, 5, 8, None])
def test_the_document_over_the_cut_is_on_one_side(ends_at: int | None) -> None:
    """Of a document that began before the cut, the held-out side scores nothing."""
    starts = torch.zeros(8, 5, dtype=torch.bool)
    starts[:, 0] = True  # as packing has it: a row always begins a document
    if ends_at is not None and ends_at < 5:
        starts[6, ends_at] = True
    blocks = TokenBlocks(torch.arange(40).view(8, 5), starts, 40)
    train, held = text_module._divided(blocks, 0.25)
    assert torch.equal(torch.cat([train.tokens, held.tokens]), blocks.tokens)
    assert (len(train), len(held), held.n_tokens) == (6, 2, 10)
    rest = 5 if ends_at is None else min(ends_at, 5)
    # A token that begins a document is not predicted, and one before such a token predicts nothing.
    assert held.starts[0, :rest].all()
    assert torch.equal(held.starts[0, rest:], starts[6, rest:])
    assert torch.equal(held.starts[1], starts[7])
    assert torch.equal(blocks.starts, starts)


def test_too_little_to_divide() -> None:
    one = TokenBlocks(torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool), 5)
    with pytest.raises(UserError, match="cannot be divided into rows of 5"):
        text_module._divided(one, 0.5)


def test_saved_text_reads_back(folder: Path) -> None:
    found = prepare_text(recipe_of(folder, ["a.jsonl"], ["a.jsonl"]))
    found.save(folder / "text")
    again = read_text(folder / "text")
    for got, want in ((again.train, found.train), (again.heldout, found.heldout)):
        assert got and want and got.n_tokens == want.n_tokens
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.starts, want.starts)
    RecipeText(None, found.heldout).save(folder / "half")
    assert read_text(folder / "half").train is None
    with pytest.raises(UserError, match="no such folder of text"):
        read_text(folder / "nowhere")
