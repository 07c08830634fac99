"""Other people's programs on the checkpoint that `make demo` leaves; `make demo && make slow`.

`DEMO` names another folder that `tamba run recipes/demo.toml --out FOLDER` has made.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import tamba  # noqa: F401  (registers the Auto classes)
from compare import assert_same

DEMO = Path(os.environ.get("DEMO", Path(__file__).parents[1] / "demo"))
STUDENT = DEMO / "student"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STUDENT.is_dir(), reason="`make demo` was not run here"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STUDENT)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)


def test_generate_answers_as_the_report_says(model, tokenizer):
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in text
    assert text.startswith(json.loads((DEMO / "report.json").read_text())["answer"][:20])


def test_the_report_holds_what_it_must():
    report = json.loads((DEMO / "report.json").read_text())
    quality = report["perplexity"]
    assert quality["ratio"] == pytest.approx(quality["student"] / quality["teacher"])
    assert quality["ratio"] <= 1.15
    assert quality["tokens"] > 10_000
    assert report["layers"]["total"] == 30
    assert report["layers"]["converted"] >= 10
    assert {"seconds", "answer", "versions"} <= set(report)


def test_pipeline_in_a_batch_equals_one_by_one():
    pipe = pipeline("text-generation", model=str(STUDENT), device="cpu")
    prompts = [QUESTION, [{"role": "user", "content": "Name three colours, please."}]]
    settings = {"max_new_tokens": 8, "do_sample": False}
    batched = pipe(prompts, batch_size=2, **settings)
    assert batched == [pipe(prompt, **settings) for prompt in prompts]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_lora_learns_a_text_and_merges(model, tokenizer):
    peft = pytest.importorskip("peft")
    ids = tokenizer("The zebra of Quito sells nine purple umbrellas.", return_tensors="pt")
    ids = ids.input_ids
    tuned = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", r=4)
    )
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(6):
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    tuned.double()  # thirty layers of float32 magnify that weights are rounded once more
    with torch.no_grad():
        want = tuned(ids).logits
        assert_same(tuned.merge_and_unload()(ids).logits, want, "fp64")


def test_lm_eval_scores_a_task(model, tokenizer, tmp_path):
    """lm-eval's own wrapper and task machinery, on a task of four lines."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    cases = [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Egypt", "Cairo")]
    capitals = [city for _, city in cases]
    lines = [{"country": c, "choices": capitals, "gold": i} for i, (c, _) in enumerate(cases)]
    data = tmp_path / "capitals.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "The capital of {{country}} is",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    results = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=TaskManager())
    got = results["results"]["capitals"]["acc,none"]

    def score(country: str, city: str) -> float:
        start = tokenizer(f"The capital of {country} is", return_tensors="pt").input_ids
        ids = tokenizer(f"The capital of {country} is {city}", return_tensors="pt").input_ids
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1)
        picked = logp.gather(1, ids[0, 1:, None])[start.shape[1] - 1 :]
        return float(picked.sum())

    right = [max(capitals, key=lambda city: score(c, city)) == want for c, want in cases]
    assert got == pytest.approx(sum(right) / 4)
    assert got >= 0.75
