"""What each process of test_moe_gemm_ranks runs: models whose experts `effpass.prepare` spread, against whole ones.

moe_ranks_worker.py FOLDER PART,PART,…     with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, and DEVICE=cuda for
one GPU a rank; leaves FOLDER/RANK.json
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from decode_step import enliven
from families import CONFIGS
from families import batch as batch_on_cpu
from families import make as make_on_cpu
from moe_families import LAYERS, MORE

import effpass

CONFIGS.update(MORE)
DEVICE = os.environ.get("DEVICE", "cpu")


def make(family: str, **overrides: Any) -> Any:
    return make_on_cpu(family, **overrides).to(DEVICE)


def lively(family: str, **overrides: Any) -> Any:
    return enliven(make_on_cpu(family, **overrides)).to(DEVICE)


def batch(length: int, **how: int) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in batch_on_cpu(length, **how).items()}


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
            model = lively(family)
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


def cached(run: Any, length: int) -> torch.Tensor:
    """Logits of a prefill and of three greedy steps on its cache: [B, 4, vocabulary]."""
    ids, past, found = batch(length, padding=0)["input_ids"], None, []
    for _ in range(4):
        out = run(input_ids=ids, past_key_values=past, use_cache=True)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(out.logits[:, -1])
    return torch.stack(found, 1)


def compiled(rank: int) -> dict[str, Any]:
    """One graph for several lengths; and prefill and decoding on a cache."""
    from torch._dynamo.utils import counters

    found: dict[str, Any] = {}
    for attention, lengths in (("dp", (9, 14 + rank, 21)), ("tp", ())):
        model, own = lively("qwen3_moe", num_hidden_layers=1), rank if attention == "dp" else 0
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            expected = [model(**batch(n), use_cache=False).logits for n in lengths]
            decoded = cached(model, 11 + own)
            prepared = effpass.optimize(model, recipe(attention), inner="eager", dynamic=True, fullgraph=True)
            errors = [
                float((prepared(**batch(n), use_cache=False).logits - logits).abs().max())
                for n, logits in zip(lengths, expected, strict=True)
            ]
            graphs = counters["stats"]["unique_graphs"]
            errors.append(float((cached(prepared, 11 + own) - decoded).abs().max()))
        found[attention] = {"errors": errors, "graphs": graphs}
    return found


def loaded(rank: int) -> dict[str, Any] | None:
    """Models of which transformers loaded this rank's part alone; None with a transformers that can't."""
    if importlib.util.find_spec("transformers.distributed.expert_parallel") is None:
        return None
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    found: dict[str, Any] = {}
    for family in ("mixtral", "deepseek_v2"):
        whole, folder = lively(family), Path(sys.argv[1], family)
        if rank == 0:
            whole.save_pretrained(folder)
        dist.barrier()
        both = DistributedConfig(tp_size=2, ep_size=2)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=both)
        refusal = message(lambda model=model: effpass.prepare(model, recipe("dp")))
        prepared, inputs = effpass.prepare(model, recipe("tp")), batch(9)
        prompt, how = batch(7, padding=0)["input_ids"], {"max_new_tokens": 6, "do_sample": False}
        with torch.no_grad():
            error = float((prepared(**inputs).logits - whole(**inputs).logits).abs().max())
        found[family] = {
            "error": error,
            "hits": prepared.effpass_report.passes[0].hits,
            "kept": [p.shape[0] for name, p in prepared.named_parameters() if name.endswith("experts.down_proj")],
            "text": torch.equal(prepared.generate(prompt, **how), whole.generate(prompt, **how)),
            "engine": prepared.effpass_report.generates,
            "dp": refusal,
        }
    return found


def generated(rank: int) -> dict[str, Any]:
    """The same prompts on all ranks, on the decode engine; own ones, by transformers' loop, of own lengths."""
    found: dict[str, Any] = {}
    for attention in ("tp", "dp"):
        model = lively("mixtral")
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
    cache, spreading = {"prefix_kv": {"budget": 0.5}}, {"moe_gemm": {"expert_parallel": "dp"}}
    orders = [{"version": 1, "passes": [cache, spreading]}, {"version": 1, "passes": [spreading, cache]}]
    options = {"passes": [{"moe_gemm": {"expert_parallel": "dp"}}], "inner": "eager"}
    with torch.no_grad():
        return {
            "odd": message(lambda: effpass.prepare(odd, recipe("dp"))),
            "dense": message(lambda: effpass.prepare(make("llama"), recipe("dp"))),
            "saved": message(spread.state_dict),
            "behind": message(lambda: effpass.prepare(make("mixtral"), orders[0])),
            "before": message(lambda: effpass.prepare(make("mixtral"), orders[1])),
            "backend": message(lambda: torch.compile(make("mixtral"), backend="effpass", options=options)(**batch(9))),
            "whole layer": str(prepared.effpass_report.passes[0].refusals[0]),
            "hits": str(prepared.effpass_report.passes[0].hits),
        }


PARTS = {part.__name__: part for part in (logits, compiled, loaded, generated, refused)}


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", timeout=timedelta(seconds=60))
    found = {part: PARTS[part](rank) for part in sys.argv[2].split(",")}
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
