"""Units that can be dropped from the layers of a decoder, and the sizes in a model's config that count them.

    family            a unit                                               kept in a layer
    kv_groups         a key-value head with the query heads that read it   [G_keep]
    query_heads       a query head, as many of every group                 [G_keep, Q_keep]
    ffn_channels      a channel of a dense feed-forward block              [F_keep]
    experts           an expert of a mixture, with its row of the router   [E_keep]
    expert_channels   a channel of an expert, as many of every expert      [E_keep, F_keep]
    shared_channels   a channel of the experts that every token takes      [S_keep]

Latent attention (DeepSeek's MLA) expands keys and values of every head from one latent: a group is one head there. The
size of a head is never pruned: rotary embeddings pair its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FAMILIES", "Dimensions", "Family", "layers_with", "least_experts", "split_name", "write_sizes"]

import re

# The decoder's layers by the names of the architectures; a vision tower's are not among them.
_LAYER = re.compile(
    r"^(?:model\.(?:language_model\.)?layers|language_model\.layers|layers|(?:transformer\.)?h)\.(\d+)\.(.+)$"
)
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


@dataclass(frozen=True)
class Dimensions:
    """The sizes that kept indices refer to; 0 where a model has no such thing.

    Attributes:
        num_attention_heads: H query heads.
        num_key_value_heads: G key-value heads.
        head_dim: K, of a query head.
        intermediate_size: F of a dense feed-forward block.
        num_hidden_layers: decoder layers.
        num_experts: E experts of a mixture.
        expert_size: F of an expert.
        num_shared_experts: experts that every token takes, as one block.
        router_groups: parts of equal size that the router looks at the experts in.
        value_dim: of a value head, where attention is latent.
        latent_dim: rows of the expansion of the latent for each head, where attention is latent.
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
        """Of a transformers config; GPT-2's `n_inner` defaults to four times its width."""
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
            intermediate_size=width if own or not experts else 0,  # Mixtral's are those of an expert
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
        rows: how many sets a layer has that are chosen from separately, as many from each.
        units: how many units such a set has.
        readers: modules whose inputs are the units, or the module that holds them, by the end of their names.
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
    """Layer, module inside it and parameter of a decoder's weight; None for others."""
    match = _LAYER.match(name)
    if match is None:
        return None
    module, _, leaf = match[2].rpartition(".")
    return int(match[1]), module, leaf


def layers_with(family: str, names: Iterable[str]) -> dict[int, str]:
    """The layers that have units of a family, and the full name of their reader, by the names of all parameters."""
    found = {}
    for name in names:
        parts = split_name(name)
        if parts is not None and parts[1] in FAMILIES[family].readers:
            found[parts[0]] = name.rpartition(".")[0]
    return dict(sorted(found.items()))


def least_experts(config: Any) -> int:
    """The fewest experts of one router group that a router can choose its share from."""
    config = config.get_text_config()
    chosen = config.num_experts_per_tok
    groups = getattr(config, "n_group", None)
    return chosen if groups is None else max(2, -(-chosen // config.topk_group))  # it adds up two scores of a group


def write_sizes(config: Any, after: Dimensions) -> None:
    """Set the sizes in a transformers config, by the names that it uses."""
    config = config.get_text_config()
    before = Dimensions.of(config)
    fewer_heads = after.num_attention_heads < before.num_attention_heads
    own = {
        "intermediate_size": "n_inner" if hasattr(config, "n_inner") else "intermediate_size",
        "num_experts": next((name for name in _EXPERTS if getattr(config, name, None)), "num_experts"),
        "expert_size": "moe_intermediate_size" if hasattr(config, "moe_intermediate_size") else "intermediate_size",
    }
    for name, size in asdict(after).items():
        # The size of a head stays and must then be said: by default it follows from the number of heads.
        says_head = name == "head_dim" and fewer_heads and not before.latent_dim
        if size != getattr(before, name) or says_head:
            setattr(config, own.get(name, name), size)
