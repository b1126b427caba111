"""Speculative decoding: a draft proposes a tree of tokens, and the model verifies all of them in one call."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effpass.runtime.speculative.classifier import Classifier, load_classifier
    from effpass.runtime.speculative.eagle_draft import EagleDraft
    from effpass.runtime.speculative.eagle_format import read_head, write_head
    from effpass.runtime.speculative.eagle_head import EagleHead, HeadConfig
    from effpass.runtime.speculative.generation import generate
    from effpass.runtime.speculative.growing import C2T, Eagle2
    from effpass.runtime.speculative.model_draft import ModelDraft
    from effpass.runtime.speculative.ngram_draft import NGramDraft
    from effpass.runtime.speculative.open_draft import speculator_of
    from effpass.runtime.speculative.shapes import Static, chain
    from effpass.runtime.speculative.skipped_layers import skip_layers
    from effpass.runtime.speculative.speculator import Speculator

_HOME = {
    "C2T": "growing",
    "Classifier": "classifier",
    "Eagle2": "growing",
    "EagleDraft": "eagle_draft",
    "EagleHead": "eagle_head",
    "HeadConfig": "eagle_head",
    "ModelDraft": "model_draft",
    "NGramDraft": "ngram_draft",
    "Speculator": "speculator",
    "Static": "shapes",
    "chain": "shapes",
    "generate": "generation",
    "load_classifier": "classifier",
    "read_head": "eagle_format",
    "skip_layers": "skipped_layers",
    "speculator_of": "open_draft",
    "write_head": "eagle_format",
}

__all__ = [
    "C2T",
    "Classifier",
    "Eagle2",
    "EagleDraft",
    "EagleHead",
    "HeadConfig",
    "ModelDraft",
    "NGramDraft",
    "Speculator",
    "Static",
    "chain",
    "generate",
    "load_classifier",
    "read_head",
    "skip_layers",
    "speculator_of",
    "write_head",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
