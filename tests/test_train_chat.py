"""Losses on conversations equal those computed by hand, and steps go on where they were cut off."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("trl")

import tamba
from compare import assert_same
from models import tiny_model
from tamba.chats import Row
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.recipe import Dpo, OnPolicy, Sft, read_recipe
from tamba.train import chat, chat_steps, dpo, kinds, on_policy, sft, trainer
from tamba.train.engine import Place
from texts import END, byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STACK = ["mamba2_gqa", "attention", "mamba1"]
NEVER = 1e-30
"""A learning rate at which nothing moves."""


def tokenizer(template: str | None = TEMPLATE):
    made = byte_tokenizer()
    made.chat_template = template
    return made


def student(seed: int = 0) -> TambaForCausalLM:
    made = tiny_model(STACK, seed=seed, vocab_size=257)
    made.generation_config.eos_token_id = END
    return made


def teacher() -> TambaForCausalLM:
    return tiny_model(["attention"] * 2, seed=5, vocab_size=257)


def rows(n: int = 6) -> list[Row]:
    return [Row(f"row {i}", {"prompt": f"say {i}" * (i % 3 + 1), "completion": "yes " * (i + 1)})
            for i in range(n)]  # fmt: skip


def pairs(n: int = 4) -> list[Row]:
    return [Row(f"row {i}", {"prompt": f"say {i}", "chosen": "yes " * (i + 1), "rejected": "no"})
            for i in range(n)]  # fmt: skip


TOLD = {"data": ("rows",), "steps": 1, "batch": 6, "lr": NEVER, "warmup": 0.0, "dtype": "float32"}


def sft_stage(**options) -> Sft:
    return Sft.model_validate(TOLD | {"stage": "sft", "length": 64} | options)


def dpo_stage(**options) -> Dpo:
    return Dpo.model_validate(TOLD | {"stage": "dpo", "batch": 4} | options)


def on_policy_stage(**options) -> OnPolicy:
    told = {"stage": "on_policy", "batch": 4, "new_tokens": 8, "length": 64}
    return OnPolicy.model_validate(TOLD | told | options)


# The truth, in float64 and one conversation at a time.


def framed(row: Row, answer: str = "completion") -> tuple[Tensor, int]:
    """Tokens [1, T] of prompt and answer, written out by hand, and those of the prompt."""
    asked = f"<user>{row.fields['prompt']}<end><assistant>"
    whole = f"{asked}{row.fields[answer]}<end>"
    ids = [tokenizer()(text)["input_ids"] for text in (whole, asked)]
    return torch.tensor([ids[0]]), len(ids[1])


@torch.no_grad()
def log_probabilities(model: TambaForCausalLM, ids: Tensor) -> Tensor:
    """[T - 1, V] in float64."""
    made = tiny_model_like(model)
    return made(ids, use_cache=False).logits[0, :-1].log_softmax(-1)


def tiny_model_like(model: TambaForCausalLM) -> TambaForCausalLM:
    made = type(model)(model.config).double().eval()
    made.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    return made


def cross_entropy(model: TambaForCausalLM, examples: list[Row], prompts_too: bool = False) -> float:
    found = []
    for row in examples:
        ids, n = framed(row)
        nats = -log_probabilities(model, ids).gather(1, ids[0, 1:, None])[:, 0]
        found.append(nats if prompts_too else nats[n - 1 :])
    return float(torch.cat(found).mean())


def preference_loss(model: TambaForCausalLM, reference: TambaForCausalLM, beta: float) -> float:
    found = []
    for row in pairs():
        margin = 0.0
        for sign, answer in ((1, "chosen"), (-1, "rejected")):
            ids, n = framed(row, answer)
            for weight, one in ((1, model), (-1, reference)):
                said = log_probabilities(one, ids).gather(1, ids[0, 1:, None])[n - 1 :].sum()
                margin += sign * weight * float(said)
        found.append(math.log1p(math.exp(-beta * margin)))
    return math.fsum(found) / len(found)


def first_loss(log) -> float:
    return log.losses[0][1]


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 2, "ce": 0.5}],
    ids=["at once", "in pieces, weighted"],
)
def test_sft_is_cross_entropy_of_the_answers(options) -> None:
    model = student()
    got = first_loss(sft(model, tokenizer(), sft_stage(**options), rows()))
    want = cross_entropy(model, rows()) * options.get("ce", 1.0)
    assert got == pytest.approx(want, rel=1e-5)


def test_a_mask_that_includes_prompts_is_seen(monkeypatch) -> None:
    honest = chat.answer_tokens

    def everything(*args):
        ids, mask = honest(*args)
        return ids, [True] * len(mask)

    monkeypatch.setattr(chat, "answer_tokens", everything)
    model = student()
    got = first_loss(sft(model, tokenizer(), sft_stage(), rows()))
    assert got != pytest.approx(cross_entropy(model, rows()), rel=1e-5)
    assert got == pytest.approx(cross_entropy(model, rows(), prompts_too=True), rel=1e-5)


def check_packed() -> None:
    model = student()
    stage = sft_stage(packed=True, length=96, batch=3, epochs=1, steps=None)
    lengths = sorted(framed(row)[0].shape[1] for row in rows())
    packs = chat._packed([{"input_ids": [0] * n, "lengths": [n]} for n in lengths], 96)
    assert [n for pack in packs for n in pack["lengths"]] != lengths and len(packs) == 3
    log = sft(model, tokenizer(), stage, rows())
    assert first_loss(log) == pytest.approx(cross_entropy(model, rows()), rel=1e-5)


def test_packed_conversations_see_nothing_of_one_another() -> None:
    check_packed()


def test_packing_without_boundaries_is_seen(monkeypatch) -> None:
    honest = chat._Collate.__call__

    def joined(self, some):
        batch = honest(self, some)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(
            batch["input_ids"]
        )
        return batch

    monkeypatch.setattr(chat._Collate, "__call__", joined)
    with pytest.raises(AssertionError):
        check_packed()


def test_sft_beside_the_teacher() -> None:
    model, above = student(), teacher()
    stage = sft_stage(ce=0.5, kl=2.0, temperature=3.0, micro_batch=2)
    got = first_loss(sft(model, tokenizer(), stage, rows(), teacher=above))
    apart = []
    for row in rows():
        ids, n = framed(row)
        logits = (log_probabilities(m, ids)[n - 1 :] for m in (above, model))
        p, q = ((one / 3.0).log_softmax(-1) for one in logits)
        apart.append(9.0 * (p.exp() * (p - q)).sum(-1))
    want = 0.5 * cross_entropy(model, rows()) + 2.0 * float(torch.cat(apart).mean())
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("reference", ["teacher", "student"])
def test_dpo_is_the_closed_formula(reference) -> None:
    """Rafailov et al. 2023, equation 7, from log-probabilities that are summed by hand."""
    model, above = student(), teacher()
    stage = dpo_stage(reference=reference, beta=0.05, micro_batch=2)
    log = dpo(model, tokenizer(), stage, pairs(), teacher=above)
    want = preference_loss(model, above if reference == "teacher" else model, 0.05)
    assert first_loss(log) == pytest.approx(want, rel=1e-5)
    if reference == "teacher":  # the other reference is told apart
        assert want != pytest.approx(math.log(2), rel=1e-3)
    else:
        assert want == pytest.approx(math.log(2))


def test_what_users_say_between_answers_is_no_answer(monkeypatch) -> None:
    """Answers of several turns: the assistant's alone are compared."""

    def turns(word: str) -> list[dict[str, str]]:
        said = [("assistant", word), ("user", word * 5), ("assistant", word * 2)]
        return [{"role": who, "content": what} for who, what in said]

    row = Row("row 0", {"prompt": "say", "chosen": turns("yes"), "rejected": turns("no")})
    model, above, margin = student(), teacher(), 0.0
    for sign, word in ((1, "yes"), (-1, "no")):
        spans = ["<user>say<end><assistant>", f"{word}<end>"]
        spans += [f"<user>{word * 5}<end><assistant>", f"{word * 2}<end>"]
        parts = [tokenizer()(text)["input_ids"] for text in spans]
        ids = torch.tensor([[i for part in parts for i in part]])
        counted = torch.tensor([k % 2 == 1 for k, part in enumerate(parts) for _ in part])[1:]
        for weight, one in ((1, model), (-1, above)):
            said = log_probabilities(one, ids).gather(1, ids[0, 1:, None])[:, 0]
            margin += sign * weight * float(said[counted].sum())
    want = math.log1p(math.exp(-0.05 * margin))
    stage = dpo_stage(beta=0.05, batch=1)
    got = first_loss(dpo(model, tokenizer(), stage, [row], teacher=above))
    assert got == pytest.approx(want, rel=1e-5)
    # What TRL's own rows hold counts all that follows the prompt.
    honest = chat._CollatePairs.__call__

    def everything(self, some):
        return honest(self, [r | {f"{s}_mask": [1] * len(r[f"{s}_ids"]) for s in
                                  ("chosen", "rejected")} for r in some])  # fmt: skip

    monkeypatch.setattr(chat._CollatePairs, "__call__", everything)
    other = first_loss(dpo(model, tokenizer(), stage, [row], teacher=above))
    assert other != pytest.approx(want, rel=1e-4)


