"""Recipes measured on a GPU: losses against the plain model's, bytes against the allocator's."""

from __future__ import annotations

import copy

import pytest
import torch
from families import make
from torch import nn

from effpass.search.choices import Choice
from effpass.search.measure import measure, prepared
from effpass.search.recipes import DENSE, Candidate
from effpass.search.workload import Workload

pytestmark = pytest.mark.gpu

WORKLOAD = Workload(batch=4, prompt=1024, new_tokens=16, sequences=8)
RECIPES = {
    "dense": (),
    "int8": (Choice("prefix_kv", "int8", {"budget": 1.0, "kv_cache_dtype": "int8"}),),
    "half": (Choice("prefix_kv", "half", {"budget": 0.5}),),
    "offloaded": (
        Choice("sparse_attention", "sparse", {"tokens": 256, "blocks": 8, "dense_below": 1}),
        Choice("kv_offload", "offload", {}),
    ),
}


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "max_position_embeddings": 2048}
    return make("llama", **sizes).to("cuda", torch.bfloat16)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 96, (8, WORKLOAD.length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trials(model, ids):
    return {
        name: measure(prepared(lambda: copy.deepcopy(model), Candidate(choices)), ids, WORKLOAD)
        for name, choices in RECIPES.items()
    }


def test_the_loss_is_that_of_the_plain_model(model, ids, trials):
    with torch.no_grad():
        logits = model(ids.cuda()).logits[:, WORKLOAD.prompt - 1 : -1].double()
    expected = nn.functional.cross_entropy(logits.mT, ids[:, WORKLOAD.prompt :].cuda(), reduction="none").mean(1)
    # Of logits in bfloat16, summed in another order; losses are about log 96 = 4.6.
    torch.testing.assert_close(
        torch.tensor(trials["dense"].losses), expected.cpu(), atol=0.02, rtol=0, check_dtype=False
    )
    for name in ("int8", "half", "offloaded"):
        assert trials[name].losses != trials["dense"].losses


def test_bytes_are_the_allocators(model, ids, trials):
    """What a session takes over the model's own is what is counted, and what prompts take for a moment."""
    for name, trial in trials.items():
        assert trial.peak_bytes >= trial.weight_bytes + trial.cache_bytes, name
        assert trial.step_seconds > 0
    held = {name: trial.cache_bytes for name, trial in trials.items()}
    assert held["int8"] < 0.6 * held["dense"]
    assert held["half"] < 0.7 * held["dense"]
    assert held["offloaded"] < held["dense"]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    made = prepared(lambda: copy.deepcopy(model), DENSE)
    weights = torch.cuda.memory_allocated() - before
    with made.effpass_engine.session(4, WORKLOAD.length) as session:
        session.prefill(ids[:4, :8].cuda(), None, 8)
        taken = torch.cuda.memory_allocated() - before - weights
    assert weights == pytest.approx(trials["dense"].weight_bytes, rel=0.05)
    assert taken == pytest.approx(held["dense"], rel=0.1)
