"""Pools of blocks against brute force: dictionaries, one head and one block at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_cases import error, rms_norm, rotate
from torch import Tensor

from effpass.lowering.ops.block_pool import BlockPool


@dataclass
class Head:
    """One head's pages by brute force."""

    blocks: int
    block: int
    copies: int
    owner: list[int]
    age: list[int]
    clock: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * 5)

    def page_of(self, n: int) -> int:
        return self.owner.index(n) if n in self.owner else -1

    def step(self, slots: list[list[int]], end: int) -> list[tuple[int, int]]:
        """Blocks and pages of the copies; `slots` are those of each entry of the list of what was chosen."""
        self.clock += 1
        after = end // self.block
        tokens = [s for entry in slots for s in entry]
        read = sorted({s // self.block for s in tokens})
        missing = [n for n in read if n not in self.owner]
        found = (len(read), len(missing), len(tokens), sum(s // self.block in missing for s in tokens))
        for page, n in enumerate(self.owner):
            if n in read or (n == after and after < self.blocks):
                self.age[page] = self.clock
        copied = [n for n in missing if n != after][: self.copies]
        if after < self.blocks and after not in self.owner:
            copied.append(after)
        free = sorted((p for p in range(len(self.owner)) if self.age[p] != self.clock), key=lambda p: (self.age[p], p))
        moves = list(zip(copied, sorted(free[: len(copied)]), strict=True))
        for n, page in moves:
            self.owner[page], self.age[page] = n, self.clock
        self.counts = [a + b for a, b in zip(self.counts, (*found, len(moves)), strict=True)]
        return moves


def pool_errors(
    ops: Any, batch: int, groups: int, blocks: int, block: int, key_size: int, value_size: int, slots: int, most: int,
    copies: int, entry: int, begin: int, steps: int, **of: Any,
) -> dict[str, float]:  # fmt: skip
    """Steps of one pool: how many numbers of its state are not those of brute force, and how many bytes."""
    generator = torch.Generator().manual_seed(blocks + key_size)
    device, width = of["device"], key_size + value_size
    host = torch.randn(batch, groups, blocks, block, width, generator=generator).to(**of)
    content = host.cpu().clone()
    pool = BlockPool.empty(host, slots, most, copies)
    of_head = pool.owner.shape[2]
    heads = [Head(blocks, block, copies, [-1] * of_head, [-1] * of_head) for _ in range(batch * groups)]
    found = {"table": 0, "pages": 0, "moves": 0, "counts": 0, "bytes": 0}

    def number(value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int32, device=device)

    def draw(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    for end in range(begin + 1, begin + steps + 1):
        new = torch.randn(batch, groups, 1, width, generator=generator)
        slot = end - 1
        if slot < blocks * block:
            content[:, :, slot // block, slot % block] = new[:, :, 0].to(content.dtype)
        key, value = new.to(**of).split([key_size, value_size], -1)
        ops.page_write(key, value, number(slot), host, pool.pages, pool.block_table)
        filled = min(end, blocks * block)
        chosen = torch.full((batch, groups, 5 if entry > 1 else 40), -1, dtype=torch.int32)
        expected = []
        for h, head in enumerate(heads):
            some = sorted({min(n, (filled - 1) // block) for n in draw(blocks, 1 + draw(most, 1)[0])})
            if entry == 1:
                entries = sorted({min(n * block + i, filled - 1) for n in some for i in draw(block, 40 // most)})
            else:
                entries = some
            if draw(8, 1) == [0]:
                entries = []  # a row of padding
            chosen[h // groups, h % groups, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
            of_entries = [list(range(e * entry, min((e + 1) * entry, filled))) for e in entries]
            expected.append(head.step(of_entries, filled))
        state = (pool.block_table, pool.owner, pool.age, pool.clock, pool.moves, pool.moved, pool.counts)
        ops.fetch_blocks(chosen.to(device), number(filled), host, pool.pages, *state, entry)
        if host.is_cuda:
            torch.cuda.synchronize()
        found["bytes"] += int((host.cpu() != content).sum())
        for h, head in enumerate(heads):
            b, g = divmod(h, groups)
            table = [-1 if (p := head.page_of(n)) < 0 else h * of_head + p for n in range(blocks)]
            found["table"] += pool.block_table[b, g].tolist() != table
            found["pages"] += (pool.owner[b, g].tolist(), pool.age[b, g].tolist()) != (head.owner, head.age)
            moves = [(n, h * of_head + p) for n, p in expected[h]]
            found["moves"] += [tuple(m) for m in pool.moves[b, g, : int(pool.moved[b, g])].tolist()] != moves
            found["counts"] += pool.counts[b, g].tolist() != head.counts or int(pool.clock[b, g]) != head.clock
            for n, page in ((n, p) for n, p in enumerate(table) if p >= 0):
                found["bytes"] += int((pool.pages[page].cpu() != content[b, g, n]).sum())
        if draw(4, 1) == [0]:  # a prompt that goes on, or somebody else evicts
            first = draw(blocks, 1)[0]
            pool.forget(first)
            for head in heads:
                for page, n in enumerate(head.owner):
                    if n >= first:
                        head.owner[page] = head.age[page] = -1
    return {name: float(value) for name, value in found.items()}


#: batch, groups, blocks, block, key size, value size, slots, most, copies, entry, begin, steps
POOLS = {
    "pool: tokens": (2, 3, 20, 16, 8, 8, 9, 5, 5, 1, 60, 16),
    "pool: blocks, few copies": (1, 2, 12, 16, 8, 24, 6, 5, 2, 16, 100, 20),
    "pool: as many pages as blocks, to the end of the cache": (1, 1, 6, 16, 16, 0, 40, 5, 5, 1, 70, 30),
    "pool: more heads than programs that copy": (5, 6, 6, 16, 4, 4, 5, 4, 4, 1, 30, 3),
    "pool: nothing is copied ahead": (1, 2, 10, 16, 20, 12, 7, 4, 0, 1, 30, 16),
}  # fmt: skip


def turned_errors(
    kernels: Any, batch: int, heads: int, groups: int, key_size: int, value_size: int, rotated: int, norm: bool,
    **of: Any,
) -> dict[str, float]:  # fmt: skip
    """Errors of `rope_page_write`, in a block with a page, in one without, and behind the last."""
    torch.manual_seed(heads + key_size)
    host = torch.randn(batch, groups, 5, 16, key_size + value_size, **of)
    pool = BlockPool.empty(host, 4, 3, 3)
    pool.pages.normal_()
    pool.block_table[:, :, 2] = 1 + 4 * torch.arange(batch * groups, device=of["device"]).view(batch, groups)
    query_norm, key_norm = (torch.randn(key_size, **of), torch.randn(key_size, **of)) if norm else (None, None)
    found = {"query": 0.0, "host": 0.0, "pages": 0.0}
    for slot in (37, 50, 80):
        projected = torch.randn(batch, 1, heads * key_size + groups * (key_size + value_size), **of)
        query, key, value = projected.split([heads * key_size, groups * key_size, groups * value_size], -1)
        query, key = query.view(batch, 1, heads, key_size), key.view(batch, 1, groups, key_size)
        value = value.view(batch, 1, groups, value_size)
        angles = torch.rand(1, 1, rotated // 2, **of) * 6
        cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
        turned = [rotate(rms_norm(x, w, 1e-6, 1.0) if norm else x, cos, sin).transpose(1, 2)
                  for x, w in ((query, query_norm), (key, key_norm))]  # fmt: skip
        expected_host, expected_pages = host.double(), pool.pages.double()
        row = torch.cat((turned[1], value.double().transpose(1, 2)), -1)[:, :, 0]
        if slot < 80:
            expected_host[:, :, slot // 16, slot % 16] = row
        if slot // 16 == 2:
            expected_pages[pool.block_table[:, :, 2].flatten().long(), slot % 16] = row.flatten(0, 1)
        at = torch.tensor([slot], dtype=torch.int32, device=of["device"])
        got = kernels.rope_page_write(
            query, key, value, cos, sin, query_norm, key_norm, 1e-6, 1.0, at, host, pool.pages, pool.block_table
        )  # fmt: skip
        pairs = {"query": (got, turned[0]), "host": (host, expected_host), "pages": (pool.pages, expected_pages)}
        found = {name: max(found[name], error(*pair)) for name, pair in pairs.items()}
    return found


#: batch, heads, groups, key size, value size, rotated, norm
TURNED = {"norms": (2, 4, 2, 32, 32, 32, True), "a part is rotated": (1, 3, 1, 24, 16, 16, False)}
