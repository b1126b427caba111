"""Area `moe`, cases `eps-symmetric-…`: against PyTorch's all-to-all on symmetric memory, with sizes on the device.

A case of its own: where NVSHMEM does not come up it may take its process along.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.moe_ranks import AREA, RUNS, Layer, load, make, over_ranks, seconds, start
from benchmarks.rows import Row, row
from effpass.lowering.ops.moe_ffn_cost import Shape

_ALIGN = 16  # rows at which the rows of each expert begin
_MOST = 16  # experts per rank that PyTorch 2.11's operator takes


class Symmetric:
    """One layer whose pairs travel by `symm_mem.all_to_all_vdev_2d`, and its experts by `torch._grouped_mm`.

    Nothing waits for the host; buffers are as large as the fullest rank needs, which a user would have to guess.
    """

    def __init__(self, layer: Layer) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.layer, ranks, device = layer, layer.ranks, layer.x.device
        most = int(layer.counts[:, 2].sum((0, 2)).max()) + _ALIGN * layer.down.shape[0]
        rows, width, every = layer.ids.numel(), layer.shape.width, layer.shape.experts

        def empty(*size: int, dtype: torch.dtype = layer.x.dtype) -> Tensor:
            made = symmetric.empty(*size, dtype=dtype, device=device)
            symmetric.rendezvous(made, group=ranks.group)
            return made

        largest = torch.tensor(rows, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=ranks.group)
        self.sent, self.back = empty(int(largest), width), empty(int(largest), width)
        self.got, self.done = empty(most, width), empty(most, width)
        self.splits = empty(every, dtype=torch.int64)
        self.arrived, self.returned = (empty(2, every, dtype=torch.int64) for _ in range(2))

    def __call__(self) -> Tensor:
        """[T, D]."""
        layer, group = self.layer, self.layer.ranks.name
        flat, each = layer.ids.reshape(-1), layer.shape.each
        order = flat.argsort(stable=True)
        self.splits.zero_().scatter_add_(0, flat, torch.ones_like(flat))
        torch.index_select(layer.x, 0, order // each, out=self.sent[: order.numel()])
        torch.ops.symm_mem.all_to_all_vdev_2d(self.sent, self.got, self.splits, self.arrived, group, major_align=_ALIGN)
        sizes, offsets = self.arrived.view(2, layer.down.shape[0], -1)
        ends = torch.cat((offsets[1:, 0], offsets[-1:, -1] + sizes[-1:, -1])).int()
        projected = torch._grouped_mm(self.got, layer.gate_up.transpose(1, 2), offs=ends)
        gate, up = projected.chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up
        self.done.copy_(torch._grouped_mm(hidden, layer.down.transpose(1, 2), offs=ends))
        torch.ops.symm_mem.all_to_all_vdev_2d_offset(self.done, self.back, self.arrived, self.returned, group)
        restored = torch.empty_like(self.back[: order.numel()])
        restored[order] = self.back[: order.numel()]
        return (restored.view(*layer.ids.shape, -1) * layer.weights.unsqueeze(-1)).sum(1).to(layer.x.dtype)


def cells(name: str, shape: Shape, device: str, smoke: bool) -> Iterator[Row]:
    """A load or two of one layer."""
    ranks = start(device)
    if ranks is None or device != "cuda":
        return
    import torch.distributed._symmetric_memory as symmetric

    if not symmetric.is_nvshmem_available():
        print("skipped: this PyTorch has no NVSHMEM")
        return
    if shape.experts > _MOST * ranks.size:
        print(f"skipped: {shape.experts // ranks.size} experts per rank, and PyTorch's operator takes {_MOST}")
        return
    symmetric.set_backend("NVSHMEM")
    layer = make(shape, ranks, device, torch.bfloat16)
    for tokens in (1024, 4096):
        with torch.inference_mode():
            loaded = load(layer, tokens, False, device)
            peer = Symmetric(loaded)
            expected = loaded.ours().float()
            difference = float((peer().float() - expected).abs().max() / expected.abs().max())
            worst = over_ranks(difference, ranks, device, dist.ReduceOp.MAX)
            ours, theirs = (seconds(call, ranks, device) for call in (loaded.ours, peer))
        if ranks.me == 0:
            yield row(
                AREA, f"{name} on {ranks.size} ranks, {tokens} tokens each, even", "layer of experts", ours * 1e6, "us",
                device=device, peer=theirs * 1e6, peer_name="DP + EP, symmetric-memory all-to-all, grouped_mm",
                runs=RUNS, note=f"outputs differ by {worst:.1e}; the peer waits for no host",
            )  # fmt: skip
