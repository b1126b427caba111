"""Processes that share a cache folder: whoever reads sees nothing or a whole file, whoever writes."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from effpass.core import roofline
from effpass.core.gguf import cache_dir
from effpass.lowering.ops import expert_parallel_choice, moe_ffn_choice

CPU = torch.device("cpu")
CEILINGS = dataclasses.replace(roofline.KNOWN["h100"], device="toy", dtype="float32")
FIT = dataclasses.replace(moe_ffn_choice.DEFAULT, device="toy", dtype="float32")
LINK = expert_parallel_choice.Link(*[1e-5] * len(dataclasses.fields(expert_parallel_choice.Link)))

# What is kept, how, and how it is read.
CACHES = {
    "ceilings": (
        lambda: roofline._write(cache_dir() / "ceilings" / "toy.json", CEILINGS),
        lambda: roofline._read(cache_dir() / "ceilings" / "toy.json"),
        CEILINGS,
    ),
    "experts": (
        lambda: moe_ffn_choice.keep(FIT),
        lambda: moe_ffn_choice._read(moe_ffn_choice._file("toy", "float32")),
        FIT,
    ),
    "link": (
        lambda: expert_parallel_choice.keep_link(LINK, CPU, 2),
        lambda: expert_parallel_choice._read(expert_parallel_choice._file(CPU, 2)),
        LINK,
    ),
}


def work(write: Callable[[], object], read: Callable[[], object], whole: object, rounds: int, found: object) -> None:
    """Writes and reads in turn; a reader of half a file would take it for one of another version, and see None."""
    wrong = 0
    for _ in range(rounds):
        write()
        wrong += read() != whole
    found.put(wrong)


@pytest.mark.parametrize("name", CACHES)
def test_processes_that_write_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path))
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    processes = [context.Process(target=work, args=(*CACHES[name], 50, found)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [found.get() for _ in processes] == [0, 0, 0, 0]
    assert len([path for path in Path(tmp_path).rglob("*") if path.is_file()]) == 1
