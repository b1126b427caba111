"""Benchmark area `quality`: the two calls through the cache, and what the bad selections hide."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from benchmarks import quality
from effpass.runtime.attention import reading_cache
from effpass.runtime.cache import DecodeCache
from effpass.trainers.lm.model import make_model, model_config
from effpass.trainers.lm.tasks import Example
from effpass.trainers.lm.tokenizer import byte_tokenizer

SHAPES = {
    "llama": {"num_key_value_heads": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "first_k_dense_replace": 2,
    },
}  # fmt: skip
CONTEXT, TAIL = 320, 12


@pytest.fixture(params=SHAPES)
def model(request):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    given = {"model_type": request.param, **shape, **SHAPES[request.param]}
    return make_model(model_config(given, byte_tokenizer(), 512), None, 0).eval()


def logits_after(model, hide, blocks_only: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and the logits of the tail after `hide(cache)`."""
    ids = torch.randint(0, 256, (2, CONTEXT + TAIL), generator=torch.Generator().manual_seed(0))
    cache = DecodeCache(model.config, 2, CONTEXT + TAIL, torch.device("cpu"))
    with torch.no_grad(), reading_cache(model):
        if blocks_only:
            AttentionInterface.register(quality._BLOCKS_ONLY, quality._blocks_only)
            model.set_attn_implementation(quality._BLOCKS_ONLY)
        quality._call(model, cache, ids[:, :CONTEXT], 0)
        hide(cache)
        return ids, quality._call(model, cache, ids[:, CONTEXT:], CONTEXT)


def masked(model, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The same from one plain call with a mask: `hidden` bool `[2, CONTEXT]` is unseen by the tail alone."""
    size = CONTEXT + TAIL
    seen = torch.ones(size, size, dtype=torch.bool).tril().expand(2, 1, size, size).clone()
    seen[:, 0, CONTEXT:, :CONTEXT] &= ~hidden[:, None]
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, CONTEXT:]


def test_two_calls_equal_one(model):
    ids, logits = logits_after(model, lambda cache: None)
    expected = masked(model, ids, torch.zeros(2, CONTEXT, dtype=torch.bool))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_hidden_slots_are_hidden_from_the_tail(model):
    hidden = torch.rand(2, CONTEXT) < 0.9

    def hide(cache):
        cache.slots.positions[:, :CONTEXT].masked_fill_(hidden, -1)
        cache.slots.is_dense = False

    ids, logits = logits_after(model, hide)
    torch.testing.assert_close(logits, masked(model, ids, hidden), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits, masked(model, ids, torch.zeros_like(hidden)), atol=1e-3)


def test_all_blocks_are_the_dense_model_and_a_tenth_is_not(model, monkeypatch):
    _, tenth = logits_after(model, lambda cache: None, blocks_only=True)
    monkeypatch.setattr(quality, "BUDGET", 1.0)
    ids, whole = logits_after(model, lambda cache: None, blocks_only=True)
    expected = masked(model, ids, torch.zeros(2, CONTEXT, dtype=torch.bool))
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(tenth, expected, atol=1e-3)


def test_an_answer_counts_when_greedy_decoding_would_give_it(model):
    model.get_output_embeddings().weight.data[128:] = 0  # it speaks ASCII
    tokenizer = byte_tokenizer()
    examples = []
    for context in (b"once upon a time there was a cat" * 3, b"and a dog" * 9):
        ids = torch.tensor([list(context + b" then")])
        made = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)[0, -3:]
        examples.append(Example(context, [(b" then", bytes(made.tolist()))], 0.0))
    wrong = Example(examples[0].context, [(b" then", examples[0].pairs[0][1][:2] + b"\x7f")], 0.0)
    assert wrong != examples[0]
    assert quality._accuracy(model, tokenizer, examples, "all keys", 0) == 1
    assert quality._accuracy(model, tokenizer, [*examples, wrong, wrong], "all keys", 0) == 0.5
