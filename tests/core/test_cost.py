"""The cost model: FLOPs against PyTorch's counter, bytes by hand, symbols against sizes, and what passes save."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from families import make
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from effpass.core.cost import Cost, node_costs, total, uncounted, weight_nodes
from effpass.core.dynamo import program_from_dynamo
from effpass.core.exported import program_from_exported
from effpass.core.flops import evaluate, symbolic
from effpass.core.kernels import kernels
from effpass.core.manager import PassManager
from effpass.core.program import Program

aten = torch.ops.aten


def traced(model: nn.Module, *, dynamic: bool, batch: int = 2, tokens: int = 9) -> Program:
    """One forward of `model` through Dynamo."""
    programs: list[Program] = []

    def collect(gm: Any, inputs: Any) -> Any:
        programs.append(program_from_dynamo(gm, inputs))
        return gm.forward

    ids = torch.ones(batch, tokens, dtype=torch.long)
    if dynamic:
        torch._dynamo.mark_dynamic(ids, [0, 1])
    with torch.no_grad():
        torch.compile(model, backend=collect, dynamic=None if dynamic else False)(input_ids=ids, use_cache=False)
    (program,) = programs
    return program


@pytest.fixture(scope="module")
def any_size() -> Callable[[str], Program]:
    """The program of a family for any batch and length, traced once: costs are read from it."""
    return cache(lambda family: traced(make(family), dynamic=True))


def sizes_of(program: Program, batch: int, tokens: int) -> Mapping[Any, int]:
    """The symbols of `input_ids` and what they are to stand for."""
    (ids,) = (n for n in program.graph.find_nodes(op="placeholder") if n.name.endswith("input_ids_"))
    shape = ids.meta["val"].shape
    return {d.node.expr: size for d, size in zip(shape, (batch, tokens), strict=True)}


def exported(module: nn.Module, *inputs: torch.Tensor) -> Program:
    return program_from_exported(torch.export.export(module.eval(), inputs))


# -- FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "deepseek_v3"])
def test_flops_are_those_of_pytorch_s_counter_at_every_size(family, any_size):
    plain = make(family, **({"experts_implementation": "eager"} if family in ("mixtral", "deepseek_v3") else {}))
    program = any_size(family)
    cost = total(program, symbolic)
    assert not uncounted(program)
    for batch, tokens in ((2, 9), (3, 21)):
        # The counter knows neither the CPU's fused attention nor grouped products: it sees plain products instead.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            plain(input_ids=torch.ones(batch, tokens, dtype=torch.long), use_cache=False)
        assert evaluate(cost.flops, sizes_of(program, batch, tokens)) == counter.get_total_flops()


def test_a_size_without_a_value_is_an_error(any_size):
    with pytest.raises(KeyError):
        evaluate(total(any_size("llama"), symbolic).flops, {})


def test_einsum_and_convolution_count_every_product():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(3, 5, 4)

        def forward(self, x, y):
            return self.conv(x), torch.einsum("bij,bjk->bik", x, y)

    flops = {c.node.target: c.flops for c in node_costs(exported(Net(), torch.ones(2, 3, 8), torch.ones(2, 8, 7)))}
    assert flops[aten.conv1d.default] == 2 * 2 * 5 * 5 * 3 * 4  # two per multiply-add, [2, 5, 5] results of 3 x 4 each
    product = [f for t, f in flops.items() if t is not aten.conv1d.default and f]
    assert product == [2 * 2 * 3 * 8 * 7]


def test_an_operator_from_elsewhere_counts_when_it_registers_a_formula():
    @torch.library.custom_op("effpass_test_cost::mine", mutates_args=())
    def mine(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    @mine.register_fake
    def _(x):
        return torch.empty_like(x)

    class Net(nn.Module):
        def forward(self, x):
            return torch.ops.effpass_test_cost.mine(x)

    program = exported(Net(), torch.ones(4, 4))
    assert uncounted(program) == {"effpass_test_cost.mine.default"}
    assert total(program).flops == 0
    register_flop_formula(torch.ops.effpass_test_cost.mine)(lambda x, out_shape=None: 2 * x[0] ** 3)
    assert uncounted(program) == set()
    assert total(program).flops == 128


# -- bytes ------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A table, a product, a view, a broadcast, a softmax and a second product."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 8)
        self.up = nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.up(self.table(ids)).transpose(0, 1)
        return torch.softmax(F.relu(x) + mask.expand(3, 2, 16), -1) @ x.transpose(1, 2)


def test_bytes_by_hand():
    program = exported(Small(), torch.zeros(2, 3, dtype=torch.long), torch.ones(1, 2, 16))
    moved = {c.node.target: (sum(c.reads.values()), c.written) for c in node_costs(program) if c.kind != "free"}
    f, i = 4, 8
    assert moved == {
        aten.embedding.default: (6 * 8 * f + 6 * i, 6 * 8 * f),  # six rows, not the table
        aten.linear.default: ((6 * 8 + 8 * 16 + 16) * f, 6 * 16 * f),
        aten.relu.default: (6 * 16 * f, 6 * 16 * f),
        aten.add.Tensor: ((96 + 32) * f, 96 * f),  # the mask is read once, not for each of the three
        aten.softmax.int: (96 * f, 96 * f),
        aten.matmul.default: ((96 + 96) * f, 3 * 2 * 2 * f),
    }
    assert total(program) == Cost(2 * 6 * 8 * 16 + 2 * 96 * 2, (6 * 8 + 8 * 16 + 16) * f)


def test_kernels_by_hand():
    program = exported(Small(), torch.zeros(2, 3, dtype=torch.long), torch.ones(1, 2, 16))
    found = [(k.kind, len(k.nodes), k.weights, k.cache, k.read, k.written) for k in kernels(program)]
    f, i = 4, 8
    assert found == [
        ("fused", 1, 6 * 8 * f, 0, 6 * i, 6 * 8 * f),
        ("matmul", 1, (8 * 16 + 16) * f, 0, 6 * 8 * f, 96 * f),
        ("fused", 3, 0, 0, (96 + 32) * f, 96 * f),  # relu, add and softmax pass nothing through memory
        ("matmul", 1, 0, 0, 2 * 96 * f, 12 * f),
    ]


def test_a_cache_written_in_place_is_told_apart_and_only_its_new_rows_are_written():
    class Step(nn.Module):
        def forward(self, x, cache, at):
            cache.index_copy_(1, at, x)
            return torch.softmax(x @ cache.transpose(1, 2), -1)

    program = exported(Step(), torch.ones(2, 1, 8), torch.ones(2, 32, 8), torch.tensor([4]))
    found = [(k.kind, [str(n.target) for n in k.nodes], k.cache, k.read, k.written) for k in kernels(program)]
    assert found[0] == ("fused", ["aten.index_copy_.default"], 0, 2 * 8 * 4 + 8, 2 * 8 * 4)
    assert found[1][2:] == (2 * 32 * 8 * 4, 2 * 8 * 4, 2 * 32 * 4)


def test_cheap_values_are_computed_where_they_are_used():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            angles = torch.arange(8) * 0.5
            return self.second(self.first(x) * angles.cos()) * angles.sin()

    found = [[str(n.target) for n in k.nodes] for k in kernels(exported(Positions(), torch.ones(3, 8)))]
    assert found == [
        ["aten.linear.default"],
        ["aten.mul.Tensor"],
        ["aten.linear.default"],
        ["aten.mul.Tensor"],
    ]


def test_few_rows_read_few_experts(any_size):
    program = any_size("mixtral")
    experts = [k for k in kernels(program) if "grouped" in str(k.nodes[0].target)]
    assert len(experts) == 4  # two products a layer
    for kernel in experts:
        four, one = (evaluate(kernel.weights, sizes_of(program, 1, tokens)) for tokens in (16, 1))
        assert one == four // 2  # top 2 of 4 experts


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_the_quick_total_is_the_sum_over_the_nodes(family):
    program = traced(make(family, tie_word_embeddings=True), dynamic=False)
    costs = list(node_costs(program))
    weights = weight_nodes(program)
    read = sum(count for c in costs for base, count in c.reads.items() if base in weights)
    assert total(program) == Cost(sum(c.flops for c in costs), read)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_symbols_agree_with_static_sizes(family, any_size):
    dynamic = any_size(family)
    torch._dynamo.reset()
    static = traced(make(family), dynamic=False)
    values = sizes_of(dynamic, 2, 9)

    def sums(program: Program) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for kernel in kernels(program):
            flops, moved = found.get(kernel.kind, (0, 0))
            found[kernel.kind] = (flops + evaluate(kernel.flops, values), moved + evaluate(kernel.bytes, values))
        return found

    assert sums(dynamic) == sums(static)
    assert all(isinstance(k.flops, int) and isinstance(k.bytes, int) for k in kernels(static))


# -- what passes save -------------------------------------------------------------------------------------------------


def test_merging_an_adapter_saves_its_products_and_its_weights():
    from peft import LoraConfig, get_peft_model

    from effpass.passes.weights.merge_lora import MergeLora

    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    program = traced(model, dynamic=False)
    (entry,) = PassManager([MergeLora()]).run(program).passes
    sides = sum(sum(m.base_layer.weight.shape) for m in model.modules() if hasattr(m, "lora_A"))
    assert entry.hits == 14
    assert entry.weight_bytes == -4 * 4 * sides
    assert entry.flops == -2 * (2 * 9) * 4 * sides


def test_pruning_saves_in_proportion(tmp_path: Path):
    from effpass.passes.weights.keep_indices import make_keep_artifact
    from effpass.passes.weights.structured_pruning import StructuredPruning, StructuredPruningOptions

    model = make("llama")
    make_keep_artifact(model, tmp_path, ffn_channels=[list(range(40)), list(range(56, 96))])
    program = traced(model, dynamic=False)
    (entry,) = PassManager([StructuredPruning(StructuredPruningOptions(tmp_path))]).run(program).passes
    gone = 2 * 3 * 64 * (96 - 40)  # two layers, three matrices
    assert (entry.flops, entry.weight_bytes) == (-2 * 18 * gone, -4 * gone)


def test_a_pass_that_finds_nothing_is_not_counted(toy_passes, monkeypatch):
    from effpass.core import cost
    from effpass.passes.weights.merge_lora import MergeLora

    program = traced(make("llama"), dynamic=False)
    monkeypatch.setattr(cost, "total", lambda program: pytest.fail("counted"))
    (entry,) = PassManager([MergeLora()]).run(program).passes
    assert (entry.hits, entry.flops, entry.weight_bytes) == (0, None, None)


@pytest.mark.parametrize(
    ("module", "operator", "shapes", "rest"),
    [
        (
            "block_sparse_attention_causal", "block_sparse_causal_attention",
            lambda t: ((2, 4, t, 16), (2, 2, t, 16), (2, 2, t, 16)), (0.25, 0.12),
        ),
        (
            "routed_attention", "routed_attention",
            lambda t: ((t, 4, 16), (t, 2, 16), (t, 2, 16), (2,), (t, 2, 3)), (8,),
        ),
        (
            "two_level_attention", "two_level_attention",
            lambda t: (
                (2, 4, 1, 16), (2, 2, t, 16), (2, 2, t, 16), None, None, (2, t), (2, 1), (2,), (2, 8), (2, 2, 4, 32),
                None, (2, 2, t, 4), None, None, (2, 2, 3), (2, 2, 24), 0.25, 0.0,
            ),
            (16,),
        ),
    ],
)  # fmt: skip
def test_formulas_of_attention_take_a_dynamic_length(module, operator, shapes, rest):
    importlib.import_module(f"effpass.lowering.ops.{module}")
    formula = flop_registry[getattr(torch.ops.effpass, operator)]
    tokens = sympy.Symbol("tokens", integer=True, positive=True)
    for count in (7, 20, 333):
        assert evaluate(formula(*shapes(tokens), *rest), {tokens: count}) == formula(*shapes(count), *rest) > 0
