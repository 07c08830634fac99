"""The same model on a CUDA device: what the CPU says is the truth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tamba
from compare import Kind, assert_same
from hf_models import tiny_hf_model
from models import STACKS, random_ids, tiny_model
from tamba.data import TokenBlocks
from tamba.model.attention import _by_document, takes_documents
from tamba.model.cache import TambaCache
from tamba.model.tokens import segments
from tamba.recipe import Distil
from tamba.report import read_record
from tamba.train import distil
from tamba.train.recorder import Recorder
from tokens import character_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def as_in_use():
    """Deterministic mode is the other tests' own: on CUDA it refuses ordinary operations."""
    torch.use_deterministic_algorithms(False)


@torch.no_grad()
@pytest.mark.parametrize("stack", sorted(STACKS))
def test_cut_padded_and_rolled_back_passes_equal_the_cpu(stack):
    model, ids = tiny_model(stack), random_ids(3, 30)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    want = model(ids, attention_mask=mask).logits[mask.bool()]
    model.cuda()
    got = model(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()[mask.bool()]
    assert_same(got, want, "decode")

    cache, pieces = TambaCache(model.config, max_rollback=8), []
    end = 0
    for piece in ids.cuda().split([17, 5, 1, 7], dim=1):
        end += piece.shape[1]
        seen = mask[:, :end].cuda()
        pieces.append(model(piece, attention_mask=seen, past_key_values=cache).logits)
    assert_same(torch.cat(pieces, dim=1).cpu()[mask.bool()], want, "decode")
    cache.rollback(6)
    again = model(ids[:, 24:].cuda(), past_key_values=cache).logits
    assert_same(again, pieces[-1][:, 1:], "decode")


@pytest.mark.parametrize("stack", sorted(STACKS))
def test_gradients_equal_the_cpu(stack):
    model, ids = tiny_model(stack, dtype=torch.float64), random_ids(2, 23)

    def gradients() -> dict[str, torch.Tensor]:
        """Of a loss in float64 too: that of transformers is float32 always."""
        model.zero_grad()
        seen = ids.to(model.device)
        logits = model(seen).logits[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, seen[:, 1:].flatten()).backward()
        return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}

    want = gradients()
    model.cuda()
    # Angles of positions are float32, and their cosines end in other digits on the device.
    kind: Kind = "fp64" if stack in ("mamba1", "mamba2") else "kernel"
    for name, gradient in gradients().items():
        assert_same(gradient, want[name], kind, name)


@torch.no_grad()
@pytest.mark.parametrize("stack", sorted(STACKS))
def test_bfloat16_stays_near_float32(stack):
    model, ids = tiny_model(stack), random_ids(2, 23)
    want = model(ids).logits
    got = model.to(torch.bfloat16).cuda()(ids.cuda()).logits.float().cpu()
    assert float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) < 0.1


