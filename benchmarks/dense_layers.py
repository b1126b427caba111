"""A model with dense and expert layers, for sparse verification: experts of some layers, imitated by a dense network.

    python -m benchmarks.dense_layers models/tiny-moe --data FOLDER --layers 1,3,5 -o OUT

No model that is shipped has both. In each of the named layers of a Qwen3-MoE model, a gated network of `--inner`
channels learns the output of the experts from their inputs, on the texts and tasks that the model was trained on; all
else stays as it is. The last lines say how much of the experts' outputs the networks miss, and the loss of the model
before and after.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

from benchmarks.quality import TASKS
from effpass.trainers.lm.tasks import make_example

BATCH, LENGTH = 8, 512


def batches(tokenizer: Any, data: Path, seed: int) -> Iterator[Tensor]:
    """Endless ids int64 [8, 512]: a half of each batch is text, and a half tasks."""
    rng, tasks = np.random.default_rng(seed), sorted(TASKS)
    text = b"\n".join(path.read_bytes() for path in sorted((data / "text").glob("*.txt")))
    while True:
        rows = []
        for row in range(BATCH):
            at, part = int(rng.integers(len(text) - LENGTH)), b""
            while row % 2 and len(part) < LENGTH:
                part += make_example(tasks[int(rng.integers(len(tasks)))], rng, LENGTH, 1, {}).text
            part = (part or text[at:])[:LENGTH].decode("ascii", errors="replace").replace("\ufffd", "?")
            rows.append(torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"]))
        yield torch.stack(rows)


def imitate(model: Any, layers: list[int], inner: int, steps: int, ids: Iterator[Tensor]) -> dict[int, float]:
    """Replace the experts of these layers in place; returns the share of their outputs' variance that is missed."""
    config = model.config
    networks = nn.ModuleDict({str(i): Qwen3MoeMLP(config, intermediate_size=inner) for i in layers})
    optimizer = torch.optim.AdamW(networks.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-4)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[index] = args[0], output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.model.layers[i].mlp.register_forward_hook(keep(i)) for i in layers]
    missed: dict[int, list[float]] = {i: [] for i in layers}
    for step in range(steps):
        with torch.no_grad():
            model(next(ids), use_cache=False, logits_to_keep=1)
        losses = {i: _missed(networks[str(i)], *seen[i]) for i in layers}
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        schedule.step()
        for i, loss in losses.items():
            missed[i].append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}:", *(f"layer {i} {np.mean(m[-50:]):.3f}" for i, m in missed.items()), flush=True)
    for handle in handles:
        handle.remove()
    for i in layers:
        model.model.layers[i].mlp = networks[str(i)]
    config.mlp_only_layers, config.intermediate_size = layers, inner
    return {i: float(np.mean(m[-20:])) for i, m in missed.items()}


def _missed(network: nn.Module, given: Tensor, wanted: Tensor) -> Tensor:
    wanted = wanted.reshape(given.shape)
    return (network(given) - wanted).square().mean() / (wanted - wanted.mean((0, 1))).square().mean()


@torch.no_grad()
def _loss(model: Any, ids: Iterator[Tensor], count: int = 8) -> float:
    some = [next(ids) for _ in range(count)]
    return float(np.mean([float(model(rows, labels=rows, use_cache=False).loss) for rows in some]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model")
    options.add_argument(
        "--data", type=Path, default=os.environ.get("EFFPASS_DATA"), required="EFFPASS_DATA" not in os.environ
    )
    options.add_argument("--layers", default="1,3,5")
    options.add_argument("--inner", type=int, default=768)
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("-o", "--output", type=Path, required=True)
    given = options.parse_args()
    torch.manual_seed(0)
    layers = [int(i) for i in given.layers.split(",")]
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    before = _loss(model, batches(tokenizer, given.data, 1))
    missed = imitate(model, layers, given.inner, given.steps, batches(tokenizer, given.data, 0))
    after = _loss(model, batches(tokenizer, given.data, 1))
    model.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    print(f"missed of the experts' outputs: {', '.join(f'layer {i} {share:.1%}' for i, share in missed.items())}")
    print(f"loss, {before:.4f} before, {after:.4f} after", flush=True)


if __name__ == "__main__":
    main()
