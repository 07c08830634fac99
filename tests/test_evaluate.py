"""Scores equal what transformers, exact arithmetic and plain loops give for the same tokens."""

from __future__ import annotations

import json
import math
import sys
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from compare import assert_same
from models import STACKS, VOCAB, tiny_config, tiny_model
from tamba.checkpoint import load
from tamba.data import Batch, TokenBlocks
from tamba.errors import UserError
from tamba.evaluate import cache_bytes, compare, evaluate, perplexity
from tamba.evaluate.parts import built_entries, layers_of, plan_of, recipe_of
from tamba.model.cache import TambaCache
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import LayerPlan, parse_entries
from tamba.report import Layers, read_record
from texts import byte_tokenizer, document

scores = sys.modules[
    "tamba.evaluate.perplexity"
]  # the module; its name in the package is the function

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def stock(model_class, config_class, *, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return model_class(config_class(**(SMALL | options))).to(dtype).eval()


def llama(seed=0, **options):
    return stock(LlamaForCausalLM, LlamaConfig, seed=seed, **options)


def random_documents(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in sizes]


def windows(n=5, length=12, seed=0):
    """Blocks of one document each."""
    return TokenBlocks.from_tokens(random_documents([length] * n, seed), length, separator=0)


def packed(length=16, seed=0):
    sizes = [5, 9, 3, 30, 1, 7, 2, 12]
    return TokenBlocks.from_tokens(random_documents(sizes, seed), length, separator=0, fill=True)


@torch.no_grad()
def alone(model, blocks):
    """(sum of nll, tokens) of every piece of a document inside a block, each run by itself."""
    total, count = 0.0, 0
    for tokens, starts in zip(blocks.tokens, blocks.starts, strict=True):
        edges = [*starts.nonzero().flatten().tolist(), blocks.length]
        for a, b in pairwise(edges):
            if b - a < 2:
                continue
            piece = tokens[None, a:b].long()
            total += model(piece, labels=piece).loss.item() * (b - a - 1)
            count += b - a - 1
    return total / count, count


@pytest.fixture(autouse=True)
def few_logits_at_once(monkeypatch):
    # So that slices end inside blocks and batches.
    monkeypatch.setattr(scores, "_LOGITS_AT_ONCE", 7 * VOCAB)


# Against transformers' own loss


def same(got, want, kind):
    assert_same(
        torch.tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), kind
    )


def check_packed(model=None):
    model, blocks = model or llama(), packed()
    want, count = alone(model, blocks)
    got = perplexity(model, blocks, batch_size=3)
    assert got.tokens == count
    # transformers computes norms, rotations and losses in float32 whatever the model's type.
    same(got.nll, want, "fp32")


@torch.no_grad()
def test_windows_equal_transformers_loss():
    model, blocks = llama(), windows()
    ids = blocks.tokens.long()
    out = model(ids, labels=ids)
    exact = -out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().item()
    got = perplexity(model, blocks, batch_size=5)
    assert got.tokens == 5 * 11
    same(got.nll, out.loss.item(), "fp32")
    same(got.nll, exact, "fp64")
    same(got.ppl, math.exp(exact), "fp64")


def test_packed_documents_equal_documents_alone():
    check_packed()


@pytest.mark.parametrize("stack", sorted(STACKS))
def test_our_models_packed_equal_documents_alone(stack):
    check_packed(tiny_model(stack))


def targets_too_early(models, batch):
    for logits, _ in genuine_slices(models, batch):
        yield logits, batch.tokens[:, :-1][batch.predicted][: len(logits[0])]


genuine_slices = scores._slices

