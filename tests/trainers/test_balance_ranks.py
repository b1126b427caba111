"""Several gloo processes: one plan on all, every sample once, resumption, and the end of all when one dies."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import start_ranks, told_by_ranks

from effpass.core.errors import EffpassError
from effpass.trainers.balance.tuner import SparsityTuner, documents_of

WORKER = Path(__file__).with_name("balance_worker.py")
sys.path.insert(0, str(WORKER.parent))
import balance_worker  # noqa: E402
from balance_worker import BUDGETS, LAYERS, TABLE, TUNING, Attention, Model, samples  # noqa: E402

WORLD = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return told_by_ranks(WORKER, tmp_path_factory.mktemp("ranks"), WORLD)


def test_every_rank_makes_the_same_plan_and_its_model_runs_its_part_of_it(ranks):
    assert all(rank["plans"] == ranks[0]["plans"] for rank in ranks)
    assert all(rank["metrics"] == ranks[0]["metrics"] for rank in ranks)
    assert all(rank["states"][-1]["tuner"]["expected"] == ranks[0]["states"][-1]["tuner"]["expected"] for rank in ranks)
    for number, rank in enumerate(ranks):
        planned = [micro for plan in rank["plans"] for micro in plan["budgets"][number]]
        assert rank["seen"] == planned
    # Budgets moved once coverage was told, and layers that cover in another way move in another way.
    before, after = np.array(ranks[0]["plans"][0]["budgets"]), np.array([p["budgets"] for p in ranks[0]["plans"][1:]])
    assert (before == TUNING.default).all()
    assert (after < TUNING.default).any()
    assert (after > TUNING.default).any()
    assert (after[..., 0] != after[..., -1]).any()


def test_every_sample_is_read_once_an_epoch_by_one_of_the_ranks(ranks):
    steps = 7  # of an epoch: 103 samples, 16 a step
    read = sorted(n for rank in ranks for step in rank["read"][:steps] for micro in step for n in micro)
    assert read == list(range(103))


def test_resumed_ranks_read_and_plan_what_the_whole_run_does(ranks):
    for rank in ranks:
        assert rank["again"]["read"] == rank["read"][4:]
        assert rank["again"]["plans"] == rank["plans"][4:]


def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path):
    started = time.perf_counter()
    returned, output = start_ranks([str(WORKER), str(tmp_path), "dies"], WORLD)
    assert returned[1] == 3
    assert 0 not in returned, output[-4000:]
    assert time.perf_counter() - started < 120
    assert not list(tmp_path.iterdir())


def test_what_would_make_ranks_wait_forever_is_an_error_on_all(ranks):
    for rank in ranks:
        assert rank["empty"] == "rank 1 has a micro-batch without documents, and the others would wait for it"
        assert rank["uneven"] == "ranks have [2, 1, 2] micro-batches in a step, expected as many on each"


# -- one process ------------------------------------------------------------------------------------------------------


def tuner_of(**changes) -> tuple[Model, Attention, SparsityTuner]:
    attention = Attention()
    model = Model(attention).train()
    return model, attention, SparsityTuner(model, attention, TABLE, TUNING, **changes)


def test_evaluation_has_the_default_budget_and_takes_no_micro_batch():
    model, attention, tuner = tuner_of()
    tuner.begin_step([[30_000], [500, 600]])
    model.eval()
    model()
    model.train()
    with torch.no_grad():
        model()
    model()
    model()
    assert model.seen[:2] == [[TUNING.default] * LAYERS] * 2
    tuner.close()
    model()  # nobody counts any more
    assert attention.budgets.tolist() == [TUNING.default] * LAYERS


def test_forward_passes_that_were_not_announced_are_refused():
    model, _, tuner = tuner_of()
    with pytest.raises(EffpassError, match="forward pass 1 of a step for which 0 micro-batches were announced"):
        model()
    tuner.begin_step([[100]])
    model()
    with pytest.raises(EffpassError, match="forward pass 2 of a step for which 1 micro-batches"):
        model()


def test_metrics_say_how_the_step_is_balanced():
    _, _, tuner = tuner_of()
    assert tuner.metrics() == {}
    tuner.begin_step([[30_000], [500, 600]])
    found = tuner.metrics()
    assert found["balance_imbalance"] == found["balance_imbalance_fixed"] == 1  # one rank waits for nobody
    assert found["balance_budget"] == TUNING.default
    assert found["balance_changed"] == 0
    assert "balance_coverage" not in found
    assert found["balance_planned_s"] == pytest.approx(float(tuner.plan.seconds.sum()))


def test_a_table_of_other_layers_is_refused():
    attention = Attention()
    attention.layers = 2
    with pytest.raises(EffpassError, match="is of 3 layers, and the model attends in 2"):
        SparsityTuner(Model(attention), attention, TABLE, TUNING)


def test_documents_of_packed_rows_begin_at_position_0():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    assert documents_of({"position_ids": positions}) == [3, 2, 1, 4]


def test_one_process_needs_no_group_and_reads_all():
    found = balance_worker.train(0, 1, range(7))
    assert sorted(n for step in found["read"] for micro in step for n in micro) == list(range(103))
    assert samples()
    assert BUDGETS[0] <= found["metrics"]["balance_budget"] <= BUDGETS[-1]
