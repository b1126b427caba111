"""Supervised fine-tuning with sparse attention and balance: the same steps, resumption, what is said and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_tuning import checkpoint, metrics, quiet, weights, write

import effpass
from effpass.cli.train_options import sparse_settings
from effpass.core.errors import EffpassError, ModelError
from effpass.core.roofline import device_name
from effpass.trainers.afa_lora import LoraSettings
from effpass.trainers.balance import measure
from effpass.trainers.balance.expected import Expected
from effpass.trainers.balance.measure import _by_flops, _words
from effpass.trainers.balance.table import from_flops, read_table, write_table
from effpass.trainers.balance.tuner import documents_of
from effpass.trainers.finetune.balanced import LATENCY, BalancedRows
from effpass.trainers.finetune.memory import estimate
from effpass.trainers.finetune.packing import PackedBatches
from effpass.trainers.finetune.run import tune
from effpass.trainers.finetune.samples import Sample
from effpass.trainers.finetune.settings import Settings, Sparse
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.loop import Loop

ROOT = Path(__file__).parents[2]
# As many keys as a row has: attention is dense, whatever is balanced.
DENSE = Sparse(256, 32)
SPARSE = Sparse(96, 32, is_balanced=True)
SETTINGS = Settings(
    OptimizerConfig(lr=1e-2, name="adamw", weight_decay=0.0), steps=6, batch=4, accumulate=2, sequence_length=224,
    log_every=1, save_every=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Iterator[Path]:
    """Tables are measured once for all tests, and quickly, since what they say does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_PACKED", 256)
        yield tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch) -> None:
    monkeypatch.setenv("EFFPASS_CACHE", str(cache))


def texts(path: Path) -> Path:
    """Many short ones and some long ones."""
    rng = np.random.default_rng(0)
    rows = [{"text": "".join(rng.choice(list("abcdefgh"), size))} for size in (*[12] * 30, *[90] * 6, *[200] * 6)]
    return write(path, *(rows[n] for n in rng.permutation(len(rows))))


