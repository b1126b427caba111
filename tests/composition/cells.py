"""Which passes stand together, on which models, with which weights: the table that tests run and documents show.

A cell is run in two ways: as one recipe on the model in float32 and bfloat16, and, for quantized weights, with what
changes weights first, then quantized, then the rest; an artifact of slices or sums of weights is no artifact of
rounded ones.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import make, quantized
from torch import nn

import effpass
from effpass.core import registry
from effpass.core.errors import PassRefusedError
from effpass.core.manager import PassManager
from effpass.core.recipe import Recipe

__all__ = [
    "CELLS",
    "FILES",
    "NOT_BUILT",
    "WEIGHTS",
    "Cell",
    "Made",
    "dense_equivalent",
    "hybrid_of",
    "refused_pairs",
    "weighted",
]

# What a model's weights are. The figure is what steps' logits may differ by, as a share of the largest: rounding of
# sums in another order, in float32 and in bfloat16.
WEIGHTS = {"float32": 2e-5, "bfloat16": 0.03, "int8": 0.03, "float8": 0.03}

SPARSE_ALL = {"sparse_attention": {"tokens": 128, "blocks": 8, "block": 16, "recent": 1, "dense_below": 1}}
SPARSE_FEW = {"sparse_attention": {"tokens": 16, "blocks": 3, "block": 16, "recent": 1, "dense_below": 1}}
SMALL_TREES = {"dense_below": 8, "block": 4}
KEEP_ALL = {"prefix_kv": {"budget": 1.0}}
KEEP_HALF = {"prefix_kv": {"budget": 0.5, "sink": 2, "recent": 8, "page": 1}}


@dataclass(frozen=True)
class Made:
    """What a cell's artifacts are, made for one family in one folder."""

    family: str
    folder: Path

    @property
    def latent(self) -> bool:
        return self.family.startswith("deepseek")

    def adapter(self, model: Any = None) -> dict[str, Any]:
        """A LoRA adapter that does something, of attention and, where there are any, of experts' neighbors."""
        import peft
        from lora_models import stir

        targets = ["q_b_proj", "o_proj"] if self.latent else ["q_proj", "v_proj", "o_proj"]
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.get_peft_model(make(self.family) if model is None else model, config).eval()
            stir(wrapped, 1)
            wrapped.save_pretrained(self.folder / "adapter")
        return {"merge_lora": {"adapter": str(self.folder / "adapter")}}

    def pruned(self) -> dict[str, Any]:
        """Half of the heads, and other ones in each layer."""
        from effpass.passes.weights.keep_indices import make_keep_artifact

        groups = [[0, 2], [1, 3]] if self.latent else [[1], [0]]
        make_keep_artifact(make(self.family), self.folder / "keep", kv_groups=groups)
        return {"structured_pruning": {"artifact": str(self.folder / "keep")}}

    def linear(self) -> dict[str, Any]:
        """The first layer as linear attention."""
        from effpass.core.fingerprint import Fingerprint
        from effpass.passes.weights.fg2_gdn import make_artifact
        from effpass.runtime.linear_attention import GatedDeltaSettings, make_hybrid

        model = make(self.family)
        original = Fingerprint.of(model)
        torch.manual_seed(1)
        made = make_hybrid(model, (0,), GatedDeltaSettings("fg2+", 4, 4, 16, 16, gate_rank=8))
        make_artifact(self.folder / "hybrid", original, made, rest={}, provenance={}, metrics={})
        return {"fg2_gdn": {"artifact": str(self.folder / "hybrid")}}


def dense_equivalent(made: Made, *, merged: bool, pruned: bool) -> nn.Module:
    """The dense model that computes the same: the adapter added by PEFT, the removed heads' outputs at zero."""
    import peft

    model = make(made.family)
    if merged:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, made.folder / "adapter").merge_and_unload()
    if pruned:
        heads = model.config.num_attention_heads
        groups = 4 if made.latent else 2
        for layer, keep in zip(model.model.layers, [[0, 2], [1, 3]] if made.latent else [[1], [0]], strict=True):
            weight = layer.self_attn.o_proj.weight.detach().unflatten(1, (groups, -1))
            weight[:, sorted(set(range(groups)) - set(keep))] = 0
        assert heads % groups == 0
    return model.eval()


