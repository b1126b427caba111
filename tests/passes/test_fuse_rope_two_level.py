"""fuse_rope_attention in front of sparse attention: norms, rotation and the cache's write are one launch."""

from __future__ import annotations

import families
import pytest
import torch

import effpass
from effpass import backend
from effpass.lowering.ops import cached_attention, rope_cache_write
from effpass.runtime.attention import reading_cache
from effpass.runtime.session import Session


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_recorded_sparse_step(family: str, offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for operators in (cached_attention, rope_cache_write):
        monkeypatch.setattr(operators, "has_kernel", lambda device, dtype, rows: True)
    backend.reports.clear()
    options = {"tokens": 16, "blocks": 4, "block": 16, "recent": 1, "dense_below": 1}
    passes = [{"sparse_attention": options}, *([{"kv_offload": {"pool": 5}}] if offload else [])]
    recipe = {"version": 1, "passes": passes}
    model, given = effpass.prepare(families.make(family), recipe), families.batch(43)
    compile_step = backend.DecodeBackend()
    with torch.no_grad(), reading_cache(model):
        ours, plain = (Session(model, 2, 96, compile_step) for _ in range(2))
        for session in (ours, plain):
            session.begin(2)
            session.prefill(given["input_ids"], given["attention_mask"].bool(), 64)
        compiled = ours._compile()
        for _ in range(6):  # over a border of blocks
            token = plain.logits.argmax(-1, keepdim=True)
            ours.tokens.copy_(token)
            plain.tokens.copy_(token)
            plain.step()
            ours.cache.ready()
            with ours._recording():
                ours._move()
                ours.cache.append(ours._position)
                ours._forward(compiled, None)
            ours.cache.advance(1)
            # The same arithmetic, but for sums in another order.
            torch.testing.assert_close(ours.logits[:2], plain.logits[:2], rtol=1e-5, atol=2e-6)
    torch._dynamo.reset()
    (report,) = backend.reports
    (rope,) = [entry for entry in report.passes if entry.name == "fuse_rope_attention"]
    layers = model.config.num_hidden_layers
    assert rope.hits == layers
    fused, alone = ("rope_page_write", "page_write") if offload else ("rope_cache_write", "cache_write")
    assert rope.ops[f"effpass.{fused}.default"] == -rope.ops[f"effpass.{alone}.default"] == layers
    assert rope.ops["aten.neg.default"] == -2 * layers
    assert "effpass.two_level_attention.default" not in rope.ops