def run(model: Path, folder: Path, sparse: Sparse | None, *, say=quiet, resume: bool = False, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    data = texts(folder / "data.jsonl")
    return tune(str(model), data, folder / "out", replace(SETTINGS, sparse=sparse, **changes), resume=resume, say=say)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


# -- micro-batches ----------------------------------------------------------------------------------------------------


def some_samples(count: int = 40) -> list[Sample]:
    rng = np.random.default_rng(1)
    sizes = np.where(rng.random(count) < 0.6, rng.integers(4, 16, count), rng.integers(60, 128, count))
    return [Sample(rng.integers(3, 96, size).astype(np.int32), np.arange(size) > 2, n) for n, size in enumerate(sizes)]


def balanced(rank: int = 0, **changes) -> BalancedRows:
    arguments = {"length": 128, "batch": 8, "accumulate": 2, "world": 2, "epochs": 1, "seed": 3, **changes}
    rows = BalancedRows(some_samples(), rank=rank, **arguments)
    tuning = SPARSE.tuning
    table = from_flops((32, 64, 128), tuning.budgets, layers=2, attention_width=64, parameters=10**5, rate=1e9)
    rows.balance(table, Expected(tuning, 2))
    rows._expected.steps = 99  # all plans may be asked for
    return rows


def test_steps_have_the_samples_and_weights_that_packing_gives_them():
    plain = PackedBatches(some_samples(), length=128, batch=8, accumulate=2, world=2, epochs=1, seed=3)
    ranks = [balanced(rank) for rank in range(2)]
    assert len(ranks[0]) == len(plain)
    assert ranks[0].steps > 1
    for step in range(plain.steps):
        found: list[float] = []
        tokens: list[int] = []
        for part in range(2):
            for rank in ranks:
                micro = rank[2 * step + part]
                assert micro["input_ids"].shape == micro["position_ids"].shape == micro["weights"].shape
                assert micro["input_ids"].shape[0] == 1
                assert micro["input_ids"].shape[1] <= 2 * 128
                found += micro["weights"][micro["weights"] > 0].tolist()
                tokens += micro["input_ids"][micro["weights"] > 0].tolist()
        assert len(set(found)) == 1
        assert sum(found) / 4 == pytest.approx(1)  # the Trainer divides by two micro-batches, DDP by two processes
        rows = plain.rows[8 * step : 8 * (step + 1)]
        graded = [t for row in rows for n in row for t in plain.samples[n].tokens[plain.samples[n].graded].tolist()]
        assert sorted(tokens) == sorted(graded)


def test_micro_batches_cost_more_alike_than_full_rows_do():
    """Rows hold as many tokens, and yet a row of long documents costs more."""
    plain = PackedBatches(some_samples(), length=128, batch=8, accumulate=2, world=2, epochs=1, seed=3)
    ranks = [balanced(rank) for rank in range(2)]
    table = ranks[0]._table

    def spread(micro_batches: list[list[int]]) -> float:
        costs = [
            float(table.rest_seconds(sum(lengths)) + 2 * table.attention_seconds(lengths, 96).sum())
            for lengths in micro_batches
        ]
        return max(costs) / min(costs)

    rows = [[len(plain.samples[n].tokens) for row in plain.rows[n : n + 2] for n in row] for n in range(0, 8, 2)]
    assert spread([documents_of(rank[part]) for rank in ranks for part in range(2)]) < spread(rows)


def test_a_step_with_fewer_samples_than_micro_batches_keeps_its_rows():
    rows = balanced(batch=64, accumulate=32)
    assert len(rows) == 32
    seen = sum(
        int((balanced(rank, batch=64, accumulate=32)[n]["weights"] > 0).sum()) for rank in range(2) for n in range(32)
    )
    assert seen == sum(int(sample.graded.sum()) for sample in some_samples())


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(llama, cache, tmp_path_factory) -> Path:
    os.environ["EFFPASS_CACHE"] = str(cache)
    try:
        return run(llama, tmp_path_factory.mktemp("finished"), SPARSE)
    finally:
        del os.environ["EFFPASS_CACHE"]


def test_a_budget_of_a_row_gives_the_losses_of_dense_attention_balanced_or_not(llama, tmp_path):
    few = {"steps": 2, "save_every": 0}
    dense = run(llama, tmp_path / "dense", None, **few)
    sparse = run(llama, tmp_path / "sparse", DENSE, **few)
    balanced_ = run(llama, tmp_path / "balanced", replace(DENSE, is_balanced=True, p=0.0), **few)
    assert losses(sparse) == pytest.approx(losses(dense), abs=2e-5)
    assert losses(balanced_) == pytest.approx(losses(dense), abs=2e-4)
    assert effpass.load_model(sparse).model.config._attn_implementation == "sdpa"


def test_a_balanced_run_says_and_draws_how_and_leaves_a_stock_checkpoint(finished):
    assert (finished / "balance.png").stat().st_size > 1000
    lines = [line for line in metrics(finished) if "loss" in line]
    assert len(lines) == 6
    for line in lines:
        assert line["balance_imbalance"] == 1  # one process
        assert line["balance_budget_least"] >= 64
        assert line["balance_planned_s"] > 0
    assert 0 < lines[-1]["balance_coverage"] <= 1
    record = json.loads((finished / "training.json").read_text())
    assert record["settings"]["sparse"] == {"budget": 96, "block": 32, "is_balanced": True, "anchor": "mean", "p": 0.1}
    assert not finished.with_name("out.training").exists()
    assert type(effpass.load_model(finished).model).__name__ == "LlamaForCausalLM"


class _KilledError(Exception):
    pass


def test_an_interrupted_balanced_run_resumes_to_the_bit(llama, finished, tmp_path, monkeypatch):
    original = Loop.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise _KilledError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "training_step", step)
    with pytest.raises(_KilledError):
        run(llama, tmp_path, SPARSE)
    monkeypatch.setattr(Loop, "training_step", original)
    work = tmp_path / "out.training"
    assert read_table(work / LATENCY).source == "measured"
    assert (work / "checkpoints" / "checkpoint-3" / "balance_0.json").exists()
    again = run(llama, tmp_path, SPARSE, resume=True)
    skipped = {"balance_planned_s", "balance_planning_ms"}
    mine, theirs = ([{k: v for k, v in m.items() if k not in skipped} for m in metrics(f)] for f in (again, finished))
    assert mine == theirs
    one, two = weights(again), weights(finished)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_adapter_trains_sparsely_and_balanced(llama, tmp_path):
    said: list[str] = []
    out = run(llama, tmp_path, SPARSE, method="lora", steps=2, save_every=0, say=said.append)
    assert (out / "adapter_model.safetensors").exists()
    assert [line for line in said if line.startswith("attention to 96 keys in blocks of 32, balanced: 64 to 384")]
    assert [line for line in said if "balance_imbalance" in line]


