"""Fine-tuning on a GPU: the memory that is said, one compilation for all β, and completions from recorded steps."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from families import batch, make
from tiny_tuning import checkpoint, quiet, sums

from effpass.trainers.afa_lora import AnnealSchedule, LoraSettings, attach
from effpass.trainers.finetune.memory import estimate
from effpass.trainers.finetune.rollouts import use_engine
from effpass.trainers.finetune.run import load, tune
from effpass.trainers.finetune.settings import Method, Settings
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.lm.model import set_experts
from effpass.trainers.lm.optimizers import make_optimizer

pytest.importorskip("peft")
pytestmark = pytest.mark.gpu

ADAMW = OptimizerConfig(lr=1e-2, name="adamw", weight_decay=0.0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_a_recorded_step_samples_what_transformers_samples_while_weights_and_beta_move(family):
    model = make(family).cuda().train()
    set_experts(model)
    adapter = attach(model, AnnealSchedule(8, end=0.75), LoraSettings(4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-2)
    ids = batch(9)["input_ids"].repeat(3, 1).cuda()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert use_engine(model) is None
    seen = []
    for _ in range(7):
        seen.append(adapter.model.generate(**asked))
        with torch.no_grad():
            assert torch.equal(seen[-1], type(model).generate(model, **asked))
        model(input_ids=ids, labels=ids.flip(1), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    assert len({tuple(s.flatten().tolist()) for s in seen}) == 7


@pytest.mark.parametrize("method", ["full", "lora", "afa-lora"])
def test_the_memory_that_is_said_is_what_a_step_takes(tmp_path, method: Method):
    # Large enough that what the allocator rounds up is little, and on a GPU of any size.
    folder = checkpoint(
        tmp_path / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=1024,
    )  # fmt: skip
    settings = Settings(ADAMW, method=method, dtype="bfloat16", lora=LoraSettings(8))
    device, rows, length = torch.device("cuda"), 8, 1024
    gc.collect()
    before = torch.cuda.memory_allocated()
    trained = load(str(folder), settings, settings.anneal.schedule(10), device)
    config = trained.model.config
    said = estimate(
        config, method, settings.lora, "adamw", rows=rows, length=length, bfloat16=True, device=device
    )  # fmt: skip
    optimizer = make_optimizer(settings.optimizer, trained.model)
    ids = torch.randint(256, (rows, length), device=device)
    positions = torch.arange(length // 2, device=device).repeat(2).expand(rows, -1)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with trained.under_autocast(), torch.autocast("cuda", torch.bfloat16):
            logits = trained.model(input_ids=ids, position_ids=positions, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    # Not all is there at once: gradients come as activations go.
    assert said.total == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.25)


def test_a_compiled_run_learns_and_one_compilation_does_for_all_beta(tmp_path):
    folder = checkpoint(tmp_path / "model")
    settings = Settings(
        ADAMW, method="afa-lora", steps=10, batch=4, sequence_length=64, dtype="bfloat16", compile=True,
        log_every=5, save_every=0,
    )  # fmt: skip
    data = sums(tmp_path / "data.jsonl")
    counters = torch._dynamo.utils.counters
    found = []
    for name, end in (("short", 0.1), ("long", 0.9)):  # one value of β above 0, and nine
        torch._dynamo.reset()
        counters.clear()
        anneal = replace(settings.anneal, end=end)
        tune(str(folder), data, tmp_path / name, replace(settings, anneal=anneal), say=quiet)
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[1] > 0