FAULTS = {
    "shift off by one": lambda patch: patch(scores, "_slices", targets_too_early),
    "starts scored, filling counted": lambda patch: patch(
        Batch, "predicted", property(lambda b: torch.ones_like(b.starts[:, 1:]))
    ),
    "boundaries crossed": lambda patch: (
        patch(scores, "_check_documents_apart", lambda model: None),
        patch(
            Batch,
            "position_ids",
            property(lambda b: torch.arange(b.tokens.shape[1]).expand_as(b.tokens)),
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_scoring_are_seen(fault, monkeypatch):
    FAULTS[fault](monkeypatch.setattr)
    with pytest.raises(AssertionError):
        check_packed()


@pytest.mark.parametrize(
    ("model_class", "config_class", "options"),
    [
        (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 2.0}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 3.0}),
    ],
)
def test_models_that_do_more_than_a_linear_head(model_class, config_class, options, monkeypatch):
    model = stock(model_class, config_class, dtype=torch.float32, **options)
    check_packed(model)
    # What the check of the cheap way prevents:
    monkeypatch.setattr(scores, "_distance", lambda got, want: 0.0)
    with pytest.raises(AssertionError):
        check_packed(model)


def test_batches_and_slices_change_nothing(monkeypatch):
    model, blocks = llama(), packed()
    want = perplexity(model, blocks, batch_size=1)
    for batch_size, at_once in ((2, 1), (7, 10**9), (100, 50 * VOCAB)):
        monkeypatch.setattr(scores, "_LOGITS_AT_ONCE", at_once)
        got = perplexity(model, blocks, batch_size=batch_size)
        assert got.tokens == want.tokens
        same(got.nll, want.nll, "fp32")


def test_half_precision_is_near_and_modes_are_put_back():
    model, blocks = llama(dtype=torch.float32).train(), packed()
    whole = perplexity(model, blocks)
    half = perplexity(model, blocks, autocast=torch.bfloat16)
    assert model.training
    assert half.nll != whole.nll
    assert abs(half.nll - whole.nll) < 0.02 * whole.nll


# Against exact arithmetic on five words

A, B, C, D, E = range(5)
TEACHER = [
    # probabilities of the next word (columns) after each word (rows)
    [Fraction(1, 2), Fraction(1, 4), Fraction(1, 8), Fraction(1, 16), Fraction(1, 16)],
    [Fraction(1, 10), Fraction(3, 5), Fraction(1, 10), Fraction(1, 10), Fraction(1, 10)],
    [Fraction(1, 5), Fraction(1, 10), Fraction(2, 5), Fraction(1, 10), Fraction(1, 5)],
    [Fraction(1, 20), Fraction(1, 20), Fraction(1, 20), Fraction(1, 4), Fraction(3, 5)],
    [Fraction(1, 3), Fraction(1, 6), Fraction(1, 6), Fraction(1, 6), Fraction(1, 6)],
]
STUDENT = [
    [Fraction(1, 4), Fraction(1, 2), Fraction(1, 8), Fraction(1, 16), Fraction(1, 16)],
    *TEACHER[1:4],
    [Fraction(2, 5), Fraction(1, 10), Fraction(1, 10), Fraction(1, 5), Fraction(1, 5)],
]


def bigram(table):
    """A Llama without layers whose logits are the logarithms of a table."""
    model = llama(vocab_size=5, hidden_size=16, num_hidden_layers=0, rms_norm_eps=0.0)
    logs = torch.tensor([[math.log(p) for p in row] for row in table], dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(5, 16))
        model.model.norm.weight.fill_(0.25)  # a unit vector of 16 has root mean square 1/4, exactly
        model.lm_head.weight.zero_()[:, :5] = logs.T
    return model


WORDS = [[A, B, B, E], [D, E], [C, A, A], [E, A, D]]
# Blocks of six: [A B B E D E] [C A A E A D]; pairs scored, by block:
PAIRS = [[(A, B), (B, B), (B, E), (D, E)], [(C, A), (A, A), (E, A), (A, D)]]


def sentences():
    return TokenBlocks.from_tokens(WORDS, 6, separator=A, bytes_per_token=2.5)


def mean(f):
    return math.fsum(f(a, b) for block in PAIRS for a, b in block) / 8


def check_by_hand():
    got = compare(bigram(TEACHER), bigram(STUDENT), sentences(), batch_size=2)
    teacher = mean(lambda a, b: -math.log(TEACHER[a][b]))
    student = mean(lambda a, b: -math.log(STUDENT[a][b]))
    kl = mean(
        lambda a, _: math.fsum(
            p * math.log(p / q) for p, q in zip(TEACHER[a], STUDENT[a], strict=True)
        )
    )
    # The likeliest word differs after A alone.
    agreement = mean(lambda a, _: float(a != A))
    want = [teacher, student, math.exp(student - teacher), kl, agreement]
    found = [got.teacher.nll, got.student.nll, got.ratio, got.kl, got.agreement]
    same(found, want, "fp64")
    assert (got.teacher.tokens, got.student.tokens) == (8, 8)
    return got


def test_five_words_by_hand():
    got = check_by_hand()
    assert got.teacher.bits_per_byte == pytest.approx(got.teacher.nll / math.log(2) / 2.5)
    one = perplexity(bigram(TEACHER), sentences())
    same(one.nll, got.teacher.nll, "fp64")
    by_block = [
        math.fsum(math.log(TEACHER[a][b] / STUDENT[a][b]) for a, b in block) / 4 for block in PAIRS
    ]
    spread = abs(by_block[0] - by_block[1]) / 2  # standard error of the mean of two
    same(got.ratio_error, got.ratio * spread, "fp64")


PAIR_FAULTS = {
    "KL the other way round": lambda t, s, y: (
        genuine_pair(t, s, y)[[0, 1, 2, 3]]
        .clone()
        .index_copy(0, torch.tensor([2]), genuine_pair(s, t, y)[2:3])
    ),
    "teacher and student swapped": lambda t, s, y: genuine_pair(s, t, y),
    "agreement with the text": lambda t, s, y: torch.cat(
        [genuine_pair(t, s, y)[:3], (s.argmax(-1) == y).double()[None]]
    ),
}
genuine_pair = scores._pair


@pytest.mark.parametrize("fault", PAIR_FAULTS)
def test_faults_in_comparing_are_seen(fault, monkeypatch):
    monkeypatch.setattr(scores, "_pair", PAIR_FAULTS[fault])
    with pytest.raises(AssertionError):
        check_by_hand()


def test_a_model_against_itself():
    got = compare(llama(), llama(), packed())
    assert (got.ratio, got.ratio_error, got.kl, got.agreement) == (1.0, 0.0, 0.0, 1.0)


def test_comparing_equals_scoring_each():
    blocks = packed()
    got = compare(llama(), llama(seed=1), blocks)
    same(got.teacher.nll, perplexity(llama(), blocks).nll, "fp64")
    same(got.student.nll, perplexity(llama(seed=1), blocks).nll, "fp64")


def test_standard_error_of_equal_blocks_is_the_textbooks():
    values = [1.0, 2.5, 3.0, 7.25]
    got = scores._standard_error([(v * 11, 11) for v in values])
    want = torch.tensor(values).double().std(correction=1) / 2
    same(got, float(want), "fp64")
    assert scores._standard_error([(1.0, 3)]) is None


# What is refused


def test_stock_recurrent_models_mix_packed_documents_and_are_refused():
    config = MambaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, initializer_range=0.4
    )
    torch.manual_seed(0)
    model = MambaForCausalLM(config).eval()
    with pytest.raises(UserError, match="lets packed documents see one another"):
        perplexity(model, packed())
    assert perplexity(model, windows()).tokens == 55