def test_the_memory_of_sparse_attention_has_lists_of_blocks_and_no_masks(llama):
    config = effpass.load_model(llama).model.config

    def activations(sparse: Sparse | None, sharing: int = 1) -> int:
        found = estimate(
            config, "full", LoraSettings(), "adamw", rows=2, length=4096, bfloat16=True, device=torch.device("cpu"),
            sparse=sparse, sharing=sharing,
        ).activations  # fmt: skip
        assert found is not None
        return found

    dense, sparse = activations(None), activations(Sparse(512, 64))
    assert dense - sparse == 2 * 4096 * 4096 * 5 - 2 * 2 * 2 * 4096 * 8 * 4
    assert activations(Sparse(512, 64, is_balanced=True)) - sparse == 2 * 2 * 2 * 4096 * (32 - 8) * 4
    assert activations(Sparse(512, 64), sharing=2) == pytest.approx(sparse / 2, rel=0.01)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget": 32}, r"budget: got 32 keys, and the first and the own block of 32, which are always chosen"),
        ({"block": 48}, "block: got 48, expected one of 32, 64"),
        ({"p": 1.0}, "p: got 1.0"),
        ({"anchor": "best"}, "anchor: got 'best'"),
    ],
)
def test_sparse_settings_out_of_range_are_refused(changes, says):
    with pytest.raises(EffpassError, match=says):
        replace(SPARSE, **changes)


def test_the_command_says_that_balance_wants_sparse_attention():
    with pytest.raises(EffpassError, match="--balance moves budgets of sparse attention"):
        sparse_settings(None, 8192, 256, True, "mean", 0.1)
    with pytest.raises(EffpassError, match="--attention: got 'dense'; known: sparse"):
        sparse_settings("dense", 8192, 256, False, "mean", 0.1)
    with pytest.raises(EffpassError, match="--anchor: got 'meam', did you mean 'mean'"):
        sparse_settings("sparse", 8192, 256, True, "meam", 0.1)
    assert sparse_settings(None, 8192, 256, False, "mean", 0.1) is None
    assert sparse_settings("sparse", 512, 64, True, "max", 0.2) == Sparse(512, 64, True, "max", 0.2)


def test_what_processes_cannot_share_rows_that_are_not_packed_and_a_damaged_table_are_refused_before_anything_is_made(
    llama, tmp_path
):
    with pytest.raises(EffpassError, match="context: got 2, and the model's own attention sees the tokens of one"):
        replace(SETTINGS, context=2)
    with pytest.raises(EffpassError, match="--context-parallel 2: 1 processes are no multiple of it"):
        run(llama, tmp_path, SPARSE, context=2)
    with pytest.raises(ModelError, match="2 key-value heads can't be shared out over 3 ranks"):
        run(llama, tmp_path, SPARSE, context=3)
    with pytest.raises(EffpassError, match="balanced micro-batches are packed rows"):
        replace(SETTINGS, sparse=SPARSE, is_packed=False)
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(EffpassError, match=r"table\.json: no latency table of this version"):
        tune(
            str(llama), texts(tmp_path / "data.jsonl"), tmp_path / "out", replace(SETTINGS, sparse=SPARSE),
            latencies=tmp_path / "table.json", say=quiet,
        )  # fmt: skip
    assert not list(tmp_path.glob("out*"))


