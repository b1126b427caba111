"""What each process of test_moe_gemm_ranks runs: models whose experts `effpass.prepare` spread, against whole ones.

moe_ranks_worker.py FOLDER     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; leaves FOLDER/RANK.json
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from decode_step import enliven
from families import CONFIGS, batch, make
from moe_families import LAYERS, MORE

import effpass

CONFIGS.update(MORE)


def recipe(attention: str) -> dict[str, Any]:
    return {"version": 1, "passes": [{"moe_gemm": {"expert_parallel": attention}}]}


def message(call: Any) -> str:
    try:
        call()
    except Exception as error:  # Dynamo wraps what a backend raises
        return str(error)
    return "nothing"


def logits(rank: int) -> dict[str, Any]:
    """Of every family, each rank's own batch or the same one; what is kept of the experts."""
    found = {}
    for family in LAYERS:
        for attention in ("dp", "tp") if family in ("qwen3_moe", "gpt_oss") else ("dp",):
            model = enliven(make(family))
            inputs = batch(9 if attention == "tp" else 9 + 4 * rank)
            with torch.no_grad():
                expected = model(**inputs).logits
                whole = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
                prepared = effpass.prepare(model, recipe(attention))
                got = prepared(**inputs).logits
                for name, weight in prepared.named_parameters():
                    if name.endswith("down_proj") and ".experts." in name:
                        weight.mul_(2)
                felt = prepared(**inputs).logits - expected
            kept = sum(p.numel() for name, p in prepared.named_parameters() if ".experts." in name)
            (entry,) = prepared.effpass_report.passes
            found[f"{family}, {attention}"] = {
                "error": float((got - expected).abs().max()),
                "felt": float(felt.abs().max()),
                "hits": entry.hits,
                "share": kept / whole,
            }
    return found


def compiled(rank: int) -> dict[str, Any]:
    """One graph for several lengths."""
    from torch._dynamo.utils import counters

    model, lengths = enliven(make("qwen3_moe")), (9, 14 + rank, 21)
    counters.clear()
    with torch.no_grad():
        expected = [model(**batch(n), use_cache=False).logits for n in lengths]
        prepared = effpass.optimize(model, recipe("dp"), inner="aot_eager", dynamic=True, fullgraph=True)
        got = [prepared(**batch(n), use_cache=False).logits for n in lengths]
    errors = [float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)]
    return {"error": max(errors), "graphs": counters["stats"]["unique_graphs"]}


def generated(rank: int) -> dict[str, Any]:
    """The same prompts on all ranks, on the decode engine; own ones, by transformers' loop, of own lengths."""
    found: dict[str, Any] = {}
    for attention in ("tp", "dp"):
        model = enliven(make("mixtral"))
        prompt = batch(7, padding=0, seed=rank if attention == "dp" else 0)["input_ids"]
        how: dict[str, Any] = {"max_new_tokens": 6 + (3 * rank if attention == "dp" else 0), "do_sample": False}
        expected = model.generate(prompt, **how)
        prepared = effpass.prepare(model, recipe(attention))
        if attention == "dp":
            how["synced_gpus"] = True
        found[attention] = torch.equal(prepared.generate(prompt, **how), expected)
        found[f"{attention}, engine"] = prepared.effpass_report.generates
    return found


def refused(rank: int) -> dict[str, str]:
    odd = make("mixtral", num_local_experts=3)
    spread = effpass.prepare(make("mixtral"), recipe("tp"))
    normed = make("qwen3_moe")
    normed.model.layers[0].mlp.experts.has_post_expert_norm = True
    prepared = effpass.prepare(normed, recipe("tp"))
    both = {"version": 1, "passes": [{"prefix_kv": {"budget": 0.5}}, {"moe_gemm": {"expert_parallel": "dp"}}]}
    options = {"passes": [{"moe_gemm": {"expert_parallel": "dp"}}], "inner": "eager"}
    with torch.no_grad():
        return {
            "odd": message(lambda: effpass.prepare(odd, recipe("dp"))),
            "dense": message(lambda: effpass.prepare(make("llama"), recipe("dp"))),
            "saved": message(spread.state_dict),
            "beside": message(lambda: effpass.prepare(make("mixtral"), both)),
            "backend": message(lambda: torch.compile(make("mixtral"), backend="effpass", options=options)(**batch(9))),
            "whole layer": str(prepared.effpass_report.passes[0].refusals[0]),
            "hits": str(prepared.effpass_report.passes[0].hits),
        }


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {part.__name__: part(rank) for part in (logits, compiled, generated, refused)}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
