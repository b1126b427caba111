"""The three objects in loops that are not ours: transformers' Trainer, accelerate, sharded weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from families import make
from ranks import told_by_ranks
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from effpass.trainers.balance import documents_of

WORKER = Path(__file__).with_name("balance_loop_worker.py")
sys.path.insert(0, str(WORKER.parent))
from balance_loop_worker import BLOCK, BUDGET, STEPS, dataset, objects  # noqa: E402

WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return told_by_ranks(WORKER, tmp_path_factory.mktemp("loops"), WORLD)


@pytest.mark.parametrize("kind", ["sharded", "accelerated"])
def test_ranks_of_other_libraries_follow_one_plan(ranks, kind):
    one, two = (rank[kind] for rank in ranks)
    assert one["plans"] == two["plans"]
    for number, rank in enumerate((one, two)):
        assert rank["budgets"] == [micro for plan in rank["plans"] for micro in plan[number]]
    steps = 3 if kind == "accelerated" else 6  # of an epoch: all tokens but the first of each sample
    count = sum(sum(rank["tokens"][:steps]) for rank in (one, two))
    assert count == sum(len(row["input_ids"]) - 1 for row in dataset())


def test_sharded_budgets_move_once_coverage_is_known(ranks):
    plans = ranks[0]["sharded"]["plans"]
    assert {k for rank in plans[0] for micro in rank for k in micro} == {BUDGET}
    assert any(k != BUDGET for plan in plans[1:] for rank in plan for micro in rank for k in micro)
    assert all(k >= 2 * BLOCK for plan in plans for rank in plan for micro in rank for k in micro)


def test_whole_budgets_give_the_losses_of_dense_attention(ranks):
    """In the first step the weights are those of the start: its losses are known without all this."""
    model, rows = make("llama"), dataset()
    first = 0.0
    with torch.no_grad():
        _, _, batches = objects(make("llama"), 0, WORLD, "step", budget=256, p=0.0)
        for number in (n for rank in batches.plan(0, 0) for micro in rank for n in micro):
            ids = torch.tensor(rows[number]["input_ids"])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            first += float(cross_entropy(logits, ids[1:], reduction="sum"))
    assert sum(rank["accelerated"]["losses"][0] for rank in ranks) == pytest.approx(first, rel=1e-5)


def test_transformers_trainer_runs_balanced_with_two_methods(tmp_path):
    model = make("llama").train().requires_grad_(True)
    attention, tuner, batches = objects(model, 0, 1, "step")
    loader = DataLoader(dataset(), batch_sampler=batches, collate_fn=DataCollatorWithFlattening())
    read: list[int] = []

    class Balanced(Trainer):
        def get_train_dataloader(self):
            return loader

        def get_batch_samples(self, *args, **kwargs):
            found = super().get_batch_samples(*args, **kwargs)
            tuner.begin_step([documents_of(batch) for batch in found[0]])
            read.extend(length for batch in found[0] for length in documents_of(batch))
            return found

    args = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, gradient_accumulation_steps=2, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", learning_rate=3e-3, logging_steps=1,
    )  # fmt: skip
    trainer = Balanced(model=model, args=args)
    trainer.train()
    assert trainer.state.global_step == batches.steps
    assert sorted(read) == sorted(len(row["input_ids"]) for row in dataset())
    assert tuner.metrics()["balance_coverage"] > 0
    assert attention.budgets.shape == (2,)
    model.eval()
    with torch.no_grad():  # evaluation has the default budget
        model(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False)
    assert attention.budgets.tolist() == [BUDGET] * 2
    assert batches.steps < STEPS