def test_the_student_is_the_reference_as_it_was() -> None:
    model, before = student(), student()
    stage = dpo_stage(reference="student", steps=3, lr=1e-3, beta=0.5, schedule="constant")
    log = dpo(model, tokenizer(), stage, pairs())
    assert log.losses[-1][1] < first_loss(log)
    again = dpo_stage(reference="teacher", beta=0.5)
    after = first_loss(dpo(model, tokenizer(), again, pairs(), teacher=before))
    assert after == pytest.approx(preference_loss(model, before, 0.5), rel=1e-5)
    assert after < log.losses[-1][1]


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_on_policy_is_the_divergence_along_the_students_answers(divergence, monkeypatch) -> None:
    import trl

    model, above, seen = student(), teacher(), []
    honest = trl.DistillationTrainer._compute_loss

    def watched(self, one, inputs, count):
        seen.append({k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)})
        return honest(self, one, inputs, count)

    monkeypatch.setattr(trl.DistillationTrainer, "_compute_loss", watched)
    stage = on_policy_stage(divergence=divergence, temperature=2.0)
    got = first_loss(on_policy(model, tokenizer(), stage, rows(4), teacher=above))
    apart, asked = [], set()
    for batch in seen:
        for k in range(len(batch["prompt_ids"])):
            prompt = batch["prompt_ids"][k][batch["prompt_mask"][k].bool()]
            answer = batch["completion_ids"][k][batch["completion_mask"][k].bool()]
            assert 1 <= len(answer) <= 8
            asked.add(tokenizer().decode(prompt))
            ids = torch.cat([prompt, answer])[None]
            logits = (log_probabilities(m, ids)[len(prompt) - 1 :] for m in (above, model))
            p, q = ((one / 2.0).log_softmax(-1) for one in logits)
            m = ((p.exp() + q.exp()) / 2).log()
            forward = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
            reverse = F.kl_div(p, q, log_target=True, reduction="none").sum(-1)
            both = [F.kl_div(m, x, log_target=True, reduction="none").sum(-1) for x in (p, q)]
            js = (both[0] + both[1]) / 2
            apart.append({"forward": forward, "reverse": reverse, "js": js}[divergence])
    assert asked == {f"<user>{r.fields['prompt']}<end><assistant>" for r in rows(4)}
    assert got == pytest.approx(float(torch.cat(apart).mean()), rel=1e-4)


