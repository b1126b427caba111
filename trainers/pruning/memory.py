"""Estimate of the device memory that a pruning run needs; checked before the run starts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.initialization import no_init_weights

from effpass.trainers.finetune.memory import estimate as estimate_tuning
from effpass.trainers.lm.model import make_model
from effpass.trainers.lm.optimizers import STATE_BYTES
from effpass.trainers.memory import Estimate
from effpass.trainers.pruning.distillation import PIECE
from effpass.trainers.pruning.settings import Settings
from effpass.trainers.pruning.units import find_units

__all__ = ["estimate"]

_FLOAT = 4
# Number of float32 tensors of the size of the logits that are computed at once: log-probabilities and gradients of the
# student, those of the teacher, and intermediate values of the losses.
_PIECES = 6
# Vocabulary size with which the memory of the logits of a step is negligible. Fine-tuning, whose estimate is used here,
# computes all logits of a step at once, and pruning computes them in pieces.
_FEW = 8


def estimate(config: Any, settings: Settings, device: torch.device) -> Estimate:
    """Estimate the device memory before the cut, where a run needs most."""
    rows, length = settings.batch // settings.accumulate, settings.sequence_length
    element = 2 if settings.dtype == "bfloat16" else _FLOAT
    text = copy.deepcopy(config).get_text_config(decoder=True)
    text.vocab_size, text.pad_token_id, text.bos_token_id, text.eos_token_id = _FEW, None, None, None
    found = estimate_tuning(
        text, settings.method, settings.lora, settings.optimizer.name, rows=rows, length=length,
        bfloat16=element == 2, device=device,
    )  # fmt: skip
    whole = _parameters(config)
    missing = whole - _parameters(text)
    state = found.state + whole * element  # the teacher
    if settings.method == "full":
        state += missing * (2 * _FLOAT + STATE_BYTES[settings.optimizer.name] + (element if element == 2 else 0))
    else:
        state += missing * element
    activations = found.activations
    if activations is not None:
        tokens, layers = rows * length, text.num_hidden_layers
        activations += _PIECES * _FLOAT * min(PIECE, tokens * config.get_text_config(decoder=True).vocab_size)
        activations += tokens * sum(_masked_inputs(text, settings)) * element
        activations += tokens * layers * text.hidden_size * element  # the teacher's hidden states
    return Estimate(found.parameters + missing, state, activations, "", found.available)


def _parameters(config: Any) -> int:
    with torch.device("meta"), no_init_weights():
        model: Any = make_model(copy.deepcopy(config), None, 0)
        model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def _masked_inputs(config: Any, settings: Settings) -> list[int]:
    """Return the sizes per token of the values that masks multiply, which are stored once more for backward."""
    with torch.device("meta"), no_init_weights():
        model = make_model(copy.deepcopy(config), None, 0)
    units = find_units(model, settings.units).values()
    return [len(u.readers) * u.rows * u.count * u.width for u in units if u.family != "query_heads"]
