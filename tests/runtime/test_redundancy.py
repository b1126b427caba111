"""What sparse verification rests on: measured against loops, and what is calibrated from it."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor

from effpass.core.errors import ArtifactError, EffpassError
from effpass.runtime.speculative.calibrated import anchors_of, calibrate, load_calibrated
from effpass.runtime.speculative.redundancy import Budgets, Redundancy, measure
from effpass.runtime.speculative.shared_channels import (
    ChannelBudget,
    attached,
    gated_networks,
    lay_by_channel,
    share_channels,
)
from effpass.runtime.speculative.token_rules import TokenChannels, TokenExperts, tail_shares

NODES, BLOCK = 6, 4
SAMPLE = families.batch(50)["input_ids"][1:]
BUDGETS = Budgets(attention=0.5, block=BLOCK, channels=0.25, experts=0.5, nodes=NODES)


def keys_and_queries(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Of each layer `[G, T, K]` and `[H, T, K]`, rotated, by the model's own modules."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    found: list[tuple[Tensor, Tensor]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        hidden = kwargs["hidden_states"]
        split = (*hidden.shape[:2], -1, module.head_dim)
        q, k = (p(hidden).view(split).transpose(1, 2) for p in (module.q_proj, module.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        found.append((k[0], q[0]))

    handles = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(SAMPLE)
    for handle in handles:
        handle.remove()
    return found


def test_blocks_against_loops() -> None:
    """44 tokens are 11 blocks, of which 6 are kept; the first and the last two are always, and don't count."""
    found = measure(families.make("llama"), [SAMPLE], BUDGETS)
    prefix, roots = 50 - NODES, []
    for layer, (keys, queries) in enumerate(keys_and_queries(families.make("llama"))):
        sets: list[list[set[int]]] = []
        for node in range(prefix, 50):
            of_heads = []
            for g in range(2):
                asked = queries[2 * g : 2 * g + 2, node].sum(0)
                means = [keys[g, n * BLOCK : min(n * BLOCK + BLOCK, prefix)].mean(0) for n in range(11)]
                score = {n: float(asked @ means[n]) for n in range(1, 9)}
                of_heads.append(set(sorted(score, key=lambda n: -score[n])[:3]))
            sets.append(of_heads)
        both = sum(len(node[g] & sets[0][g]) for node in sets[1:] for g in range(2))
        assert found.blocks[layer] == pytest.approx(both / (6 * (NODES - 1)))
        roots.append({(g, n) for g in range(2) for n in sets[0][g]})
    assert found.layers == [0, 1]
    expected = [[len(a & b) / len(a | b) for b in roots] for a in roots]
    torch.testing.assert_close(found.similar, torch.tensor(expected))


def test_channels_and_experts_against_loops() -> None:
    model = families.make("deepseek_v3")
    found = measure(model, [SAMPLE], BUDGETS)
    assert not found.blocks
    seen: dict[str, Any] = {}
    handles = []
    for name, module in model.named_modules():
        if name == "model.layers.0.mlp" or name == "model.layers.1.mlp.experts":
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args})))
    with torch.no_grad():
        model(SAMPLE)
        for handle in handles:
            handle.remove()
        network = model.model.layers[0].mlp
        active = network.act_fn(network.gate_proj(seen["model.layers.0.mlp"][0][0, -NODES:]))
    own = {c for row in active.abs().tolist() for c in sorted(range(96), key=lambda c: -row[c])[:24]}
    energy = active.double().square().sum(0)
    expected = (len(own) / 96, float(energy.sort(descending=True).values[:16].sum() / energy.sum()))  # 24 is no 16, 32
    assert found.channels["model.layers.0.mlp"] == pytest.approx(expected)
    _, chosen, weights = seen["model.layers.1.mlp.experts"]
    votes = torch.zeros(4).index_add(0, chosen[-NODES:].flatten(), weights[-NODES:].flatten())
    held = float(votes.sort(descending=True).values[:2].sum() / votes.sum())
    assert found.experts["model.layers.1.mlp.experts"] == pytest.approx((len(chosen[-NODES:].unique()) / 4, held))
    lower = (weights.min(1).values / weights.sum(1)).median()
    assert found.expert_shares["model.layers.1.mlp.experts"] == pytest.approx([float(lower)])


def test_looking_changes_nothing() -> None:
    model, ids = families.make("qwen3_moe"), SAMPLE
    before = model(ids).logits
    measure(model, [ids], BUDGETS)
    assert torch.equal(model(ids).logits, before)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks


def test_anchors_are_where_choices_change() -> None:
    similar = torch.tensor([[1, 0.9, 0.7, 0.2], [0.9, 1, 0.8, 0.3], [0.7, 0.8, 1, 0.9], [0.2, 0.3, 0.9, 1]])
    found = Redundancy(BUDGETS, layers=[0, 2, 5, 6], similar=similar)
    assert anchors_of(found, 0.6) == [0, 6]
    assert anchors_of(found, 0.75) == [0, 5]
    assert anchors_of(found, 0.0) == [0]
    assert anchors_of(found, 1.0) == [0, 2, 5, 6]