# What does not depend on how a step is divided, or cut off.


def check_steps_by_hand(**options) -> None:
    """Steps of all rows, written out with torch's plain AdamW."""
    told = {"steps": 5, "batch": 4, "lr": 3e-3, "warmup": 0.2, "weight_decay": 0.3, "clip": 0.5}
    told |= {"betas": (0.7, 0.8), "micro_batch": 2}
    examples, ours, theirs = rows(4), student(), student()
    log = sft(ours, tokenizer(), sft_stage(**(told | options)), examples)
    groups = [
        {
            "params": [p],
            "weight_decay": 0.3 * (p.dim() == 2 and not n.endswith(("A_log", "dt_bias", ".D"))),
        }
        for n, p in theirs.named_parameters()
    ]
    adam = torch.optim.AdamW(groups, betas=(0.7, 0.8))
    losses = []
    for step in range(5):
        said = []
        for row in examples:
            ids, n = framed(row)
            logits = theirs(ids, use_cache=False).logits[0, :-1]
            said.append(F.cross_entropy(logits, ids[0, 1:], reduction="none")[n - 1 :])
        loss = torch.cat(said).mean()
        losses.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        factor = 1.0 if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 4))
        for group in adam.param_groups:
            group["lr"] = 3e-3 * factor
        adam.step()
        adam.zero_grad()
    assert [loss for _, loss in log.losses] == pytest.approx(losses, rel=1e-4)
    for (name, got), (_, p) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        # Adam divides by the size of a gradient, which magnifies the last bits of a small one.
        torch.testing.assert_close(got, p, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_steps_equal_a_loop_written_by_hand() -> None:
    check_steps_by_hand()


@pytest.mark.parametrize("fault", [{"weight_decay": 0.0}, {"betas": (0.7, 0.99)}, {"clip": 0.0}])
def test_steps_that_differ_are_seen(fault) -> None:
    with pytest.raises(AssertionError):
        check_steps_by_hand(**fault)


def test_every_step_is_whole_and_every_row_has_its_turn() -> None:
    turns = [*chat_steps.Turns(7, 4, 5, seed=3)]
    assert len(turns) == len(chat_steps.Turns(7, 4, 5, seed=3)) == 20
    assert sorted(turns[:7]) == sorted(turns[7:14]) == [*range(7)] and turns[:7] != turns[7:14]
    assert turns != [*chat_steps.Turns(7, 4, 5, seed=4)]
    assert turns[:8] == [*chat_steps.Turns(7, 4, 2, seed=3)]  # more steps change none before
    twice = [*chat_steps.Turns(7, 4, 5, seed=3, repeats=2)]
    assert twice[:4] == twice[4:8] == turns[:4] and len(twice) == 40


def test_pairs_weigh_alike_however_a_step_is_divided(monkeypatch) -> None:
    def losses(micro_batch: int) -> list[float]:
        stage = dpo_stage(batch=2, micro_batch=micro_batch, steps=2, beta=0.5)
        log = dpo(student(), tokenizer(), stage, pairs(3), teacher=teacher())
        return [loss for _, loss in log.losses]

    assert losses(1) == pytest.approx(losses(2), rel=1e-5)
    # A last step of what is left over: its one pair counted as two, or as one.
    monkeypatch.setattr(chat_steps.Turns, "__iter__", lambda self: iter([0, 1, 2]))
    monkeypatch.setattr(chat_steps.Turns, "__len__", lambda self: 3)
    stage = dpo_stage(batch=3, micro_batch=3, steps=1, beta=0.5)
    whole = dpo(student(), tokenizer(), stage, pairs(3), teacher=teacher()).losses[0][1]
    assert sum(losses(2)) / 2 != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_policy_products_run_in_the_stages_type(dtype) -> None:
    """TRL goes round what accelerate puts about a model's forward pass."""
    model, seen = student(), set()
    model.model.layers[0].register_forward_hook(
        lambda *_: seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    )
    on_policy(model, tokenizer(), on_policy_stage(dtype=dtype), rows(4), teacher=teacher())
    assert seen == {(grad, dtype == "bfloat16") for grad in (False, True)}


# What is left as it was.


def test_what_moves_and_what_stays() -> None:
    model, names = student(), [f"model.layers.0.mixer.{n}" for n in ("A_log", "out_proj.weight")]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate()
    config = model.config.to_dict()
    stage = sft_stage(steps=2, lr=1e-2, checkpointing=True)
    log = sft(model, tokenizer(), stage, rows(), moving=names)
    assert log.stage == "sft" and log.tokens > 0 and log.skipped == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name
        assert parameter.requires_grad and parameter.grad is None
    assert_same(torch.get_rng_state(), states[0], "exact")
    assert random.getstate() == states[1]
    assert model.config.to_dict() == config and not model.training
    assert not {"forward", "_original_forward"} & model.__dict__.keys()


def test_a_stage_leaves_nothing_for_the_next() -> None:
    """Under autocast too, which accelerate gives a model only once."""
    one, other = student(), student()
    sft(one, tokenizer(), sft_stage(dtype="bfloat16", lr=1e-3), rows())
    other.load_state_dict(one.state_dict())
    stage = dpo_stage(dtype="bfloat16")
    after, alone = (dpo(m, tokenizer(), stage, pairs(), teacher=teacher()) for m in (one, other))
    assert after.losses == alone.losses
    wide = dpo(other, tokenizer(), dpo_stage(), pairs(), teacher=teacher())
    assert wide.losses != alone.losses


def test_short_masters_are_refused_and_products_may_be_short() -> None:
    with pytest.raises(TypeError, match="float32 master"):
        sft(student().bfloat16(), tokenizer(), sft_stage(), rows())
    model = student()
    got = first_loss(sft(model, tokenizer(), sft_stage(dtype="bfloat16"), rows()))
    want = cross_entropy(model, rows())
    assert got == pytest.approx(want, rel=2e-2) and got != pytest.approx(want, rel=1e-6)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_products_are_those_of_accelerate_which_is_not_told(kind, monkeypatch) -> None:
    """It would shorten parameters that are shared out."""
    told, above = {"dtype": "bfloat16", "lr": 1e-2, "steps": 2}, teacher()
    honest, seen = chat_steps.Run.trainer, []

    def watched(self, *args, **options):
        made = honest(self, *args, **options)
        seen.append((made.args.bf16, made.accelerator.mixed_precision))
        return made

    monkeypatch.setattr(chat_steps.Run, "trainer", watched)

    def losses():
        if kind == "dpo":
            return dpo(student(), tokenizer(), dpo_stage(**told), pairs(), teacher=above).losses
        stage = sft_stage(**told, kl=0.5)
        return sft(student(), tokenizer(), stage, rows(), teacher=above).losses

    def tell(self, *args, **options):
        return arguments(self, *args, **options | {"bf16": True})

    ours, arguments = losses(), Place.arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "arguments", tell)
        patch.setattr(chat_steps._Steps, "computing", lambda self: self.accelerator.autocast())
        assert ours == losses()
    assert seen == [(False, "no"), (True, "bf16")]
    whole = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr(chat_steps._Steps, "computing", lambda _: whole)
    assert ours != losses()