@dataclass(frozen=True)
class Cell:
    """Passes that stand together.

    Attributes:
        names: of the passes and what else there is, as the table shows it.
        families: models that it is run on.
        first: recipe items that change weights.
        then: the others.
        neutral: the others with settings under which they change nothing.
        reference: the plain model that `first` and `neutral` are compared with.
        generate: makes the draft and its tree, as arguments of `generate`; None without.
    """

    names: tuple[str, ...]
    families: tuple[str, ...]
    first: Callable[[Made], list[Any]] = lambda made: []
    then: tuple[Any, ...] = ()
    neutral: tuple[Any, ...] | None = None
    reference: Callable[[Made], nn.Module] = lambda made: make(made.family)
    generate: Callable[[Made, nn.Module], dict[str, Any]] | None = None

    @property
    def title(self) -> str:
        return " x ".join(self.names)


def hybrid_of(made: Made) -> nn.Module:
    return effpass.prepare(make(made.family), {"version": 1, "passes": [made.linear()]})


def pruned_self(made: Made, model: nn.Module) -> dict[str, Any]:
    """The model with half of its heads as its own draft."""
    draft = effpass.prepare(make(made.family), {"version": 1, "passes": [made.pruned()]})
    return {"draft": draft.to(model.dtype)}


def annealed_draft(made: Made, model: nn.Module) -> dict[str, Any]:
    """Another model whose AFA adapter ended its anneal and was merged, which grows C2T's trees."""
    from speculative_drafts import KINDS

    from effpass.trainers.afa_lora import AnnealSchedule, LoraSettings, attach

    adapter = attach(make(made.family, seed=3), AnnealSchedule(4), LoraSettings(4))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    for _ in range(4):
        adapter.step()
    adapter.save(made.folder / "annealed")
    merged = [{"merge_lora": {"adapter": str(made.folder / "annealed")}}]
    draft = effpass.prepare(make(made.family, seed=3), {"version": 1, "passes": merged})
    return {"draft": draft.to(model.dtype), "tree": KINDS["c2t"]}


def other_draft(made: Made, model: nn.Module) -> dict[str, Any]:
    """Another model that grows C2T's trees."""
    from speculative_drafts import KINDS

    return {"draft": make(made.family, seed=3).to(model.dtype), "tree": KINDS["c2t"]}


DENSE = ("llama", "qwen3", "qwen3_moe", "deepseek_v3")

CELLS = [
    Cell(
        ("merge_lora", "structured_pruning"), DENSE,
        first=lambda made: [made.adapter(), made.pruned()],
        reference=lambda made: dense_equivalent(made, merged=True, pruned=True),
    ),
    Cell(
        ("structured_pruning", "prefix_kv"), DENSE,
        first=lambda made: [made.pruned()], then=(KEEP_HALF,), neutral=(KEEP_ALL,),
        reference=lambda made: dense_equivalent(made, merged=False, pruned=True),
    ),
    Cell(("structured_pruning (draft)", "speculative decoding"), DENSE, generate=pruned_self),
    Cell(("merge_lora (AFA draft)", "C2T trees"), ("llama", "qwen3", "mixtral"), generate=annealed_draft),
    Cell(
        ("merge_lora", "moe_gemm"), ("mixtral", "qwen3_moe", "deepseek_v3"),
        first=lambda made: [made.adapter()], neutral=("moe_gemm",), then=("moe_gemm",),
        reference=lambda made: dense_equivalent(made, merged=True, pruned=False),
    ),
    Cell(
        ("moe_gemm", "sparse_verification", "C2T trees"), ("mixtral", "qwen3_moe"),
        then=("moe_gemm", {"sparse_verification": {**SMALL_TREES, "attention": 0.1, "experts": 0.25}}),
        neutral=("moe_gemm", {"sparse_verification": {**SMALL_TREES, "attention": 1.0, "experts": 1.0}}),
        generate=other_draft,
    ),
    Cell(
        ("mla_absorption", "sparse_attention", "kv_offload"), ("deepseek_v3",),
        then=("mla_absorption", SPARSE_FEW, {"kv_offload": {"pool": 10}}),
        neutral=("mla_absorption", SPARSE_ALL, {"kv_offload": {"pool": 10}}),
    ),
    Cell(
        ("prefix_kv", "sparse_attention"), DENSE, then=(KEEP_HALF, SPARSE_FEW), neutral=(KEEP_ALL, SPARSE_ALL),
    ),
    Cell(
        ("prefix_kv", "sparse_attention", "kv_offload"), ("qwen3", "deepseek_v3"),
        then=(KEEP_HALF, SPARSE_FEW, {"kv_offload": {"pool": 10}}),
        neutral=(KEEP_ALL, SPARSE_ALL, {"kv_offload": {"pool": 10}}),
    ),
    Cell(
        ("fg2_gdn", "prefix_kv"), ("qwen3", "qwen3_moe"), first=lambda made: [made.linear()],
        then=(KEEP_HALF,), neutral=(KEEP_ALL,), reference=hybrid_of,
    ),
    Cell(
        ("fg2_gdn", "sparse_attention", "kv_offload"), ("qwen3",), first=lambda made: [made.linear()],
        then=(SPARSE_FEW, {"kv_offload": {"pool": 10}}), neutral=(SPARSE_ALL, {"kv_offload": {"pool": 10}}),
        reference=hybrid_of,
    ),
]  # fmt: skip


