"""The benchmark of experts on several ranks runs under torchrun, and its peers compute the same layer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.moe_ranks import shared

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks", "moe", "--smoke", "--json", str(file)]
    cases = ("eps-deepseek-v2", "eps-stack-deepseek-v2", "eps-decode-mixtral-8x7b")
    command += [word for case in cases for word in ("--case", case)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_peers_compute_the_same_layer(rows):
    layers = [row for row in rows if row["metric"] == "layer of experts"]
    assert len(layers) == 4  # two loads, two peers, of one rank
    for row in layers:
        (difference,) = re.findall("outputs differ by (.*)", row["note"])
        assert float(difference) < 1e-5, row["peer_name"]


def test_whole_layers_have_every_peer(rows):
    prefills = [row for row in rows if row["metric"] == "prefill"]
    assert [row["peer_name"].partition(",")[0] for row in prefills] == ["one stage", "DP + EP", "TP + TP"]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in prefills)


def test_decoding_runs(rows):
    """On the engine: a step has a time, if not one to go by."""
    steps = [row for row in rows if row["metric"] == "greedy, a step"]
    assert [row["case"].split(", ")[1] for row in steps] == ["batch 1", "batch 8"]


@pytest.mark.parametrize(
    ("link", "experts", "share"),
    [
        ([(0, 2), (4, 6)], [(1, 5)], 0.5),
        ([(0, 3), (2, 4)], [(0, 1), (3, 9)], 0.5),  # what overlaps itself counts once
        ([(0, 1)], [(1, 2)], 0.0),
        ([], [(0, 1)], 0.0),
    ],
)
def test_the_share_of_time_that_is_hidden(link, experts, share):
    assert shared(link, experts) == share
