"""Trainable sparse attention of tokens that lie on several ranks: losses and gradients are those of one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import start_ranks

WORKER = Path(__file__).with_name("context_parallel_worker.py")
sys.path.insert(0, str(WORKER.parent))
from context_parallel_worker import ROWS  # noqa: E402

WORLD = 2


KINDS = [*ROWS, "dealt", "dealt, compiled", "checkpointed", "compiled", "sharded"]


def launch(folder: Path, device: str = "cpu") -> list[dict[str, Any]]:
    returned, output = start_ranks([str(WORKER), str(folder)], WORLD, DEVICE=device)
    assert returned == [0] * WORLD, output[-4000:]
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(tmp_path_factory.mktemp("context"))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_one_process(ranks: list[dict[str, Any]], kind: str) -> None:
    for rank in ranks:
        split, whole = rank[kind]
        assert len(whole) > 20
        for name in whole.keys() - {"curves"}:
            torch.testing.assert_close(
                split[name], whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert float(whole["model.layers.0.self_attn.k_proj.weight"].abs().max()) > 1e-4


@pytest.mark.parametrize("kind", [*ROWS, "dealt"])
def test_coverage_is_that_of_all_heads_and_equal_on_all_ranks(ranks: list[dict[str, Any]], kind: str) -> None:
    one, two = (rank[kind][0]["curves"] for rank in ranks)
    assert torch.equal(one, two)
    whole = ranks[0][kind][1]["curves"]
    tokens = sum(map(sum, ROWS["even" if kind == "dealt" else kind]))
    padding = -tokens % WORLD  # tokens that see themselves alone
    torch.testing.assert_close(one, (whole * tokens + padding) / (tokens + padding), rtol=1e-4, atol=1e-5)
    if kind != "short":
        assert float(whole[:, 0].max()) < 1


def test_pytorch_dealt_heads_and_tails(ranks: list[dict[str, Any]]) -> None:
    """Or the test would not be one of another order."""
    orders = [rank["dealt"][0]["order"].flatten() for rank in ranks]
    assert [order[0].item() for order in orders] == [0, 40]
    assert [order[-1].item() for order in orders] == [159, 119]
    assert torch.equal(torch.cat(orders).sort().values, torch.arange(160))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("uneven", "2 ranks share 107 tokens, and this one has 1 x 5"),
        ("positions", "called without position_ids"),
        ("no positions", "the batch has no position_ids"),
        ("mask", "there is an attention_mask"),
        ("order", "order is torch.int64 (3,)"),
        ("heads", "1 key-value heads can't be shared out over 2 ranks"),
    ],
)
def test_what_ranks_cannot_split_is_refused_on_all_of_them(ranks: list[dict[str, Any]], what: str, says: str) -> None:
    for rank in ranks:
        assert says in rank["refused"][what]
    assert "fills up with a document of padding" in ranks[0]["refused"]["uneven"]


@pytest.mark.gpu
def test_on_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < WORLD:
        pytest.skip("needs two GPUs")
    ranks = launch(tmp_path, "cuda")
    for kind in KINDS:
        test_losses_and_gradients_are_those_of_one_process(ranks, kind)
    for kind in [*ROWS, "dealt"]:
        test_coverage_is_that_of_all_heads_and_equal_on_all_ranks(ranks, kind)
