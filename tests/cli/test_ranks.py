"""Commands under torchrun: two processes share a model's experts, and one of them writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import make_checkpoint

from effpass.cli.ranks import process_group
from effpass.core.errors import EffpassError

TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PLACED = """
import os, sys
from pathlib import Path
import torch
from effpass.cli.ranks import placed
from effpass.core.recipe import Recipe
spread = Recipe.parse({"passes": [{"moe_gemm": {"expert_parallel": "tp"}}]})
with placed(spread, "cpu") as place:
    found = [place.loads_on, place.runs_on, str(place.writes), str(float(torch.rand(1)))]
    Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join(found))
with placed(Recipe.parse({"passes": ["moe_gemm"]}), "cpu") as place:
    assert place.writes and not torch.distributed.is_initialized()
"""


def torchrun(*arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    words = [*TORCHRUN, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def tiny_moe(tmp_path: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = make_checkpoint(tmp_path / "moe")
    config = MixtralConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_two_processes_write_the_text_of_one(run, tiny_moe, recipe_file):
    recipe = recipe_file("- moe_gemm: {expert_parallel: tp}")
    words = ["generate", tiny_moe, "-p", "hi there", "--max-new-tokens", 12]
    alone = run(*words)
    assert alone.exit_code == 0, alone.output
    assert len(alone.stdout) > 6
    assert torchrun("-m", "effpass", *words, "-r", recipe) == alone.stdout


def test_processes_draw_the_same_numbers_and_one_writes(tmp_path):
    (tmp_path / "placed.py").write_text(PLACED)
    torchrun(tmp_path / "placed.py", tmp_path)
    places = [(tmp_path / rank).read_text().split() for rank in "01"]
    assert [place[:3] for place in places] == [["cpu", "cpu", "True"], ["cpu", "cpu", "False"]]
    assert places[0][3] == places[1][3]


@pytest.mark.parametrize(
    ("device", "found", "message"),
    [
        ("cuda:1", 2, "--device cuda:1 for 2 processes\n  → --device cuda gives each its own"),
        ("cuda", 1, "torchrun started process 1 on this machine, which has 1 GPUs"),
    ],
)
def test_each_process_needs_a_gpu(device, found, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    with pytest.raises(EffpassError) as caught, process_group(device):
        pass
    assert message in str(caught.value)
