"""`moe_gemm` with `expert_parallel`: models whose experts two processes share are the models that one process has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from families import make
from moe_families import LAYERS
from ranks import told_by_ranks

import effpass
from effpass.core.errors import PassRefusedError, RecipeError
from effpass.core.manager import Planned
from effpass.core.recipe import Recipe
from effpass.lowering.targets.export import check_passes

WORKER = Path(__file__).with_name("moe_ranks_worker.py")
WORLD = 2


def launch(parts: tuple[str, ...], folder: Path, device: str = "cpu") -> list[dict]:
    """What each rank found."""
    return told_by_ranks(WORKER, folder, WORLD, ",".join(parts), DEVICE=device)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return launch(("logits", "compiled", "loaded", "generated", "refused"), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("family", "attention"), [*((family, "dp") for family in LAYERS), ("qwen3_moe", "tp"), ("gpt_oss", "tp")]
)
def test_every_family(family, attention, results):
    for rank in results:
        found = rank["logits"][f"{family}, {attention}"]
        assert found["error"] < 1e-5
        assert found["felt"] > 1e-3  # what the experts do can be seen
        assert found["hits"] == LAYERS[family]
        assert found["share"] == 1 / WORLD


def test_compiled(results):
    """One graph for every length; on a cache, prefill and decoding are those of one process too."""
    for rank in results:
        own, shared = rank["compiled"]["dp"], rank["compiled"]["tp"]
        assert len(own["errors"]) == 4
        assert max(own["errors"]) < 1e-5
        assert own["graphs"] == 1
        assert len(shared["errors"]) == 1
        assert max(shared["errors"]) < 1e-5


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_models_that_transformers_loaded_in_parts(family, results):
    for rank in results:
        if rank["loaded"] is None:
            pytest.skip("needs transformers with ep_dispatch_experts")
        found = rank["loaded"][family]
        assert found["error"] < 1e-5
        assert found["hits"] == LAYERS[family]
        assert found["kept"] == [2] * LAYERS[family]  # of 4
        assert found["text"]
        assert found["engine"] is None
        assert re.search("transformers has spread .* over ranks that all have the same tokens", found["dp"])


def test_generation(results):
    """The same prompts run on the decode engine; with own prompts ranks end at different lengths."""
    for rank in results:
        assert rank["generated"]["tp"]
        assert rank["generated"]["tp, engine"] is None
        assert rank["generated"]["dp"]
        assert "synced_gpus=True" in rank["generated"]["dp, engine"]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("odd", r"model.layers.0.mlp.experts has 3 experts, and 2 ranks can't share them evenly\n.*divide 3"),
        ("dense", "LlamaForCausalLM has no layer of stacked experts"),
        ("saved", "model.layers.0.mlp.experts holds 2 of 4 experts, and a checkpoint of this process would lack"),
        ("behind", "prefix_kv acts in effpass's loop, which does not wait for other ranks"),
        ("before", "prefix_kv acts in effpass's loop, which does not wait for other ranks"),
        ("backend", r"expert_parallel needs effpass.prepare\(model, recipe\) before torch.compile"),
        ("whole layer", "model.layers.0.mlp.experts: there is a norm behind each expert"),
        ("hits", "1"),
    ],
)
def test_refusals(what, reason, results):
    assert [bool(re.search(reason, rank["refused"][what], re.DOTALL)) for rank in results] == [True] * WORLD


RECIPE = {"version": 1, "passes": [{"moe_gemm": {"expert_parallel": "dp"}}]}


@pytest.mark.gpu
def test_on_two_gpus(tmp_path):
    """Through NCCL, by the kernels; the decode engine records a rank's part in a CUDA graph, sums included."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for rank in launch(("logits", "generated"), tmp_path, "cuda"):
        for name, found in rank["logits"].items():
            assert found["error"] < 5e-5, name  # the library's products of the whole model sum in another order
            assert found["felt"] > 1e-3
        assert rank["generated"]["tp"]
        assert rank["generated"]["tp, engine"] is None
        assert rank["generated"]["dp"]


def test_processes_without_a_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = make("mixtral")
    with pytest.raises(PassRefusedError, match=r"2 processes, and no process group is up\n.*init_process_group"):
        effpass.prepare(model, RECIPE)
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


def test_a_file_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    planned = [Planned(pass_) for pass_ in Recipe.parse(RECIPE).build()]
    with pytest.raises(PassRefusedError, match="moe_gemm spreads the model over processes, and a file is for one"):
        check_passes(planned)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_passes(planned)


def test_in_one_process_the_recipe_is_that_of_one_process():
    model = effpass.prepare(make("mixtral"), RECIPE)
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert model.effpass_report.passes == []  # it acts on the graph


def test_the_option_is_checked():
    with pytest.raises(RecipeError, match=r"moe_gemm.expert_parallel: got 'ep' \(str\), expected 'dp' or 'tp'"):
        Recipe.parse({"version": 1, "passes": [{"moe_gemm": {"expert_parallel": "ep"}}]}).build()
