"""Every tensor of a student is what the plan says, to the bit where it is copied.

Truths: the source models and transformers' classes; for converted layers, decaying linear attention
written out pair by pair in float64.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import tamba
from compare import assert_same
from hf_models import some_ids, tiny_hf_model
from models import BLOCKS, D_MODEL, VOCAB, random_ids, tiny_config, tiny_model
from tamba import surgery
from tamba.build import build, build_student, student_config
from tamba.checkpoint import Checkpoint, load, open_checkpoint, parameter_specs
from tamba.errors import UserError
from tamba.families.mamba_in_llama import MAMBA_CONFIG, MAMBA_IN_LLAMA
from tamba.model.config import Mamba1Spec, TambaConfig
from tamba.plan import ConvertOptions, LayerPlan, PlanEntry, e_tamba_plan, read_plan
from test_checkpoint import left_in, tiny_tokenizer
from test_families import PUBLISHED, every_token, original_names, write_folder
from test_gguf import write_gguf

PAPER = ConvertOptions(
    conv="random", conv_activation="silu", gate="random", norm="head", decay="paper"
)


def plan_of(*lines: str, **more) -> LayerPlan:
    entries = []
    for line in lines:
        action, *rest = line.split()
        source = rest.pop(0) if rest[0] in ("teacher", "donor") else None
        entries.append(PlanEntry(action, int(rest[0]), rest[1] if rest[1:] else None, source))
    return LayerPlan(tuple(entries), **more)


def keep_all(n: int) -> LayerPlan:
    return plan_of(*(f"keep {i}" for i in range(n)))


@torch.no_grad()
def logits(model, ids=None) -> Tensor:
    return model(some_ids() if ids is None else ids).logits


def opened(case: str, folder: Path) -> Checkpoint:
    tiny_hf_model(case).save_pretrained(folder)
    return open_checkpoint(folder)


# Keep, drop, transplant.


@pytest.mark.parametrize("case", ["llama-biases-tied", "qwen3", "gpt_neox", "mamba", "mamba2"])
def test_keeping_everything_is_the_teacher_to_the_bit(case, tmp_path):
    teacher = opened(case, tmp_path / "teacher")
    plan = keep_all(teacher.tamba_config.num_hidden_layers)
    report = build_student(teacher, plan, tmp_path / "student")
    student = open_checkpoint(tmp_path / "student")
    assert student.parameters == teacher.parameters
    for name in student.parameters:
        assert_same(student.read(name), teacher.read_parameter(name), "exact")
    assert {row.how for row in report.rows} == {"copied"}
    ours = load(tmp_path / "student")[0]
    assert_same(logits(ours), logits(load(tmp_path / "teacher")[0]), "exact")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert_same(logits(stock), logits(ours), "exact")


def test_our_own_hybrids_are_teachers_too(tmp_path):
    tiny_model("mixed").save_pretrained(tmp_path / "teacher")
    build_student(open_checkpoint(tmp_path / "teacher"), keep_all(7), tmp_path / "student")
    a, b = load(tmp_path / "teacher")[0], load(tmp_path / "student")[0]
    assert_same(logits(a, random_ids(2, 9)), logits(b, random_ids(2, 9)), "exact")


def test_a_gguf_is_a_teacher_too(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama-biases-tied")
    build_student(open_checkpoint(tmp_path / "m.gguf"), keep_all(3), tmp_path / "student")
    a, b = load(tmp_path / "m.gguf")[0], load(tmp_path / "student")[0]
    assert_same(logits(a), logits(b), "exact")


def test_dropping_layers_is_the_model_without_them(tmp_path):
    theirs = tiny_hf_model("llama")
    theirs.save_pretrained(tmp_path / "teacher")
    plan = plan_of("keep 0", "keep 2")
    report = build_student(open_checkpoint(tmp_path / "teacher"), plan, tmp_path / "student")
    del theirs.model.layers[1]
    with torch.no_grad():
        want = theirs(some_ids(), use_cache=False).logits
    assert_same(logits(load(tmp_path / "student")[0]), want, "fp32")
    assert report.dropped == (1,)
    assert "dropped teacher layers: 1" in str(report)


def pythia_and_mamba(
    folder: Path, n_pythia: int = 24, n_mamba: int = 48
) -> tuple[GPTNeoXForCausalLM, MambaForCausalLM]:
    """The pair of *E-Tamba* with all its layers, at a width of 32; the donor in its own layout."""
    torch.manual_seed(0)
    pythia = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB + 3,
            hidden_size=32,
            num_hidden_layers=n_pythia,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
    ).eval()
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB + 3, hidden_size=32, num_hidden_layers=n_mamba, state_size=4)
    ).eval()
    pythia.save_pretrained(folder / "pythia")
    config = {"d_model": 32, "n_layer": n_mamba, "vocab_size": VOCAB, "ssm_cfg": {"d_state": 4}}
    write_folder(folder / "mamba", config, original_names(mamba.state_dict()))
    return pythia, mamba


@pytest.mark.parametrize(
    ("preset", "below", "middle"), [("12+12+1", 12, (25, 36)), ("11+12+1", 11, (25, 36))]
)
def test_e_tamba_transplants_every_tensor_to_the_bit(preset, below, middle, tmp_path):
    pythia, mamba = pythia_and_mamba(tmp_path)
    teacher, donor = (open_checkpoint(tmp_path / name) for name in ("pythia", "mamba"))
    plan = e_tamba_plan(preset)
    report = build_student(teacher, plan, tmp_path / "student", donor=donor)
    student = open_checkpoint(tmp_path / "student")
    wanted = [("teacher", i) for i in range(below)]
    wanted += [("donor", i) for i in range(middle[0], middle[1] + 1)] + [("teacher", 23)]
    assert student.tamba_config.num_hidden_layers == len(wanted)
    q_of = pythia.state_dict()
    for layer, (source, index) in enumerate(wanted):
        if source == "teacher":
            fused = q_of[f"gpt_neox.layers.{index}.attention.query_key_value.weight"]
            query = fused.view(4, 3, 8, 32)[:, 0].reshape(32, 32)
            assert_same(student.read(f"model.layers.{layer}.mixer.q_proj.weight"), query, "exact")
        else:
            theirs = mamba.state_dict()[f"backbone.layers.{index}.mixer.A_log"]
            assert_same(student.read(f"model.layers.{layer}.mixer.A_log"), theirs, "exact")
        model = teacher if source == "teacher" else donor
        for name in student.names():
            if name.startswith(f"model.layers.{layer}."):
                origin = name.replace(f"layers.{layer}.", f"layers.{index}.")
                assert_same(student.read(name), model.read_parameter(origin), "exact")
    assert {row.how for row in report.rows} == {"copied"}
    ours = load(tmp_path / "student")[0]
    assert torch.isfinite(logits(ours)).all()
    assert ours.config.residual_in_fp32


def test_a_transplant_of_everything_is_the_donor(tmp_path):
    pythia, mamba = pythia_and_mamba(tmp_path, 3, 4)
    a, b = (open_checkpoint(tmp_path / name) for name in ("pythia", "mamba"))
    parts = {"embedding": "donor", "final_norm": "donor", "head": "donor"}
    for teacher, donor, truth, n in ((a, b, mamba, 4), (b, a, pythia, 3)):
        plan = plan_of(*(f"transplant {i}" for i in range(n)), **parts)
        folder = tmp_path / f"all-{n}"
        build_student(teacher, plan, folder, donor=donor)
        assert_same(logits(load(folder)[0]), logits(truth), "decode")
        assert_same(logits(load(folder)[0]), logits(load(donor.location)[0]), "exact")


def published(name: str, folder: Path) -> Checkpoint:
    """A checkpoint of a published configuration without any weights."""
    return Checkpoint(folder / name, PUBLISHED[name], {}, {}, folder)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("12+12+1", 1_178_007_552),
        ("11+12+1", 1_127_649_280),
        ("none", 860_706_816),
        ("fresh", 1_178_007_552),
    ],
)
def test_e_tamba_has_the_published_numbers_of_parameters(preset, parameters, tmp_path):
    teacher, donor = published("pythia-1.4b", tmp_path), published("mamba-1.4b", tmp_path)
    config = student_config(teacher, e_tamba_plan(preset), donor)
    assert sum(torch.Size(s.shape).numel() for s in parameter_specs(config).values()) == parameters


def test_the_sources_have_the_published_numbers_of_parameters(tmp_path):
    for name, parameters in (("pythia-1.4b", 1_414_647_808), ("mamba-1.4b", 1_372_178_432)):
        specs = parameter_specs(published(name, tmp_path).tamba_config)
        assert sum(torch.Size(s.shape).numel() for s in specs.values()) == parameters


# Reinitialize.


def test_a_fresh_layer_has_the_shape_and_nothing_else(tmp_path):
    teacher = opened("llama-biases-tied", tmp_path / "teacher")
    plan = plan_of("keep 0", "reinitialize teacher 1", "keep 2")
    students = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(students))
        report = build_student(teacher, plan, folder, seed=seed)
        students.append(open_checkpoint(folder))
    first, again, other = students
    assert first.parameters == teacher.parameters
    for name in first.names():
        fresh = name.startswith("model.layers.1.")
        assert_same(first.read(name), again.read(name), "exact")
        if not fresh:
            assert_same(first.read(name), teacher.read_parameter(name), "exact")
        elif name.endswith("proj.weight"):
            assert not torch.equal(first.read(name), other.read(name))
            assert not torch.equal(first.read(name), teacher.read_parameter(name))
            assert first.read(name).std().item() == pytest.approx(0.3, rel=0.2)
    assert {r.how for r in report.rows if r.tensor.startswith("model.layers.1.")} == {"new"}


def test_fresh_weights_leave_the_global_random_state_alone():
    config = tiny_config("mamba2")
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    surgery.fresh_block(BLOCKS["mamba2"], config, 5)
    assert_same(torch.rand(3), want, "exact")


# Convert.


def linear_attention(layer, hidden: Tensor, memory: Tensor, options: ConvertOptions) -> Tensor:
    """Decaying linear attention of a layer's projections, pair by pair: hidden [T, D] -> [T, D].

    ``y_t = sum over s <= t of exp(-(t - s) / m) / m * (q_t . k_s) v_s`` in every head, with its own
    memory m; or, in slices, each slice of q and k weighing the same slice of v.
    """
    mixer, spec = layer.mixer, layer.spec.mixer
    T, P = hidden.shape[0], spec.head_dim
    q, k, v = (proj(hidden).view(T, -1, P) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    width = P if options.mixer == "mamba2" else options.d_state
    out = torch.zeros(T, spec.n_heads, P, dtype=hidden.dtype)
    for h in range(spec.n_heads):
        kv = h // (spec.n_heads // spec.n_kv_heads)
        for first in range(0, P, width):
            piece = slice(first, first + width)
            for t in range(T):
                for s in range(t + 1):
                    weight = torch.exp(-(t - s) / memory[h]) / memory[h]
                    match = q[t, h, piece] @ k[s, kv, piece]
                    out[t, h, piece] += weight * match * v[s, kv, piece]
    return mixer.o_proj(out.flatten(1))


ATTENTIONS = ["attention", "parallel", "sliding"]


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
@pytest.mark.parametrize("decay", ["span", "slow"])
@torch.no_grad()
def test_a_converted_layer_begins_as_decaying_linear_attention(kind, mixer, decay):
    model = tiny_model([kind], dtype=torch.float64)
    options = ConvertOptions(mixer=mixer, decay=decay, d_state=4)
    layer = model.model.layers[0]
    new = surgery.convert_layer(layer, model.config, options, 0)
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    hidden = torch.randn(9, D_MODEL, dtype=torch.float64)
    got = new.mixer(hidden[None], None, every_token(9))[0]
    # The memories as float32 holds them: that is the precision in which they are made.
    memory = 1 / torch.nn.functional.softplus(1.0 * new.mixer.dt_bias)
    memory = memory if mixer == "mamba2" else memory.view(4, -1)[:, 0]
    want = linear_attention(layer, hidden, memory, options)
    assert_same(got, want, "fp64")
    assert memory[-1] == pytest.approx(surgery.LONGEST_MEMORY, rel=1e-4)
    with pytest.raises(AssertionError):  # another pairing of heads is another layer
        assert_same(got, linear_attention(layer, hidden, memory.flip(0) + 1, options), "fp64")


@torch.no_grad()
def test_legacy_slices_are_not_those_of_whole_heads():
    model = tiny_model(["attention"], dtype=torch.float64)
    layer, hidden = model.model.layers[0], torch.randn(9, D_MODEL, dtype=torch.float64)
    options = ConvertOptions(mixer="mamba1", d_state=4, slices="legacy")
    new = surgery.convert_layer(layer, model.config, options, 0)
    assert new.spec.mixer.repeat_span == 1
    memory = (1 / torch.nn.functional.softplus(new.mixer.dt_bias)).view(4, -1)[:, 0]
    got = new.mixer(hidden[None], None, every_token(9))[0]
    with pytest.raises(AssertionError):
        assert_same(got, linear_attention(layer, hidden, memory, options), "fp64")


OPTIONS = {
    "default": ConvertOptions(),
    "paper": PAPER,
    "open gate, whole norm": ConvertOptions(gate="open", norm="all", conv_activation="silu"),
    "wide convolution": ConvertOptions(d_conv=7, conv="random", decay="slow"),
}


CONVERSIONS = [
    *((case, "default") for case in ("llama", "qwen2", "qwen3", "gpt_neox")),
    *(("llama-biases-tied", which) for which in OPTIONS),
]


def swapped(out, read, leaf, slices):
    return surgery_filled(
        out, lambda name: read({"k": "v", "v": "k"}.get(name[0], "q") + name[1:]), leaf, slices
    )


surgery_filled = surgery._filled


@pytest.mark.parametrize(("case", "which"), CONVERSIONS)
@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_a_converted_layer_holds_the_attention_row_by_row(case, mixer, which, tmp_path):
    check_conversion(case, mixer, which, tmp_path)


def test_keys_in_the_place_of_values_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(surgery, "_filled", swapped)
    with pytest.raises(AssertionError, match="max error"):
        check_conversion("llama", "mamba2", "default", tmp_path)


def check_conversion(case, mixer, which, tmp_path):
    teacher = opened(case, tmp_path / "teacher")
    options = OPTIONS[which].model_copy(update={"d_state": 4})
    plan = plan_of("keep 0", f"convert 1 {mixer}", "keep 2", convert=options)
    report = build_student(teacher, plan, tmp_path / "student")
    student = open_checkpoint(tmp_path / "student")
    spec = student.tamba_config.block_specs[1].mixer
    assert spec.kind == mixer
    slices = surgery._slices(spec)
    mine, theirs = "model.layers.1.mixer.", "model.layers.1.mixer."
    attention = teacher.tamba_config.block_specs[1].mixer
    for rows, name in (("x", "v_proj"), ("B", "k_proj"), ("C", "q_proj")):
        got = student.read(f"{mine}in_proj.weight")[slices[rows]]
        assert_same(got, teacher.read_parameter(f"{theirs}{name}.weight"), "exact")
        if attention.qkv_bias:
            got = student.read(f"{mine}in_proj.bias")[slices[rows]]
            assert_same(got, teacher.read_parameter(f"{theirs}{name}.bias"), "exact")
    out = teacher.read_parameter(f"{theirs}o_proj.weight")
    assert_same(student.read(f"{mine}out_proj.weight"), out, "exact")
    if attention.out_bias:
        bias = teacher.read_parameter(f"{theirs}o_proj.bias")
        assert_same(student.read(f"{mine}out_proj.bias"), bias, "exact")
    for name in teacher.parameters:
        if ".layers.1.mixer." not in name:
            assert_same(student.read(name), teacher.read_parameter(name), "exact")
    rows = {r.tensor: r for r in report.rows}
    assert rows[f"{mine}in_proj.weight"].how == "transformed"
    assert rows[f"{mine}in_proj.weight"].sources == tuple(
        f"teacher: {theirs}{p}_proj.weight" for p in "vkq"
    )
    assert rows[f"{mine}out_proj.weight"].how == "copied"
    assert rows[f"{mine}A_log"].how == "new"
    assert report.lost[1][0] == "softmax and its scale"
    assert ("q/k norm" in report.lost[1]) == (case == "qwen3")
    assert torch.isfinite(logits(load(tmp_path / "student")[0])).all()


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_random_weights_hold_nothing_of_the_attention(mixer, tmp_path):
    teacher = opened("llama", tmp_path / "teacher")
    options = ConvertOptions(weights="random", d_state=4)
    plan = plan_of("keep 0", f"convert 1 {mixer}", "keep 2", convert=options)
    report = build_student(teacher, plan, tmp_path / "student")
    mixer_rows = [r for r in report.rows if ".layers.1.mixer." in r.tensor]
    assert mixer_rows and {r.how for r in mixer_rows} == {"new"}
    other = build_student(teacher, plan, tmp_path / "other", seed=1)
    one, two = (open_checkpoint(tmp_path / name) for name in ("student", "other"))
    name = "model.layers.1.mixer.out_proj.weight"
    assert other.rows == report.rows and not torch.equal(one.read(name), two.read(name))
    mlp = next(n for n in teacher.parameters if ".layers.1.mlp." in n)
    assert_same(one.read(mlp), teacher.read_parameter(mlp), "exact")


def test_an_open_gate_is_one_for_every_channel(tmp_path):
    model = tiny_model(["attention"], dtype=torch.float64)
    layer, hidden = model.model.layers[0], torch.randn(1, 9, D_MODEL, dtype=torch.float64)
    closed, opened_ = (
        surgery.convert_layer(layer, model.config, ConvertOptions(gate=gate), 0)
        for gate in ("none", "open")
    )
    with torch.no_grad():
        want = closed.mixer(hidden, None, every_token(9))
        got = opened_.mixer(hidden, None, every_token(9))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the bias is float32 when made


def test_the_papers_conversion_is_one_of_its_checkpoints(tmp_path):
    """What the paper's options make can be written in its layout, and reads back as it was."""
    teacher = opened("llama", tmp_path / "teacher")
    plan = plan_of("convert 0", "keep 1", "convert 2", convert=PAPER)
    build_student(teacher, plan, tmp_path / "student")
    student = open_checkpoint(tmp_path / "student")
    config = student.tamba_config
    # The released layout holds the epsilon of its output norm fixed at 1e-5.
    blocks = json.loads(json.dumps(config.blocks))
    blocks["mamba2"]["mixer"]["norm_eps"] = 1e-5
    config = TambaConfig.from_dict({**config.to_dict(), "blocks": blocks})
    tensors = {}
    for name, origin in MAMBA_IN_LLAMA.tensors(config, student.parameters).items():
        sources = [student.read(s) for s in origin.sources]
        tensors[name] = sources[0] if origin.make is None else origin.make(*sources)
    written = MAMBA_IN_LLAMA.to_family_config(config)
    extra = written.pop(MAMBA_CONFIG)
    assert extra["attn_layers"] == [1]
    write_folder(tmp_path / "released", written, tensors, mamba_config=extra)
    ours = load(tmp_path / "student")[0]
    for layer in (0, 2):
        ours.model.layers[layer].mixer.norm.eps = 1e-5
    assert_same(logits(load(tmp_path / "released")[0]), logits(ours), "exact")


