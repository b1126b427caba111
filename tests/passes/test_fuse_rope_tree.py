"""fuse_rope_attention in front of tree attention: norms, rotation and the cache's write are one launch.

What a CUDA graph would hold of a round is run here as it is recorded: the model's calls compiled, on a CPU.
"""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch

from effpass import backend
from effpass.lowering.ops import cached_attention, fused_linear, rope_cache_write, rotary_table
from effpass.runtime.engine import Engine
from effpass.runtime.speculative import Eagle2, ModelDraft, Speculator, generate


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for operators in (cached_attention, rope_cache_write, fused_linear, rotary_table):
        monkeypatch.setattr(operators, "has_kernel", lambda device, dtype, rows: True)
    backend.reports.clear()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_recorded_round(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = families.make(family), families.batch(11)
    inputs = {k: given[k] for k in ("input_ids", "attention_mask")}
    expected = families.make(family).generate(**inputs, max_new_tokens=16, eos_token_id=None)
    engine = Engine(model, backend=backend.DecodeBackend())
    # 5 nodes in two layers and 3 tokens to catch up with are one shape of call, the tree of 6 another.
    speculator = Speculator(
        engine, ModelDraft(families.make(family, seed=3), Eagle2(3, 2, 6), backend.DecodeBackend()), switches=False
    )

    def loop(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    from effpass.runtime.speculative.round import Round

    def as_recorded(self: Round, key: Any, work: Any) -> Any:
        with self.target.recording(), self.draft.recording():
            return work()

    monkeypatch.setattr(Round, "_run", as_recorded)
    out = model.generate(**inputs, max_new_tokens=16, eos_token_id=None, custom_generate=loop)
    torch._dynamo.reset()
    assert torch.equal(out, expected)
    assert len(backend.reports) == 2  # the draft's and the target's, each compiled once
    for report in backend.reports:
        (rope,) = [entry for entry in report.passes if entry.name == "fuse_rope_attention"]
        layers = model.config.num_hidden_layers
        assert rope.hits == layers
        assert rope.ops["effpass.rope_cache_write.default"] == -rope.ops["effpass.cache_write.default"] == layers
        assert "effpass.tree_attention.default" not in rope.ops
        assert next(entry for entry in report.passes if entry.name == "fuse_linears").hits > 0
