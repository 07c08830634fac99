"""Our log-likelihoods beside those of lm-eval's own wrapper: the same items, and what each costs.

    python benchmarks/lm_eval_parity.py MODEL --data lambada=FILE --data winogrande=FILE --out FILE
    python benchmarks/lm_eval_parity.py MODEL --tiny --data ...     (random weights, its tokenizer)

Rows `parity_TASK`: lm-eval's task asks `HarnessLM` and `HFLM`, in turns, the same requests in one
process. Said are the items whose score differs, the largest difference of a log-likelihood, and
seconds that the process computed (on a busy machine those of the clock say little). With
`--transformers` HFLM runs transformers' own class of the model, read again from a folder or GGUF;
without it, ours. `--tiny` answers only whether the items agree, for whole data sets in minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

import tamba
from tamba.artefact import versions, write_file
from tamba.evaluate.harness import HarnessLM, prepare
from tamba.evaluate.measure import Options, Request, Subject
from tamba.model.config import AttentionSpec, BlockSpec, Mamba2Spec, MLPSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM

TOKENS_AT_ONCE = 2048


def tiny_hybrid(vocab_size: int, positions: int) -> TambaForCausalLM:
    """One attention and one Mamba-2 layer, random, with weights large enough to have an opinion."""
    attention = AttentionSpec(n_heads=2, n_kv_heads=1, head_dim=16, rotary_dim=16)
    mamba2 = Mamba2Spec(n_heads=2, head_dim=16, d_state=16, n_groups=1)
    mlp = MLPSpec(d_mlp=64)
    config = TambaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        blocks={
            "a": BlockSpec(mixer=attention, mlp=mlp).to_dict(),
            "m": BlockSpec(mixer=mamba2, mlp=mlp).to_dict(),
        },
        layers=["a", "m"],
        initializer_range=0.25,
        max_position_embeddings=positions,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return TambaForCausalLM(config).eval()


def asked(lm: Any, tasks: Any, limit: int | None) -> tuple[dict[str, Any], float]:
    """By item, its metrics and log-likelihoods; and the seconds that the process computed."""
    begun = time.process_time()
    found = evaluate(lm, tasks, limit=limit, bootstrap_iters=0)
    seconds = time.process_time() - begun
    items = {}
    for name, samples in found["samples"].items():
        for sample in samples:
            items[f"{name}/{sample['doc_id']}"] = {
                "scores": {m: sample[m] for m in sample["metrics"] if m.startswith("acc")},
                "logp": [float(r[0]) for r in sample["filtered_resps"]],
            }
    return items, seconds


def main() -> None:
    """Run the rows that the arguments name and print each as a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", action="append", required=True, metavar="TASK=FILE")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16, help="of HFLM")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--transformers", metavar="FOLDER", help="the model for HFLM")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, tokenizer = tamba.load(options.model, dtype="float32")
    if options.tiny:
        model = tiny_hybrid(model.config.vocab_size, model.config.max_position_embeddings)
    theirs = model
    if options.transformers:
        folder, _, file = options.transformers.partition(":")
        extra = {"gguf_file": file} if file else {}
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra).eval()
    subject = Subject("student", options.model, model, tokenizer, "", TOKENS_AT_ONCE)
    rows = []
    for given in options.data:
        task, _, file = given.partition("=")
        request = Request(task, (file,), {"student": model.config}, tokenizer, Options())
        tasks = prepare(request)._load()
        seconds: dict[str, list[float]] = {"ours": [], "HFLM": []}
        for _ in range(options.rounds):
            got, taken = asked(HarnessLM(subject), tasks, options.limit)
            seconds["ours"].append(taken)
            peer = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=options.batch_size)
            want, taken = asked(peer, tasks, options.limit)
            seconds["HFLM"].append(taken)
        pairs = [(got[name], item) for name, item in want.items()]
        off = [abs(a - b) for g, w in pairs for a, b in zip(g["logp"], w["logp"], strict=True)]
        ratios = [t / o for o, t in zip(seconds["ours"], seconds["HFLM"], strict=True)]
        rows.append(
            {
                "row": f"parity_{task}",
                "items": len(want),
                "items_that_differ": sum(g["scores"] != w["scores"] for g, w in pairs),
                "accuracy": sum(w["scores"]["acc"] for _, w in pairs) / len(pairs),
                "largest_difference_nats": max(off),
                "cpu_seconds": {side: median(taken) for side, taken in seconds.items()},
                "ratio": median(ratios),
                "ratios": ratios,
                "model": "tiny random hybrid" if options.tiny else Path(options.model).name,
                "peer": "transformers" if options.transformers else "the same model",
                "batch_size": options.batch_size,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        about = {
            "versions": versions() | {"lm_eval": version("lm_eval")},
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
            "rows": rows,
        }
        write_file(options.out, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
