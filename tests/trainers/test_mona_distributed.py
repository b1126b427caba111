"""Several gloo processes give what one process gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ranks import start_ranks

from effpass.trainers import MONA

WORKER = Path(__file__).with_name("mona_worker.py")
sys.path.insert(0, str(WORKER.parent))
import mona_worker  # noqa: E402

KINDS = {2: ("fsdp", "ddp", "checkpoint", "nan", "placed"), 4: ("fsdp", "ddp", "checkpoint", "nan", "hsdp", "placed")}

WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """world → kind → what rank 0 saved; all kinds of a world in one start of its processes."""
    found = {}

    def get(world: int, kind: str):
        if world not in found:
            folder = tmp_path_factory.mktemp(f"world{world}")
            launch(KINDS[world], world, folder)
            found[world] = {kind: torch.load(folder / f"{kind}.pt") for kind in KINDS[world]}
        return found[world][kind]

    return get


def launch(kinds: tuple[str, ...], world: int, folder: Path) -> None:
    """Run the worker in `world` processes."""
    returned, output = start_ranks([str(WORKER), ",".join(kinds), str(folder)], world)
    assert returned == [0] * world, output[-6000:]


def alone(make=mona_worker.optimizer) -> dict[str, torch.Tensor]:
    model = mona_worker.network()
    mona_worker.train(model, make(model), range(3))
    return mona_worker.weights(model)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # float64; sums of gradients are added in another order, and Newton-Schulz amplifies that by up to 1000.
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_processes_equal_one(kind, world, results):
    assert_same(results(world, kind), alone())


@pytest.mark.slow
def test_replicas_of_shards_equal_one_process(results):
    assert_same(results(4, "hsdp"), alone())


@pytest.mark.parametrize("world", WORLDS)
def test_any_placement_equals_one_process(world, results):
    expected = alone(lambda model: mona_worker.by_name(model.named_parameters()))
    assert_same(results(world, "placed"), expected)


def test_kernels_get_no_addresses_of_dtensors(monkeypatch):
    """Not even those of stacks that are sharded by whole experts, which no process has to exchange."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from effpass.trainers.mona import fused

    monkeypatch.setattr(fused, "supported", lambda *_: True)  # as on a GPU
    monkeypatch.setattr(fused, "Upload", lambda *_: lambda addresses: None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(distribute_tensor(torch.randn(4, 6, 5), mesh, [Shard(0)]))
        sharded.grad = distribute_tensor(torch.randn(4, 6, 5), mesh, [Shard(0)])
        plain = torch.nn.Parameter(torch.randn(4, 6, 5))
        plain.grad = torch.randn(4, 6, 5)
        optimizer = MONA([sharded, plain])
        plan, others = optimizer._plan(optimizer.param_groups[0], [sharded, plain])
    finally:
        dist.destroy_process_group()
    assert [member.parameter for member in plan.members] == [plain]
    assert others == [sharded]


@pytest.mark.parametrize("world", WORLDS)
def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_on_all(world, results):
    assert results(world, "nan") == {"skipped": True, "same": True}


@pytest.mark.parametrize("world", WORLDS)
def test_a_state_saved_by_several_processes_goes_on_in_one(world, results):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    saved = results(world, "checkpoint")
    model = mona_worker.network()
    optimizer = mona_worker.optimizer(model)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    mona_worker.train(model, optimizer, range(3, 5))
    assert_same(mona_worker.weights(model), saved["after"])
