"""Processes that share a cache folder: whoever reads sees nothing or a whole file, whoever writes."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effpass.core import roofline
from effpass.core.gguf import cache_dir
from effpass.lowering.ops import expert_parallel_choice, moe_ffn_choice, moe_ffn_cost

CPU = torch.device("cpu")
CEILINGS = dataclasses.replace(roofline.KNOWN["h100"], device="toy", dtype="float32")
KERNELS = dict.fromkeys(moe_ffn_cost.KERNELS, next(iter(moe_ffn_choice.DEFAULT.kernels.values())))
FIT = dataclasses.replace(moe_ffn_choice.DEFAULT, device="toy", dtype="float32", kernels=KERNELS)
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


EDITS = st.lists(st.tuples(st.integers(0, 4095), st.sampled_from(b'{}[]":,-0e1aN\xff\x00')), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(CACHES)), edits=EDITS, keep=st.integers(0, 4095))
def test_a_damaged_file_is_whole_or_nothing(name, edits, keep, tmp_path, monkeypatch):
    """Never an exception: the cache is made again."""
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path / name))
    write, read, whole = CACHES[name]
    write()
    (file,) = (path for path in (tmp_path / name).rglob("*") if path.is_file())
    content = bytearray(file.read_bytes())
    for at, value in edits:
        content[at % len(content)] = value
    file.write_bytes(content if keep % 3 else content[: keep % len(content)])
    found = read()
    assert found is None or type(found) is type(whole)
    write()
    assert read() == whole
