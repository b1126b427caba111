"""The model that case `ranks` of area `balance` trains on each rank, the tables of the device, and a timed step."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.balance_lengths import MOST
from benchmarks.balance_ranks_data import LARGE, Sizes
from benchmarks.moe_ranks import place
from benchmarks.rows import sync
from effpass.runtime.routed_attention import install
from effpass.trainers.balance import SparsityTuner, measure
from effpass.trainers.balance.costs import micro_batches
from effpass.trainers.balance.shares import Shares
from effpass.trainers.balance.tuning import imbalance, slowest
from effpass.trainers.finetune.packing import make_rows
from effpass.trainers.finetune.processes import ALONE
from effpass.trainers.finetune.samples import Sample

__all__ = ["Called", "Model", "Taken"]

QUERIES = 40.0  # their scale; half of the keys then hold 0.98 of a router's weight in 8192 tokens, an eighth 0.73


@dataclass(frozen=True)
class Taken:
    """What a step took on this rank, and what the latency table says of its plan; budget and coverage are means."""

    step: float
    own: float
    imbalance: float
    simulated: float
    budget: float
    coverage: float


class Called(nn.Module):
    """The model as one way calls it: tuners have their hooks here, and each way can have its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class Model:
    """A model with random weights under DDP.

    Attributes:
        table: of budgets that move.
        fixed: where no budget but the default can occur, so that buffers are smaller.
    """

    def __init__(self, of: Sizes, device: str, rank: int, most: int) -> None:
        self.of, self.device, self.rank, self.place = of, device, rank, place(device)
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        config = Qwen3Config(
            vocab_size=of.vocabulary, hidden_size=of.width, intermediate_size=of.inner, num_hidden_layers=of.layers,
            num_attention_heads=of.heads, num_key_value_heads=of.groups, head_dim=of.size, tie_word_embeddings=True,
            max_position_embeddings=MOST,
        )  # fmt: skip
        torch.manual_seed(0)
        with self.place:
            model = Qwen3ForCausalLM(config).float().train().requires_grad_(True)
        for name, weight in model.named_parameters():
            if "q_norm" in name:
                nn.init.constant_(weight, QUERIES)
        tuning = of.sparse.tuning
        self.routed = install(model, block=of.sparse.block, budget=tuning.default, max_budget=of.sparse.most)
        self._default = self.routed.budgets
        with patch.object(measure, "_PACKED", measure._PACKED // of.scale * LARGE.scale):
            self._measure(model, most)
        # Buffers are not broadcast: ranks would wait for it in the midst of a step.
        devices = [self.place.index] if device == "cuda" else None
        self.ddp = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
        self.ddp.register_comm_hook(dist.group.WORLD, self._exchange)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")

    def _measure(self, model: Any, most: int) -> None:
        of, tuning, block = self.of, self.of.sparse.tuning, self.of.sparse.block
        alone: tuple[int, ...] = (tuning.default,)
        found: list[Any] = [None]
        if self.rank == 0:
            shape = of.heads, of.groups, of.size, of.size
            found = [measure.attention_seconds(*shape, measure.grid(most), alone, block, self.place, self.dtype)]
        with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, EFFPASS_CACHE=cache):  # no older table
            self.table = measure.latency_table(model, tuning.budgets, most, block=block, dtype=self.dtype)
        dist.broadcast_object_list(found, src=0)
        self.fixed = replace(self.table, budgets=alone, attention=found[0])
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the pools of the graphs that were timed

    def step(self, called: Called, tuner: SparsityTuner | None, shares: Shares, samples: Sequence[Sample]) -> Taken:
        """Train on a step's samples, shared out to all ranks; without a tuner with the default budget."""
        graded = sum(len(samples[n].tokens) - 1 for rank in shares for micro in rank for n in micro)
        lengths = [len(sample.tokens) for sample in samples]
        mine = shares[self.rank]
        sync(self.device)
        dist.barrier()
        sync(self.device)
        started = time.perf_counter()
        self.routed.max_budget = self.of.sparse.tuning.default if tuner is None else self.of.sparse.most
        if tuner is None:
            self.routed.budgets = self._default
        else:
            tuner.begin_step([[lengths[n] for n in micro] for micro in mine])
        begun = self._mark()
        for number, micro in enumerate(mine):
            self._backward(called, [samples[n] for n in micro], len(shares) / graded, number == len(mine) - 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        sync(self.device)
        took, own = time.perf_counter() - started, self._between(begun, self._done)
        if tuner is not None:
            said = tuner.metrics()
            found = said["balance_imbalance"], said["balance_planned_s"], said["balance_budget"]
            return Taken(took, own, *found, said.get("balance_coverage", np.nan))
        attention, rest, _ = micro_batches(self.fixed, shares, lengths, self.fixed.budgets)
        seconds = rest + self.fixed.layers * attention[..., 0]
        return Taken(took, own, imbalance(seconds, "step")[0], slowest(seconds, "step"), self.fixed.budgets[0], np.nan)

    def _backward(self, called: Called, micro: Sequence[Sample], weight: float, is_last: bool) -> None:
        sizes = [len(sample.tokens) for sample in micro]
        rows = make_rows([micro], sum(sizes), 0)
        batch = ALONE.part({**{n: rows[n] for n in ("input_ids", "position_ids")}, "weights": rows["graded"].float()})
        batch["cu_seq_lens_q"] = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        batch = {name: value.to(self.place, non_blocking=True) for name, value in batch.items()}
        weights, targets = batch.pop("weights"), batch.pop("targets")
        with nullcontext() if is_last else self.ddp.no_sync():
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                logits = called(**batch, use_cache=False).logits
                losses = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
                loss = (losses * weights.flatten()).sum() * weight
            del logits, losses
            loss.backward()

    def _exchange(self, group, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        if bucket.is_last():
            self._done = self._mark()
        return allreduce_hook(group, bucket)

    def _mark(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3 if self.device == "cuda" else end - begin