def test_a_layer_converted_in_place_is_the_one_that_build_makes(tmp_path):
    teacher = opened("llama", tmp_path / "teacher")
    for mixer in ("mamba2", "mamba1"):
        options = PAPER.model_copy(update={"mixer": mixer, "d_state": 4})
        plan = plan_of("keep 0", "convert 1", "keep 2", convert=options)
        build_student(teacher, plan, tmp_path / mixer, seed=7)
        model = load(tmp_path / "teacher")[0]
        new = surgery.convert_layer(model.model.layers[1], model.config, options, 1, seed=7)
        built = load(tmp_path / mixer)[0].model.layers[1]
        assert new.spec == built.spec
        for name, tensor in built.state_dict().items():
            assert_same(new.state_dict()[name], tensor, "exact")
        attention = model.model.layers[1].mixer
        assert new.mixer.out_proj.weight.data_ptr() != attention.o_proj.weight.data_ptr()


def test_bfloat16_teachers_make_bfloat16_students(tmp_path):
    model = tiny_hf_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "teacher")
    teacher = open_checkpoint(tmp_path / "teacher")
    build_student(teacher, plan_of("convert 0", "keep 1"), tmp_path / "student")
    student = open_checkpoint(tmp_path / "student")
    for name in student.names():
        small = name.rpartition(".")[2] in ("A_log", "dt_bias", "D")
        assert student.dtype(name) == (torch.float32 if small else torch.bfloat16)
    rows = surgery._slices(student.tamba_config.block_specs[0].mixer)["x"]
    got = student.read("model.layers.0.mixer.in_proj.weight")[rows]
    assert_same(got, teacher.read_parameter("model.layers.0.mixer.v_proj.weight"), "exact")
    build_student(teacher, keep_all(3), tmp_path / "wide", dtype=torch.float32)
    assert load(tmp_path / "wide")[0].dtype == torch.float32


