"""Derived weights beside the program: one copy for all variants, let go with its originals, static for CUDA graphs."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from derived_net import SCALE, Net, assert_fresh, compiled, derived_tensors, in_place, reference
from families import make
from torch import nn

from effpass.backend import reports
from effpass.core.derived_arguments import DerivedArguments
from effpass.core.live_weights import Entry

pytestmark = pytest.mark.usefixtures("no_derived_weights")


# -- one copy -------------------------------------------------------------------------------------------------------


def test_five_variants_hold_one_copy():
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.k_proj = nn.Linear(8, 8)

        def forward(self, x):
            return super().forward(self.k_proj(x))

    net = Two().requires_grad_(False)
    run = compiled(net, {"scale": {"only": "_proj"}})

    def check(x):
        hidden = nn.functional.linear(x, 2 * net.k_proj.weight, net.k_proj.bias)
        torch.testing.assert_close(run(x), reference(net, hidden))

    def all_variants():
        for length in (5, 7, 9):  # static, then dynamic
            check(torch.randn(length, 8))
        check(torch.randn(1, 8))
        with torch.no_grad():
            check(torch.randn(5, 8))
        with torch.inference_mode():
            check(torch.randn(5, 8))

    all_variants()
    assert len(reports) == 5
    assert len(Entry.live) == 2
    assert sum(t.nbytes for t in derived_tensors()) == 2 * 8 * 8 * 4
    assert [r.passes[0].derived_bytes for r in reports] == [2 * 8 * 8 * 4] * 5
    assert len({t.data_ptr() for t in derived_tensors()}) == 2
    in_place(net)
    all_variants()
    assert len(reports) == 5


def test_tied_weights_change_per_use():
    """The head reads 2 W, the embedding W: logits are exactly doubled, and nothing else."""
    model = make("llama", tie_word_embeddings=True).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(12).view(2, 6)
    run = compiled(model, {"scale": {"only": "lm_head"}})
    with torch.no_grad():
        assert torch.equal(run(input_ids=ids, use_cache=False).logits, 2 * model(input_ids=ids, use_cache=False).logits)
        model.lm_head.weight.add_(0.1)
        torch.testing.assert_close(
            run(input_ids=ids, use_cache=False).logits, 2 * model(input_ids=ids, use_cache=False).logits
        )
    assert [r.hits for r in reports] == [1]


def test_two_instances_share_code_and_keep_their_weights():
    nets, x = [Net().requires_grad_(False) for _ in range(2)], torch.randn(3, 8)
    runs = [compiled(net) for net in nets]
    for _ in range(2):
        for net, run in zip(nets, runs, strict=True):
            assert_fresh(run, net, x)
        in_place(nets[1])
    assert len(reports) == 1
    assert len(Entry.live) == 2


def test_layers_compiled_apart_share_one_graph():
    layers, x = nn.ModuleList(Net() for _ in range(4)).requires_grad_(False), torch.randn(3, 8)
    for layer in layers:
        layer.compile(backend="effpass", options={"passes": [SCALE], "inner": "aot_eager"})
    for _ in range(3):
        for layer in layers:
            assert_fresh(layer, layer, x)
    assert len(reports) == 1
    assert len(Entry.live) == 4


def test_layers_in_turn_stay_on_the_fast_path(monkeypatch):
    layers, x = [Net().requires_grad_(False) for _ in range(3)], torch.randn(3, 8)
    runs = [compiled(layer) for layer in layers]
    for _ in range(2):
        for run in runs:
            run(x)
    for run in runs:
        run(x)
    slow = []
    renew = DerivedArguments._renew
    monkeypatch.setattr(DerivedArguments, "_renew", lambda self, originals: slow.append(1) or renew(self, originals))
    for _ in range(3):
        for run in runs:
            run(x)
    assert not slow
    in_place(layers[1])
    runs[1](x)
    assert slow == [1]


# -- what is let go -------------------------------------------------------------------------------------------------


def test_replaced_parameters_are_let_go():
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    run = compiled(net)
    run(x)
    replaced = []
    for _ in range(5):
        replaced.append(weakref.ref(net.q_proj.weight))
        net.q_proj.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        assert_fresh(run, net, x)
    assert [r() for r in replaced] == [None] * 5
    assert len(Entry.live) == 1
    assert len(reports) == 1


def test_weights_of_a_dropped_model_go_at_the_next_collection():
    """Its compiled code lives on with its sibling, and must not keep its weights."""
    nets, x = [Net().requires_grad_(False) for _ in range(2)], torch.randn(3, 8)
    runs = [compiled(net) for net in nets]
    for run in runs:
        run(x)
    dropped = [weakref.ref(p) for p in nets[1].parameters()]
    buffers = [weakref.ref(t) for t in derived_tensors()]
    del nets[1], runs[1], run
    gc.collect()
    assert [r() for r in dropped] == [None] * 4
    assert sum(r() is not None for r in buffers) == 1
    assert_fresh(runs[0], nets[0], x)


def test_swap_tensors_works_after_a_compiled_call():
    """It refuses tensors that somebody refers to weakly."""
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    compiled(net)(x)
    other = nn.Parameter(torch.zeros(8, 8), requires_grad=False)
    torch.utils.swap_tensors(net.q_proj.weight, other)
    assert torch.equal(net.q_proj.weight, torch.zeros(8, 8))


# -- threads --------------------------------------------------------------------------------------------------------


def test_two_threads_at_once():
    """After a write no thread may run on the old value, although only one of them recomputes it."""
    net, x = Net(64).requires_grad_(False), torch.randn(3, 64)
    run = compiled(net)
    run(x)
    rounds, wrong = 40, []
    gate = threading.Barrier(3)

    def work():
        for _ in range(rounds):
            gate.wait()
            got = run(x)
            if not torch.allclose(got, expected[0], atol=1e-5):
                wrong.append(got)
            gate.wait()

    expected = [None]
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(rounds):
        net.q_proj.weight.fill_(0.01 * (i + 1))
        expected[0] = reference(net, x)
        gate.wait()
        gate.wait()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(reports) == 1


# -- CUDA graphs, as far as the CPU shows ---------------------------------------------------------------------------


@pytest.fixture
def static_inputs(monkeypatch):
    """Records what Inductor is told: (number of inputs, static input indices, sizes of the last input) per graph."""
    import torch._inductor.compile_fx as inductor
    from functorch.compile import make_boxed_func

    recorded = []
    original = inductor.compile_fx

    def pretend(gm, inputs, **kwargs):
        last = gm.graph.find_nodes(op="placeholder")[-1]
        recorded.append((len(inputs), list(kwargs["static_input_idxs"]), tuple(last.meta["val"].shape)))
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(
        inductor, "compile_fx", lambda gm, inputs, **kwargs: original(gm, inputs, inner_compile=pretend, **kwargs)
    )
    return recorded


def test_derived_weights_are_static_inputs(static_inputs):
    net, x = Net().requires_grad_(False), torch.randn(3, 8)

    def record(backend, **options):
        torch._dynamo.reset()
        static_inputs.clear()
        run = torch.compile(net, backend=backend, dynamic=True, options=options or None)
        got = run(x)
        (graph,) = static_inputs[-1:]
        return got, graph

    _, plain = record("inductor")
    assert len(plain[1]) == 4, "the four weights of the net"
    assert record("effpass", passes=[{"scale": {"only": "nothing"}}])[1] == plain
    assert record("effpass", passes=["touch"])[1] == plain
    got, (count, static, sizes) = record("effpass", passes=[SCALE])
    assert (count, static) == (plain[0] + 1, [*plain[1], plain[0]]), "and the derived weight, appended"
    assert sizes == (8, 8), "its sizes are numbers, not symbols"
    assert all(type(size) is int for size in sizes)
    torch.testing.assert_close(got, reference(net, x))
