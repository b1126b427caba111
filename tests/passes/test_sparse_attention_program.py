"""sparse_attention on programs: causal attention of prompts becomes block-sparse."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch

from effpass import backend
from effpass.lowering.ops import block_sparse_attention_causal  # noqa: F401  (registers the operator)

WHOLE = {"sparse_attention": {"prefill_threshold": 1.0, "dense_below": 1}}
PART = {"sparse_attention": {"prefill_density": 0.3, "dense_below": 1}}


def compiled(model: Any, item: dict[str, Any], **more: Any) -> Any:
    backend.reports.clear()
    return torch.compile(model, backend="effpass", options={"passes": [item], "inner": "eager"}, **more)


class Attention(torch.nn.Module):
    """One layer: 4 heads of 16 over 2 key-value heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.out = torch.nn.Linear(32, 128), torch.nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (h.unflatten(-1, (-1, 16)).transpose(1, 2) for h in self.project(x).split([64, 32, 32], -1))
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(a.transpose(1, 2).flatten(2))


def test_prompts_of_a_dynamic_length() -> None:
    model = Attention()
    ready = compiled(model, WHOLE, dynamic=True)
    for length in (1500, 1601):
        x = torch.randn(2, length, 32)
        with torch.no_grad():
            # Every block is chosen: the same sums in another order.
            torch.testing.assert_close(ready(x), model(x), rtol=1e-4, atol=2e-5)
    (report,) = backend.reports
    assert report.hits == 1
    assert report.passes[0].ops == {
        "aten.scaled_dot_product_attention.default": -1,
        "effpass.block_sparse_causal_attention.default": 1,
    }


def test_a_share_of_the_blocks_is_an_approximation() -> None:
    model, x = Attention(), torch.randn(1, 1800, 32) * 2
    with torch.no_grad():
        sparse, dense = compiled(model, PART)(x), model(x)
    # A tile of queries always has what it lies in, two blocks in front, and the first: up to there nothing is left out.
    torch.testing.assert_close(sparse[:, :512], dense[:, :512], rtol=1e-4, atol=2e-5)
    assert not torch.allclose(sparse[:, 1200:], dense[:, 1200:], atol=1e-3)


def test_short_prompts_are_dense() -> None:
    model, x = Attention(), torch.randn(1, 900, 32)
    item = {"sparse_attention": {**PART["sparse_attention"], "dense_below": 901}}
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, item)(x), model(x), rtol=1e-4, atol=2e-5)


def test_what_can_not_be_sparse_stays_with_the_reason() -> None:
    model, given = families.make("llama"), families.batch(20)
    for item, call, reason in (
        (PART, lambda m: m(**given, use_cache=False), "it has a mask, or sees tokens after its own"),
        (
            {"sparse_attention": {"dense_below": 1}},
            lambda m: m(given["input_ids"], use_cache=False),
            "prompts attend to",
        ),
    ):
        torch._dynamo.reset()
        ready = compiled(model, item)
        with torch.no_grad():
            got, expected = call(ready).logits, call(model).logits
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert backend.reports[0].hits == 0
        assert reason in backend.reports[0].passes[0].line()


def test_gradients_keep_attention_dense() -> None:
    model, ids = families.make("llama"), torch.randint(3, 96, (1, 20))
    compiled(model, PART)(input_ids=ids, use_cache=False).logits.sum().backward()
    assert "the program records gradients" in backend.reports[0].passes[0].line()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_a_recipe_that_requires_it_says_what_to_do() -> None:
    ids = torch.randint(3, 96, (1, 20))
    ready = compiled(families.make("llama"), {"sparse_attention": {"dense_below": 1, "require": True}})
    with torch.no_grad(), pytest.raises(Exception, match="prefill_density or prefill_threshold"):
        ready(input_ids=ids, use_cache=False)
