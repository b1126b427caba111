"""Balance where every micro-batch lies on two of four processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ranks import told_by_ranks

WORKER = Path(__file__).with_name("balance_context_worker.py")
sys.path.insert(0, str(WORKER.parent))
from balance_context_worker import BUDGET, LENGTHS, SHARING  # noqa: E402

WORLD = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return told_by_ranks(WORKER, tmp_path_factory.mktemp("context"), WORLD)


def test_processes_that_share_a_micro_batch_attend_with_the_same_budgets(ranks):
    assert all(rank["plans"] == ranks[0]["plans"] and rank["metrics"] == ranks[0]["metrics"] for rank in ranks)
    for number, rank in enumerate(ranks):
        planned = [micro for budgets, _ in rank["plans"] for micro in budgets[number // SHARING]]
        assert rank["seen"] == planned
        assert rank["read"] == ranks[number // SHARING * SHARING]["read"]
    assert {k for micro in ranks[0]["seen"][:2] for k in micro} == {BUDGET}
    assert {k for rank in ranks for micro in rank["seen"][2:] for k in micro} - {BUDGET}  # what was covered is known


def test_samples_are_read_once_by_the_groups(ranks):
    steps = 2  # of an epoch
    read = [n for rank in ranks[::SHARING] for step in rank["read"][:steps] for micro in step for n in micro]
    assert sorted(read) == sorted(LENGTHS)


def test_losses_are_those_of_one_process_with_these_budgets(ranks):
    for rank in ranks:
        assert len(rank["split"]) == 8
        assert rank["split"] == pytest.approx(rank["whole"], rel=1e-5)
    assert len({loss for rank in ranks for loss in rank["whole"]}) >= 8


def test_groups_that_carry_no_cpu_tensors_get_one_beside_each(ranks):
    assert all(rank["beside"] for rank in ranks)
