"""The registry, and the verb over several suites: one run, resumed, whatever fails."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from models import tiny_config, tiny_model
from tamba.errors import UserError
from tamba.evaluate import SETS, SUITES, cache_bytes, evaluate, memory, speed, windows
from tamba.evaluate.measure import Models, Options, Request, Subject
from tamba.evaluate.memory import break_even
from tamba.evaluate.suites import assign_data, find_suites
from tamba.model.modeling import TambaForCausalLM
from tamba.report import read_record
from tamba.store import Store
from texts import byte_tokenizer, document


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suites")
    for name, stack in (
        ("teacher", ["attention", "attention"]),
        ("student", ["mamba2_gqa", "attention"]),
        ("other", ["attention", "attention"]),
    ):
        torch.manual_seed(len(name) + ord(name[0]))
        TambaForCausalLM(tiny_config(stack, vocab_size=257)).save_pretrained(folder / name)
        byte_tokenizer(chat=True).save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n\n".join(document(i) for i in range(3)))
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    (folder / "preference.jsonl").write_text(json.dumps(pair) + "\n")
    return folder


def test_names_and_sets():
    found = find_suites(["e-tamba", "winogrande", "winogrande@5"])
    assert [s.name for s, _ in found] == ["lambada", "winogrande", "winogrande@5"]
    assert [shots for _, shots in found] == [None, None, 5]
    assert all(find_suites([name]) for name in (*SUITES, *SETS))
    with pytest.raises(UserError, match="did you mean 'phonebook'"):
        find_suites(["phone-book"])


def test_data_finds_its_suite():
    names = ["ppl", "kl", "lambada", "gsm8k@0"]
    got = assign_data(
        names,
        ["a.txt", "x/lambada.jsonl", "gsm8k=b", "gsm8k.train=c", "hf://datasets/o/n/f=1.jsonl"],
        ["ppl", "kl", "position"],
    )
    text = ("a.txt", "hf://datasets/o/n/f=1.jsonl")
    assert got == {
        "ppl": {"": text},
        "kl": {"": text},
        "lambada": {"": ("x/lambada.jsonl",)},
        "gsm8k": {"": ("b",), "train": ("c",)},
    }


def test_one_run_of_several_suites_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    def call():
        return evaluate(
            folder / "student",
            [folder / "text.txt", f"preference={folder / 'preference.jsonl'}"],
            suites=["ppl", "kl", "copy", "preference"],
            against=folder / "teacher",
            out=tmp_path / "out",
            length=64,
            lengths=(4, 6),
            cases=2,
            dtype="float64",
        )

    first = call()
    assert list(first.suites) == ["ppl", "kl", "copy", "preference"]
    assert set(first.suites["copy"].scores) == {"student", "teacher"}
    assert first.perplexity.kl == first.suites["kl"].scores["student"]["kl"].value
    assert read_record(tmp_path / "out" / "report.json") == first
    for name in ("evaluate.scoring", "decoding"):
        monkeypatch.setattr(sys.modules[f"tamba.{name}"], "TambaCache", None)
    again = call()  # nothing is left to compute
    assert again.suites["copy"].scores == first.suites["copy"].scores
    assert again.suites["preference"].scores == first.suites["preference"].scores


def test_what_is_compared_belongs_to_both_models(folder, tmp_path, monkeypatch):
    """Beside another teacher in the same folder, nothing of the first one is taken over."""

    def kl(teacher, out):
        found = evaluate(
            folder / "student",
            folder / "text.txt",
            suites=["kl"],
            against=folder / teacher,
            out=out,
            length=64,
            limit=3,
            dtype="float64",
        )
        return found.suites["kl"].scores["student"]["kl"].value

    def check(out):
        assert kl("teacher", out) == kl("teacher", tmp_path / "apart")
        assert kl("other", out) == kl("other", tmp_path / "other")

    check(tmp_path / "one")
    # Items that are named by the student alone are those of whichever teacher came first.
    monkeypatch.setattr(
        windows._Divergence,
        "sums",
        lambda self, both, n, store, *rest, real=windows._Divergence.sums: real(
            self, both, n, Store(store.path.with_name("student.jsonl")), *rest
        ),
    )
    with pytest.raises(AssertionError):
        check(tmp_path / "two")


@pytest.mark.parametrize(
    ("where", "said"), [("here", "suite copy: here: is broken"), ("suite copy", "suite copy: is")]
)
def test_what_fails_takes_nothing_with_it(folder, tmp_path, monkeypatch, where, said):
    def broken(self, models, stores):
        raise UserError(where, "is broken", "mend it")

    monkeypatch.setattr("tamba.evaluate.recall.RecallMeasure.run", broken)
    with pytest.raises(UserError, match=f"^{said}"):
        evaluate(
            folder / "student",
            folder / "text.txt",
            suites=["copy", "ppl"],
            out=tmp_path / "out",
            length=64,
            lengths=(4,),
        )
    found = read_record(tmp_path / "out" / "report.json")
    assert found.suites["copy"].problem == f"{where}: is broken; mend it"
    assert found.suites["ppl"].scores["student"]["perplexity"].value > 1


def test_running_out_of_memory_names_the_way_out(folder, tmp_path, monkeypatch):
    def full(self, models, stores):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(windows._Perplexity, "run", full)
    with pytest.raises(UserError, match="--tokens-at-once 512") as caught:
        evaluate(
            folder / "student",
            folder / "text.txt",
            suites=["ppl", "copy"],
            out=tmp_path / "out",
            length=64,
            lengths=(4,),
            cases=1,
        )
    assert "suite ppl" in str(caught.value) and "is kept" in str(caught.value)
    assert read_record(tmp_path / "out" / "report.json").suites["copy"].problem is None


def models():
    found = {}
    for role, stack in (("student", "mamba2"), ("teacher", "attention")):
        found[role] = Subject(role, role, tiny_model(stack), byte_tokenizer(), role, 100)
    return Models(found["student"], found["teacher"])


def sweep(name, **options):
    config = {"student": tiny_config("mamba2")}
    return Request(name, (), config, byte_tokenizer(), Options(**options))


def test_memory_by_cause():
    both = models()
    got = memory.prepare(sweep("memory", contexts=(16, 32), batches=(1, 2)))
    rows = got.run(both, lambda _: Store()).rows
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        model = (both.student if row["role"] == "student" else both.teacher).model
        weights = sum(p.numel() * 4 for p in model.parameters())
        cache = row["batch"] * cache_bytes(model.config, row["context"], bytes_per_value=4)
        assert row["weights"] == weights
        assert row["kv"] + row["state"] == cache
        assert row["floor"] == weights + cache + row["batch"] * model.config.vocab_size * 4
    assert {row["kv"] for row in rows if row["role"] == "student"} == {0}


def test_speed_and_where_it_breaks_even(monkeypatch):
    monkeypatch.setattr(speed, "REPEATS", 2)
    # A student that is slower below 32 tokens and faster from there on.
    seconds = {("student", 16): 2.0, ("student", 32): 1.0, ("student", 64): 1.0}
    monkeypatch.setattr(
        speed, "_seconds", lambda s, context, batch: (1.0, seconds.get((s.role, context), 1.5))
    )
    got = speed.prepare(sweep("speed", contexts=(16, 32, 64))).run(models(), lambda _: Store())
    row = next(r for r in got.rows if r["role"] == "student" and r["context"] == 32)
    assert row["decode_tokens_per_second"] == speed.DECODED
    assert row["prefill_tokens_per_second"] == 32
    scores = got.scores["student"]
    assert scores["break_even_decode_tokens"].value == 32
    assert scores["break_even_prefill_tokens"].value == 16
    monkeypatch.undo()
    assert all(s > 0 for s in speed._seconds(models().student, 8, 2))


def test_running_out_of_memory_is_a_row(monkeypatch):
    """The models' other points are measured, and where the teacher alone stops the student wins."""
    both = models()
    full = both.teacher.model.model
    real = type(full).forward

    def small(self, input_ids, **options):
        if self is full and input_ids.shape[1] >= 32:
            raise torch.OutOfMemoryError
        return real(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(full), "forward", small)
    rows = memory.prepare(sweep("memory", contexts=(16, 32))).run(both, lambda _: Store()).rows
    notes = [row.get("note") for row in rows]
    assert notes == [None, None, None, "out of memory"] and rows[3]["floor"] > 0
    monkeypatch.setattr(speed, "REPEATS", 1)
    monkeypatch.setattr(speed, "DECODED", 1)
    got = speed.prepare(sweep("speed", contexts=(16, 32))).run(both, lambda _: Store())
    assert [row.get("note") for row in got.rows] == [None, None, None, "out of memory"]
    assert got.scores["student"]["break_even_decode_tokens"].value <= 32
    assert [p.x for p in got.curves["decode_tokens_per_second"].points["teacher"]] == [16]
    swapped = Models(replace(both.teacher, role="student"), replace(both.student, role="teacher"))
    got = speed.prepare(sweep("speed", contexts=(32,))).run(swapped, lambda _: Store())
    assert "break_even_decode_tokens" not in got.scores["student"]