def test_vocabularies_must_fit():
    with pytest.raises(UserError, match=f"teacher and student have {VOCAB} and 99 tokens"):
        compare(llama(), llama(vocab_size=99), packed())
    with pytest.raises(UserError, match="beyond the model's vocabulary of 9"):
        perplexity(llama(vocab_size=9), packed())


def test_nothing_to_score():
    ones = TokenBlocks.from_tokens([[1]] * 8, 4, separator=0)
    with pytest.raises(UserError, match="no token to score"):
        perplexity(llama(), ones)


# Memory


@pytest.mark.parametrize("stack", sorted(STACKS))
@pytest.mark.parametrize("context", [1, 4, 9])
@torch.no_grad()
def test_counted_cache_equals_what_the_cache_holds(stack, context):
    model = tiny_model(stack)
    cache = TambaCache(model.config)
    model(torch.ones(1, context, dtype=torch.long), past_key_values=cache)
    held = sum(
        layer.nbytes if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )
    assert cache_bytes(model.config, context, bytes_per_value=4) == held


# The verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of a teacher, a student and others, and a file of text."""
    folder = tmp_path_factory.mktemp("evaluate")

    def write(name, stack, tokenizer, vocab_size=257, **options):
        torch.manual_seed(len(name))
        config = tiny_config(stack, vocab_size=vocab_size, **options)
        TambaForCausalLM(config).save_pretrained(folder / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / name)

    write("teacher", ["attention", "attention", "sliding"], byte_tokenizer())
    write("student", ["mamba2_gqa", "attention", "mamba1"], byte_tokenizer())
    write("bare", ["attention"], None)
    write("wide", ["attention"], byte_tokenizer(), vocab_size=300)
    write("short", ["attention"], byte_tokenizer(), max_position_embeddings=32)
    (folder / "text.txt").write_text("\n\n".join(document(i) for i in range(3)))
    return folder


def test_one_call_measures_teacher_and_student(folder, tmp_path):
    text = folder / "text.txt"
    got = evaluate(folder / "student", text, against=folder / "teacher", length=64, out=tmp_path)
    blocks = TokenBlocks.from_texts([text.read_text()], byte_tokenizer(), 64, fill=True)
    student, _ = load(folder / "student")
    teacher, _ = load(folder / "teacher")
    want = compare(teacher, student, blocks)
    assert got.perplexity.teacher == pytest.approx(want.teacher.ppl)
    assert got.perplexity.student == pytest.approx(want.student.ppl)
    assert got.perplexity.ratio == pytest.approx(want.student.ppl / want.teacher.ppl)
    assert got.perplexity.tokens == len(text.read_text()) + 1 - len(blocks)
    assert (got.layers.total, got.layers.converted) == (3, 2)
    assert list(got.seconds) == ["load", "ppl", "kl"]
    assert got.parameters == {
        n: m.num_parameters() for n, m in (("student", student), ("teacher", teacher))
    }
    assert [p.context for p in got.memory] == [1024, 2048, 4096, 8192, 16384, 32768]
    assert got.memory[-1].student == cache_bytes(student.config, 32768)
    assert {"torch", "transformers", "python"} <= set(got.versions)
    assert read_record(tmp_path / "report.json") == got
    assert (tmp_path / "report.html").is_file()


