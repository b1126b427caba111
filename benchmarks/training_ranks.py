"""Area `training` on several GPUs: `effpass train lm` on a mixture of experts that is sharded by FSDP2.

    python -m benchmarks training --device cuda --case experts-500m --json FILE

One process starts the command under torchrun on all GPUs, with one optimizer after the other, and reads what it wrote.
Muon is MONA with α = 0. All read the same batches in the same order, with one seed, and end with the same held-out
sequences. The time of a step is the median over the lines of metrics.

    EFFPASS_STEPS      steps of each run (default 200)
    EFFPASS_RATES      learning rates of AdamW, Muon and MONA, such as 5e-4,2e-3,2e-3
    EFFPASS_RUNS       a folder that keeps the runs: what has ended there with the same config is not run again
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from subprocess import CalledProcessError
from typing import Any

import torch

from benchmarks.rows import Row, row
from benchmarks.torchrun import torchrun
from benchmarks.training_data import TEXT
from benchmarks.training_runs import METHODS, OURS
from effpass.core.plain_yaml import write_yaml

AREA = "training"
# Half of the best ones at 15 M parameters.
RATES = "5e-4,2e-3,2e-3"
BATCH, LENGTH, STEPS = 256, 256, 200


@dataclass(frozen=True)
class Ended:
    """What a run wrote.

    Attributes:
        held_out: loss at the end, in nats a token.
        recent: mean loss of the last tenth of the steps.
        seconds: of a step.
        parameters: of the model.
    """

    held_out: float
    recent: float
    seconds: float
    parameters: int


def experts(model: dict[str, Any], smoked: dict[str, Any], device: str, smoke: bool) -> Iterator[Row]:
    """AdamW, Muon and MONA on a sharded model.

    Args:
        model: transformers config.
        smoked: what stands in for it in a smoke run.
    """
    ranks = 2 if device == "cpu" else torch.cuda.device_count()
    if ranks < 2 or (device == "cpu" and not smoke) or "RANK" in os.environ:
        print("skipped: start it without torchrun on several GPUs, or with --smoke")
        return
    batch, length, steps = (4, 32, 6) if smoke else (BATCH, LENGTH, int(os.environ.get("EFFPASS_STEPS", STEPS)))
    batch = batch if batch % ranks == 0 else batch * ranks
    rates = dict(zip(OURS, map(float, os.environ.get("EFFPASS_RATES", RATES).split(",")), strict=True))
    config = {
        "version": 1, "model": smoked if smoke else model, "tokenizer": "bytes",
        "data": [{"text": ["$STDLIB/json/*.py", "$STDLIB/email/*.py"] if smoke else list(TEXT)}],
        "stages": [{"steps": steps, "sequence_length": length, "batch": batch}], "held_out": 0.02,
        "schedule": {"warmup": max(1, steps // 20), "final": 0.02}, "dtype": "bfloat16", "fsdp": True,
        "log_every": 1 if smoke else 10,
    }  # fmt: skip
    if "EFFPASS_DATA" in os.environ:  # patterns are relative to the config's folder
        os.environ["EFFPASS_DATA"] = os.path.abspath(os.environ["EFFPASS_DATA"])
    tokens = steps * batch * length
    ended: dict[str, Ended] = {}
    with tempfile.TemporaryDirectory() as passing:
        for method, rate in rates.items():
            name, options = METHODS[method]
            optimizer = {"name": name, "lr": rate, "options": options}
            folder = Path(os.environ.get("EFFPASS_RUNS", passing))
            try:
                found = ended[method] = _run(folder, {**config, "optimizer": optimizer}, ranks, device)
            except CalledProcessError as error:  # the command has said why
                print(f"{AREA} | {method} at rate {rate:g} failed: {error}", flush=True)
                continue
            peer = None if method == "AdamW" else ended.get("AdamW")
            case = f"MoE {found.parameters / 1e6:.0f} M, {ranks} ranks"
            common: dict[str, Any] = {"device": device, "peer_name": "AdamW" if peer else ""}
            yield row(
                AREA, case, f"step in training, {method}", found.seconds * 1e3, "ms",
                peer=None if peer is None else peer.seconds * 1e3,
                note=f"FSDP2, {batch} x {length} tokens, {batch * length / found.seconds:.0f} a second", **common,
            )  # fmt: skip
            yield row(
                AREA, case, f"held-out loss on text, {method}", found.held_out, "nats a token",
                peer=None if peer is None else peer.held_out,
                note=f"FSDP2 on {ranks} ranks, bfloat16, {steps} steps, {tokens / 1e6:.1f} M tokens, one seed, rate"
                f" {rate:g}, not swept at this size; loss of the last tenth of the steps {found.recent:.4f}", **common,
            )  # fmt: skip
    if len(ended) < len(rates):
        raise SystemExit(1)


def _run(folder: Path, config: dict[str, Any], ranks: int, device: str) -> Ended:
    """Run the command, unless the folder has this run."""
    optimizer = config["optimizer"]
    steps, name = config["stages"][0]["steps"], "muon" if optimizer["options"] else optimizer["name"]
    out = folder / f"{name}-{optimizer['lr']:g}-{steps}-{ranks}"
    text = write_yaml(config)
    if not out.exists() or (out / "training.yaml").read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / f"{out.name}.training", ignore_errors=True)  # of a run that was ended early
        path = folder / f"{out.name}.yaml"
        path.write_text(text)
        torchrun(ranks, "effpass", "train", "lm", str(path), "-o", str(out), device=device)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    points = [line for line in lines if "loss" in line]
    last = [line["loss_text"] for line in points[-max(1, len(points) // 10) :]]
    seconds = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(points)]
    held_out = next(line["eval_loss_text"] for line in reversed(lines) if "eval_loss_text" in line)
    parameters = json.loads((out / "training.json").read_text())["parameters"]
    return Ended(held_out, mean(last), median(seconds), parameters)
