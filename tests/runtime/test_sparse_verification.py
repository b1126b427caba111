"""Sparse verification: what is left out, that it is the same for a whole tree, and that dense calls make up for it."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from speculative_drafts import KINDS, draft_model, prepared
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.runtime.attention import reading_cache
from effpass.runtime.speculative import Eagle2, ModelDraft, Speculator, Static, chain, generate
from effpass.runtime.speculative.cache import TreeCache
from effpass.runtime.speculative.shared_channels import ChannelBudget
from effpass.runtime.speculative.shared_experts import ExpertBudget, share_experts
from effpass.runtime.speculative.sparse import ROOM, SharedBlocks, SparseVerification

GIVEN = families.batch(24)
PADDED = {k: GIVEN[k] for k in ("input_ids", "attention_mask")}
FREE = {"max_new_tokens": 24, "eos_token_id": None}
FEW = SharedBlocks(share=0.25, dense_below=4, block=4)


def speculate(model: Any, settings: SparseVerification, draft: Any) -> tuple[Tensor, Any]:
    """The text where every step is a sparse round, and the round, whose cache is as it was left."""
    setattr(model, ROOM, settings)
    speculator = Speculator(model.effpass_engine, draft, switches=False)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    out = type(model).generate(model, **PADDED, **FREE, custom_generate=loop)
    (found,) = speculator._free.values()
    return out, found


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("kind", ["chain", "static", "eagle2"])
def test_with_all_of_it_the_text_is_plain_decoding_s(family: str, kind: str) -> None:
    blocks = None if family == "deepseek_v3" else SharedBlocks(share=1.0, dense_below=4, block=4)
    settings = SparseVerification(blocks, ExpertBudget(1.0, rescales=True), refresh=3)
    out, _ = speculate(prepared(family), settings, ModelDraft(draft_model("random", family), KINDS[kind]))
    assert torch.equal(out, families.make(family).generate(**PADDED, **FREE))


def recomputed(family: str, text: Tensor) -> Any:
    mask = torch.cat((PADDED["attention_mask"], torch.ones(2, 24, dtype=torch.long)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return families.make(family)(input_ids=text, attention_mask=mask, position_ids=positions).past_key_values


def difference(cache: TreeCache, theirs: Any) -> float:
    """The largest, of keys and values in each row's prefix."""
    largest = 0.0
    for row, length in enumerate(cache.lengths.tolist()):
        of = slice(3 if row == 0 else 0, length)
        for index in range(len(cache)):
            ours, other = cache.buffers(index), theirs.layers[index]
            for a, b in ((ours.keys, other.keys), (ours.values, other.values)):
                largest = max(largest, float((a[row, :, of] - b[row, :, of].detach()).abs().max()))
    return largest


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", SparseVerification(FEW, None, refresh=6)),
        ("llama", SparseVerification(FEW, None, refresh=17)),  # 68 tokens in one call: two words of ancestors
        ("llama", SparseVerification(None, None, ChannelBudget(0.3), refresh=8)),
        ("mixtral", SparseVerification(None, ExpertBudget(0.5, rescales=True), refresh=5)),
        ("qwen3_moe", SparseVerification(FEW, ExpertBudget(0.5, rescales=False), refresh=4)),
    ],
)
def test_a_dense_call_makes_up_for_sparse_ones(family: str, settings: SparseVerification) -> None:
    """Keys and values of the last tokens are a sparse model's, until they are run again."""
    out, found = speculate(prepared(family), settings, ModelDraft(draft_model("random", family), Eagle2(4, 3, 12)))
    theirs, again, cache = recomputed(family, out), found._again, found.target.cache
    known, lengths = again.known.clone(), cache.lengths.clone()
    assert torch.all(known > 24)
    assert torch.any(known < lengths)  # it did not end with a dense call
    cache.lengths.copy_(known)
    assert difference(cache, theirs) < 1e-5
    cache.lengths.copy_(lengths)
    assert difference(cache, theirs) > 1e-3
    with torch.no_grad(), reading_cache(found.target.model), found.target.attached():
        again.run()
    assert torch.equal(cache.lengths, lengths)
    assert torch.equal(again.known, lengths)
    assert difference(cache, theirs) < 1e-5


def test_means_are_those_of_the_blocks() -> None:
    """After a prompt with padding, rounds and dense calls every block of each row has the mean of its keys."""
    settings = SparseVerification(FEW, None, refresh=2)
    _, found = speculate(prepared(), settings, ModelDraft(draft_model("right"), Static((2, 2, 1))))
    cache, seen = found.target.cache, 0
    for row, length in enumerate(cache.lengths.tolist()):
        for index in range(len(cache)):
            layer = cache.buffers(index)
            for block, mean in enumerate(layer.means[row].unbind(1)):
                slots = [s for s in range(4 * block, min(4 * block + 4, length)) if cache.slots.positions[row, s] >= 0]
                if slots:
                    torch.testing.assert_close(mean, layer.keys[row][:, slots].mean(1))
                    seen += 1
    assert seen > 40