def test_converted_layers_are_those_of_the_plan_the_build_or_the_teacher(folder, tmp_path):
    """A transplanted Mamba layer was converted from nothing, and so is a pretrained one."""
    student, _ = load(folder / "student")
    teacher, _ = load(folder / "teacher")
    entries = parse_entries(["convert 0", "keep 1", "transplant 0"], "here")
    assert layers_of(student, LayerPlan(entries)) == Layers(total=3, converted=1)
    assert layers_of(student, teacher=teacher) == Layers(total=3, converted=2)
    assert layers_of(student, teacher=tiny_model("attention")) == Layers(total=3, converted=2)
    assert layers_of(student, teacher=student) == Layers(total=3, converted=0)
    assert layers_of(student) == Layers(total=3, converted=0)
    assert layers_of(student, folder=folder / "student") == Layers(total=3, converted=0)
    built = {"layers": ["convert 0", "keep 1", "transplant 0"]}
    (tmp_path / "build.json").write_text(json.dumps(built))
    assert layers_of(student, folder=tmp_path) == Layers(total=3, converted=1)
    entries = built_entries(tmp_path)
    layers = plan_of(student, entries)
    assert [(p.mixer, p.origin, p.source_layer) for p in layers] == [
        ("mamba2", "converted", 0),
        ("attention", "kept", 1),
        ("mamba1", "transplanted", 0),
    ]
    assert plan_of(student, entries[:2]) == plan_of(student, None) == []
    assert built_entries(folder / "student") is None and recipe_of(tmp_path) is None
    (tmp_path / "recipe.toml").write_text("name = 'x'")
    assert recipe_of(tmp_path) == "name = 'x'"
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(UserError, match="is not a record of a build"):
        layers_of(student, folder=tmp_path)


def test_tokens_that_mean_something_else_are_not_compared(folder, tmp_path):
    """As many tokens, two of them swapped."""
    for path in (folder / "teacher").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    for suite in ("ppl", "kl", "copy"):
        data = [] if suite == "copy" else [folder / "text.txt"]
        with pytest.raises(UserError, match=r"vocabulary: 'b' is token \d+ of the teacher"):
            evaluate(folder / "student", data, suites=[suite], against=tmp_path, length=32)


def test_a_place_for_the_report_is_looked_at_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["tamba.evaluate"], "open_checkpoint", None)  # none is opened
    (tmp_path / "file").write_text("")
    for out in ("file", "file/deep/er"):
        with pytest.raises(UserError, match="file is no folder; choose another --out"):
            evaluate(folder / "student", folder / "text.txt", out=tmp_path / out)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="may not be written to; choose another --out"):
        evaluate(folder / "student", folder / "text.txt", out=tmp_path / "new" / "one")


def test_one_call_measures_a_model_alone(folder):
    text = folder / "text.txt"
    got = evaluate(str(folder / "student"), [text], length=64, limit=2)
    blocks = TokenBlocks.from_texts([text.read_text()], byte_tokenizer(), 64).take(2)
    want = perplexity(load(folder / "student")[0], blocks)
    assert got.perplexity.student == pytest.approx(want.ppl)
    assert got.perplexity.tokens == 126
    assert got.perplexity.teacher is None
    assert got.perplexity.ratio is None


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nowhere", {}, "nowhere"),
        ("student", {"against": "wide"}, "257 tokens"),
        ("bare", {}, "has no tokenizer"),
        ("short", {"length": 64}, "length: 64 is beyond the model's 32 positions"),
        ("student", {"limit": 0}, "limit: 0"),
        ("student", {"length": 1}, "leave nothing to predict"),
        ("student", {"suites": []}, "names no suite"),
        ("student", {"suites": ["ppl"], "lengths": {"copy": (4,)}}, "--lengths copy"),
        ("student", {"suites": ["ppl", "copy"], "lengths": {"coppy": (4,)}}, "did you mean 'copy'"),
        ("student", {"data": "missing.txt"}, "no such file"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(folder, tmp_path, model, options, message):
    options = {"length": 16, "out": tmp_path / "out", "data": "text.txt"} | options
    if "against" in options:
        options["against"] = folder / options["against"]
    data = folder / options.pop("data")
    with pytest.raises(UserError) as caught:
        evaluate(folder / model, data, **options)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