def test_budgets() -> None:
    def steps(**options) -> int:
        stage = sft_stage(**({"steps": None, "batch": 2} | options))
        return chat_steps.Run(student(), stage, 0, Place(), Path())._steps(7, 700)

    assert steps(epochs=2) == 7 and steps(steps=5) == 5 and steps() == 4
    assert steps(tokens=700) == 4 and steps(tokens=1) == 1 and steps(tokens=7000) == 35


# Mistakes.


@pytest.mark.parametrize(
    ("run", "stage", "given", "said"),
    [
        (sft, sft_stage(), [], "there are no rows"),
        (sft, sft_stage(length=16), rows(), "row 0: the prompt leaves no room"),
        (sft, sft_stage(length=33), rows(9), "row 2: the prompt leaves no room"),
        (sft, sft_stage(), [Row("row 3", {"txet": "a"})], "row 3: .*'txet'"),
        (sft, sft_stage(length=8, too_long="skip"), rows(), "all 6 rows are too long"),
        (dpo, dpo_stage(reference="student"), [], "there are no rows"),
        (dpo, dpo_stage(), pairs(), "no teacher for its reference"),
        (
            dpo,
            dpo_stage(reference="student"),
            [*pairs(), Row("row 9", {"prompt": "a", "chosen": "b", "rejected": "b"})],
            "row 9: .*do not differ",
        ),
        (
            dpo,
            dpo_stage(reference="student", length=32),
            [Row("row 2", {"prompt": "abc", "chosen": "b" * 40, "rejected": "b" * 50})],
            "row 2: .*do not differ within length = 32",
        ),
        (dpo, dpo_stage(reference="student", length=16), pairs(), "row 0: the prompt leaves"),
        (sft, sft_stage(batch=6, micro_batch=3), [Row("row 1", {"prompt": "a"})], "row 1: holds"),
    ],
)
def test_mistakes_are_named_before_the_first_step(run, stage, given, said, monkeypatch) -> None:
    monkeypatch.setattr(chat_steps.Run, "log", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(UserError, match=said):
        run(student(), tokenizer(), stage, given)


def test_pairs_that_differ_too_late_may_be_left_out() -> None:
    late = Row("row 9", {"prompt": "abc", "chosen": "b" * 40, "rejected": "b" * 50})
    stage = dpo_stage(length=32, too_long="skip", steps=None, epochs=1)
    found = chat.frame(stage, tokenizer(), [*pairs(), late], [END], 257)
    assert sorted(len(row["chosen_ids"]) for row in found.rows) == [5, 9, 9, 9]
    same = Row("row 3", {"prompt": "abc", "chosen": "b", "rejected": "b"})
    with pytest.raises(UserError, match=r"row 3: .*do not differ"):
        chat.frame(stage, tokenizer(), [*pairs(), same], [END], 257)


def test_models_that_do_not_fit(monkeypatch) -> None:
    other = tiny_model(["attention"], vocab_size=99)
    with pytest.raises(UserError, match="the teacher has 99 words and the student 257"):
        dpo(student(), tokenizer(), dpo_stage(), pairs(), teacher=other)
    with pytest.raises(UserError, match="no chat template"):
        sft(student(), tokenizer(None), sft_stage(), rows())
    with pytest.raises(UserError, match="the prompt is empty"):
        given = [Row("row 0", {"prompt": " "})]
        on_policy(student(), tokenizer(), on_policy_stage(), given, teacher=teacher())
    endless = byte_tokenizer(end=False)
    endless.chat_template = TEMPLATE
    with pytest.raises(UserError, match="names no token that ends a text"):
        on_policy(student(), endless, on_policy_stage(), rows(), teacher=teacher())
    monkeypatch.setattr(chat_steps.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package 'trl'.*tamba\[chat\]"):
        sft(student(), tokenizer(), sft_stage(), rows())


@pytest.mark.parametrize("kind", ["sft", "dpo", "on_policy"])
def test_words_that_the_model_lacks(kind, monkeypatch) -> None:
    """A row with one is named; padding, which nothing reads, is another token then."""
    run, told, given = {
        "sft": (sft, sft_stage(), rows()),
        "dpo": (dpo, dpo_stage(), pairs()),
        "on_policy": (on_policy, on_policy_stage(), rows()),
    }[kind]
    models = [tiny_model(["attention"] * 2, seed=seed, vocab_size=257) for seed in (0, 5)]
    models[0].generation_config.eos_token_id = END
    padded = tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert padded.pad_token_id == 257
    log = run(models[0], padded, told, given, teacher=models[1])
    assert log.losses == run(models[0], tokenizer(), told, given, teacher=models[1]).losses
    monkeypatch.setattr(chat_steps.Run, "log", lambda *_: pytest.fail("a step was taken"))
    given[2].fields["prompt"] += "<pad>"  # type: ignore[index]
    with pytest.raises(UserError, match=r"row 2: holds token number 257, .* model has 257 words"):
        run(models[0], padded, told, given, teacher=models[1])


# Reliability.


def stages(kind: str, steps: int = 6) -> Callable[[TambaForCausalLM, Place], object]:
    """Some steps of a stage."""
    told = {"steps": steps, "lr": 3e-3, "batch": 2, "micro_batch": 1}
    runs: dict[str, Callable[[TambaForCausalLM, Place], object]] = {
        "sft": lambda model, place: sft(
            model, tokenizer(), sft_stage(**told), rows(), seed=3, place=place
        ),
        "dpo": lambda model, place: dpo(
            model, tokenizer(), dpo_stage(**told, reference="student"), pairs(), seed=3, place=place
        ),
        "on_policy": lambda model, place: on_policy(
            model,
            tokenizer(),
            on_policy_stage(**told),
            rows(),
            teacher=teacher(),
            seed=3,
            place=place,
        ),
    }
    return runs[kind]


@pytest.mark.parametrize("kind", ["sft", "dpo", "on_policy"])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "KEEP_SECONDS", 0.0)
    whole, cut = student(), student()
    log = stages(kind)(whole, Place())
    honest = trainer._Watch.on_step_end

    def dies(self, args, state, control, **told):
        honest(self, args, state, control, **told)
        if state.global_step == 4:  # after the checkpoint of step 3
            raise KeyboardInterrupt

    place = Place(tmp_path / "kept")
    with monkeypatch.context() as inside:
        inside.setattr(trainer._Watch, "on_step_end", dies)
        with pytest.raises(KeyboardInterrupt):
            stages(kind)(cut, place)
    assert [p.name for p in (tmp_path / "kept").glob("checkpoint-*")] == ["checkpoint-3"]
    fresh = student()
    again = stages(kind)(fresh, place)
    assert again.losses == log.losses
    for (name, want), got in zip(whole.named_parameters(), fresh.parameters(), strict=True):
        assert_same(got, want, "exact", name)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "KEEP_SECONDS", 0.0)
    honest, saved = trainer.save_file, []

    def full(tensors, path):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        honest(tensors, path)

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        stages("sft")(student(), Place(tmp_path / "kept"))
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["checkpoint-2"]


