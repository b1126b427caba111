"""Trainable sparse attention in transformers models: against their own attention, in checkpoints, compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import effpass
from effpass.core.errors import EffpassError, ModelError
from effpass.runtime.context_parallel import Context
from effpass.runtime.linear_attention import GatedDeltaSettings, make_hybrid
from effpass.runtime.routed_attention import install

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 512,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "use_cache": False, **changes})).train()


def qwen3() -> Any:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, use_cache=False)).train()


def packed() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(0))
    positions = torch.cat((torch.arange(60), torch.arange(40)))
    return {"input_ids": ids, "position_ids": positions.expand(2, -1), "labels": ids}


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("make", [llama, qwen3])
def test_a_budget_of_the_length_trains_as_full_attention(make: Any) -> None:
    model = make()
    dense = loss_and_gradients(model, packed())
    routed = install(model, block=16, budget=60)
    assert routed.layers == 3
    for ours, theirs in zip(loss_and_gradients(model, packed()), dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(routed.coverage, torch.ones(3))
    routed.undo()
    again = loss_and_gradients(model, packed())
    assert all(torch.equal(a, b) for a, b in zip(again, dense, strict=True))


def test_padding_behind_rows_changes_nothing() -> None:
    model = llama()
    install(model, block=16, budget=32)
    batch = packed()
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, 70:] = 0
    ids = batch["input_ids"].clone()
    full = model(input_ids=ids, attention_mask=mask).logits
    ids[1, 70:] = 7
    other = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(full[1, :70], other[1, :70])
    assert torch.equal(full[0], other[0])
    alone = model(input_ids=ids[1:, :70]).logits
    torch.testing.assert_close(full[1:, :70], alone, rtol=1e-4, atol=1e-5)


def test_sequences_are_taken_from_the_collator_or_from_positions() -> None:
    model = llama()
    install(model, block=16, budget=32)
    batch = packed()
    found = model(**batch).logits
    ends = torch.tensor([0, 60, 100, 160, 200], dtype=torch.int32)
    assert torch.equal(model(**batch, cu_seq_lens_q=ends).logits, found)
    first = model(input_ids=batch["input_ids"][:1, :60]).logits
    torch.testing.assert_close(found[:1, :60], first, rtol=1e-4, atol=1e-5)


def test_documents_are_kept_apart_whose_positions_do_not_begin_at_zero() -> None:
    model = llama()
    batch = packed() | {"position_ids": torch.cat((torch.arange(2, 62), torch.arange(5, 45))).expand(2, -1)}
    with torch.no_grad():
        dense = model(**batch).logits
        install(model, block=16, budget=100, max_budget=100)
        torch.testing.assert_close(model(**batch).logits, dense, rtol=1e-4, atol=1e-5)


def test_a_hybrid_attends_sparsely_with_and_without_documents_in_a_row() -> None:
    model = llama()
    make_hybrid(model, (1,), GatedDeltaSettings("kda", 2, 2, 16, 16))
    install(model, block=16, budget=100, max_budget=100)
    batch = packed()
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"]).logits  # with a cache, which nobody reads
        first = model(input_ids=batch["input_ids"][:1, :60]).logits
        torch.testing.assert_close(whole[:1, :60], first, rtol=1e-4, atol=1e-5)
        found = model(**batch, use_cache=False).logits
    torch.testing.assert_close(found[:1, :60], first, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:1, 60:], whole[:1, 60:], atol=1e-3)


def test_a_checkpoint_attends_with_the_budgets_of_its_forward_pass() -> None:
    budgets = torch.tensor([32, 64, 48])
    model = llama()
    routed = install(model, block=16, budget=32, max_budget=96)
    routed.budgets = budgets
    plain = loss_and_gradients(model, packed())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad()
    loss = model(**packed()).loss
    routed.budgets = torch.full((3,), 96)  # the next micro-batch's
    loss.backward()
    recomputed = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert all(torch.equal(a, b) for a, b in zip(recomputed, plain, strict=True))
    other = loss_and_gradients(model, packed())
    assert not torch.equal(other[0], plain[0])


def test_budgets_are_of_each_layer_and_their_curves_are_watched() -> None:
    model = llama()
    routed = install(model, block=16, budget=32, max_budget=64)
    model(**packed())
    assert routed.curves is None
    routed.watch(torch.tensor([32, 48, 64]))
    routed.budgets = torch.tensor([32, 48, 64])
    model(**packed())
    assert routed.curves is not None
    assert routed.curves.shape == (3, 3)
    assert (routed.curves.diff(dim=1) > 0).all()
    torch.testing.assert_close(routed.coverage, routed.curves.diag(), rtol=1e-4, atol=1e-4)  # 200 tokens, all of them
    routed.watch(None)
    assert routed.curves is None


def test_adapters_train_through_it() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    dense = loss_and_gradients(model, packed())
    install(model, block=16, budget=60)
    assert len(dense) == 13
    for ours, theirs in zip(loss_and_gradients(model, packed()), dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_budgets_compile_nothing_in_a_compiled_model() -> None:
    model = llama()
    routed = install(model, block=16, budget=32, max_budget=96)
    batch = {**packed(), "cu_seq_lens_q": torch.tensor([0, 60, 100, 160, 200], dtype=torch.int32)}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = []
    for budgets in ([32, 32, 32], [48, 32, 96], [64, 64, 64]):
        routed.budgets = torch.tensor(budgets, dtype=torch.int32)
        losses.append(compiled(**batch).loss.detach())
        torch.testing.assert_close(losses[-1], model(**batch).loss.detach())
    assert len({float(x) for x in losses}) == 3


def test_the_pass_prepares_a_model_to_train_and_leaves_decoding_as_it_was() -> None:
    dense, model = llama(), llama()
    recipe = {"version": 1, "passes": [{"sparse_attention": {"train_budget": 32, "train_block": 16}}]}
    ready = effpass.prepare(model, recipe)
    assert ready.effpass_report.hits == 3
    assert not torch.equal(ready(**packed()).loss, dense(**packed()).loss)
    assert 0 < float(ready.effpass_routed.coverage[0]) < 1
    prompt = packed()["input_ids"][:1, :40]
    ready.eval(), dense.eval()
    expected = dense.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=True, eos_token_id=None)
    assert torch.equal(
        ready.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=True, eos_token_id=None), expected
    )
    twin = copy.deepcopy(ready)
    twin.effpass_routed.budgets = torch.tensor([100, 100, 100])
    with pytest.raises(EffpassError, match="the budget is 100 keys and max_budget 32"):
        twin(**packed())
    assert ready.effpass_routed.budgets.tolist() == [32, 32, 32]
    ready.effpass_routed.undo()
    assert torch.equal(ready(**packed()).loss, dense(**packed()).loss)


def test_programs_say_where_training_is_sparse() -> None:
    model = llama()
    effpass.backend.reports.clear()
    options = {"passes": [{"sparse_attention": {"train_budget": 32, "train_block": 16}}], "inner": "eager"}
    torch.compile(model, backend="effpass", options=options)(input_ids=packed()["input_ids"]).logits.sum()
    assert "training is sparse in the model" in effpass.backend.reports[0].passes[0].line()


def test_what_it_has_no_place_for_is_refused() -> None:
    model = llama()
    for budget, most, said in ((16, None, "a budget of 16 keys is less"), (65, 64, "the budget is 65 keys")):
        with pytest.raises(EffpassError, match=said):
            install(model, block=16, budget=budget, max_budget=most)
    assert model.config._attn_implementation == "sdpa"
    sliding = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ModelError, match="layer 1: it sees 8 positions only"):
        install(Qwen2ForCausalLM(sliding))
    sinks = GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ModelError, match="attends to sinks of its own"):
        install(GptOssForCausalLM(sinks))

    routed = install(model, block=16, budget=32)
    batch = packed()
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(EffpassError, match="padding in front of tokens"):
        model(input_ids=batch["input_ids"], attention_mask=mask)
    with pytest.raises(EffpassError, match=r"attention_mask is \(1, 1, 100, 100\)"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones(1, 1, 100, 100))
    with pytest.raises(ModelError, match="attends to a cache of 5 keys with 1 queries"):
        model.generate(batch["input_ids"][:1, :4], max_new_tokens=3, use_cache=True)
    with pytest.raises(ModelError, match="called without what the model's forward pass passes on"):
        model.model(input_ids=batch["input_ids"])
    routed.budgets = torch.tensor([32, 32])
    with pytest.raises(EffpassError, match=r"int32 \[3\], the budget of each layer"):
        model(**batch)
    part = {**batch, "effpass_context": Context(None, 400)}  # refused before ranks are asked for anything
    routed.budgets = torch.tensor([32, 32, 32])
    model.config.linear_attention = {"layers": [1]}
    with pytest.raises(ModelError, match="layer 1: it is linear attention, which keeps a state, and context"):
        model(**part)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="attends by 'sdpa' now, which sees this rank's tokens alone"):
        model(**part)
    dropping = llama(attention_dropout=0.1)
    install(dropping, block=16, budget=32)
    with pytest.raises(ModelError, match=r"dropout of 0\.1"):
        dropping(**batch)


@pytest.mark.gpu
def test_a_model_trains_on_a_gpu_without_waiting_for_it() -> None:
    from routed_cases import ratio

    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model, batch = llama(**sizes), packed()
    install(model, block=16, budget=60)
    loss, *expected = loss_and_gradients(model, batch)
    on_gpu = llama(**sizes).to("cuda", torch.bfloat16)
    routed = install(on_gpu, block=16, budget=32, max_budget=60)
    routed.watch(torch.tensor([32, 48, 60]))
    batch = {**batch, "cu_seq_lens_q": torch.tensor([0, 60, 100, 160, 200], dtype=torch.int32)}
    batch = {name: x.cuda() for name, x in batch.items()}
    loss_and_gradients(on_gpu, batch)
    budgets = torch.tensor([60, 60], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        routed.budgets = budgets
        found, *gradients = loss_and_gradients(on_gpu, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(found) == pytest.approx(float(loss), rel=1e-2)
    assert routed.curves is not None
    torch.testing.assert_close(routed.curves[:, 2], torch.ones(2, device="cuda"))
    assert max(ratio(a, b.double()) for a, b in zip(gradients, expected, strict=True)) <= 0.1  # of bfloat16 weights
