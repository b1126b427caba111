"""The operators of token trees: references against loops, kernels interpreted and compiled, and run on a GPU.

Triton decides when it is imported whether it interprets, so both run in processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tree_kernel_cases
from torch.utils.flop_counter import FlopCounterMode

import effpass.runtime.speculative.round  # noqa: F401  (registers the operators)
from effpass.core.errors import EffpassError
from effpass.lowering.ops import chosen_channels, token_noise, top_tokens, tree_attention
from effpass.lowering.ops.ancestors import pack, relations, unpack

ops = torch.ops.effpass
CASES = [name for name, _ in tree_kernel_cases.cases(device=torch.device("cpu"), dtype=torch.float32)]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SHARED_MEMORY = 227 * 1024  # bytes that one program may have at compute capability 9.0


def check(name: str, found: dict[str, float], dtype: torch.dtype, *, in_order: bool) -> None:
    """Within the operators' tolerances; what counts faults is 0. Only kernels promise an order of equal tokens."""
    measured = {
        "attention": tree_attention.TOLERANCE[dtype],
        "channels": chosen_channels.TOLERANCE[dtype],
        "log p": top_tokens.TOLERANCE,
        "entropy": top_tokens.TOLERANCE,
        "noise": token_noise.TOLERANCE,
        "order": 0.0 if in_order else float("inf"),
    }
    assert all(value <= measured.get(what, 0.0) for what, value in found.items()), (name, found)


@pytest.mark.parametrize("name", CASES)
def test_references_against_loops(name: str) -> None:
    of = {"device": torch.device("cpu"), "dtype": torch.float32}
    (case,) = [case for known, case in tree_kernel_cases.cases(**of) if known == name]
    check(name, case(ops), torch.float32, in_order=False)