def test_steps_of_no_number_move_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "MOST_SKIPPED", 3)
    honest, bad = chat_steps._SftSteps.compute_loss, {2, 3}
    calls = []

    def poisoned(self, *args, **options):
        calls.append(0)
        loss = honest(self, *args, **options)
        return loss * math.nan if (len(calls) - 1) // 2 in bad else loss

    monkeypatch.setattr(chat_steps._SftSteps, "compute_loss", poisoned)
    model = student()
    log = stages("sft")(model, Place())
    assert log.skipped == 2
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    # A gradient of no number beside a loss that is one is counted too.
    norms, right = [], chat_steps._Steps._norm_of
    bad.clear()

    def too_large(*args, **options):
        norms.append(0)
        return right(*args, **options) * (math.inf if len(norms) == 2 else 1.0)

    with monkeypatch.context() as once:
        once.setattr(chat_steps._Steps, "_norm_of", too_large)
        assert stages("sft")(student(), Place()).skipped == 1
    calls.clear()
    bad.update(range(10))
    with pytest.raises(UserError, match=r"in 3 steps, up to step 3; .*not-a-number-3") as raised:
        stages("sft")(student(), Place(tmp_path / "kept"))
    assert "lower the learning rate" in str(raised.value)
    assert (tmp_path / "not-a-number-3.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "on_policy"])
def test_a_killed_process_goes_on(kind, tmp_path) -> None:
    """``kill -9`` in the middle, then the same command: the same bits."""
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
import os, signal, torch
from safetensors.torch import save_file
import test_train_chat as t
t.trainer.KEEP_SECONDS = 0.0
if len(sys.argv) > 1:
    honest = t.chat_steps._Steps._save_checkpoint
    def dies(self, *args):
        honest(self, *args)
        if self.state.global_step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
    t.chat_steps._Steps._save_checkpoint = dies
model = t.student()
t.stages({kind!r}, 10)(model, t.Place(t.Path("kept")))
save_file({{n: p.detach() for n, p in model.named_parameters()}}, "done.safetensors")
"""

    def run(folder: Path, *told: str) -> int:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", script, *told]
        return subprocess.run(command, cwd=folder, env=os.environ, check=False).returncode

    from safetensors.torch import load_file

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "cut", "5") == -signal.SIGKILL
    assert run(tmp_path / "cut") == 0
    whole, cut = (load_file(tmp_path / n / "done.safetensors") for n in ("whole", "cut"))
    for name, want in whole.items():
        assert_same(cut[name], want, "exact", name)


# Recipes.

RECIPE = """
name = "small"
[teacher]
path = "teacher"
[build]
plan = ["keep 0", "convert 1"]
[[train]]
stage = "sft"
data = ["sft.jsonl"]
steps = 2
batch = 2
lr = 1e-3
length = 64
dtype = "float32"
train = "mixers"
[[train]]
stage = "dpo"
data = ["dpo.jsonl"]
epochs = 1
batch = 2
lr = 1e-3
length = 64
dtype = "float32"
[[train]]
stage = "on_policy"
data = ["sft.jsonl"]
steps = 1
batch = 2
lr = 1e-3
length = 64
new_tokens = 4
dtype = "float32"
"""


def write_rows(path: Path, examples: list[Row]) -> None:
    path.write_text("".join(json.dumps(dict(r.fields)) + "\n" for r in examples))


def test_stages_of_a_recipe(tmp_path, monkeypatch) -> None:
    made = tiny_model(["attention"] * 2, vocab_size=257)
    made.save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    with pytest.raises(UserError, match=r"train.0.data\[0\]: no such file.*sft.jsonl"):
        tamba.build(recipe, tmp_path / "built")
    write_rows(tmp_path / "sft.jsonl", rows())
    write_rows(tmp_path / "dpo.jsonl", [*pairs(), Row("", {"prompt": "a", "chosen": "b"})])
    tamba.build(recipe, tmp_path / "built")
    # What is wrong with the second stage is said before the first begins.
    with monkeypatch.context() as inside:
        inside.setattr(chat_steps.Run, "log", lambda *_: pytest.fail("a step was taken"))
        with pytest.raises(UserError, match=r"dpo.jsonl:5: holds no preference"):
            tamba.train(recipe, tmp_path / "out", student=tmp_path / "built")
    write_rows(tmp_path / "dpo.jsonl", pairs())
    model = student()
    few = RECIPE.replace("epochs = 1", "epochs = 1\nrows = 3").replace("steps = 2", "rows = 4")
    (tmp_path / "few.toml").write_text(few)
    framed = [
        kinds.frame_all(read_recipe(tmp_path / "few.toml", told), model, tokenizer(), done=0)
        for told in ([], ["seed=1"])
    ]
    assert [len(one[0].rows) for one in framed] == [4, 4] and len(framed[0][1].rows) == 3
    orders = [[row["input_ids"] for row in one[0].rows] for one in framed]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    logs = tamba.train(recipe, tmp_path / "out", student=tmp_path / "built")
    assert [log.stage for log in logs] == ["sft", "dpo", "on_policy"]
    assert all(math.isfinite(loss) for log in logs for _, loss in log.losses)
    trained, _ = tamba.load(str(tmp_path / "out"))
    before, _ = tamba.load(str(tmp_path / "built"))
    moved = [
        n for n, p in trained.named_parameters() if not torch.equal(p, before.get_parameter(n))
    ]
    assert len(moved) == len(list(before.parameters()))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("epochs = 1", "steps and epochs are both given"),
        ("micro_batch = 3", "micro_batch = 3 does not divide"),
        ("packd = true", "unknown key; did you mean 'packed'"),
        ("ce = 0.0", "kl and ce are both 0"),
        ("train = 'heads'", "train"),
    ],
)
def test_sections_are_strict(line, said, tmp_path) -> None:
    told = RECIPE[: RECIPE.index('[[train]]\nstage = "dpo"')].replace('train = "mixers"\n', "")
    (tmp_path / "recipe.toml").write_text(f"{told}{line}\n")
    with pytest.raises(UserError, match=said):
        read_recipe(tmp_path / "recipe.toml")


def test_a_recipe_goes_all_the_way_with_conversations(tmp_path) -> None:
    tiny_model(["attention"] * 2, vocab_size=257).save_pretrained(tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    for name, some in (("chats", rows()), ("pairs", pairs())):
        lines = "".join(json.dumps(row.fields) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "text.txt").write_text("measured on this text alone. " * 20)
    (tmp_path / "recipe.toml").write_text(
        """
        name = "talks"
        teacher.path = "teacher"
        data = {heldout = ["text.txt"], length = 32}
        build.plan = ["keep 0", "convert 1"]
        evaluate = {tokens = 64, prompts = ["hi"], new_tokens = 4}
        output = {report_to = [], html = false}
        [[train]]
        stage = "sft"
        data = ["chats.jsonl"]
        steps = 2
        batch = 2
        lr = 1e-3
        packed = true
        [[train]]
        stage = "dpo"
        data = ["pairs.jsonl"]
        steps = 1
        batch = 2
        lr = 1e-3
        """
    )
    tamba.run(tmp_path / "recipe.toml", tmp_path / "out")
    stages = json.loads((tmp_path / "out" / "student" / "train.json").read_text())["stages"]
    assert [s["stage"] for s in stages] == ["sft", "dpo"] and not any(s["skipped"] for s in stages)
    assert stages[1]["losses"][0][1] > 0
    assert (tmp_path / "out" / "report.json").is_file()
