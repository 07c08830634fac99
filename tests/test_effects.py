"""What changing one layer does: against whole models in float64, and where the answer is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models import random_ids, tiny_model
from tamba.analyze import effects, swaps
from tamba.analyze.choice import RATIO_LIMIT, Budget, Facts, choose
from tamba.analyze.choice import ratio as ratio_of
from tamba.analyze.effects import (
    Change,
    Ledger,
    aligned_scores,
    change_scores,
    conversion_scores,
    drop_scores,
    restore_scores,
)
from tamba.analyze.probe import Probe, word_probe
from tamba.analyze.study import Settings, Study, _digest
from tamba.analyze.swaps import converted_layers
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.model.config import AttentionSpec, BlockSpec, MLPSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import ConvertOptions

IDLE, LOUD, TWINS = 1, 3, (4, 5)


def made() -> TambaForCausalLM:
    """Six layers: one does nothing, one shouts, two are the same, the others whisper."""
    model = tiny_model(["attention"] * 6)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            factor = {IDLE: 0.0, LOUD: 4.0}.get(index, 0.05)
            layer.mixer.o_proj.weight *= factor
            layer.mlp.down_proj.weight *= factor
    first, second = (model.model.layers[i] for i in TWINS)
    second.load_state_dict(first.state_dict())
    return model


def rows(n: int = 4, length: int = 20) -> TokenBlocks:
    starts = torch.zeros(n, length, dtype=torch.bool)
    starts[:, 0] = True
    starts[::2, length // 2] = True
    return TokenBlocks(random_ids(n, length, 5).int(), starts, n * length)


def without(model: TambaForCausalLM, index: int) -> TambaForCausalLM:
    """A model of its own, one layer shorter, that shares the weights."""
    names = list(model.config.layers)
    del names[index]
    config = TambaConfig(**(model.config.to_dict() | {"layers": names}))
    short = TambaForCausalLM(config).to(model.dtype).eval()
    kept = [layer for i, layer in enumerate(model.model.layers) if i != index]
    for ours, theirs in zip(short.model.layers, kept, strict=True):
        ours.load_state_dict(theirs.state_dict())
    short.model.embed_tokens, short.lm_head = model.model.embed_tokens, model.lm_head
    short.model.final_norm = model.model.final_norm
    return short


def by_hand(model: TambaForCausalLM, index: int, blocks: TokenBlocks) -> tuple[float, float]:
    """KL and change of the loss from two whole forward passes, row by row, every other place."""
    short = without(model, index)
    kl, loss = [], []
    for row, batch in enumerate(blocks.batches(1)):
        with torch.no_grad():
            p, q = (m(**batch.inputs).logits[0].log_softmax(-1) for m in (model, short))
        places = [t for t in range(blocks.length - 1) if not batch.starts[0, t + 1]]
        places = places[row % 2 :: 2]
        kl.append(sum(float((p[t].exp() * (p[t] - q[t])).sum()) for t in places) / len(places))
        change = [float((p - q)[t, batch.tokens[0, t + 1]]) for t in places]
        loss.append(sum(change) / len(change))
    return sum(kl) / len(kl), sum(loss) / len(loss)


def check_drops() -> None:
    model, blocks = tiny_model("mixed").double(), rows()
    found = drop_scores(model, blocks, dtype=None)
    for index in range(7):
        kl, loss = by_hand(model, index, blocks)
        assert found[index].kl == pytest.approx(kl, rel=1e-9), index
        assert found[index].loss == pytest.approx(loss, rel=1e-9, abs=1e-12), index


@pytest.mark.slow
def test_dropping_a_layer_is_a_model_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_drops()
    right = effects.climb
    monkeypatch.setattr(effects, "climb", lambda m, h, t, first: right(m, h, t, first - 1))
    with pytest.raises(AssertionError):
        check_drops()


def test_idle_loud_and_equal_layers() -> None:
    found = drop_scores(made(), rows(), dtype=None)
    harm = {i: change.kl for i, change in found.items()}
    assert min(harm, key=harm.__getitem__) == IDLE and max(harm, key=harm.__getitem__) == LOUD
    assert harm[IDLE] == pytest.approx(0.0, abs=1e-6)
    # Without one of two equal neighbours the same model is left, whichever went.
    assert harm[TWINS[0]] == pytest.approx(harm[TWINS[1]], rel=1e-3)
    assert found[LOUD].loss_error is not None and found[LOUD].loss_error > 0


@pytest.mark.parametrize("fit", [None, rows(seed := 4)])
def test_converting_an_idle_layer_costs_nothing(fit: TokenBlocks | None) -> None:
    found = conversion_scores(made(), rows(), ConvertOptions(), fit=fit)
    harm = {i: change.kl for i, change in found.items()}
    assert max(harm, key=harm.__getitem__) == LOUD
    assert harm[IDLE] == pytest.approx(0.0, abs=1e-3)


# A model in which one layer alone answers.

RETRIEVES = 1
KEYS = VALUES = 4
D = 32


def librarian() -> TambaForCausalLM:
    """Three layers; the middle one looks up the value that was written beside a key.

    Tokens are pairs (key, value), queries of a key, and values. A query attends to the pair of its
    key, and the value found there is what the head reads.
    """
    attention = AttentionSpec(n_heads=1, n_kv_heads=1, head_dim=8, rotary_dim=0)
    block = BlockSpec(mixer=attention, mlp=MLPSpec(d_mlp=16))
    config = TambaConfig(
        vocab_size=24, hidden_size=D, blocks={"b": block}, layers=["b"] * 3, initializer_range=0.25
    )
    torch.manual_seed(0)
    model = TambaForCausalLM(config).eval()
    with torch.no_grad():
        table = model.model.embed_tokens.weight.zero_()
        head = model.lm_head.weight.zero_()
        for key in range(KEYS):
            table[16 + key, 4 + key] = 1.0
            for value in range(VALUES):
                table[4 * key + value, [key, 8 + value]] = 1.0
        for value in range(VALUES):
            table[20 + value, 17 + value] = 1.0
            head[20 + value, 12 + value] = 1.0
        for index, layer in enumerate(model.model.layers):
            layer.mixer.o_proj.weight *= 0.002
            layer.mlp.down_proj.weight *= 0.002
            if index == RETRIEVES:
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    getattr(layer.mixer, name).weight.zero_()
                layer.mlp.down_proj.weight.zero_()
                for i in range(4):
                    layer.mixer.q_proj.weight[i, 4 + i] = 5.0
                    layer.mixer.k_proj.weight[i, i] = 1.0
                    layer.mixer.v_proj.weight[i, 8 + i] = 1.0
                    layer.mixer.o_proj.weight[12 + i, i] = 1.0
                # Keys have much in common. Softmax takes no notice, but a recurrence that forgets
                # finds the latest pair instead of the one asked for.
                layer.mixer.q_proj.weight[4, 4:8] = 15.0
                layer.mixer.k_proj.weight[4, 0:4] = 3.0
    return model


def lookups(n: int = 16) -> Probe:
    """Four pairs, then each key asked for and its value, in another order."""
    torch.manual_seed(1)
    tokens, answers = [], []
    for _ in range(n):
        value = torch.randint(VALUES, (KEYS,))
        asked = torch.randperm(KEYS)
        pairs = [4 * int(k) + int(value[k]) for k in torch.randperm(KEYS)]
        tail = [t for k in asked for t in (16 + int(k), 20 + int(value[k]))]
        tokens.append(pairs + tail)
        answers.append([False] * KEYS + [False, True] * KEYS)
    starts = torch.zeros(n, 3 * KEYS, dtype=torch.bool)
    starts[:, 0] = True
    return Probe(
        TokenBlocks(torch.tensor(tokens).int(), starts, starts.numel()), torch.tensor(answers)
    )


def small_text() -> TokenBlocks:
    starts = torch.zeros(4, 16, dtype=torch.bool)
    starts[:, 0] = True
    generator = torch.Generator().manual_seed(2)
    return TokenBlocks(torch.randint(24, (4, 16), generator=generator).int(), starts, 64)


def check_recall(found: dict[int, Change]) -> None:
    lost = {i: change.recall for i, change in found.items()}
    assert lost[RETRIEVES] is not None and lost[RETRIEVES] > 0.5
    others = [value for i, value in lost.items() if i != RETRIEVES and value is not None]
    assert len(others) == len(lost) - 1
    assert all(abs(value) < 0.05 for value in others)
    assert all(value or math.copysign(1.0, value) > 0 for value in others)  # nothing is 0, not -0


def test_the_layer_that_looks_up_is_found_by_every_effect() -> None:
    model, text, probe = librarian(), small_text(), lookups()
    told = {"probe": probe, "dtype": None}
    dropped = drop_scores(model, text, **told)
    check_recall(dropped)
    # Retrieval beside knowledge: the librarian is the one layer to keep.
    scores = {
        "drop_recall": [dropped[i].recall for i in range(3)],
        "drop_loss": [dropped[i].loss for i in range(3)],
    }
    ratio = "ratio drop_recall/drop_loss"
    assert choose(ratio, Facts(3, (0, 1, 2), (1,) * 3, (0,) * 3), Budget(2), scores).layers == (
        0,
        2,
    )
    values, _ = Study("librarian", 3, changes={"drop": dropped}).scores()
    assert values["drop_ratio"] == [ratio_of(c.recall, c.loss) for c in dropped.values()]
    assert max(range(3), key=lambda i: values["drop_ratio"][i]) == RETRIEVES
    check_recall(conversion_scores(model, text, ConvertOptions(), **told))
    student = librarian()
    made = converted_layers(model, range(3), ConvertOptions())
    config = TambaConfig(
        **(
            model.config.to_dict()
            | {
                "blocks": {"c": made[0].spec.to_dict()},
                "layers": ["c"] * 3,
            }
        )
    )
    student = TambaForCausalLM(config).eval()
    student.model.embed_tokens, student.lm_head = model.model.embed_tokens, model.lm_head
    student.model.final_norm = model.model.final_norm
    for i, layer in made.items():
        student.model.layers[i] = layer
    restored = restore_scores(model, student, text, **told)
    check_recall(restored)
    assert max(restored, key=lambda i: restored[i].kl) == RETRIEVES
    check_recall(aligned_scores(model, student, text, **told))


def test_the_error_of_a_ratio_is_that_of_repeated_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    recall, loss = 0.3, 0.5
    r = recall + 0.02 * torch.randn(4000, generator=generator, dtype=torch.float64)
    q = loss + 0.05 * torch.randn(4000, generator=generator, dtype=torch.float64)
    change = Change(0.1, loss, recall, None, 0.05, 0.02)
    cut = Change(0.1, 1e-4, recall, None, 0.05, 0.02)
    found = Study("it", 3, changes={"drop": {0: change, 1: cut}})
    values, errors = found.scores()
    assert values["drop_ratio"] == pytest.approx([0.6, RATIO_LIMIT, None])
    assert errors["drop_ratio"][0] == pytest.approx(float((r / q).std()), rel=0.05)
    assert errors["drop_ratio"][1:] == [None, None]
    # What is cut off is the limit to the last digit, whatever was lost: no error is told of it.
    lost = [Change(0.1, -0.04, answers / 256, None, 0.05, 0.02) for answers in range(1, 257)]
    noise = Study("it", 256, changes={"drop": dict(enumerate(lost))})
    values, errors = noise.scores()
    assert set(values["drop_ratio"]) == {RATIO_LIMIT} and set(errors["drop_ratio"]) == {None}


def test_a_probe_of_the_wrong_places_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = lookups()
    wrong = Probe(probe.blocks, probe.answers.roll(-1, dims=1))
    with pytest.raises(AssertionError):
        check_recall(drop_scores(librarian(), small_text(), probe=wrong, dtype=None))


# The record.


def test_finished_layers_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, blocks, path = made(), rows(2), tmp_path / "effects.jsonl"
    right, done = effects._climbed, []

    def counting(model: object, owner: object, index: int, *rest: object):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(index)
        return right(model, owner, index, *rest)

    whole = drop_scores(model, blocks, dtype=None)
    monkeypatch.setattr(effects, "_climbed", counting)
    with pytest.raises(KeyboardInterrupt):
        drop_scores(model, blocks, dtype=None, ledger=Ledger(path, "this"))
    with path.open("a") as file:
        file.write('{"score": "drop", "la')  # a kill in the middle of a line
    first = list(done)
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        drop_scores(model, blocks, dtype=None, ledger=Ledger(path, "other text"))
    assert done == first
    path.write_text(path.read_text().replace("other text", "this"))
    done.clear()
    monkeypatch.setattr(effects, "_climbed", right)
    calls = []
    monkeypatch.setattr(effects, "_climbed", lambda *a: (calls.append(a[2]), right(*a))[1])
    again = drop_scores(model, blocks, dtype=None, ledger=Ledger(path, "this"))
    assert again == whole and sorted([*first, *calls]) == list(range(6))
    lines = path.read_text().splitlines()
    assert len(lines) == 7 and json.loads(lines[0]) == {"inputs": "this"}


def test_numbers_that_are_not_finite_name_layer_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        model, blocks = made(), rows()
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
        with pytest.raises(UserError, match=r"layer 2: gives a hidden state .* in row 0"):
            drop_scores(model, blocks, dtype=None)
        model = made()
        bad = int(blocks.tokens[2, 3])
        with torch.no_grad():
            model.model.embed_tokens.weight[bad] = math.nan
        first = int((blocks.tokens == bad).nonzero()[0, 0])
        with pytest.raises(UserError, match=rf"embedding: gives .* in row {first}"):
            drop_scores(model, blocks, dtype=None)

    check()
    for module in (effects, swaps):
        monkeypatch.setattr(module, "bad_rows", lambda stream: [])
    with pytest.raises(pytest.fail.Exception):
        check()


def test_the_record_is_keyed_by_every_weight(tmp_path: Path) -> None:
    text = rows()

    def key(model: TambaForCausalLM) -> str:
        return _digest(model, text, text, Settings(), None, None)

    model = made()
    before = key(model)
    assert key(made()) == before
    wide = Settings(dtype=torch.float32)
    assert _digest(model, text, text, wide, None, None) != before
    for weight in (model.model.embed_tokens.weight, model.model.layers[2].mixer.o_proj.weight):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(kept.flip(0))  # its sum stays
        assert key(model) != before
        with torch.no_grad():
            weight.copy_(kept)
    assert key(model) == before


def test_models_that_do_not_match() -> None:
    teacher, blocks = tiny_model(["attention"] * 2), rows(2)
    with pytest.raises(UserError, match="has 3 layers and the teacher 2"):
        aligned_scores(teacher, tiny_model(["mamba2"] * 3), blocks)
    with pytest.raises(UserError, match="has no converted layer"):
        restore_scores(teacher, tiny_model(["attention"] * 2), blocks)
    with pytest.raises(UserError, match="there is no layer 5"):
        change_scores(teacher, {5: None}, blocks, score="drop")


class _Words:
    """As much of a tokenizer as a probe asks for."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [self.words.index(text)]}

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        return [self.words[i] for (i,) in ids]