def test_the_root_chooses_for_all_at_anchors() -> None:
    """Two layers of four choose; each is asked with the first node's query, and the layer behind takes its blocks."""
    calls: list[tuple[int, Any]] = []
    taken, choose = TreeCache.chosen, torch.ops.effpass.choose_tree_blocks

    def chosen(self: TreeCache, index: int, query: Tensor) -> Any:
        before = self._chosen
        blocks, size = taken(self, index, query)
        if blocks is not None:
            calls.append((index, blocks is before))
            if blocks is not before:
                how = (4, 4, 256)
                again = choose(query[:, :, 0], self.buffers(index).means, self.lengths, blocks.shape[2], *how)
                assert torch.equal(blocks, again)
        return blocks, size

    settings = SparseVerification(SharedBlocks(0.25, 4, 4, anchors=(0, 2)), None, refresh=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeCache, "chosen", chosen)
        wide = {"num_hidden_layers": 4}
        _, found = speculate(prepared(**wide), settings, ModelDraft(draft_model("right", **wide), chain(3)))
    assert found._again is None
    assert calls
    assert calls == [(0, False), (1, True), (2, False), (3, True)] * (len(calls) // 4)


def test_short_contexts_are_read_wholly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are sparse from the column on behind which there is something to leave out."""
    reached: list[int] = []
    sparse = TreeCache.sparse

    def entered(self: TreeCache) -> Any:
        reached.append(int(self.lengths.max()))
        return sparse(self)

    monkeypatch.setattr(TreeCache, "sparse", entered)
    draft = ModelDraft(draft_model("wrong"), chain(3))
    speculate(prepared(), SparseVerification(SharedBlocks(0.5, 36, 4), None), draft)
    assert reached == list(range(36, 47))
    reached.clear()
    speculate(prepared(), SparseVerification(SharedBlocks(0.5, 100, 4), None), draft)
    assert not reached


def test_only_the_target_s_verification_has_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the prompt nor the draft, which is the model itself without a layer, nor dense calls."""
    from effpass.runtime.speculative import shared_experts, skip_layers

    nodes: list[int] = []

    def counted(chosen: Tensor, weights: Tensor, is_node: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        nodes.append(len(is_node))
        assert len(chosen) == len(is_node)
        return share_experts(chosen, weights, is_node, *rest)

    monkeypatch.setattr(shared_experts, "share_experts", counted)
    model = prepared("mixtral")
    draft = ModelDraft(skip_layers(model, [0]), Eagle2(3, 2, 6))
    speculate(model, SparseVerification(None, ExpertBudget(0.5, True), refresh=2), draft)
    assert set(nodes) == {2 * 6}
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("rescales", [True, False])
def test_experts_that_stay(rescales: bool) -> None:
    """Against loops: votes of nodes alone, the best of them, weights scaled to their sum."""
    torch.manual_seed(int(rescales))
    experts, kept = 7, 3
    chosen = torch.stack([torch.randperm(experts)[:3] for _ in range(6)])
    weights, is_node = torch.rand(6, 3), torch.tensor([True, True, False, True, True, False])
    weights[2] = weights[5] = 100.0  # padding
    votes = [0.0] * experts
    for t in range(6):
        for e, w in zip(chosen[t].tolist(), weights[t].tolist(), strict=True):
            votes[e] += w if is_node[t] else 0.0
    best = sorted(range(experts), key=lambda e: -votes[e])[:kept]
    new, left = share_experts(chosen, weights, is_node, experts, kept, rescales)
    assert set(new.flatten().tolist()) <= set(best)
    dense = torch.zeros(6, experts).scatter_add(1, new, left)
    for t in range(6):
        stay = {e: w for e, w in zip(chosen[t].tolist(), weights[t].tolist(), strict=True) if e in best}
        scale = float(weights[t].sum()) / sum(stay.values()) if rescales and stay else 1.0
        expected = torch.tensor([scale * stay.get(e, 0.0) for e in range(experts)])
        torch.testing.assert_close(dense[t], expected)
    everything = torch.arange(experts).expand(2, -1)
    of_all = share_experts(everything, torch.rand(2, experts), torch.ones(2).bool(), experts, experts, rescales)
    assert torch.equal(of_all[0], everything)


def test_a_budget_is_never_below_one_token_s_choice() -> None:
    budget = ExpertBudget(0.1, True)
    assert [budget.of(128, 8), budget.of(8, 2), budget.of(4, 4)] == [13, 2, 4]


def test_more_rounds_than_one_dense_call_takes() -> None:
    settings = SparseVerification(FEW, None, refresh=100)
    with pytest.raises(EffpassError, match=r"refresh: 100 rounds.*up to 400 tokens(.|\n)*refresh: 64 is the most"):
        speculate(prepared(), settings, ModelDraft(draft_model("right"), chain(3)))