def run(mode: str, **environment: str) -> Any:
    command = [sys.executable, "-W", "ignore", tree_kernel_cases.__file__, mode]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return run("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_against_loops(interpreted: Any, name: str) -> None:
    check(name, interpreted[name], torch.float32, in_order=True)


@needs_triton
def test_kernels_compile_without_a_gpu_and_fit(tmp_path: Path) -> None:
    shared = run("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(shared) == 31
    assert {name: size for name, size in shared.items() if size > SHARED_MEMORY} == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_kernels_against_loops(name: str, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialized memory holds NaN
    try:
        of = {"device": torch.device("cuda"), "dtype": dtype}
        (case,) = [case for known, case in tree_kernel_cases.cases(**of) if known == name]
        found = case(ops)
        check(name, found, dtype, in_order=True)
        assert case(ops) == found  # the same bits
    finally:
        torch.use_deterministic_algorithms(False)


# -- what an operator owes --------------------------------------------------------------------------------------------


def state() -> dict[str, torch.Tensor]:
    long: Any = {"dtype": torch.long}
    return {
        "ids": torch.zeros(2, 12, **long),
        "count": torch.full((2,), 4, **long),
        "position": torch.tensor([3, -1], dtype=torch.int32),
    }


def samples() -> dict[str, tuple[Any, ...]]:
    arguments, _ = tree_kernel_cases.attention_case(
        2, 4, 2, 6, 20, 6, 16, 16, 0, 0.0, device="cpu", dtype=torch.float32
    )
    long: Any = {"dtype": torch.long}
    tree = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([[-1, 0, 0], [-1, 0, 1]])
    ids, count, position = state().values()
    pool = torch.zeros(2, 9, **long), torch.rand(2, 9), torch.full((2, 9), -1)
    log_p, tokens, entropy = torch.randn(2, 3, 3).log_softmax(-1), torch.randint(9, (2, 3, 3)), torch.rand(2, 3)
    frontier = torch.rand(2, 3), torch.rand(2, 3), torch.arange(6).view(2, 3), torch.zeros(2, 3, 1, **long)
    classifier = [torch.randn(5, 3), torch.randn(5), torch.randn(1, 5), torch.randn(1)]
    grow = (log_p, tokens, entropy, *frontier, position, None, classifier, *pool)
    return {
        "tree_attention": arguments,
        "top_tokens": (torch.randn(3, 9), 4),
        "grow_layer": (*grow, 0, 1, 0.0, True),
        "best_nodes": (torch.zeros(2, **long), position, *pool, 6, 2),
        "accept_tokens": (
            torch.zeros(2, 3, **long), *tree, torch.tensor([-1]), torch.tensor(9), ids, count, position,
            torch.zeros(2, **long), torch.ones((), dtype=torch.bool), torch.zeros(2, **long), 3,
        ),
        "choose_tree_blocks": (
            torch.randn(2, 4, 8), torch.randn(2, 2, 9, 8), torch.tensor([300, 20]).int(), 4, 64, 0, 256,
        ),
        "chosen_channels": (
            torch.randn(5, 8), torch.randn(5, 12), torch.randn(12, 8), torch.randn(8, 12),
            torch.tensor([0, 2, 9]).int(),
        ),
        "largest_channels": (torch.rand(12), 5),
        "take_tokens": (ids, count, position, torch.zeros(2, **long), 3),
        "move_slots": (
            torch.randn(2, 2, 1, 12, 4), torch.randn(2, 2, 1, 12, 4), torch.zeros(2, 12, dtype=torch.int32),
            torch.ones(2, dtype=torch.int32), torch.tensor([[0, 2], [0, 1]]), torch.tensor([2, 0]), 8, True,
        ),
        "token_noise": (torch.tensor(7), torch.tensor([[3, 4]]), 11),
        "write_ring": (
            torch.zeros(2, 6, 4), torch.randn(2, 3, 4), torch.tensor([[0, 2], [0, 1]]), torch.tensor([5, 8]),
            torch.tensor([2, 0]),
        ),
        "read_ring": (torch.randn(2, 6, 4), torch.tensor([5, 0]), -1, 3),
    }  # fmt: skip


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name), samples()[name])


@pytest.mark.parametrize("name", samples())
def test_flops(name: str) -> None:
    arguments = samples()[name]
    with FlopCounterMode(display=False) as counter:
        getattr(ops, name)(*arguments)
    # Two products of 2 x 4 heads x 6 nodes x 26 slots x 16; one of 2 x 2 heads x 9 blocks x 8; two of 5 x 8 x 3.
    expected = {
        "tree_attention": 2 * 2 * 4 * 6 * 26 * 32,
        "choose_tree_blocks": 2 * 2 * 2 * 9 * 8,
        "chosen_channels": 2 * 2 * 5 * 8 * 3,
    }
    assert counter.get_total_flops() == expected.get(name, 0)


def test_ancestors_are_bits() -> None:
    parents = tree_kernel_cases.random_parents(130, 20, seed=4)
    depths, words = relations(torch.tensor([parents]), 130)
    above = [tree_kernel_cases.ancestors_of(node, parents) for node in range(130)]
    assert depths[0].tolist() == [len(a) - 1 for a in above]
    assert torch.equal(words[0], tree_kernel_cases.words_of(above, 3))
    bits = unpack(words, 130)
    assert [row.nonzero().flatten().tolist() for row in bits[0]] == [sorted(a) for a in above]
    assert torch.equal(pack(bits), words)


def test_noise_is_exponential() -> None:
    """And chooses tokens by their probabilities, independently in rows and columns."""
    noise = ops.token_noise(torch.tensor(3), torch.arange(400).view(4, 100), 100)
    flat = noise.flatten().sort().values.double()
    expected = 1 - torch.exp(-flat)
    found = torch.arange(1, len(flat) + 1, dtype=torch.float64) / len(flat)
    # Kolmogorov and Smirnov: more than 2.5 / √n once in a hundred thousand.
    assert float((expected - found).abs().max()) < 2.5 / len(flat) ** 0.5
    across = torch.corrcoef(noise.transpose(0, 1).reshape(100, -1))
    assert float(across.triu(1).abs().max()) < 5.5 / 400**0.5
    assert torch.equal(ops.token_noise(torch.tensor(3), torch.tensor([[7]]), 100), noise[:1, 7:8])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("top_tokens", {1: 10}, "10 tokens of logits (3, 9)"),
        ("tree_attention", {1: torch.randn(2, 3, 26, 16)}, "can't attend to keys (2, 3, 26, 16)"),
        ("tree_attention", {6: torch.zeros(2, 5, 1, dtype=torch.long)}, "ancestors (2, 5, 1)"),
        ("tree_attention", {7: 27}, "the tree begins at slot 27 of 26"),
        ("grow_layer", {13: 1}, "10 candidates and 6 nodes, and there is room for 9 and 64"),
        ("grow_layer", {14: 21}, "9 candidates and 66 nodes"),
        ("tree_attention", {11: torch.zeros(2, 3, 4), 12: 64}, "chosen (2, 3, 4) of blocks of 64 slots"),
        ("choose_tree_blocks", {2: torch.tensor([1])}, "lengths (1,)"),
        ("largest_channels", {1: 13}, "13 channels of (12,)"),
        ("chosen_channels", {3: torch.randn(12, 8)}, "down (12, 8)"),
        ("write_ring", {0: torch.zeros(2, 1, 4)}, "a path of 2 nodes does not fit a ring buffer of 1 rows"),
        ("token_noise", {2: 1 << 21}, "2097152 tokens"),
    ],
)
def test_sizes_that_do_not_fit(name: str, change: dict[int, Any], message: str) -> None:
    arguments = [change.get(i, given) for i, given in enumerate(samples()[name])]
    with pytest.raises(EffpassError) as caught:
        getattr(ops, name)(*arguments)
    assert message in str(caught.value)
