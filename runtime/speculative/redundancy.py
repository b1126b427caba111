"""Measurement of the redundancy that sparse verification relies on: how much the nodes of a tree read in common.

The last tokens of a text sample represent the nodes of a tree, and the first of them the root. They form one path,
whose tokens differ more from each other than siblings do. The model runs densely and is not changed.

Shapes: T nodes, G KV heads, N blocks, F channels, E experts, k experts per token, L layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from effpass.core.errors import EffpassError
from effpass.lowering.ops.tree_blocks import PARTS, most_blocks
from effpass.runtime.attention import reading_cache
from effpass.runtime.cache import DecodeCache, Reader
from effpass.runtime.engine import check_decodable
from effpass.runtime.latent_attention import is_latent_attention
from effpass.runtime.session import Session
from effpass.runtime.speculative import shared_channels, shared_experts
from effpass.runtime.speculative.shared_channels import ChannelBudget, gated_networks, share_channels
from effpass.runtime.speculative.shared_experts import ExpertBudget, expert_modules, share_experts
from effpass.runtime.speculative.token_rules import tail_shares

__all__ = ["Budgets", "Redundancy", "measure"]


@dataclass(frozen=True)
class Budgets:
    """Sizes of the selections to compare, none of which is applied to the model.

    Attributes:
        attention: share of the prefix's blocks that a node keeps.
        block: number of tokens per block.
        channels: share of the channels of a network that are kept.
        experts: share of the experts of a layer that are kept.
        nodes: number of nodes T, the last tokens of each sample.
    """

    attention: float = 0.25
    block: int = 64
    channels: float = 0.5
    experts: float = 0.5
    nodes: int = 32


@dataclass
class Redundancy:
    """Results of a measurement, as means over samples.

    Attributes:
        budgets: sizes of the selections that were compared.
        tokens: number of tokens of each sample.
        blocks: for each layer, share of the blocks chosen by the root that another node chooses too; the first block
            and the last two, which all nodes choose, do not count.
        layers: indices of the layers that choose blocks, in the order of `similar`.
        similar: `[L, L]`, Jaccard similarity of the root's choices in two layers.
        channels: for each network, the union over nodes of their largest channels, as a share of F, and the share of
            the nodes' Σ a² in the shared channels, where a is the activated gate.
        experts: for each module of experts, the union over nodes of their experts, as a share of E, and the share of
            the nodes' routing weights that the shared experts have.
        expert_shares: for each module of experts, medians over tokens of the share of the routing weights that the 1,
            2, ... k - 1 smallest have.
    """

    budgets: Budgets
    tokens: list[int] = field(default_factory=list)
    blocks: dict[int, float] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    similar: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    channels: dict[str, tuple[float, float]] = field(default_factory=dict)
    experts: dict[str, tuple[float, float]] = field(default_factory=dict)
    expert_shares: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "nodes": self.budgets.nodes,
            "tokens": self.tokens,
            "blocks": {str(layer): share for layer, share in self.blocks.items()},
            "similar": self.similar.tolist(),
            "channels": self.channels,
            "experts": self.experts,
        }


def measure(
    model: Any,
    samples: Iterable[Tensor],
    budgets: Budgets | None = None,
    *,
    each: Callable[[int], None] = lambda tokens: None,
) -> Redundancy:
    """Run samples densely and measure the redundancy of their last tokens.

    Args:
        model: a transformers causal LM.
        samples: token ids of the samples, int64 `[1, tokens]` each, with more tokens than `budgets.nodes`.
        budgets: sizes of the selections to compare; None for the defaults.
        each: function that is called with the length of each sample after it was run.

    Raises:
        EffpassError: if there is no sample, or one is too short.
    """
    check_decodable(model)
    budgets = budgets or Budgets()
    look, has_latents = _Look(model, budgets), any(map(is_latent_attention, model.modules()))
    lengths = []
    with torch.inference_mode(False), torch.no_grad(), look.attached(), reading_cache(model):
        for ids in samples:
            length, nodes = ids.shape[1], budgets.nodes
            if length <= nodes:
                raise EffpassError(
                    f"a sample of {length} tokens, of which the last {nodes} stand for a tree's nodes",
                    hint="give longer text, or fewer nodes",
                )
            session = Session(model, 1, length, None)
            session.cache.reader = None if has_latents else look  # no blocks are chosen of latents
            session.begin(1)
            ids = ids.to(model.device)
            session.prefill(ids[:, :-nodes], None, 4096)
            with look.at_nodes():
                session.prefill(ids[:, -nodes:], None, nodes)
            lengths.append(length)
            each(length)
    if not lengths:
        raise EffpassError("there is nothing to look at", hint="give text")
    return look.found(lengths)


class _Look(Reader):
    """Observes a model while it runs, as the reader of its cache and as a rule that skips nothing."""

    def __init__(self, model: Any, budgets: Budgets) -> None:
        self.is_on, self.is_node = True, torch.ones(budgets.nodes, dtype=torch.bool, device=model.device)
        self._model, self._of, self._at_nodes = model, budgets, False
        self._networks = {module: name for name, module in gated_networks(model)[0].items()}
        self._experts = list(expert_modules(model))
        self._roots: dict[int, Tensor] = {}  # by layer, blocks that the root of the current sample chooses, bool [G, N]
        self._similar: list[Tensor] = []
        self._seen: dict[tuple[str, Any], list[Any]] = defaultdict(list)

    @contextmanager
    def attached(self) -> Iterator[None]:
        with shared_channels.attached(self._networks, self, self), shared_experts.attached(self._model, self, self):
            yield

    @contextmanager
    def at_nodes(self) -> Iterator[None]:
        """Context in which the tokens of a call are nodes."""
        self._at_nodes = True
        self._roots.clear()
        try:
            yield
        finally:
            self._at_nodes = False
        roots = list(self._roots.values())
        self._similar.append(torch.tensor([[_jaccard(a, b) for b in roots] for a in roots]))

    def attend(
        self, cache: DecodeCache, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float
    ) -> None:
        if not self._at_nodes or cache.buffers(index).window:
            return
        nodes, block, share = query.shape[2], self._of.block, round(self._of.attention * PARTS)
        prefix = cache.slots.length - nodes
        count = -(-prefix // block)
        whole = pad(keys[:, :, :prefix].float(), (0, 0, 0, count * block - prefix)).unflatten(2, (count, block)).sum(3)
        slots = torch.tensor([min(block, prefix - block * n) for n in range(count)], device=keys.device)
        means = (whole / slots[:, None]).to(keys.dtype)
        lengths = torch.full((nodes,), prefix, dtype=torch.int32, device=keys.device)
        chosen = torch.ops.effpass.choose_tree_blocks(
            query[0].transpose(0, 1), means.expand(nodes, -1, -1, -1), lengths, most_blocks(prefix, block, 0, share),
            block, 0, share,
        ).long()  # fmt: skip
        kept = torch.zeros(*chosen.shape[:2], count + 1, dtype=torch.bool, device=keys.device)
        kept = kept.scatter(2, torch.where(chosen < 0, count, chosen), True)
        kept = kept[:, :, 1 : max(1, count - 2)]  # without the first block and the last two, which are always chosen
        self._roots[index] = kept[0]
        if kept[0].any() and nodes > 1:
            self._seen["blocks", index].append(float((kept[1:] & kept[0]).sum() / (kept[0].sum() * (nodes - 1))))

    def ready(self, cache: DecodeCache) -> None:
        return None

    def forget(self) -> None:
        return

    def run(self, network: Any, x: Tensor, is_node: Tensor) -> Tensor:
        """Measure the channels of a network; see :meth:`ChannelRule.run`."""
        if self._at_nodes:
            active = network.act_fn(network.gate_proj(x)).flatten(0, -2)
            energy, channels = active.float().square(), active.shape[1]
            own = energy.topk(max(1, round(self._of.channels * channels)), dim=1).indices
            union = torch.zeros(channels, dtype=torch.bool, device=x.device).scatter(0, own.flatten(), True)
            shared = share_channels(active, is_node, ChannelBudget(self._of.channels).of(channels)).long()
            held = energy[:, shared].sum() / energy.sum().clamp(min=1e-30)
            self._seen["channels", self._networks[network]].append((float(union.float().mean()), float(held)))
        return type(network).forward(network, x)

    def narrow(
        self, layer: int, chosen: Tensor, weights: Tensor, experts: int, is_node: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Measure the experts of a layer; see :meth:`ExpertRule.narrow`."""
        name = self._experts[layer]
        self._seen["shares", name].append(tail_shares(weights).cpu())
        if self._at_nodes:
            kept = ExpertBudget(self._of.experts, rescales=False).of(experts, chosen.shape[1])
            _, left = share_experts(chosen, weights, is_node, experts, kept, rescales=False)
            held = left.float().sum() / weights.float().sum().clamp(min=1e-30)
            self._seen["experts", name].append((len(chosen.unique()) / experts, float(held)))
        return chosen, weights

    def found(self, lengths: list[int]) -> Redundancy:
        results: dict[str, dict[Any, Any]] = defaultdict(dict)
        for (what, where), values in self._seen.items():
            if what == "shares":
                results[what][where] = torch.cat(values).median(0).values.tolist()
            elif what == "blocks":
                results[what][where] = sum(values) / len(values)
            else:
                results[what][where] = tuple(sum(v) / len(v) for v in zip(*values, strict=True))
        similar = torch.stack(self._similar).mean(0)
        return Redundancy(
            self._of,
            lengths,
            results["blocks"],
            list(self._roots),
            similar,
            results["channels"],
            results["experts"],
            results["shares"],
        )


def _jaccard(a: Tensor, b: Tensor) -> float:
    """Return the Jaccard similarity of two sets of blocks, bool `[G, N]`; 0 if their shapes differ."""
    if a.shape != b.shape:
        return 0.0
    return float((a & b).sum() / (a | b).sum().clamp(min=1))
