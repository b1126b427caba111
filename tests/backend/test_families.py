"""Every family through the dialect, with a pass that changes nothing: equal to eager, and no more graphs."""

from __future__ import annotations

import families
import pytest
import torch
from families import FAMILIES, Count, batch
from torch._dynamo.backends.registry import lookup_backend

from effpass.backend import effpass, reports

LENGTHS = (17, 33, 20, 64, 9)

# The retraced graph runs the same ATen kernels as eager, so most families agree to the bit; where a kernel's result
# depends on memory layout (batched matmul in attention and experts) the last bits of a float32 sum move.
LOGITS = {"rtol": 1e-5, "atol": 2e-6}
GRADIENTS = {"rtol": 1e-4, "atol": 1e-6}

# Whose layers are of two kinds, and one whose are not; of the others one layer shows what the dialect makes of it.
OF_TWO_LAYERS = ("llama", "gemma3", "deepseek_v3")


def make(family):
    one = {"n_layer" if family == "gpt2" else "num_hidden_layers": 1}
    return families.make(family, **({} if family in OF_TWO_LAYERS else one))


def cells(usual, other, families_of_other):
    """All families with one option; with the other those whose own code it meets, the rest where `slow` is run."""
    rest = [
        pytest.param(family, other, marks=pytest.mark.slow) for family in FAMILIES if family not in families_of_other
    ]
    return [*((family, usual) for family in FAMILIES), *((family, other) for family in families_of_other), *rest]


def retraced(gm, inputs):
    return effpass(gm, inputs, options={"passes": ["touch"], "inner": "aot_eager"})


@pytest.fixture(autouse=True)
def _toys(toy_passes):
    reports.clear()


def _graphs(call, backend, dynamic) -> int:
    torch._dynamo.reset()
    count = Count(backend)
    call(lambda f: torch.compile(f, backend=count, dynamic=dynamic))
    return count.compiled


# Symbolic from the first call on: beside plain layers windows, a table of positions, and the routing of experts.
@pytest.mark.parametrize(
    ("family", "dynamic"), cells(None, True, ["llama", "gemma3", "gpt2", "mixtral", "deepseek_v3"])
)
def test_inference_with_left_padding(family, dynamic):
    model = make(family)
    expected = {}
    with torch.no_grad():
        for length in LENGTHS:
            expected[length] = model(**batch(length), use_cache=False).logits

        def run(compile_):
            compiled = compile_(model)
            for length in LENGTHS:
                logits = compiled(**batch(length), use_cache=False).logits
                torch.testing.assert_close(logits, expected[length], **LOGITS)

        count = Count(retraced)
        run(lambda m: torch.compile(m, backend=count, dynamic=dynamic))
        assert len(reports) == count.compiled
        assert all(r.hits == 1 and r.unrewritten is None for r in reports)
        without = _graphs(run, lookup_backend("eager"), dynamic)
    assert count.compiled == without, "effpass changed how many graphs Dynamo makes"
    assert count.compiled <= 2


# A cache of a fixed length: beside plain layers windows, positions that are looked up, and two sizes of heads.
@pytest.mark.parametrize(("family", "cache"), cells("dynamic", "static", ["llama", "gemma3", "gpt2", "deepseek_v3"]))
def test_prefill_and_three_cached_steps(family, cache):
    from transformers import DynamicCache, StaticCache

    model = make(family)

    def run(forward):
        kv = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=32)
        first = batch(10)
        out = [forward(**first, past_key_values=kv).logits]
        mask, positions = first["attention_mask"], first["position_ids"][:, -1:]
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            positions = positions + 1
            ids = torch.full((2, 1), 5 + step)
            out.append(forward(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=kv).logits)
        return out

    with torch.no_grad():
        expected = run(model)
        count = Count(retraced)
        actual = run(torch.compile(model, backend=count))
        without = _graphs(lambda c: run(c(model)), lookup_backend("eager"), None)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **LOGITS)
    assert count.compiled == without
    assert all(r.hits == 1 for r in reports)


# Checkpointing wraps a layer whatever is in it: plain layers, layers of two kinds, experts.
@pytest.mark.parametrize(("family", "checkpointing"), cells(False, True, ["llama", "gemma3", "mixtral"]))
def test_training_step(family, checkpointing):
    model = make(family).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch(12)

    def step(forward):
        model.zero_grad()
        loss = forward(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        return loss.detach(), {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}

    loss, gradients = step(model)
    count = Count(retraced)
    compiled_loss, compiled_gradients = step(torch.compile(model, backend=count))
    torch.testing.assert_close(compiled_loss, loss, **LOGITS)
    for name, expected in gradients.items():
        actual = compiled_gradients[name]
        assert (actual is None) == (expected is None), f"{name}: a gradient appeared or vanished"
        if expected is not None:
            torch.testing.assert_close(actual, expected, **GRADIENTS, msg=lambda m, n=name: f"{n}: {m}")
    without = _graphs(lambda c: step(c(model)), lookup_backend("eager"), None)
    if (
        count.compiled != without
    ):  # torch 2.11: AOTAutograd itself fails on grouped_mm_fallback, and Dynamo breaks there
        without = _graphs(lambda c: step(c(model)), lookup_backend("aot_eager"), None)
    assert count.compiled == without
