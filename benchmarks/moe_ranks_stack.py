"""Area `moe`, cases `eps-stack-…`: prefill of four whole layers on several GPUs, attention and all.

Ours is a transformers model that `effpass.prepare` spread with `expert_parallel: dp`: a sequence of T tokens on each of
W ranks. Peers run as many tokens in the same run: the same model in one stage; the same weights with an all-to-all of
pairs and transformers' grouped experts; and a model of 1 / W of the heads and of each expert's width with W sequences,
its two sums a layer added up over the ranks (TP + TP). Nothing is compiled or captured on any side. Weights are random,
so that routing is about even.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import effpass.lowering.ops.expert_parallel as expert_parallel
from benchmarks.backend import _free
from benchmarks.moe_peers import exchange_pairs, grouped_experts
from benchmarks.moe_ranks import AREA, RUNS, TOKENS, seconds, start
from benchmarks.rows import Row, row
from effpass.lowering.ops.expert_parallel_exchange import Ranks

LAYERS = 4
# Attention's and experts' sizes of the models; vocabularies are cut, which a prefill's layers don't read.
_COMMON = {"vocab_size": 1024, "num_hidden_layers": LAYERS, "max_position_embeddings": 16384}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, **_COMMON,
    },
    "deepseek-v2": {
        "model_type": "deepseek_v2", "hidden_size": 5120, "intermediate_size": 12288, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 160, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1536, "first_k_dense_replace": 0, "n_group": 8,
        "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, **_COMMON,
    },
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 8,
    "moe_intermediate_size": 32, "vocab_size": 96, "num_hidden_layers": 2, "head_dim": 16, "num_experts": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 4, "topk_group": 2,
}  # fmt: skip
_CUT = ("num_attention_heads", "num_key_value_heads", "moe_intermediate_size")


def stack(name: str, device: str, smoke: bool) -> Iterator[Row]:
    """Tokens of all ranks a second."""
    import effpass

    ranks = start(device)
    if ranks is None:
        return
    small = smoke or device == "cpu"
    sizes = CONFIGS[name] | ({k: v for k, v in TINY.items() if k in CONFIGS[name]} if small else {})
    tokens_of = (32,) if small else TOKENS
    own = {tokens: _ids((1, tokens), ranks.me, sizes, device) for tokens in tokens_of}
    every = {tokens: _ids((ranks.size, tokens), 0, sizes, device) for tokens in tokens_of}

    def prefills(model: Any, ids: dict[int, Tensor]) -> dict[int, float]:
        return {n: seconds(lambda n=n: model.model(ids[n], use_cache=False), ranks, device) for n in tokens_of}  # type: ignore[misc]

    with torch.inference_mode():
        recipe = {"version": 1, "passes": [{"moe_gemm": {"expert_parallel": "dp"}}]}
        model = effpass.prepare(_model(sizes, device), recipe)
        _free(device)
        ours = prefills(model, own)
        with patch.object(expert_parallel, "stages_of", lambda *load: 1):
            theirs = {"one stage": prefills(model, own)}
        _exchange_pairs_in(model, ranks)
        theirs["DP + EP, all-to-all of pairs, transformers grouped_mm"] = prefills(model, own)
        del model
        _free(device)
        theirs["TP + TP"] = prefills(_tensor_parallel(sizes, ranks, device), every)
    if ranks.me == 0:
        for tokens, taken in ours.items():
            case = f"{LAYERS} layers of {name} on {ranks.size} ranks, {tokens} tokens each"
            for peer, of in theirs.items():
                rates = (tokens * ranks.size / s for s in (taken, of[tokens]))
                yield row(
                    AREA, case, "prefill", next(rates), "tokens/s", device=device, peer=next(rates), peer_name=peer,
                    lower_is_better=False, runs=RUNS,
                )  # fmt: skip


def _ids(size: tuple[int, int], seed: int, sizes: dict[str, Any], device: str) -> Tensor:
    return torch.randint(sizes["vocab_size"], size, generator=torch.Generator().manual_seed(seed)).to(device)


def _model(sizes: dict[str, Any], device: str) -> Any:
    """Random weights, the same on all ranks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _tensor_parallel(sizes: dict[str, Any], ranks: Ranks, device: str) -> Any:
    """A rank's part under TP + TP: whole heads and 1 / W of each expert, and sums over the ranks behind both."""
    model = _model(sizes | {name: sizes[name] // ranks.size for name in _CUT}, device)

    def added(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return ranks.sum(output)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(added)
        layer.mlp.register_forward_hook(added)
    return model


class _Pairs(nn.Module):
    """The experts of a layer that effpass spread, as other libraries would call them."""

    def __init__(self, spread: Any, ranks: Ranks) -> None:
        super().__init__()
        self.call, self.every = grouped_experts(spread.gate_up_proj.data, spread.down_proj.data), spread.num_experts
        self.ranks = ranks

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return exchange_pairs(hidden_states, top_k_index, top_k_weights, self.call, self.every, self.ranks)


def _exchange_pairs_in(model: Any, ranks: Ranks) -> None:
    for layer in model.model.layers:
        layer.mlp.experts = _Pairs(layer.mlp.experts, ranks)