# names, family, target, weights, and whether it is quick enough to run every time
_MERGED = ("merge_lora", "structured_pruning")
FILES = [
    (_MERGED, "qwen3", "onnx", "float32", True),
    (_MERGED, "qwen3", "onnx", "int8", True),
    (_MERGED, "qwen3", "onnx", "float8", False),
    (_MERGED, "qwen3_moe", "onnx", "float32", False),
    (_MERGED, "deepseek_v3", "onnx", "float32", False),
    (_MERGED, "qwen3", "inductor", "bfloat16", False),
    (_MERGED, "qwen3", "inductor", "int8", False),
    (_MERGED, "qwen3", "inductor", "float8", False),
    (_MERGED, "qwen3", "aoti", "bfloat16", False),
    (_MERGED, "qwen3", "aoti", "int8", False),
    (_MERGED, "qwen3", "aoti", "float8", False),
    (_MERGED, "qwen3", "tensorrt", "float32", False),
    (_MERGED, "qwen3", "tensorrt", "int8", False),
    (_MERGED, "qwen3", "tensorrt", "float8", False),
    (("fg2_gdn",), "qwen3", "onnx", "float32", True),
    (("fg2_gdn",), "qwen3", "onnx", "int8", False),
    (("fg2_gdn",), "qwen3", "onnx", "float8", False),
    (("fg2_gdn",), "qwen3", "aoti", "float32", False),
    (("fg2_gdn",), "qwen3", "tensorrt", "float32", False),
]


# Pairs that are refused and need not be: nothing but work stands in the way.
NOT_BUILT = {
    ("kv_offload", "sparse_verification"),
    ("prefix_kv", "sparse_verification"),
    ("sparse_attention", "sparse_verification"),
}


def refused_pairs() -> dict[tuple[str, str], str]:
    """Pairs of built-in passes that stand together in neither order, and why, in the words of the refusal."""
    from itertools import combinations

    found = {}
    for one, other in combinations(registry.names(), 2):
        reasons = [_refusal(pair) for pair in ((one, other), (other, one))]
        if None not in reasons:
            found[one, other] = str(reasons[0])
    return found


def _refusal(names: tuple[str, str]) -> str | None:
    # What an artifact holds has no say in it.
    needs = {
        "prefix_kv": {"budget": 0.5}, "merge_lora": {"adapter": "adapter"}, "fg2_gdn": {"artifact": "artifact"},
        "structured_pruning": {"artifact": "artifact"},
    }  # fmt: skip
    items: list[Any] = []
    for name in names:
        if name == "kv_offload" and "sparse_attention" not in names:
            items.append("sparse_attention")  # which it needs whatever else there is
        items.append({name: needs[name]} if name in needs else name)
    try:
        PassManager.from_recipe(Recipe.parse({"version": 1, "passes": items}, base=Path(), source="recipe"))
    except PassRefusedError as error:
        return error.message
    return None


def weighted(model: nn.Module, weights: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A copy of the model of `dtype`, its linear layers with weights of this kind; float32 stays."""
    model = copy.deepcopy(model)
    if weights == "float32":
        return model
    model = model.to(dtype)
    return model if weights == "bfloat16" else quantized(model, weights)