# What cannot be built, and what is left when it is not.


def with_tokenizer(folder: Path, vocab: int, swap: bool = False) -> Checkpoint:
    tokenizer = tiny_tokenizer(vocab)
    if swap:
        tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer.model)(
            {"A": 34, "B": 33, "<e>": 0}, unk_token="<e>"
        )
    tokenizer.save_pretrained(folder)
    return open_checkpoint(folder)


def test_a_donor_of_another_width_or_vocabulary_is_refused(tmp_path):
    teacher = opened("llama", tmp_path / "teacher")
    plan = plan_of("keep 0", "transplant 0")
    out = tmp_path / "student"
    donor = tiny_model("mamba1")
    for name, change in (("wide", {"hidden_size": 48}), ("large", {"vocab_size": 1000})):
        config = TambaConfig(**{**donor.config.to_dict(), **change})
        type(donor)(config).save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="48 wide and the teacher 32"):
        build_student(teacher, plan, out, donor=open_checkpoint(tmp_path / "wide"))
    with pytest.raises(UserError, match="another vocabulary: 1000 tokens, and 64"):
        build_student(teacher, plan, out, donor=open_checkpoint(tmp_path / "large"))
    donor = opened("mamba", tmp_path / "donor")
    build_student(teacher, plan, out, donor=donor)  # the same, as far as the rows tell
    teacher = with_tokenizer(tmp_path / "teacher", 64)
    build_student(teacher, plan, tmp_path / "b", donor=with_tokenizer(tmp_path / "donor", 64))
    other = with_tokenizer(tmp_path / "donor", 64, swap=True)
    with pytest.raises(UserError, match=r"another vocabulary: '.+' is \d+ there, \d+ in"):
        build_student(teacher, plan, tmp_path / "c", donor=other)
    assert left_in(tmp_path) == ["b", "donor", "large", "student", "teacher", "wide"]


