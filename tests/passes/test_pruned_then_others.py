"""Passes with artifacts behind `structured_pruning`: what was learned for the whole model, on what is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch

import effpass
from effpass.core.errors import EffpassError, PassRefusedError
from effpass.core.fingerprint import Fingerprint
from effpass.passes.weights.fg2_gdn import make_artifact
from effpass.passes.weights.structured_pruning import make_keep_artifact
from effpass.runtime.linear_attention import GatedDeltaSettings, make_hybrid
from effpass.runtime.prefix_kv.calibrate import calibrate as calibrate_prefix_kv
from effpass.runtime.sparse_channels import calibrate, load_channels
from effpass.runtime.speculative.calibrated import PASS, VERSION

IDS = torch.arange(96).remainder(61)[None]
GROUPS = [[1], [0]]


def recipe(*items: Any) -> dict[str, Any]:
    return {"version": 1, "passes": list(items)}


@pytest.fixture
def pruning(tmp_path: Path) -> dict[str, Any]:
    make_keep_artifact(families.make("qwen3"), tmp_path / "keep", kv_groups=GROUPS)
    return {"structured_pruning": {"artifact": str(tmp_path / "keep")}}


def test_channels_of_the_kept_heads(tmp_path: Path, pruning: dict[str, Any]) -> None:
    calibrate(families.make("qwen3"), [IDS], channels=8).save(tmp_path / "channels")
    few = {"tokens": 16, "blocks": 3, "block": 16, "recent": 1, "dense_below": 1}
    sparse = {"sparse_attention": {**few, "artifact": str(tmp_path / "channels")}}
    ready = effpass.prepare(families.make("qwen3"), recipe(pruning, sparse))
    channels = load_channels(tmp_path / "channels")[1]
    assert channels[0].shape == (2, 8)
    used = ready.effpass_reader.channels
    for layer, (group,) in enumerate(GROUPS):
        assert used[layer].tolist() == [channels[layer][group].tolist()]

    # The pruned model by itself, with these channels.
    alone = effpass.prepare(families.make("qwen3"), recipe(pruning))
    artifact = calibrate(alone, [IDS], channels=8)
    artifact.tensors.update({f"layers.{i}.channels": used[i] for i in used})
    artifact.save(tmp_path / "after")
    after = {"sparse_attention": {**few, "artifact": str(tmp_path / "after")}}
    alone = effpass.prepare(alone, recipe(after))
    texts = [m.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8) for m in (ready, alone)]
    assert torch.equal(*texts)


def _prefix_kv(folder: Path) -> dict[str, Any]:
    prompts = [{"input_ids": IDS.repeat(1, 2)}]
    calibrate_prefix_kv(families.make("qwen3"), prompts).artifact.save(folder)
    return {"budget": 0.5}


def _sparse_attention(folder: Path) -> dict[str, Any]:
    calibrate(families.make("qwen3"), [IDS], channels=8).save(folder)
    return {}


def _sparse_verification(folder: Path) -> dict[str, Any]:
    from effpass.core.artifact import Artifact

    tensors = {"anchors": torch.tensor([0], dtype=torch.int32), "expert_shares": torch.zeros(0, 0)}
    Artifact(PASS, VERSION, {"block": 64}, Fingerprint.of(families.make("qwen3")), {}, {}, tensors).save(folder)
    return {}


def _fg2_gdn(folder: Path, rest: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    model = families.make("qwen3")
    original = Fingerprint.of(model)
    made = make_hybrid(model, (0,), GatedDeltaSettings("fg2+", 4, 4, 16, 16, gate_rank=8))
    make_artifact(folder, original, made, rest=rest)
    return {}


MAKERS = {
    "prefix_kv": _prefix_kv, "sparse_attention": _sparse_attention, "sparse_verification": _sparse_verification,
    "fg2_gdn": _fg2_gdn,
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_learned_for_all_layers_goes_with_fewer(name: str, tmp_path: Path) -> None:
    make_keep_artifact(families.make("qwen3"), tmp_path / "keep", layers=[1])
    options = MAKERS[name](tmp_path / "learned")
    items = [
        {"structured_pruning": {"artifact": str(tmp_path / "keep")}},
        {name: {**options, "artifact": str(tmp_path / "learned")}},
    ]
    model = families.make("qwen3")
    with pytest.raises(PassRefusedError, match=f"drops layers, and the artifact of {name} was learned .* all 2 of"):
        effpass.prepare(model, recipe(*items))
    assert len(model.model.layers) == 2
    effpass.prepare(model, recipe(items[1]))


def test_layers_may_go_where_nothing_was_learned_for_them(tmp_path: Path) -> None:
    make_keep_artifact(families.make("qwen3"), tmp_path / "keep", layers=[1])
    steps = [{"structured_pruning": {"artifact": str(tmp_path / "keep")}}, {"prefix_kv": {"budget": 0.5}}]
    ready = effpass.prepare(families.make("qwen3"), recipe(*steps))
    assert ready.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4).shape == (1, 100)


def test_weights_of_the_whole_model_would_undo_what_came_before(tmp_path: Path, pruning: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    _fg2_gdn(tmp_path / "hybrid", {name: families.make("qwen3").get_parameter(name) + 1})
    hybrid = {"fg2_gdn": {"artifact": str(tmp_path / "hybrid")}}
    model = families.make("qwen3")
    before = model.get_parameter(name).clone()
    with pytest.raises(EffpassError, match="weights of the whole model, and structured_pruning changes weights before"):
        effpass.prepare(model, recipe(pruning, hybrid))
    assert torch.equal(model.get_parameter(name), before)
    assert torch.equal(effpass.prepare(model, recipe(hybrid)).get_parameter(name), before + 1)
