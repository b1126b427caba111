"""The cache behind derived weights, without a compiler: what makes it recompute, what it holds, what it lets go."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from effpass.core import live_weights
from effpass.core.checksum import checksum, digest
from effpass.core.derived_arguments import DerivedArguments, Spec, derived_bytes
from effpass.core.errors import ArtifactError
from effpass.core.live_weights import Entry, Slot, refresh, slots_of


@pytest.fixture(autouse=True)
def _nothing_left():
    if Entry.live:
        gc.collect()
    assert not Entry.live


def parameters(count: int, shape: tuple[int, ...] = (2, 3)) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape), requires_grad=False) for _ in range(count)]


class Computed:
    """``2 w``, and how often it was asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 2 * w


def doubled(weights: list[nn.Parameter], positions: list[int], compute: Computed, **keywords) -> DerivedArguments:
    pairs = enumerate(zip(positions, weights, strict=True))
    specs = [Spec(f"double:{i}", [p], [w], compute, None) for i, (p, w) in pairs]
    return DerivedArguments(lambda *args: args, specs, **keywords)


# -- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [[0], [3], [1, 4], [4, 1], [0, 2, 3]])
def test_derived_arguments_are_appended_in_order(positions):
    weights, compute = parameters(len(positions)), Computed()
    arguments: list[object] = ["x"] * 5
    for position, weight in zip(positions, weights, strict=True):
        arguments[position] = weight
    run = doubled(weights, positions, compute)
    out = run(*arguments)
    assert out[:5] == tuple(arguments)
    for value, weight in zip(out[5:], weights, strict=True):
        assert torch.equal(value, 2 * weight)
    run(*arguments)
    assert compute.calls == len(positions), "computed once, when the spec was made"


def test_a_slot_of_its_own_needs_no_weight():
    slot = Slot("key", {"a": torch.ones(2)})
    run = DerivedArguments(lambda *args: args, [(slot, "a")])
    assert torch.equal(run("x")[1], torch.ones(2))
    slot.swap({"a": torch.zeros(2)})
    assert torch.equal(run("x")[1], torch.zeros(2))


def test_nothing_changed_means_no_lock(monkeypatch):
    weights = parameters(3)
    run = doubled(weights, [0, 1, 2], Computed())
    for _ in range(2):
        values = run.values(tuple(weights))
    with live_weights.lock:  # a second look at anything would wait for ever
        assert run.values(tuple(weights)) is values


def test_specs_share_one_tensor_and_one_computation():
    (weight,), compute = parameters(1), Computed()
    first, second = (DerivedArguments(lambda *a: a, [Spec("double", [p], [weight], compute, None)]) for p in (0, 1))
    assert first(weight)[-1] is second("x", weight)[-1]
    assert compute.calls == 1
    weight.add_(1)
    assert torch.equal(second("x", weight)[-1], 2 * weight)
    assert torch.equal(first(weight)[-1], 2 * weight)
    assert compute.calls == 2


def test_several_originals():
    w, s = parameters(1)[0], nn.Parameter(torch.tensor(3.0))
    run = DerivedArguments(lambda *a: a, [Spec("scale", [1, 0], [w, s], lambda w, s: w * s, None)])
    assert torch.equal(run(s, w)[-1], 3 * w)
    with torch.no_grad():
        s.add_(1)
    assert torch.equal(run(s, w)[-1], 4 * w)
    assert not run(s, w)[-1].requires_grad


def test_bytes_by_pass():
    weight = parameters(1)[0]
    specs = [Spec(owner, [0], [weight], Computed(), None) for owner in ("a:1", "a:2", "b:1")]
    assert derived_bytes([*specs, (Slot("k", {}), "x")], "a") == 2 * 2 * 3 * 4


# -- changes --------------------------------------------------------------------------------------------------------


def test_an_address_that_comes_back_with_other_content():
    """The end of a storage is an event: same object, address and version tell nothing then."""
    memory = np.zeros(6, dtype=np.float32)
    (weight,) = parameters(1)
    weight.data = torch.from_numpy(memory).view(2, 3)
    run = doubled([weight], [0], Computed())
    for _ in range(2):
        run(weight)
    address, version = weight.data_ptr(), weight._version
    memory += 1
    weight.data = torch.from_numpy(memory).view(2, 3)
    assert (weight.data_ptr(), weight._version) == (address, version)
    assert torch.equal(run(weight)[-1], torch.full((2, 3), 2.0))