def test_a_probe_lists_pairs_twice() -> None:
    names = [f" {a}{b}x" for a in "abcdef" for b in "abcdef"]
    probe = word_probe(_Words(["\n", "no", " Capital", *names]), pairs=5, rows=3, seed=1)
    assert probe.blocks.tokens.shape == (3, 30) and int(probe.answers.sum()) == 15
    for tokens, asked in zip(probe.blocks.tokens, probe.answers, strict=True):
        lines = tokens.view(10, 3)
        assert (lines[:, 2] == 0).all() and (lines[:, :2] > 2).all()
        assert {tuple(x) for x in lines[:5].tolist()} == {tuple(x) for x in lines[5:].tolist()}
        assert len(set(lines[:5, :2].flatten().tolist())) == 10
        assert torch.equal(asked.nonzero()[:, 0], torch.arange(16, 30, 3))
    again = word_probe(_Words(["\n", "no", " Capital", *names]), pairs=5, rows=3, seed=1)
    assert torch.equal(again.blocks.tokens, probe.blocks.tokens)
    with pytest.raises(UserError, match="36 words that are one token, and 40"):
        word_probe(_Words(["\n", *names]), pairs=20)


def test_perplexity_is_the_exponent_of_the_loss() -> None:
    model, blocks = made().double(), rows(2)
    found = drop_scores(model, blocks.take(1), dtype=None)[LOUD]
    batch = next(blocks.batches(1))
    places = [t for t in range(0, blocks.length - 1) if not batch.starts[0, t + 1]][::2]
    with torch.no_grad():
        nll = [
            F.cross_entropy(
                m(**batch.inputs).logits[0, places], batch.tokens[0, [t + 1 for t in places]]
            )
            for m in (model, without(model, LOUD))
        ]
    assert found.loss == pytest.approx(float(nll[1] - nll[0]), rel=1e-9)
    assert found.kl_error is None