# -- several processes ------------------------------------------------------------------------------------------------


def torchrun(port: int, *arguments: object) -> str:
    """Two processes of `effpass train sft` with the options of SETTINGS; what they say."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port,
        "-m", "effpass", "--debug", "train", "sft", *arguments, "--optimizer", "adamw", "--lr", 1e-2, "--batch", 4,
        "--accumulate", 2, "--sequence-length", 224, "--log-every", 1, "--attention", "sparse",
        "--attention-block", 32,
    ]  # fmt: skip
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def test_two_processes_that_share_rows_learn_what_one_learns(llama, cache, tmp_path):
    """Budgets are fixed by a guard of 0, so that what the machine measures moves none of them."""
    sparse = replace(SPARSE, p=0.0)
    tmp_path.joinpath("one").mkdir()
    data = texts(tmp_path / "one" / "data.jsonl")
    held_out = write(tmp_path / "held_out.jsonl", {"text": "abcdefgh" * 11}, {"text": "hgfedcb"})
    settings = replace(SETTINGS, sparse=sparse, steps=2, save_every=0)
    model, tables = effpass.load_model(llama).model, {}
    threads = torch.get_num_threads()
    for ranks in (1, 2):  # given, since measuring takes long
        torch.set_num_threads(threads if ranks == 1 else 1)  # a part of a CPU's name
        name, words = device_name(torch.device("cpu")), _words(model, sparse.tuning.budgets, 2 * 224, 32, ranks)
        table = _by_flops(model, (256, 448), sparse.tuning.budgets, name, "float32", ranks, words)
        tables[ranks] = tmp_path / f"table_{ranks}.json"
        write_table(tables[ranks], table)
    torch.set_num_threads(threads)
    one = tune(
        str(llama), data, tmp_path / "one" / "out", settings, validation=held_out, latencies=tables[1], say=quiet
    )
    said = torchrun(
        29643, llama, "--data", data, "--validation", held_out, "-o", tmp_path / "two", "--steps", 2,
        "--save-every", 0, "--attention-budget", 96, "--balance", "--guard", 0, "--context-parallel", 2,
        "--latency-table", tables[2],
    )  # fmt: skip
    assert "measuring" not in said
    keys = ("loss", "grad_norm", "eval_loss_validation", "eval_error_validation", "balance_coverage")
    found, expected = (
        [{k: line[k] for k in keys if k in line} for line in metrics(folder)] for folder in (tmp_path / "two", one)
    )
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert len(found) == 4  # two steps, and the held-out loss before and after
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)
    ours, theirs = weights(tmp_path / "two"), weights(one)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "two" / "training.json").read_text())["settings"]["context"] == 2


@pytest.mark.slow
def test_two_processes_under_torchrun_learn_the_same_by_one_plan(llama, cache, tmp_path):
    one = run(llama, tmp_path / "one", replace(DENSE, is_balanced=True, p=0.0))
    table = replace(read_table(next((cache / "latency").iterdir())), device="another")
    write_table(tmp_path / "table.json", table)
    said = torchrun(
        29641, llama, "--data", tmp_path / "one" / "data.jsonl", "-o", tmp_path / "two", "--steps", 6,
        "--save-every", 3, "--attention-budget", 256, "--balance", "--guard", 0,
        "--latency-table", tmp_path / "table.json",
    )  # fmt: skip
    assert "was measured on another" in said
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=5e-4)
    lines = [line for line in metrics(tmp_path / "two") if "loss" in line]
    # How much is left depends on what was measured here; that plans are good is tested on tables that are given.
    assert all(line["balance_imbalance"] >= 1 and line["balance_planned_s"] > 0 for line in lines)
