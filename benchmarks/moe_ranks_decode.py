"""Area `moe`, case `eps-decode-mixtral-8x7b`: decoding with a model that no single 80 GB GPU holds.

Mixtral 8x7B, 93 GB in bfloat16, with random weights: all ranks have the same prompts (`expert_parallel: tp`), each
holds attention whole and its part of the experts, and `generate` runs on the decode engine, one CUDA graph a step with
the sums over the ranks in it. There is no peer in the run; the bound is to read a rank's weights, those of as many
experts as a step should meet, at the bandwidth of a read-only kernel in that run. Times are the slowest rank's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.decode import PROMPT, _greedy
from benchmarks.moe_ranks import AREA, over_ranks, place, start
from benchmarks.rows import Row, bandwidth, row

NAME = "mixtral-8x7b"
_MIXTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip
_TINY = _MIXTRAL | {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def decode(device: str, smoke: bool) -> Iterator[Row]:
    """Steps of one and of eight sequences."""
    ranks = start(device)
    if ranks is None:
        return
    small = smoke or device == "cpu"
    model = _model(_TINY if small else _MIXTRAL, ranks.me, device)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for rows in (1, 8):
        torch.manual_seed(rows)  # the same prompts on all ranks
        ours, first, _ = _greedy(model, rows, small, device)
        slowest, first = (over_ranks(s, ranks, device, dist.ReduceOp.MAX) for s in (ours, first))
        bound = _read(model, rows) / bandwidth(device)
        if ranks.me == 0:
            yield row(
                AREA, f"{NAME} on {ranks.size} ranks, batch {rows}, prompt {PROMPT}", "greedy, a step", slowest * 1e3,
                "ms", device=device, bound=bound * 1e3, runs=5,
                note=f"{held / 1e9:.1f} GB of weights a rank; first call {first:.1f} s",
            )  # fmt: skip
    model.effpass_engine.release()  # CUDA graphs with collectives end before the process group does


def _model(sizes: dict[str, Any], rank: int, device: str) -> Any:
    """Spread before it has weights: memory of the host that nobody writes to costs nothing."""
    from transformers import MixtralConfig, MixtralForCausalLM

    import effpass

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device("meta"):
            model: Any = MixtralForCausalLM(MixtralConfig(**sizes)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    model = effpass.prepare(model, {"version": 1, "passes": [{"moe_gemm": {"expert_parallel": "tp"}}]})
    model.to(place(device))
    for seed, experts in ((0, False), (rank + 1, True)):  # what all hold is the same on all
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if (".experts." in name) == experts:
                parameter.normal_(std=0.02)
    return model


def _read(model: Any, rows: int) -> float:
    """Bytes of weights that a step reads on a rank: of E experts it meets E (1 - (1 - k/E)ᴮ)."""
    config, met = model.config, 0.0
    share = 1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** rows
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            met += parameter.numel() * parameter.element_size() * (share if ".experts." in name else 1)
    return met
