"""fuse_rope_attention in front of tree attention: norms, rotation and the cache's write are one launch.

What a CUDA graph would hold of a round is run here as it is recorded: the model's calls compiled, on a CPU.
"""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from transformers import LlamaConfig

from effpass import backend
from effpass.lowering import regions
from effpass.lowering.ops import cached_attention, fused_linear, rope_cache_write, rotary_table
from effpass.runtime.engine import Engine
from effpass.runtime.speculative import Eagle2, EagleDraft, EagleHead, HeadConfig, ModelDraft, Speculator, generate
from effpass.runtime.speculative.round import Round
from effpass.runtime.speculative.shared_channels import ChannelBudget
from effpass.runtime.speculative.shared_experts import ExpertBudget
from effpass.runtime.speculative.sparse import SharedBlocks, SparseVerification


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for operators in (cached_attention, rope_cache_write, fused_linear, rotary_table):
        monkeypatch.setattr(operators, "has_kernel", lambda device, dtype, rows: True)
    backend.reports.clear()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds run as they are recorded."""

    def as_recorded(self: Round, key: Any, work: Any) -> Any:
        with self.target.recording(), self.drafting.recording():
            return work()

    monkeypatch.setattr(Round, "_run", as_recorded)


def run(family: str, make_draft: Any, expected: torch.Tensor | None = None, graphs: int = 2) -> None:
    """The text is plain decoding's or `expected`, from compiled graphs with every layer fused: of target and draft."""
    model, given = families.make(family), families.batch(11)
    inputs = {k: given[k] for k in ("input_ids", "attention_mask")}
    if expected is None:
        expected = families.make(family).generate(**inputs, max_new_tokens=16, eos_token_id=None)
    engine = Engine(model, backend=backend.DecodeBackend())
    draft = make_draft(model, backend.DecodeBackend())
    speculator = Speculator(engine, draft, switches=False)

    def loop(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    out = model.generate(**inputs, max_new_tokens=16, eos_token_id=None, custom_generate=loop)
    torch._dynamo.reset()
    assert torch.equal(out, expected)
    assert len(backend.reports) == graphs
    layers = {model.config.num_hidden_layers, 1 if isinstance(draft, EagleDraft) else model.config.num_hidden_layers}
    for report in backend.reports:
        (rope,) = [entry for entry in report.passes if entry.name == "fuse_rope_attention"]
        assert rope.hits in layers
        assert rope.ops["effpass.rope_cache_write.default"] == -rope.ops["effpass.cache_write.default"] == rope.hits
        assert "effpass.tree_attention.default" not in rope.ops
        assert next(entry for entry in report.passes if entry.name == "fuse_linears").hits > 0
        tables = 2 if family == "gemma3" else 1
        assert next(entry for entry in report.passes if entry.name == "fuse_rotary_table").hits == tables


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_recorded_round(family: str, recorded: None) -> None:
    # Three nodes in a layer and three tokens to catch up with are one shape of call.
    run(family, lambda model, compile_: ModelDraft(families.make(family, seed=3), Eagle2(3, 2, 6), compile_))


def test_a_recorded_round_with_a_head(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def draft(model: Any, compile_: Any) -> EagleDraft:
        layer = LlamaConfig(**{**families.COMMON, "num_hidden_layers": 1})
        head = EagleHead(HeadConfig(layer, 96, (0, 1))).eval().requires_grad_(False)
        head.share(model)
        return EagleDraft(head, Eagle2(3, 2, 6), compile_)

    found: list[list[str]] = []
    choose = regions._regions

    def chosen(graph: torch.fx.Graph) -> Any:
        of_graph = choose(graph)
        found.extend([str(node.target) for node in region] for region in of_graph)
        return of_graph

    monkeypatch.setattr(regions, "_regions", chosen)
    run("llama", draft, graphs=3)  # catching up is a graph of its own, with the product of the features
    # Each graph of the head has one region: embedding, norms of both inputs, and their concatenation.
    assert len(found) == 2
    for names in found:
        assert names[-1] == "aten.cat.default"
        assert "aten.embedding.default" in names
        assert names.count("aten.rms_norm.default") == 2


@pytest.mark.parametrize(
    ("family", "rules"),
    [
        ("qwen3_moe", {"experts": ExpertBudget(0.5, rescales=True)}),
        ("llama", {"channels": ChannelBudget(0.3)}),
    ],
)
def test_a_recorded_sparse_round(family: str, rules: dict[str, Any], recorded: None) -> None:
    """Half of the blocks, and experts or channels: the text is that of sparse rounds that were not compiled."""
    settings = SparseVerification(SharedBlocks(0.5, 4, 4), **rules, refresh=2)

    def draft(model: Any, compile_: Any) -> ModelDraft:
        model.effpass_sparse_verification = settings
        return ModelDraft(families.make(family, seed=3), Eagle2(3, 2, 6), compile_)

    model, given = families.make(family), families.batch(11)
    speculator = Speculator(Engine(model), draft(model, None), switches=False)
    inputs = {k: given[k] for k in ("input_ids", "attention_mask")}
    expected = model.generate(
        **inputs,
        max_new_tokens=16,
        eos_token_id=None,
        custom_generate=lambda _, ids, **how: generate(speculator, ids, **how),
    )
    plain = families.make(family).generate(**inputs, max_new_tokens=16, eos_token_id=None)
    assert not torch.equal(expected, plain)
    run(family, draft, expected, graphs=3)  # dense calls that run tokens again are one more
    if "experts" in rules:
        for report in backend.reports:
            assert next(entry for entry in report.passes if entry.name == "moe_gemm").hits == 2
