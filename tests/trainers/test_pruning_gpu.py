"""Pruning on a GPU: bfloat16 computation over float32 weights, in the memory that was said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_tuning import checkpoint, metrics, quiet

import effpass
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.pruning.memory import estimate
from effpass.trainers.pruning.run import prune
from effpass.trainers.pruning.settings import Settings

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
SETTINGS = Settings(
    OptimizerConfig(lr=1e-3), keep=0.7, steps=30, learning=0.5, batch=4, accumulate=2, sequence_length=128,
    dtype="bfloat16", warmup=2, log_every=3, save_every=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} plus {i % 7} makes {i + i % 7}. " for i in range(2000)))
    return path


@pytest.mark.parametrize(
    ("family", "settings", "method", "recovery"),
    [
        ("qwen3", {**WIDE, "head_dim": 32}, "full", "afa-lora"),
        ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 64}, "full", "full"),
        ("llama", WIDE, "lora", "lora"),
    ],
)
def test_a_run_in_bfloat16_learns_and_its_checkpoint_loads(text, tmp_path, family, settings, method, recovery):
    model = checkpoint(tmp_path / "model", family, **settings)
    chosen = replace(SETTINGS, method=method, recovery=recovery)
    prune(str(model), text, tmp_path / "keep", chosen, save_model=tmp_path / "small", validation=text, say=quiet)
    final = {key: value for line in metrics(tmp_path / "keep") for key, value in line.items()}
    assert final["eval_loss_recovered"] < final["eval_loss_whole"]
    smaller = effpass.load_model(tmp_path / "small", device_map={"": "cuda"}).model
    assert smaller.dtype == torch.bfloat16
    assert smaller.generate(torch.arange(8, device="cuda")[None], max_new_tokens=4).shape == (1, 12)


def test_the_memory_that_is_said_is_what_a_run_takes(text, tmp_path):
    """Within a third: the allocator rounds, and fused kernels have workspaces."""
    settings = {**WIDE, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = checkpoint(tmp_path / "model", "llama", **settings)
    chosen = replace(SETTINGS, batch=16, accumulate=1, sequence_length=256, steps=20, save_every=0)
    config = effpass.load_model(model).model.config
    said = estimate(config, chosen, torch.device("cuda")).total
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prune(str(model), text, tmp_path / "keep", chosen, say=quiet)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.67 * said < taken < 1.34 * said