@pytest.mark.parametrize("window", [None, 33])
def test_packed_documents_equal_a_mask(window):
    """bfloat16 attention over documents end to end, against a mask in float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, h, 200, 64, device="cuda") for h in (9, 3, 3))
    starts = torch.rand(3, 200, device="cuda") < 0.03
    starts[0, 1:] = False
    documents = starts.cumsum(1)
    back = torch.arange(200, device="cuda")[:, None] - torch.arange(200, device="cuda")
    seen = (documents[:, :, None] == documents[:, None]) & (back >= 0)
    seen &= back < (window or 200)
    edges, weights = segments(starts), torch.randn(3, 200, 9 * 64, device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        qkv = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        if dtype == torch.bfloat16:
            mixed = _by_document(*qkv, edges, 0.125, window)
        else:
            wide = [qkv[0], *(x.repeat_interleave(3, 1) for x in qkv[1:])]
            mixed = F.scaled_dot_product_attention(*wide, seen[:, None], scale=0.125)
            mixed = mixed.transpose(1, 2).flatten(2)
        found.append([mixed.detach(), *torch.autograd.grad(mixed, qkv, weights.to(dtype))])
    assert_same(found[0][0], found[1][0], "half")
    for name, got, want in zip("qkv", found[0][1:], found[1][1:], strict=True):
        assert_same(got, want, "half_gradient", name)


@torch.no_grad()
@pytest.mark.filterwarnings("default")  # torch's compiler warns of much that is not ours
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_rows_of_a_model_in_bfloat16(compiled):
    model = tiny_model("mixed").cuda()
    ids, starts = random_ids(3, 60).cuda(), torch.zeros(3, 60, dtype=torch.bool)
    starts[0, 17] = starts[2, 40] = starts[2, 41] = True
    seq_idx = starts.cumsum(1).cuda()
    want = model(ids, seq_idx=seq_idx).logits
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    with torch.autocast("cuda", torch.bfloat16):
        assert takes_documents(model.config, model.model.embed_tokens(ids))
        got = model(ids, seq_idx=seq_idx).logits
    # bfloat16 is 5.8 % off in this model on a CPU too; a document that sees another, 48 %.
    assert (got.float() - want).norm() < 0.1 * want.norm()
    joined = model(ids).logits
    assert (joined - want).norm() > 0.3 * want.norm()


@pytest.mark.filterwarnings("default")  # torch's compiler warns of much that is not ours
@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_steps_equal_plain_ones(compiled, monkeypatch, caplog):
    """With documents in rows, pieces of two sizes, and a clipped gradient."""
    replays = []
    replay = Recorder._replay
    monkeypatch.setattr(Recorder, "_replay", lambda *given: replays.append(1) or replay(*given))
    ids, starts = random_ids(12, 64).int(), torch.zeros(12, 64, dtype=torch.bool)
    starts[:, 0] = starts[::3, 30] = starts[5, 7] = True
    found = []
    for graphs in (False, True):
        student, teacher = (tiny_model("mixed", seed=seed).cuda() for seed in (0, 1))
        stage = Distil(
            stage="distil",
            tokens=40 * 5 * 64,
            batch=5,
            micro_batch=3,
            lr=1e-3,
            train="all",
            compile=compiled,
            graphs=graphs,
            dtype="bfloat16",
        )
        names = [name for name, _ in student.named_parameters()]
        log = distil(student, teacher, names, TokenBlocks(ids, starts, ids.numel()), stage)
        found.append(torch.tensor([loss for _, loss in log.losses]))
    assert len(replays) > 60
    assert not caplog.records
    assert found[0][-1] < 0.7 * found[0][0]
    assert ((found[1] - found[0]).abs() < 0.03 * found[0]).all()


@torch.no_grad()
def test_generation_on_the_device():
    model, ids = tiny_model("mixed"), random_ids(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False}
    want = model.generate(ids, **options)
    got = model.cuda().generate(ids.cuda(), **options)
    assert torch.equal(got.cpu(), want)


@pytest.mark.filterwarnings("default")  # torch's compiler warns of much that is not ours
def test_the_whole_way_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of stage, on tensors that all have to be where the model is."""
    tiny_hf_model("llama").save_pretrained(tmp_path / "teacher")
    character_tokenizer().save_pretrained(tmp_path / "teacher")
    nouns = ["cat", "dog", "owl", "fox", "elk", "bee", "ant", "hen", "ram", "cow", "pig", "yak"]
    paragraphs = [f"the {a} is in the house of the {b}. " * 4 for a in nouns for b in nouns]
    lines = [json.dumps({"text": text}) for text in paragraphs]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "recipe.toml").write_text(WHOLE_WAY)
    on_device = read_record(tamba.run(tmp_path / "recipe.toml", tmp_path / "out")).perplexity
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = read_record(tamba.run(tmp_path / "recipe.toml", tmp_path / "cpu")).perplexity
    assert on_device and on_cpu and on_device.student is not None
    assert on_device.student == pytest.approx(on_cpu.student, rel=0.02)


WHOLE_WAY = """
name = "small"
[teacher]
path = "teacher"
[data]
train = ["text.jsonl"]
heldout = ["text.jsonl"]
length = 32
[analyze]
convert = 1
tokens = 256
[build.convert]
mixer = "mamba2"
conv_activation = "silu"
gate = "random"
norm = "head"
[[train]]
stage = "least_squares"
fit = "mixer"
tokens = 512
[[train]]
stage = "align"
tokens = 512
lr = 1e-3
[[train]]
stage = "distil"
tokens = 512
lr = 1e-4
[evaluate]
tokens = 512
prompts = ["The"]
new_tokens = 4
"""
