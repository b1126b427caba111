"""A net with one derived weight, for tests of derived weights under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from effpass.core.live_weights import Entry

SCALE = {"scale": {"factor": 2.0}}


class Net(nn.Module):
    """``up(relu(q_proj(x)))``: the toy pass derives 2 W from q_proj's W."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(size, size)
        self.up = nn.Linear(size, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(torch.relu(self.q_proj(x)))


def reference(net: Net, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.relu(nn.functional.linear(x, 2 * net.q_proj.weight, net.q_proj.bias))
    return nn.functional.linear(hidden, net.up.weight, net.up.bias)


def compiled(module: Callable[..., torch.Tensor], *passes: object, **options: object) -> Callable[..., torch.Tensor]:
    return torch.compile(
        module, backend="effpass", options={"passes": list(passes) or [SCALE], "inner": "aot_eager", **options}
    )


def assert_fresh(run: Callable[..., torch.Tensor], net: Net, x: torch.Tensor) -> None:
    torch.testing.assert_close(run(x), reference(net, x), rtol=0, atol=1e-6 if x.dtype == torch.float32 else 1e-12)


def derived_tensors() -> list[torch.Tensor]:
    return [entry.value for entry in Entry.live.values()]


def in_place(net: Net) -> None:
    with torch.no_grad():
        net.q_proj.weight.mul_(3)
