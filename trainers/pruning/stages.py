"""Stages of a pruning run, on models in memory: choosing the units to keep, the cut, and recovery.

:mod:`effpass.trainers.pruning.run` calls the stages in this order, and reads and writes the files. The *teacher* is the
whole model, and the *student* is the copy that is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.errors import EffpassError, ModelError
from effpass.passes.weights.attached_lora import merge_attached
from effpass.passes.weights.keep_indices import KeepIndices
from effpass.passes.weights.structured_pruning import cut_model
from effpass.trainers.finetune.trained import Trained, make_trained
from effpass.trainers.lm.config import Schedule
from effpass.trainers.lm.model import set_experts
from effpass.trainers.pruning.choice import best_layers, best_units, keep_indices, layer_count, score_units
from effpass.trainers.pruning.cost import Cost, parameter_cost
from effpass.trainers.pruning.data import Rows
from effpass.trainers.pruning.loop import Distiller, training_arguments
from effpass.trainers.pruning.masks import Masks
from effpass.trainers.pruning.minimax import Minimax
from effpass.trainers.pruning.scores import Calibration
from effpass.trainers.pruning.settings import Settings
from effpass.trainers.pruning.shapes import Shapes
from effpass.trainers.pruning.step_cost import step_cost
from effpass.trainers.pruning.units import Units, find_units
from effpass.trainers.run_folder import Recorder

__all__ = ["Learned", "Problem", "choose", "cut", "hard_masks", "learn", "recover", "state_problem"]

Kept = Mapping[str, Mapping[int, Tensor]]


@dataclass(frozen=True)
class Problem:
    """Units of a model that can be pruned, the cost they account for, and the possible shapes.

    Attributes:
        units: units of the model, by family.
        cost: cost of the model as a function of its sizes.
        shapes: possible sizes of the pruned model.
    """

    units: dict[str, Units]
    cost: Cost
    shapes: Shapes

    def even(self, settings: Settings) -> dict[str, int]:
        """Return the sizes at which every family keeps the same share, as closely as the shapes allow."""
        wanted = dict.fromkeys(self.shapes.allowed, settings.keep) | settings.keep_of
        return self.shapes.nearest(self.cost, settings.keep, wanted, settings.keep_of)


def state_problem(model: Any, settings: Settings) -> Problem:
    """Determine what can be pruned from `model`, and check that a shape with the requested cost exists.

    Raises:
        EffpassError: no shape has the requested cost; the message has the nearest one.
        ModelError: the model has no units of a requested family.
    """
    units = find_units(model, settings.units)
    if settings.cost == "parameters":
        cost = parameter_cost(model, units)
    else:
        cost = step_cost(model, units, settings.cost, settings.cost_batch, settings.cost_context)
    for family in settings.keep_of:
        if family not in units:
            raise EffpassError(f"keep of {family}: this model has {', '.join(units)} to prune")
    problem = Problem(units, cost, Shapes(model.config, units, settings.multiple, settings.devices))
    if settings.choose == "depth":
        layer_count(cost, model.config.get_text_config().num_hidden_layers, settings.keep)
    else:
        problem.even(settings)
    return problem


# -- what stays -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """Choice of the units to keep.

    Attributes:
        keep: the choice as a keep-index artifact for the whole model.
        kept: the choice as indices `[R, n]` by family and layer, as masks use it; None if whole layers are removed.
    """

    keep: KeepIndices
    kept: Kept | None = None


def choose(model: Any, problem: Problem, settings: Settings, rows: Rows) -> Learned:
    """Choose the units or layers to keep by scoring the given model on calibration data."""
    device = next(model.parameters()).device
    batches = [ids.to(device) for ids in rows.calibration(settings.calibration)]
    calibration = Calibration(batches, settings.seed)
    with _computing(settings, device):
        if settings.choose == "depth":
            count = layer_count(problem.cost, model.config.get_text_config().num_hidden_layers, settings.keep)
            layers = best_layers(model, problem.units, calibration, count)
            return Learned(keep_indices(model, problem.units, layers=layers))
        scores = score_units(settings.choose, model, problem.units, calibration)
    kept = best_units(scores, problem.units, problem.shapes, problem.even(settings))
    return Learned(keep_indices(model, problem.units, kept), kept)


def learn(
    student: Any,
    teacher: Any,
    problem: Problem,
    settings: Settings,
    rows: Rows,
    folder: Path,
    recorder: Recorder,
    *,
    checkpoint: Path | None = None,
    first_step: int = 0,
    make: Callable[..., Minimax] = Minimax,
) -> tuple[Any, Learned]:
    """Learn masks, sizes and weights together.

    Args:
        student: copy of `teacher`, which is trained in place.
        teacher: the whole model.
        problem: units, cost and shapes.
        settings: settings of the run.
        rows: training data.
        folder: folder for checkpoints.
        recorder: recorder of metrics.
        checkpoint: checkpoint from which to resume; None to start anew.
        first_step: number of steps done before.
        make: class of the learner; classes other than :class:`Minimax` serve for comparisons.

    Returns:
        The student with its adapter merged and nothing cut yet, and the choice of the units to keep.
    """
    torch.manual_seed(settings.seed)
    trained = make_trained(student, settings.method, settings.lora, settings.anneal, None)
    set_experts(trained.model)
    masks = Masks(trained.model, problem.units)
    learner = make(masks, problem.cost, problem.shapes, settings.keep, settings.learning_steps, settings.keep_of)
    schedule = Schedule(warmup=settings.warmup, kind="constant")
    args = training_arguments(settings, settings.learning_steps, folder)
    with masks.attached(), _under_autocast(trained, settings):
        trainer = Distiller(
            trained, teacher, settings.distillation, args, rows, first_step, settings.optimizer, schedule, recorder,
            learner,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    kept = learner.kept()
    return _merged(trained), Learned(keep_indices(teacher, problem.units, kept), kept)


# -- the cut ----------------------------------------------------------------------------------------------------------

# Maximum deviation of a token's logits (relative, root mean square) that a different summation order may cause in most
# tokens. In float64, SmolLM2 cut to half is far below it, and with one wrong channel in its last layer far above, which
# a test measures. In float32, the rounding of a model that has lost units at random exceeds it.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def cut(model: Any, problem: Problem, learned: Learned, ids: Tensor) -> None:
    """Cut `model` in place, and compare its logits with those before the cut under masks of 0 and 1.

    If whole layers are removed, nothing is compared.

    Args:
        model: model to cut.
        problem: units of the model.
        learned: choice of the units to keep.
        ids: token ids `[B, T]` on which the logits are compared.

    Raises:
        EffpassError: the logits differ by more than rounding explains.
    """
    model.eval()
    if learned.kept is None:
        cut_model(model, learned.keep)
        return
    with torch.no_grad(), _in_float64(model):
        with hard_masks(model, problem, learned).attached():
            expected = model(input_ids=ids, use_cache=False).logits
        cut_model(model, learned.keep)
        found = model(input_ids=ids, use_cache=False).logits
    by_token = (found - expected).double().norm(dim=-1) / expected.double().norm(dim=-1)
    far = float(by_token.median())
    if not far < _ROUNDING.get(found.dtype, 3e-2):  # also true for NaN
        raise EffpassError(
            f"the cut model's logits are {far:.2g} of their size from those of the masked one", hint="report this"
        )


@contextmanager
def _in_float64(model: Any) -> Iterator[None]:
    """Context manager in which a float32 model computes in float64, which loses nothing of its weights.

    Models of another dtype, and those with experts, whose grouped products have no kernel for float64, stay as they
    are.
    """
    experts = any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules())
    if experts or {p.dtype for p in model.parameters()} != {torch.float32}:
        yield
        return
    model.double()
    try:
        yield
    finally:
        model.float()


def hard_masks(model: Any, problem: Problem, learned: Learned) -> Masks:
    """Create masks of 0 and 1 with which `model` computes the same outputs as the cut model."""
    assert learned.kept is not None
    masks = Masks(model, problem.units)
    masks.softness = 0.0
    for family, of_layers in learned.kept.items():
        index = torch.stack(list(of_layers.values())).to(masks.hard[family].device)
        masks.hard[family] = torch.zeros_like(masks.hard[family]).scatter_(-1, index, 1.0)
    return masks


# -- after ------------------------------------------------------------------------------------------------------------


def recover(
    model: Any,
    teacher: Any,
    settings: Settings,
    rows: Rows,
    folder: Path,
    recorder: Recorder,
    *,
    checkpoint: Path | None = None,
    first_step: int = 0,
) -> Any:
    """Train the cut model to recover its quality. An adapter, if `settings.recovery` is one, is merged at the end.

    Args:
        model: cut model, which is trained in place.
        teacher: the whole model.
        settings: settings of the run.
        rows: training data.
        folder, recorder, checkpoint, first_step: as for :func:`learn`.

    Returns:
        The trained model without adapters.
    """
    steps = settings.recovery_steps
    schedule = settings.anneal.schedule(steps) if settings.recovery == "afa-lora" else None
    model.to(torch.float32 if settings.recovery == "full" else getattr(torch, settings.dtype))
    torch.manual_seed(settings.seed)
    trained = make_trained(model, settings.recovery, settings.lora, settings.anneal, schedule)
    set_experts(trained.model)
    rates = Schedule(warmup=settings.warmup, kind="cosine", final=0.05)
    args = training_arguments(settings, steps, folder)
    optimizer = settings.optimizer
    if settings.recovery_lr is not None:
        optimizer = replace(optimizer, lr=settings.recovery_lr)
    with _under_autocast(trained, settings):
        trainer = Distiller(trained, teacher, settings.distillation, args, rows, first_step, optimizer, rates, recorder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return _merged(trained)


def _merged(trained: Trained) -> nn.Module:
    """Return the model with its adapters merged, ready for generation."""
    model = trained.model
    if trained.afa is not None:
        model = trained.afa.merge()
    elif trained.peft is not None:
        model = trained.peft.get_base_model().eval()
        _, refusals = merge_attached(model, "refuse")
        if refusals:
            raise ModelError(f"{refusals[0].node}: {refusals[0].reason}", hint=refusals[0].hint)
    model.config.use_cache = True  # the Trainer has set it to False
    return model.eval()


def _under_autocast(trained: Trained, settings: Settings) -> AbstractContextManager[None]:
    return trained.under_autocast() if settings.dtype == "bfloat16" else nullcontext()


@contextmanager
def _computing(settings: Settings, device: torch.device) -> Iterator[None]:
    """Context manager under which the model computes in the same dtype as in training."""
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        yield