def test_contexts_that_neither_model_runs_decide_nothing():
    def row(role, context, speed):
        found = {"role": role, "context": context, "batch": 1}
        return found | ({"decode_tokens_per_second": speed} if speed else {"note": "out of memory"})

    rows = [row("student", 16, 2.0), row("teacher", 16, 1.0), row("student", 64, 0.0)]
    found = speed._even([*rows, row("teacher", 64, 0.0)], 1)
    assert found["break_even_decode_tokens"].value == 16
    assert "break_even_decode_tokens" not in speed._even([*rows, row("teacher", 64, 1.0)], 1)


def test_a_model_of_few_positions_is_measured_at_them():
    config = {"student": tiny_config("attention", max_position_embeddings=32)}
    request = Request("memory", (), config, byte_tokenizer(), Options())
    assert memory.contexts_for(request, "cpu") == [32]
    assert request.length == 32
    assert replace(request, options=Options(length=16)).length == 16
    assert replace(request, configs={"student": tiny_config("mamba2")}).length == 1024


def test_break_even_of_memory_by_counting():
    student, teacher = tiny_config("mamba2"), tiny_config("attention")
    weights = (5000, 1000)
    want = next(
        n
        for n in range(10_000)
        if weights[0] + cache_bytes(student, n) < weights[1] + cache_bytes(teacher, n)
    )
    assert break_even(student, teacher, weights) == want
    # Wider values are reached sooner.
    assert break_even(student, teacher, weights, bytes_per_value=4) < want
    assert break_even(teacher, teacher, (2, 1)) is None
    assert break_even(teacher, teacher, (1, 2)) == 0
