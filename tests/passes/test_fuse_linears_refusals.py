"""Where `fuse_linears` stays away, and the ways a program comes to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import make
from product_programs import WIDE, D, X, fused, program_of, reasons, weight

import effpass
from effpass.core.dynamo import program_from_dynamo
from effpass.core.errors import RecipeError
from effpass.core.exported import program_from_exported, to_exported
from effpass.core.manager import PassManager
from effpass.core.program import ROOT, Program
from effpass.lowering.ops import fused_linear as operators
from effpass.passes.graph.fuse_linears import FuseLinears


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(operators, "has_kernel", lambda device, dtype, rows: True)


# -- where it stays away ----------------------------------------------------------------------------------------------


def two(x, q, k):
    return F.linear(x, q), F.linear(x, k)


def refused(program: Program) -> list[str]:
    before = program.op_counts()
    entry = PassManager([FuseLinears()]).run(program).passes[0]
    assert entry.hits == 0
    assert program.op_counts() == before
    return reasons(entry)


def test_more_than_64_rows():
    weights = weight(WIDE, D), weight(8, D)
    assert fused(two, torch.randn(2, 32, D), *weights)[0].hits == 1
    assert refused(program_of(two, torch.randn(2, 33, D), *weights)) == ["66 rows, and the kernel is for up to 64"]


def test_a_dynamic_number_of_rows():
    program = program_of(two, X, weight(WIDE, D), weight(8, D), mode="symbolic")
    guards = len(program.fake_mode().shape_env.guards)
    (reason,) = refused(program)
    assert reason == "the number of rows is dynamic → compile the decode step with dynamic=False"
    assert len(program.fake_mode().shape_env.guards) == guards


def test_training():
    program = program_of(two, X, weight(WIDE, D).requires_grad_(), weight(8, D), grad=True)
    assert refused(program) == ["the program records gradients → run the model under torch.no_grad()"]


def test_no_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(operators, "has_kernel", lambda *of: asked.append(of))
    (reason,) = refused(program_of(two, X, weight(WIDE, D), weight(8, D)))
    assert reason == "no kernel for cpu: this fuses launches on a GPU → move the model to a GPU"
    assert asked == [(torch.device("cpu"), torch.float32, 6)]


@pytest.mark.parametrize("there", [True, False])
def test_without_a_gpu_a_compilation_that_names_no_pass_does_not_ask_it(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert FuseLinears().could_act(["model.layers.0.mlp.down_proj.weight"]) is there


def test_another_type():
    def mixed(x, w, r):
        return F.linear(x, w) + r

    program = program_of(mixed, X, weight(WIDE, D), torch.randn(2, 3, WIDE))
    program.graph.find_nodes(op="placeholder")[2].meta["val"] = program.fake_mode().from_tensor(
        torch.randn(2, 3, WIDE).bfloat16()
    )
    (reason,) = refused(program)
    assert reason == "r_1 is bfloat16 and x_1 is float32 → give the model one dtype"


def test_a_weight_of_a_class_of_its_own():
    """Quantized weights, distributed ones."""

    class Packed(torch.Tensor):
        pass

    program = program_of(two, X, weight(WIDE, D), weight(8, D))
    program.graph.find_nodes(op="placeholder")[2].meta["val"] = weight(8, D).as_subclass(Packed)
    assert refused(program) == ["k_1 is a Packed, which the kernel does not read"]


def test_a_write_between_the_products():
    def changing(x, q, k):
        y = F.linear(x, q)
        x[0].add_(1)
        return y, F.linear(x, k)

    (reason,) = refused(program_of(changing, X.clone(), weight(WIDE, D), weight(8, D)))
    assert reason == "x_1 is written between linear_1, which reads it, and linear"


def test_a_border_between_the_products():
    def guarded(x, q, k):
        with torch.no_grad():
            y = F.linear(x, q)
        return y, F.linear(x, k)

    program = program_of(guarded, X, weight(WIDE, D), weight(8, D), grad=True)
    program.grad_enabled = False
    (reason,) = refused(program)
    assert "a border of no_grad or autocast" in reason


def test_a_weight_that_is_computed():
    """Such as a router's, cast to float32."""

    def computed(x, q, k):
        return F.linear(x, q), F.linear(x, k * 2)

    assert refused(program_of(computed, X, weight(WIDE, D), weight(8, D))) == ["its weight is computed in the graph"]


def test_a_bias_that_is_computed_later():
    def late(x, q, k, b):
        return F.linear(x, q), F.linear(x, k, b * 2)

    (reason,) = refused(program_of(late, X, weight(WIDE, D), weight(8, D), torch.randn(8)))
    assert reason == "mul is computed after linear"


# -- ways through -----------------------------------------------------------------------------------------------------


def test_an_exported_program():
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    model = Logits(make("llama"))
    ids = torch.randint(3, 96, (2, 5))
    with torch.no_grad():
        program = program_from_exported(torch.export.export(model, (ids,)))
        report = PassManager([FuseLinears()]).run(program)
        assert report.hits == 9
        torch.testing.assert_close(to_exported(program).module()(ids), model(ids))


def test_it_has_no_options():
    with pytest.raises(RecipeError, match="fuse_linears"):
        effpass.Recipe.parse({"version": 1, "passes": [{"fuse_linears": {"rows": 8}}]})


def test_new_nodes_know_their_place():
    """Profilers and error messages name the module that a node came from."""
    paths = []

    def backend(gm, inputs):
        program = program_from_dynamo(gm, inputs)
        PassManager([FuseLinears()]).run(program)
        for node in program.graph.nodes:
            if str(node.target).startswith("effpass"):
                paths.append(ROOT.sub("", [path for path, _ in node.meta["nn_module_stack"].values()][-1]))
        return gm

    with torch.no_grad():
        torch.compile(make("llama", num_hidden_layers=1), backend=backend, dynamic=False)(
            torch.randint(3, 96, (1, 5)), use_cache=False
        )
    inside = ("self_attn.q_proj", "self_attn.o_proj", "mlp", "mlp.down_proj")
    assert paths == [*(f"model.layers.0.{name}" for name in inside), "lm_head"]
