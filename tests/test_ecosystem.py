"""Other people's programs run on our checkpoints after `import tamba`: pipelines, PEFT, lm-eval."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import tamba  # noqa: F401  (registers the Auto classes)
from compare import assert_same
from models import random_ids, tiny_model
from tokens import character_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid")
    tiny_model("mixed").save_pretrained(path)
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # pipelines ask for one before they make batches
    tokenizer.save_pretrained(path)
    return path


def test_text_generation_pipeline(folder):
    pipe = pipeline("text-generation", model=str(folder), device="cpu")
    prompts = ["abc", "a longer prompt here"]
    batched = pipe(prompts, max_new_tokens=6, do_sample=False, batch_size=2)
    for prompt, got in zip(prompts, batched, strict=True):
        alone = pipe(prompt, max_new_tokens=6, do_sample=False)
        assert got == alone and got[0]["generated_text"].startswith(prompt)


# PEFT reads a name that newer transformers deprecate.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_peft_lora_trains_and_merges(folder):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = random_ids(2, 10)
    want = model(ids).logits
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    assert_same(tuned(ids).logits, want, "exact")
    adapted = {
        n.split(".lora_A")[0].rsplit(".", 1)[-1]
        for n, _ in tuned.named_parameters()
        if "lora_A" in n
    }
    assert {"q_proj", "in_proj", "x_proj", "dt_proj", "out_proj", "up_proj"} <= adapted
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        unused = [n for n, p in tuned.named_parameters() if "lora_B" in n and not p.grad.any()]
        assert not unused, unused
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        before = tuned(ids).logits
        assert_same(tuned.merge_and_unload()(ids).logits, before, "decode")


def test_lm_eval_wrapper_gives_our_likelihoods(folder):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    pairs = [("abc de", "f gh"), ("x", "yz"), ("a long context of words", " 123")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    got = lm.loglikelihood(requests, disable_tqdm=True)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    for (context, continuation), (score, _) in zip(pairs, got, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt").input_ids
        start = len(tokenizer(context).input_ids)
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        want = logp[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]].sum()
        assert_same(torch.tensor(score), want, "decode")
    text = lm.generate_until(
        [
            Instance(
                "generate_until",
                {},
                ("abc", {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}),
                0,
            )
        ],
        disable_tqdm=True,
    )
    assert len(text) == 1 and isinstance(text[0], str)
