"""Units that pruning can remove from the layers of a decoder, and the sizes in a model's config that count them.

A *family* is all units of one kind. The last column is the shape of the kept indices of one layer:

    family            unit                                                 kept indices
    kv_groups         KV head together with the query heads that read it   [G_keep]
    query_heads       query head; every group keeps the same number        [G_keep, Q_keep]
    ffn_channels      channel of a dense feed-forward block                [F_keep]
    experts           expert of a mixture, with its row of the router      [E_keep]
    expert_channels   channel of an expert; every expert keeps as many     [E_keep, F_keep]
    shared_channels   channel of the shared experts                        [S_keep]

Latent attention (DeepSeek's MLA) expands the keys and values of every head from one latent, so that a group is a single
head there. The size of a head is never pruned, because rotary embeddings pair its channels. The artifacts of
:mod:`effpass.passes.weights.keep_indices` and the scores of :mod:`effpass.trainers.pruning` refer to these families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FAMILIES", "Dimensions", "Family", "layers_with", "least_experts", "split_name", "write_sizes"]

import re

# Names of decoder layers in the supported architectures; the layers of a vision tower do not match.
_LAYER = re.compile(
    r"^(?:model\.(?:language_model\.)?layers|language_model\.layers|layers|(?:transformer\.)?h)\.(\d+)\.(.+)$"
)
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model to which kept indices refer; 0 for parts that the model does not have.

    Attributes:
        num_attention_heads: number of query heads H.
        num_key_value_heads: number of KV heads G.
        head_dim: size K of a query head.
        intermediate_size: intermediate size F of a dense feed-forward block.
        num_hidden_layers: number of decoder layers.
        num_experts: number of experts E of a mixture.
        expert_size: intermediate size F of an expert.
        num_shared_experts: number of shared experts, which every token is routed to; they form one block.
        router_groups: number of equal groups into which the router divides the experts.
        value_dim: size of a value head of latent attention.
        latent_dim: number of rows of `kv_b_proj`, the up-projection of latent attention, for each head.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_hidden_layers: int
    num_experts: int = 0
    expert_size: int = 0
    num_shared_experts: int = 0
    router_groups: int = 1
    value_dim: int = 0
    latent_dim: int = 0

    @classmethod
    def of(cls, config: Any) -> Dimensions:
        """Read the sizes from a transformers config. GPT-2's `n_inner` defaults to four times the hidden size."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
        experts = next((found for name in _EXPERTS if (found := getattr(config, name, None))), 0)
        own = getattr(config, "moe_intermediate_size", None)
        is_latent = bool(getattr(config, "kv_lora_rank", None))
        nope, rope = (getattr(config, f"qk_{part}_head_dim", 0) for part in ("nope", "rope"))
        plain = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            num_attention_heads=heads,
            num_key_value_heads=heads if is_latent else getattr(config, "num_key_value_heads", None) or heads,
            head_dim=nope + rope if is_latent else plain,
            intermediate_size=width if own or not experts else 0,  # Mixtral's intermediate_size is that of an expert
            num_hidden_layers=config.num_hidden_layers,
            num_experts=experts,
            expert_size=(own or width) if experts else 0,
            num_shared_experts=(getattr(config, "n_shared_experts", None) or 0) if experts else 0,
            router_groups=(getattr(config, "n_group", None) or 1) if experts else 1,
            value_dim=config.v_head_dim if is_latent else 0,
            latent_dim=nope + config.v_head_dim if is_latent else 0,
        )

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class Family:
    """Units of one kind.

    Attributes:
        rows: number of sets of units in a layer; units are chosen in each set separately, the same number in each.
        units: number of units per set.
        readers: ends of the names of the modules whose inputs are the units, or which hold the units.
    """

    rows: Callable[[Dimensions], int]
    units: Callable[[Dimensions], int]
    readers: tuple[str, ...]


_O_PROJ, _SHARED = ("self_attn.o_proj", "attn.c_proj"), ("mlp.shared_experts.down_proj",)

FAMILIES: dict[str, Family] = {
    "kv_groups": Family(lambda d: 1, lambda d: d.num_key_value_heads, _O_PROJ),
    "query_heads": Family(lambda d: d.num_key_value_heads, lambda d: d.heads_per_group, _O_PROJ),
    "ffn_channels": Family(lambda d: 1, lambda d: d.intermediate_size, ("mlp.down_proj", "mlp.c_proj")),
    "experts": Family(lambda d: d.router_groups, lambda d: d.num_experts // d.router_groups, ("mlp.experts",)),
    "expert_channels": Family(lambda d: d.num_experts, lambda d: d.expert_size, ("mlp.experts",)),
    "shared_channels": Family(lambda d: 1, lambda d: d.num_shared_experts * d.expert_size, _SHARED),
}


def split_name(name: str) -> tuple[int, str, str] | None:
    """Split the name of a decoder weight into layer index, module in the layer, and parameter; None for other names."""
    match = _LAYER.match(name)
    if match is None:
        return None
    module, _, leaf = match[2].rpartition(".")
    return int(match[1]), module, leaf


def layers_with(family: str, names: Iterable[str]) -> dict[int, str]:
    """Return the layers that have units of a family, each with the name of its reader, given all parameter names."""
    found = {}
    for name in names:
        parts = split_name(name)
        if parts is not None and parts[1] in FAMILIES[family].readers:
            found[parts[0]] = name.rpartition(".")[0]
    return dict(sorted(found.items()))


def least_experts(config: Any) -> int:
    """Return the minimum number of experts per router group with which the router can still choose its experts."""
    config = config.get_text_config()
    chosen = config.num_experts_per_tok
    groups = getattr(config, "n_group", None)
    return chosen if groups is None else max(2, -(-chosen // config.topk_group))  # the score of a group is a sum of two


def write_sizes(config: Any, after: Dimensions) -> None:
    """Set the sizes in a transformers config under the names that it uses."""
    config = config.get_text_config()
    before = Dimensions.of(config)
    fewer_heads = after.num_attention_heads < before.num_attention_heads
    own = {
        "intermediate_size": "n_inner" if hasattr(config, "n_inner") else "intermediate_size",
        "num_experts": next((name for name in _EXPERTS if getattr(config, name, None)), "num_experts"),
        "expert_size": "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size",
    }
    for name, size in asdict(after).items():
        # With fewer heads, head_dim must be explicit, because by default it follows from the number of heads.
        says_head = name == "head_dim" and fewer_heads and not before.latent_dim
        if size != getattr(before, name) or says_head:
            setattr(config, own.get(name, name), size)
