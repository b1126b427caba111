"""The kernels under Triton's interpreter, in float32 on a CPU; test_mona_kernels runs this in a process of its own."""

from __future__ import annotations

import torch
from triton_interpreter import set_up

from effpass.lowering.kernels import mona, newton_schulz
from effpass.lowering.ops.symmetric_product import reference
from effpass.trainers.mona.update import advance, augment_exact

# Wide and square tiles, written in quarters and in halves, in two loops and in one.
TILINGS = [
    newton_schulz.Tiling(height=16, width=64, depth=16),
    newton_schulz.Tiling(height=16, width=64, depth=16, parts=2, flat=True),
    newton_schulz.Tiling(height=32, width=32, depth=32, flat=True, programs=3),
]


def symmetric_products() -> None:
    # Sizes below, at and beside whole tiles of 16 × 64, one and several columns of tiles.
    for m, k, tall in ((40, 24, False), (40, 72, True), (16, 16, False), (136, 40, False), (152, 16, True)):
        x = torch.randn(2, *((k, m) if tall else (m, k)))
        d = torch.randn(2, m, m)
        d = d + d.mT
        arguments = (x, x, d, 0.7, 0.3, 2.0)
        for tiling in TILINGS:
            found = newton_schulz.launch(*arguments, tall, torch.float32, tiling)
            torch.testing.assert_close(found, reference(*arguments, tall, torch.float32), rtol=1e-5, atol=1e-4)
        plain = (x, x, None, 1.0, 0.0, 0.0)
        found = newton_schulz.launch(*plain, tall, torch.float32, TILINGS[0])
        torch.testing.assert_close(found, reference(*plain, tall, torch.float32), rtol=1e-5, atol=1e-4)


def element_wise() -> None:
    shape, count = (12, 16), 3
    grads, momenta, averages, weights = ([torch.randn(shape) for _ in range(count)] for _ in range(4))
    table = torch.tensor([[t.data_ptr() for t in row] for row in (grads, momenta, averages, weights)])
    for nesterov in (False, True):
        expected_m, expected_a = [t.clone() for t in momenta], [t.clone() for t in averages]
        augmented = augment_exact(grads, expected_a, alpha=-5.0, beta_a=0.9)
        expected = torch.stack(advance(augmented, expected_m, momentum=0.95, nesterov=nesterov))
        out = torch.empty(count, *shape)
        for flag in (False, True):  # nothing is written before all is finite
            before = [t.clone() for t in (*momenta, *averages)]
            norms = mona.advance(
                table, out, torch.float32, torch.float32, torch.float32, momentum=0.95, beta=0.9, gain=-0.5,
                nesterov=nesterov, finite=torch.tensor(flag), block=64,
            )  # fmt: skip
            assert flag or all(torch.equal(a, b) for a, b in zip(before, (*momenta, *averages), strict=True))
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(norms, expected.square().sum((1, 2)))
        for found, wanted in zip((*momenta, *averages), (*expected_m, *expected_a), strict=True):
            torch.testing.assert_close(found, wanted)
    mona.normalize(out, norms, scaled := torch.empty_like(out), 1e-7, block=64)
    torch.testing.assert_close(scaled, out / torch.linalg.matrix_norm(out)[:, None, None])
    mona.normalize(torch.zeros_like(out), torch.zeros(count), scaled, 1e-7, block=64)
    assert not scaled.any()
    for cautious in (False, True):
        before = [t.clone() for t in weights]
        mona.apply(
            table, out, torch.float32, torch.tensor(0.1), scale=0.5, weight_decay=0.2, cautious=cautious, block=64
        )
        for old, new, update in zip(before, weights, out, strict=True):
            decay = 0.02 * old * ((old * update > 0) if cautious else 1)
            torch.testing.assert_close(new, old - decay - 0.05 * update)


def finite() -> None:
    grads = [torch.randn(12, 16) for _ in range(3)]
    table = torch.tensor([[t.data_ptr() for t in grads]] * 4)
    for value, expected in ((1.0, True), (float("inf"), False), (float("nan"), False)):
        grads[2][11, 15] = value
        flag = torch.ones((), dtype=torch.bool)
        mona.finite(table, torch.float32, 192, flag, block=64)
        assert bool(flag) == expected


if __name__ == "__main__":
    set_up()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    symmetric_products()
    element_wise()
    finite()
    print("all equal")
