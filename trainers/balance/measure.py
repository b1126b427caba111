"""Measurement of latency tables: the attention operator alone, and the model with an attention of almost no cost.

Tables are kept as JSON files in the cache folder, under a key of the device, the dtype, the version of torch and the
sizes that they were measured with. The fine-tuning run (:mod:`effpass.trainers.finetune.balanced`) gets its table here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface

from effpass.core.errors import EffpassError
from effpass.core.gguf import cache_dir
from effpass.core.roofline import device_name
from effpass.lowering.ops.routed_attention import trainable_sparse_attention
from effpass.runtime.cache import full_layers
from effpass.runtime.context_parallel import check_groups
from effpass.runtime.cuda_graph import record
from effpass.trainers.balance.table import LatencyTable, from_flops, read_table, write_table

__all__ = ["attention_seconds", "grid", "latency_table", "rest_seconds", "seconds_of"]

log = logging.getLogger("effpass")

_FREE = "effpass_free_attention"
_RUNS = 3
_PACKED = 8192  # number of tokens to which short documents are packed


def latency_table(
    model: Any,
    budgets: Sequence[int],
    max_tokens: int,
    *,
    block: int,
    dtype: torch.dtype,
    ranks: int = 1,
    file: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LatencyTable:
    """Return the table of this device and model, from the cache or measured now: seconds to a minute on a GPU.

    Devices other than CPU and CUDA get a table estimated from FLOPs, with a warning, which is not cached. With a
    process group, the first process measures and all processes use its numbers.

    Args:
        model: transformers model as it is trained, with adapters, on its device, not sharded yet.
        budgets: budgets in keys, ascending.
        max_tokens: maximum number of tokens per micro-batch.
        block: number of keys per block.
        dtype: dtype of computation; if the weights have another one, the model runs under autocast.
        ranks: number of ranks that share a micro-batch by context parallelism. Lengths are then those of whole
            documents, and times those of one rank, which has part of the heads in attention and part of the tokens
            elsewhere.
        file: table to use instead of the cached one; None for the cache. If it is for another device or model, a
            warning is logged and times are measured.
        say: function that receives a message before a measurement.

    Raises:
        EffpassError: if `file` is not a table.
        ModelError: if the KV heads can't be divided among `ranks`.
    """
    check_groups(_sizes(model)[1], ranks)
    if not dist.is_initialized():
        return _here(model, budgets, max_tokens, block, dtype, ranks, file, say)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [_here(model, budgets, max_tokens, block, dtype, ranks, file, say)]
        except EffpassError as error:  # raised on all processes below, so that none waits for the table
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], EffpassError):
        raise found[0]
    return found[0]


def _here(
    model: Any, budgets: Sequence[int], max_tokens: int, block: int, dtype: torch.dtype, ranks: int, file: Path | None,
    say: Callable[[str], None],
) -> LatencyTable:  # fmt: skip
    device = next(model.parameters()).device
    name, dtype_name = device_name(device), str(dtype).removeprefix("torch.")
    description = _words(model, budgets, max_tokens, block, ranks)
    if file is not None:
        given = read_table(file)
        if given.is_for(name, dtype_name, description):
            return given
        log.warning(
            "%s was measured on %s (%s, %s), and this is %s (%s, %s): measured anew",
            file, given.device, given.dtype, given.model, name, dtype_name, description,
        )  # fmt: skip
    key = sha256("\n".join((name, dtype_name, torch.__version__, description)).encode()).hexdigest()[:16]
    path = cache_dir() / "latency" / f"{key}.json"
    if path.exists():
        try:
            kept = read_table(path)
        except EffpassError as error:
            log.warning("%s", error.message)
        else:
            if kept.is_for(name, dtype_name, description) and kept.torch == torch.__version__:
                return kept
    lengths, tokens = grid(max_tokens), grid(min(max_tokens, 8192 * ranks))
    if device.type not in ("cpu", "cuda"):
        log.warning(
            "a %s device can't be measured here: times go by FLOPs, which sparse kernels do not follow", device.type
        )
        return _by_flops(model, lengths, budgets, name, dtype_name, ranks, description)
    say(f"measuring what lengths and budgets cost on {name}: {len(lengths)} x {len(budgets)}")
    heads, groups, key_size, value_size = _sizes(model)
    measured = LatencyTable(
        "measured", name, dtype_name, torch.__version__, description, len(full_layers(model.config)[0]), lengths,
        tuple(budgets),
        attention_seconds(
            heads // ranks, groups // ranks, key_size, value_size, lengths, budgets, block, device, dtype
        ),
        tokens, rest_seconds(model, [-(-count // ranks) for count in tokens], device, dtype),
    )  # fmt: skip
    write_table(path, measured)
    return measured


def _by_flops(
    model: Any, lengths: Sequence[int], budgets: Sequence[int], name: str, kind: str, ranks: int, words: str
) -> LatencyTable:
    heads, _, size, _ = _sizes(model)
    embedded = model.get_input_embeddings().num_embeddings * model.config.get_text_config(decoder=True).hidden_size
    # The assumed speed is arbitrary, as it cancels out when ranks are compared.
    return from_flops(
        lengths, budgets, layers=len(full_layers(model.config)[0]), attention_width=heads * size,
        parameters=sum(p.numel() for p in model.parameters()) - embedded, rate=1e14 * ranks, model=words, device=name,
        dtype=kind,
    )  # fmt: skip


def grid(most: int) -> tuple[int, ...]:
    """Return the powers of two from 256 that are below `most`, followed by `most`."""
    return (*(n for n in (256 << i for i in range(24)) if n < most), most)


def attention_seconds(
    heads: int,
    groups: int,
    key_size: int,
    value_size: int,
    lengths: Sequence[int],
    budgets: Sequence[int],
    block: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[tuple[float, ...], ...]:
    """Measure forward and backward of the attention of one layer, per document: `[lengths, budgets]`.

    The time does not depend on which blocks are chosen, so that inputs are random. Short documents are measured packed,
    as in training. On a GPU the measured call is the replay of a CUDA graph: in training, the kernels of a call are
    launched while earlier layers compute, so that launch time must not be counted.
    """
    rows = []
    for length in lengths:
        count = max(1, _PACKED // length)
        run, budget = _attention(heads, groups, key_size, value_size, length, count, block, budgets[-1], device, dtype)
        row: list[float] = []
        for n, keys in enumerate(budgets):
            if n and budgets[n - 1] >= length:
                row.append(row[-1])  # the smaller budget covers all keys already
            else:
                budget.fill_(keys)
                row.append(seconds_of(run, device) / count)
        rows.append(tuple(row))
    return tuple(rows)


def _attention(
    heads: int, groups: int, key_size: int, value_size: int, length: int, count: int, block: int, most: int,
    device: torch.device, dtype: torch.dtype,
) -> tuple[Callable[[], None], Tensor]:  # fmt: skip
    """Return a function that runs one layer over `count` documents, and the budget tensor that it reads."""
    generator = torch.Generator(device).manual_seed(length)
    shapes = (heads, key_size), (groups, key_size), (groups, value_size)
    q, k, v = (torch.randn(count * length, *shape, device=device, dtype=dtype, generator=generator) for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gradient = torch.ones(count * length, heads, value_size, device=device, dtype=dtype)
    ends = torch.arange(0, count * length + 1, length, device=device, dtype=torch.int32)
    budget = torch.full((), most, device=device, dtype=torch.int32)

    def run() -> None:
        out, _ = trainable_sparse_attention(q, k, v, ends, budget, block=block, max_budget=most)
        torch.autograd.grad(out, leaves, gradient)

    if device.type != "cuda":
        return run, budget
    with torch.cuda.device(device):
        return record(run, warm_up=run).replay, budget


def rest_seconds(model: Any, tokens: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[float, ...]:
    """Measure forward and backward of the model without attention, per micro-batch; the model is left unchanged."""
    AttentionInterface.register(_FREE, _free_attention)
    own, was_training = model.config._attn_implementation, model.training
    is_cast = dtype != next(p.dtype for p in model.parameters() if p.is_floating_point())
    kept = [(p, p.grad) for p in model.parameters()]
    model.train()
    model.set_attn_implementation(_FREE)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            return tuple(_model_seconds(model, count, device, dtype if is_cast else None) for count in tokens)
    finally:
        model.set_attn_implementation(own)
        model.train(was_training)
        for parameter, gradient in kept:
            parameter.grad = gradient


def _model_seconds(model: Any, tokens: int, device: torch.device, cast: torch.dtype | None) -> float:
    vocabulary = model.get_input_embeddings().num_embeddings
    # Different tokens, since the gradients of equal ones are accumulated in the same row of the embedding.
    ids = torch.arange(tokens, device=device)[None] * 7 % vocabulary
    learned = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        around: AbstractContextManager[Any] = nullcontext()
        if cast is not None:
            around = torch.autocast(device.type, cast)
        with around:
            logits = model(input_ids=ids, use_cache=False).logits
            loss = cross_entropy(logits[0].float(), ids[0])
        loss.backward()
        for parameter in learned:
            parameter.grad = None

    return seconds_of(run, device)


def _free_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Attention of almost no cost, in which query, key and value are read and get gradients: `[B, T, H, V]`."""
    each = query.shape[1] // key.shape[1]
    spread = query.mean(-1, keepdim=True) + key.mean(-1, keepdim=True).repeat_interleave(each, 1)
    return (value.repeat_interleave(each, 1) + spread).transpose(1, 2), None


def seconds_of(run: Callable[[], None], device: torch.device, runs: int = _RUNS) -> float:
    """Return the median duration of a few calls, after one that compiles and warms up."""
    taken = []
    for attempt in range(runs + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            taken.append(time.perf_counter() - started)
    return median(taken)


def _sizes(model: Any) -> tuple[int, int, int, int]:
    text = model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, getattr(text, "num_key_value_heads", None) or heads, size, size


def _words(model: Any, budgets: Sequence[int], max_tokens: int, block: int, ranks: int) -> str:
    """Describe what the times depend on, for readers and as part of the cache key."""
    text = model.config.get_text_config(decoder=True)
    heads, groups, size, _ = _sizes(model)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"{text.model_type}, {text.num_hidden_layers} layers, {heads} query and {groups} key-value heads of {size},"
        f" {sum(p.numel() for p in model.parameters())} parameters, {learned} of them learn; blocks of {block}, budgets"
        f" {','.join(map(str, budgets))}, micro-batches to {max_tokens} tokens"
        + (f" on {ranks} ranks" if ranks > 1 else "")
    )
