"""Balanced fine-tuning on a GPU: a measured table, a run in bfloat16 with the kernels, budgets that compile nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_tuning import checkpoint, metrics, quiet, write

import effpass
from effpass.trainers.balance.measure import latency_table
from effpass.trainers.finetune.run import tune
from effpass.trainers.finetune.settings import Settings, Sparse
from effpass.trainers.lm.config import OptimizerConfig

pytestmark = pytest.mark.gpu

SHAPE = {"hidden_size": 256, "max_position_embeddings": 16384}
SPARSE = Sparse(512, 64, is_balanced=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("llama"), **SHAPE)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path / "cache"))


def test_the_table_knows_that_more_keys_of_longer_documents_take_longer(model):
    loaded = effpass.load_model(model).model.to("cuda", torch.bfloat16).requires_grad_(True)
    tuning = replace(SPARSE, budget=2048).tuning
    table = latency_table(loaded, tuning.budgets, 16384, block=64, dtype=torch.bfloat16)
    assert (table.source, table.device) == ("measured", torch.cuda.get_device_name())
    times = np.asarray(table.attention)
    assert times[-1, -1] > 1.3 * times[-1, 0]
    assert times[-1, -1] > 1.3 * times[len(times) // 2, -1]
    again = latency_table(loaded, tuning.budgets, 16384, block=64, dtype=torch.bfloat16)
    assert again == table


def test_a_balanced_run_in_bfloat16_learns_and_says_how(model, tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"text": "".join(rng.choice(list("ab"), size))} for size in (*[60] * 40, *[900] * 8, *[3500] * 8)]
    data = write(tmp_path / "data.jsonl", *(rows[n] for n in rng.permutation(len(rows))))
    settings = Settings(
        OptimizerConfig(lr=3e-3, name="adamw", weight_decay=0.0), steps=12, batch=4, accumulate=2, sequence_length=4096,
        dtype="bfloat16", sparse=SPARSE, log_every=1, save_every=0,
    )  # fmt: skip
    out = tune(str(model), data, tmp_path / "out", settings, say=quiet)
    lines = [line for line in metrics(out) if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert 0 < lines[-1]["balance_coverage"] <= 1
    dense = tune(
        str(model),
        data,
        tmp_path / "whole",
        replace(settings, sparse=Sparse(4096, 64, is_balanced=True, p=0.0)),
        say=quiet,
    )
    plain = tune(str(model), data, tmp_path / "plain", replace(settings, sparse=None), say=quiet)
    one, two = ([line["loss"] for line in metrics(folder) if "loss" in line] for folder in (dense, plain))
    assert one[:2] == pytest.approx(two[:2], abs=0.02)  # bfloat16, and sums in another order