def test_another_parameter_around_the_same_memory():
    """Same address, and a version counter that starts anew."""
    first, old = parameters(2)
    run = doubled([first, old], [0, 1], Computed())
    for _ in range(2):
        run(first, old)
    version = old._version
    old.mul_(3)
    new = nn.Parameter(old.data, requires_grad=False)
    assert (new.data_ptr(), new._version) == (old.data_ptr(), version)
    assert torch.equal(run(first, new)[-1], 2 * new)


def test_an_inference_tensor_is_recomputed_at_every_call():
    (weight,), compute = parameters(1), Computed()
    run = doubled([weight], [0], compute)
    with torch.inference_mode():
        weight.data = torch.zeros(2, 3)
        for i in range(3):
            assert torch.equal(run(weight)[-1], torch.full((2, 3), 2.0 * i))
            weight.add_(1)
    assert compute.calls == 4


def test_computed_outside_of_inference_mode():
    (weight,) = parameters(1)
    with torch.inference_mode():
        run = doubled([weight], [0], Computed())
        weight.add_(1)
        assert not run(weight)[-1].is_inference()


def test_a_failed_computation_is_tried_again():
    (weight,) = parameters(1)
    fail = []

    def compute(w):
        if fail:
            raise RuntimeError("out of memory")
        return 2 * w

    run = DerivedArguments(lambda *a: a, [Spec("double", [0], [weight], compute, None)])
    run(weight)
    weight.add_(1)
    fail.append(1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            run(weight)
    fail.clear()
    assert torch.equal(run(weight)[-1], 2 * weight)


def test_an_optimizer_step_reaches_everything():
    weights, compute = parameters(2), Computed()
    run, other = doubled(weights, [0, 1], compute), nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    buffers = [t.data_ptr() for t in run(*weights)[2:]]
    torch.optim.SGD([other], 0.1).step()
    assert [t.data_ptr() for t in run(*weights)[2:]] == buffers
    assert compute.calls == 4


def test_refresh_counts_what_it_marks():
    module, others = nn.Linear(3, 2).requires_grad_(False), parameters(1)
    module.register_buffer("scale", torch.ones(2, 3))
    compute = Computed()
    run = doubled([module.weight, module.scale, others[0]], [0, 1, 2], compute)
    arguments = (module.weight, module.scale, others[0])
    run(*arguments)
    assert refresh(module) == 2
    run(*arguments)
    assert compute.calls == 5
    assert refresh() == 3
    run(*arguments)
    assert compute.calls == 8


def test_check_weights_speaks_once_per_write():
    (weight,), compute = parameters(1), Computed()
    run = doubled([weight], [0], compute, check_weights=True)
    run(weight)
    weight.data[1, 2] += 1e-7
    with pytest.warns(UserWarning, match="can't be seen") as caught:
        values = [run(weight)[-1] for _ in range(2)]
    assert len(caught) == 1
    assert all(torch.equal(v, 2 * weight) for v in values)
    assert compute.calls == 2


# -- slots ----------------------------------------------------------------------------------------------------------


def test_slots_are_shared_by_key_while_they_live():
    slot = Slot.shared("key", lambda: {"a": torch.ones(1)})
    assert Slot.shared("key", lambda: {"a": torch.zeros(1)}) is slot
    del slot
    assert torch.equal(Slot.shared("key", lambda: {"a": torch.zeros(1)}).tensors["a"], torch.zeros(1))


def test_slot_tensors_may_be_parameters():
    (weight,), d = parameters(1), nn.Parameter(torch.ones(2, 3))
    run = DerivedArguments(lambda *a: a, [Spec("add", [0], [weight], lambda w, d: w + d, Slot("key", {"d": d}))])
    assert not run(weight)[-1].requires_grad


def test_slots_of_a_model():
    module, slot = nn.Linear(3, 2).requires_grad_(False), Slot("key", {"d": torch.ones(2, 3)})
    other = nn.Linear(3, 2).requires_grad_(False)
    spec = Spec("add", [0], [module.weight], lambda w, d: w + d, slot)
    run = DerivedArguments(lambda *a: a, [spec])
    assert slots_of(module) == [slot]
    assert slots_of(other) == []
    slot.swap({"d": torch.zeros(2, 3)})
    assert torch.equal(run(module.weight)[-1], module.weight)
    with pytest.raises(ArtifactError, match=r"give a weight of \(5, 2, 3\), expected \(2, 3\)"):
        slot.swap({"d": torch.zeros(5, 2, 3)})
    assert torch.equal(run(module.weight)[-1], module.weight)


def test_a_swap_disturbs_a_pending_backward():
    """As any write to a weight does between forward and backward."""
    (weight,), slot = parameters(1), Slot("key", {"d": torch.ones(2, 3)})
    run = DerivedArguments(lambda *a: a[-1], [Spec("add", [0], [weight], lambda w, d: w + d, slot)])
    x = torch.ones(2, 3, requires_grad=True)
    out = x * run(weight)
    slot.swap({"d": torch.zeros(2, 3)})
    run(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -- what is held ---------------------------------------------------------------------------------------------------


def test_an_original_that_only_autograd_holds_is_kept_until_it_lets_go():
    weights = [nn.Parameter(torch.randn(2, 3))]
    run = doubled(weights, [0], Computed())
    run(weights[0])
    pending = (weights[0] * weights[0]).sum()
    weights.clear()
    gc.collect()
    assert len(Entry.live) == 1
    del pending
    gc.collect()
    assert not Entry.live
    assert run.specs, "the compiled function itself lives"


def test_a_set_of_originals_goes_when_one_of_them_does():
    weights = parameters(2)
    run = doubled(weights, [0, 1], Computed())
    run(*weights)
    kept, gone = weights[0], weakref.ref(weights[1])
    del weights
    gc.collect()
    assert gone() is None
    assert not Entry.live
    other = parameters(1)[0]
    assert torch.equal(run(kept, other)[-2], 2 * kept)
    assert torch.equal(run(kept, other)[-1], 2 * other)


def test_a_collection_during_a_computation_waits():
    """It starts at any allocation, so also where the lock is held by the same thread."""
    weights = parameters(1)
    run = doubled(weights, [0], Computed())
    weights.clear()
    with live_weights.lock:
        gc.collect()
    assert len(Entry.live) == 1
    gc.collect()
    assert not Entry.live
    assert run.specs


def test_the_wrapper_goes_with_its_compiled_function():
    weights = parameters(1)
    run = doubled(weights, [0], Computed())
    buffer = weakref.ref(run(weights[0])[-1])
    del run
    assert buffer() is None
    assert not Entry.live


# -- checksums ------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checksum_sees_every_element(dtype):
    bits = torch.randint(0, 256, (97 * 16,), dtype=torch.uint8)
    tensor = bits.clone().view(dtype)
    before = checksum(tensor)
    assert checksum(bits.clone().view(dtype)) == before
    for at in range(0, bits.numel(), 13):
        bits[at] ^= 1
        assert checksum(bits.view(dtype)) != before, f"bit 0 of byte {at}"
        bits[at] ^= 1
    assert checksum(bits.view(dtype)) == before


def test_a_checksum_sees_what_sums_do_not():
    x = torch.randn(64, 32)
    sums = [checksum(t) for t in (x, -x, x.flip(0), x.flip(1), x.roll(1, 0), x.T.contiguous(), x * 1.0000001)]
    assert len(set(sums)) == len(sums)
    swapped = x.clone()
    swapped[[3, 40]] = swapped[[40, 3]]
    assert checksum(swapped) != sums[0]
    assert checksum(x.T) == checksum(x.T.contiguous())


def test_a_checksum_of_not_a_number_is_one():
    x = torch.full((4,), torch.nan)
    assert checksum(x) == checksum(x.clone())
    assert checksum(torch.empty(0)) == 0
    assert checksum(torch.tensor(True)) != checksum(torch.tensor(False))


def test_a_checksum_over_several_chunks(monkeypatch):
    monkeypatch.setattr("effpass.core.checksum._CHUNK", 16)
    x = torch.randn(100)
    exchanged = torch.cat([x[16:32], x[:16], x[32:]])
    changed = x.clone()
    changed[99] += 1
    assert len({checksum(x), checksum(exchanged), checksum(changed)}) == 3


def test_a_digest_tells_name_shape_and_type():
    x = torch.zeros(4)
    digests = [digest(t) for t in ({"a": x}, {"b": x}, {"a": x.view(2, 2)}, {"a": x.int()}, {"a": x + 1}, {})]
    assert len(set(digests)) == 6
    assert digest({"a": x, "b": x + 1}) == digest({"b": x + 1, "a": x})