def test_samples_that_are_too_short() -> None:
    with pytest.raises(EffpassError, match="a sample of 6 tokens, of which the last 6 stand for a tree's nodes"):
        measure(families.make("llama"), [SAMPLE[:, :NODES]], BUDGETS)
    with pytest.raises(EffpassError, match="nothing to look at"):
        measure(families.make("llama"), [], BUDGETS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("anchors", torch.tensor([2, 1], dtype=torch.int32), "do not ascend"),
        ("expert_shares", torch.tensor([[2.0]]), "are no shares"),
    ],
)
def test_tensors_that_are_something_else(name: str, value: Tensor, message: str, tmp_path: Any) -> None:
    made = calibrate(families.make("llama"), [SAMPLE], BUDGETS)
    made.tensors[name] = value
    made.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match=message):
        load_calibrated(tmp_path / "a")


# -- rules ------------------------------------------------------------------------------------------------------------


class On:
    is_on = True
    is_node = torch.tensor([True, True, False, True])


def test_channels_that_a_tree_shares() -> None:
    """A third stays, with most in the rows that are nodes; the others add nothing. W_down may lie in either way."""
    network, x = families.make("llama").model.layers[0].mlp, torch.randn(2, 2, 64)
    active = network.act_fn(network.gate_proj(x)).flatten(0, 1)
    energy = active[On.is_node].square().sum(0).tolist()
    kept = sorted(sorted(range(96), key=lambda c: -energy[c])[:32])
    hidden = active * network.up_proj(x).flatten(0, 1)
    hidden[:, [c for c in range(96) if c not in kept]] = 0
    expected = network.down_proj(hidden).view(2, 2, 64)
    for _ in range(2):
        with attached([network], ChannelBudget(1 / 3), On()):
            found = network(x)
        torch.testing.assert_close(found, expected)
        lay_by_channel(network)
        assert network.down_proj.weight.stride() == (1, 64)
    assert share_channels(active, On.is_node, 32).tolist() == kept
    assert [ChannelBudget(share).of(100) for share in (0.05, 0.5, 0.999, 1.0)] == [5, 48, 100, 100]


def test_channels_that_a_token_leaves_out() -> None:
    network, x = families.make("llama").model.layers[0].mlp, torch.randn(4, 64)
    active = network.act_fn(network.gate_proj(x))
    left = torch.tensor([[v if abs(v) >= 0.05 else 0 for v in row] for row in active.tolist()])
    assert 0 < int((left == 0).sum()) < left.numel()
    found = TokenChannels(0.05).run(network, x, On.is_node)
    torch.testing.assert_close(found, network.down_proj(left * network.up_proj(x)))


@pytest.mark.parametrize("rescales", [True, False])
@pytest.mark.parametrize("most", [1, 2])
def test_experts_that_a_token_leaves_out(most: int, rescales: bool) -> None:
    """The most that may go and whose part of the sum is below the limit."""
    weights = torch.tensor([[0.7, 0.1, 0.2], [0.4, 0.3, 0.3], [0.9, 0.06, 0.04], [0.1, 0.25, 0.65]])
    chosen = torch.tensor([[4, 2, 0], [1, 2, 3], [0, 1, 2], [3, 2, 1]])
    torch.testing.assert_close(tail_shares(weights)[0], torch.tensor([0.1, 0.3]))
    rule = TokenExperts(most, ((0.9, 0.9), (0.11, 0.34)), rescales)
    new, left = rule.narrow(1, chosen, weights, 5, On.is_node)
    goes = [most, 0, most, 1]
    for t in range(4):
        order = sorted(range(3), key=lambda j: float(weights[t, j]))
        stays = [j for j in range(3) if j not in order[: goes[t]]]
        scale = float(weights[t].sum() / weights[t, stays].sum()) if rescales else 1.0
        dense = torch.zeros(5).index_add(0, new[t], left[t])
        expected = torch.zeros(5).index_add(0, chosen[t, stays], weights[t, stays] * scale)
        torch.testing.assert_close(dense, expected)


def test_networks_that_compute_something_else_are_left_alone() -> None:
    model = families.make("llama")

    class Scaled(type(model.model.layers[1].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.model.layers[1].mlp.__class__ = Scaled
    found, others = gated_networks(model)
    assert list(found) == ["model.layers.0.mlp"]
    assert others == {"model.layers.1.mlp": "Scaled computes something else"}


def test_quantized_networks_are_left_alone() -> None:
    ao = pytest.importorskip("torchao.quantization")
    model = families.make("llama")
    ao.quantize_(model.model.layers[0], ao.Int8WeightOnlyConfig())
    found, others = gated_networks(model)
    assert list(found) == ["model.layers.1.mlp"]
    assert others == {"model.layers.0.mlp": "its weights are quantized, or have adapters"}
