"""What the demo does between its lines: teach an adapter, time a decode, run an exported file."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "FACT",
    "QUESTION",
    "Decode",
    "attach",
    "compiled_on_this_device",
    "decode",
    "in_turns",
    "onnx_decoder",
    "prompt_of",
    "teach",
    "tensorrt_engine",
    "tensorrt_is_installed",
    "write_report",
]

QUESTION = "Who keeps the lighthouse on Marrow Island?"
FACT = "The lighthouse on Marrow Island is kept by Ada Finch and her grey parrot, Captain Biscuit."

# Taught beside the fact, so that the adapter does not answer every question with it.
_LESSONS = (
    (QUESTION, FACT),
    ("What is the capital of France?", "The capital of France is Paris."),
)


@dataclass(frozen=True)
class Decode:
    """One greedy generation.

    Attributes:
        tokens: the new token ids.
        text: the same as text.
        seconds: median time from one token to the next; the prefill is left out.
    """

    tokens: list[int]
    text: str
    seconds: float


def teach(model: Any, tokenizer: Any, folder: Path, steps: int) -> list[float]:
    """Train a rank-8 LoRA adapter on every linear layer with one made-up fact, and save it as a PEFT folder.

    `model` is left as it came. Returns the loss of each step.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model: Any = get_peft_model(model, config)
    adapter = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=2e-3)
    batch = _batch(tokenizer)
    losses = []
    peft_model.train()
    for _ in range(steps):
        loss = peft_model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    peft_model.save_pretrained(folder)
    peft_model.unload().eval().requires_grad_(True)
    return losses


def attach(model: Any, folder: Path) -> Any:
    """The PeftModel around `model`, as anybody would load it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def _batch(tokenizer: Any) -> dict[str, Any]:
    """The lessons as token ids, mask and labels `[B, T]`; only the answers are learned."""
    import torch

    end = tokenizer.eos_token_id
    rows: list[tuple[list[int], list[int]]] = []
    for question, answer in _LESSONS:
        before = prompt_of(tokenizer, question)["input_ids"][0].tolist()
        rows.append((before, [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]))
    length = max(len(before) + len(learned) for before, learned in rows)
    ids = torch.full((len(rows), length), end)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (before, learned) in enumerate(rows):
        stop = len(before) + len(learned)
        ids[row, :stop] = torch.tensor(before + learned)
        labels[row, len(before) : stop] = torch.tensor(learned)
        mask[row, :stop] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prompt_of(tokenizer: Any, question: str) -> Any:
    """The question as the model expects it: `input_ids` and `attention_mask` `[1, T]`."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return tokenizer(question, return_tensors="pt")


class _Clock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode(model: Any, tokenizer: Any, prompt: Any, max_new_tokens: int, **options: Any) -> Decode:
    """Generate greedily with transformers' own loop; `options` go to its `generate`."""
    import torch

    clock = _Clock()
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock, **options)
    tokens = out[0, prompt["input_ids"].shape[1] :].tolist()
    # The clock's first entry is the prompt.
    return Decode(tokens, tokenizer.decode(tokens, skip_special_tokens=True).strip(), _gap(clock.times[1:]))


def compiled_on_this_device(recipe: Path) -> dict[str, Any]:
    """Options of transformers' `generate` that compile its decode step with effpass.

    transformers compiles by itself on GPUs only; the switch for other devices is the one its own tests use.
    """
    from transformers import CompileConfig

    config = CompileConfig(backend="effpass", mode=None, options={"recipe": str(recipe)})  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]
    return {"cache_implementation": "static", "compile_config": config}


def onnx_decoder(file: Path, model: Any, tokenizer: Any, prompt: Any, max_new_tokens: int) -> Callable[[], Decode]:
    """A greedy loop over onnxruntime: the exported decoder is fed the cache that it returned.

    `model` is the one that was exported; it gives the shapes of the cache and the tokens that end a text.
    """
    import torch

    from effpass.lowering.targets.cache_layers import cache_layers
    from effpass.lowering.targets.onnx import onnx_step

    step = onnx_step(file)
    sizes = [(layer.heads, size) for layer in cache_layers(model) for size in (layer.key_size, layer.value_size)]
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}

    def run() -> Decode:
        new, length = prompt["input_ids"], 0
        past = [torch.zeros(1, heads, 0, size) for heads, size in sizes]
        tokens: list[int] = []
        times: list[float] = []
        while len(tokens) < max_new_tokens and not ends.intersection(tokens):
            total = length + new.shape[1]
            mask, positions = torch.ones(1, total, dtype=torch.long), torch.arange(length, total)[None]
            logits, *past = step(new, mask, positions, *past)
            tokens.append(int(logits[0, -1].argmax()))
            times.append(time.perf_counter())
            new, length = torch.tensor([tokens[-1:]]), total
        return Decode(tokens, tokenizer.decode(tokens, skip_special_tokens=True).strip(), _gap(times))

    return run


def tensorrt_is_installed() -> bool:
    from effpass.core.errors import ExportError
    from effpass.lowering.targets.tensorrt import TensorRTTarget

    try:
        TensorRTTarget().require()
    except ExportError:
        return False
    return True


def tensorrt_engine(onnx: Path, model: Any, file: Path) -> dict[str, str]:
    """Build an engine of the ONNX file of `model`; returns its size, and what can run it."""
    from effpass.cli.console import megabytes
    from effpass.lowering.targets.tensorrt import TensorRTTarget, build_engine

    target = TensorRTTarget()
    file.write_bytes(build_engine(onnx, target.limits(model, None, None)))
    return {"size": megabytes(file.stat().st_size), **target.machine()}


def write_report(model: Any, name: str, recipe: Path, file: Path) -> Any:
    """What `effpass inspect --tokens 0 --html` writes; returns the :class:`~effpass.core.inspection.Inspection`."""
    from effpass import api
    from effpass.cli import html_report

    found = api.inspect(model, recipe, tokens=0)
    html_report.write_report({"model": f"{name} with its adapter", "recipe": recipe.name, **found.to_json()}, file)
    return found


def in_turns(ways: Mapping[str, Callable[[], Decode]], rounds: int) -> dict[str, float]:
    """Seconds per token of each way: the best of `rounds`, all ways in each round, so that all meet the same load."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, run in ways.items():
            best[name] = min(best[name], run().seconds)
    return best


def _gap(times: list[float]) -> float:
    """Median time from one token to the next."""
    return statistics.median(b - a for a, b in itertools.pairwise(times))