REFUSED = {
    "out of range": (plan_of("keep 3"), "has no layer 3"),
    "no donor": (plan_of("transplant 0"), "needs a donor"),
    "convert out of range": (plan_of("convert 3"), "no layer 3"),
    "bad slices": (
        plan_of("convert 0 mamba1", convert=ConvertOptions(d_state=5)),
        "5 does not divide the head size 8",
    ),
    "donor's head": (plan_of("keep 0", head="donor"), "head: needs a donor"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_an_impossible_plan_is_refused_before_work(case, tmp_path):
    teacher = opened("llama", tmp_path / "teacher")
    plan, says = REFUSED[case]
    with pytest.raises(UserError, match=says):
        build_student(teacher, plan, tmp_path / "student")
    assert left_in(tmp_path) == ["teacher"]


def test_a_layer_without_attention_cannot_be_converted(tmp_path):
    teacher = opened("mamba", tmp_path / "teacher")
    with pytest.raises(UserError, match=r"layers\[1\] 'convert 1'.*mamba1 already"):
        build_student(teacher, plan_of("keep 0", "convert 1"), tmp_path / "student")


def test_nan_weights_leave_nothing(tmp_path):
    model = tiny_hf_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"'model\.layers\.2\.mlp\.up_proj\.weight' holds NaN"):
        build_student(open_checkpoint(tmp_path / "teacher"), keep_all(3), tmp_path / "student")
    assert left_in(tmp_path) == ["teacher"]


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    teacher = opened("llama", tmp_path / "teacher")

    def interrupted(*args, **kwargs):
        assert left_in(tmp_path) == [".student.partial", "teacher"]
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("tamba.build.convert_mixer", interrupted)
    # Where a shell put the tests in the background, they began with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_student(teacher, plan_of("keep 0", "convert 1"), tmp_path / "student")
    finally:
        signal.signal(signal.SIGINT, before)
    assert left_in(tmp_path) == ["teacher"]


# From a recipe.


def test_a_recipe_makes_a_whole_folder(tmp_path):
    opened("llama-biases-tied", tmp_path / "teacher")
    with_tokenizer(tmp_path / "teacher", 64)
    text = (
        'name = "tiny"\n[teacher]\npath = "teacher"\n'
        '[build]\nplan = ["keep 0", "convert 1", "keep 2"]\n'
        'convert = { mixer = "mamba1", d_state = 4 }\n'
        "[output]\nshard_bytes = 20000\n"
    )
    (tmp_path / "recipe.toml").write_text(text)
    report = tamba.build(tmp_path / "recipe.toml", tmp_path / "student")
    files = left_in(tmp_path / "student")
    for name in ("config.json", "build.json", "recipe.toml", "plan.toml", "tokenizer.json"):
        assert name in files
    assert "generation_config.json" in files
    assert sum(name.startswith("model-") for name in files) > 1
    assert (tmp_path / "student" / "recipe.toml").read_text() == text
    assert read_plan(tmp_path / "student" / "plan.toml").converted == (1,)
    record = json.loads((tmp_path / "student" / "build.json").read_text())
    assert record["inputs"]["teacher"]["sha256"] == open_checkpoint(tmp_path / "teacher").digest()
    assert record["parameters"] == report.elements()
    assert len(record["table"]) == len(report.rows)
    assert "convert 1" in str(report)
    student, tokenizer = tamba.load(tmp_path / "student")
    assert isinstance(student.config.block_specs[1].mixer, Mamba1Spec)
    assert tokenizer("AB").input_ids == tiny_tokenizer()("AB").input_ids
    with pytest.raises(UserError, match="already exists"):
        build(tmp_path / "recipe.toml", tmp_path / "student")
