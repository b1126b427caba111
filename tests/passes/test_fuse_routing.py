"""`fuse_routing` on decode steps of families with experts, and on routers of a few lines that it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from decode_step import decode, enliven
from families import COMMON, CONFIGS, batch, make
from moe_families import LAYERS, MORE, OTHERS
from torch import Tensor
from torch.fx import GraphModule

import effpass.lowering.ops.moe_router
from benchmarks.shapes import SHAPES
from effpass.backend import reports
from effpass.core.dynamo import program_from_dynamo
from effpass.core.manager import PassManager
from effpass.passes.graph.fuse_routing import FuseRouting
from effpass.passes.graph.moe_gemm import MoeGemm

GROUPED = {"experts_implementation": "grouped_mm"}
GLM: dict[str, Any] = {**CONFIGS["deepseek_v3"][2], "n_routed_experts": 8, "num_experts_per_tok": 3, "head_dim": 16}
# Beside those of `families`: GLM's, the groups of DeepSeek-V2, and a norm in Qwen3-MoE.
ROUTERS = {
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**GLM, "num_key_value_heads": 2}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", {**SHAPES["tiny-glm"][1], **GROUPED}),
    "deepseek_v2 groups": (*MORE["deepseek_v2"][:2], {**MORE["deepseek_v2"][2], "topk_method": "group_limited_greedy"}),
    "qwen3_moe norm": (*CONFIGS["qwen3_moe"][:2], {**CONFIGS["qwen3_moe"][2], "norm_topk_prob": True}),
}
# Layers with experts, and arguments of the operator: top_k, scoring_func, n_group, topk_group, norm_topk_prob, eps,
# scale and the dtype of the weights.
EXPECTED: dict[str, tuple[int, tuple[Any, ...]]] = {
    "mixtral": (2, (2, "softmax", 1, 1, True, 0.0, 1.0)),
    "qwen3_moe": (2, (2, "softmax", 1, 1, False, 0.0, 1.0)),
    "qwen3_moe norm": (2, (2, "softmax", 1, 1, True, 0.0, 1.0)),
    "olmoe": (2, (2, "softmax", 1, 1, False, 0.0, 1.0)),
    "gpt_oss": (2, (2, "softmax", 1, 1, True, 0.0, 1.0)),
    "deepseek_v2": (1, (2, "softmax", 1, 1, False, 0.0, 1.0)),
    "deepseek_v2 groups": (1, (2, "softmax", 2, 1, False, 0.0, 1.0)),
    "deepseek_v3": (1, (2, "sigmoid", 2, 1, True, 1e-20, 2.5)),
    "glm4_moe": (1, (3, "sigmoid", 2, 1, True, 1e-20, 1.0)),
    "glm4_moe_lite": (1, (2, "sigmoid", 1, 1, True, 1e-20, 1.8)),
}
LOGITS = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, family in {**MORE, **ROUTERS}.items():
        monkeypatch.setitem(CONFIGS, name, family)
    reports.clear()


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effpass.lowering.ops.moe_router, "has_kernel", lambda device, dtype, rows: True)


def compiled(function: Callable[..., Any], *passes: str, dynamic: bool | None = False) -> Callable[..., Any]:
    torch._dynamo.reset()
    options = {"passes": list(passes), "inner": "eager"}
    return torch.compile(function, backend="effpass", dynamic=dynamic, fullgraph=True, options=options)


class Both:
    """A backend that runs each graph with `moe_gemm`, and then with this pass behind it.

    Attributes:
        entry: report of this pass on the last graph.
        arguments: numbers of the operators that it inserted there.
        error: largest difference of the outputs, relative to the largest value.
    """

    def __init__(self) -> None:
        self.entry: Any = None
        self.arguments: list[tuple[Any, ...]] = []
        self.error = 0.0

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        program = program_from_dynamo(gm, inputs)
        PassManager([MoeGemm()]).run(program)
        before = GraphModule(program.gm, copy.deepcopy(program.graph))
        (self.entry,) = PassManager([FuseRouting()]).run(program).passes
        operators = program.graph.find_nodes(op="call_function", target=torch.ops.effpass.moe_router.default)
        self.arguments = [node.args[2:] for node in operators]

        def run(*arguments: Any) -> Any:
            expected, actual = before(*arguments), program.gm(*arguments)
            for one, other in zip(expected, actual, strict=True):
                difference = (one - other).float().abs().max() / one.float().abs().max()
                self.error = max(self.error, float(difference))
            return actual

        return run


# -- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("family", [family for family in EXPECTED if family != "gpt_oss"])
def test_a_decode_step(family: str) -> None:
    """The same logits as with the same passes but this one."""
    layers, arguments = EXPECTED[family]
    assert LAYERS.get(family, layers) == layers
    model, both = enliven(make(family)), Both()
    logits = decode(model, torch.compile(model, backend=both, dynamic=False, fullgraph=True), rows=2, steps=1)
    assert logits.std() > 0.3
    assert both.error <= 1e-5
    assert (both.entry.hits, both.entry.refusals) == (layers, [])
    assert both.arguments == [(*arguments, torch.float32)] * layers
    assert both.entry.ops["effpass.moe_router.default"] == layers
    assert all(count < 0 for op, count in both.entry.ops.items() if op not in ("effpass.moe_router.default", "getitem"))


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt_oss", torch.float32),  # the decode engine does not run it
        ("gpt_oss", torch.bfloat16),
        ("qwen3_moe norm", torch.bfloat16),
        ("deepseek_v3", torch.bfloat16),
    ],
)
def test_a_prompt(family: str, dtype: torch.dtype) -> None:
    """In bfloat16 the weights are rounded where transformers rounds them."""
    model, both = enliven(make(family, num_hidden_layers=2)).to(dtype), Both()
    layers, arguments = EXPECTED[family]
    with torch.no_grad():
        torch.compile(model, backend=both, dynamic=False, fullgraph=True)(**batch(9, padding=0), use_cache=False)
    assert both.entry.hits == layers
    assert both.arguments == [(*arguments, torch.float32 if family == "deepseek_v3" else dtype)] * layers
    assert both.error <= {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


OTHER_FORMS = {
    "Ernie4_5_Moe": "its weights are divided by something else than their sum",  # by that, clamped
    "Phimoe": "its experts are not those that a topk returns",
    "Lfm2Moe": "is bfloat16, and the operator computes in float32",
}


@pytest.mark.slow
@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("family", [family for family, (_, found) in OTHERS.items() if isinstance(found, int)])
def test_more_families_in_bfloat16(family: str) -> None:
    """All layers, or the reason."""
    sizes, layers = OTHERS[family]
    config = getattr(transformers, f"{family}Config", None)
    if config is None:
        pytest.skip(f"this transformers has no {family}")
    known = {key: value for key, value in {**COMMON, **sizes}.items() if value is not None}
    model, both = enliven(getattr(transformers, f"{family}ForCausalLM")(config(**known)).eval()).bfloat16(), Both()
    with torch.no_grad():
        torch.compile(model, backend=both, fullgraph=True)(**batch(9, padding=0), use_cache=False)
    assert both.error <= 2e-2
    if family in OTHER_FORMS:
        assert both.entry.hits == 0
        assert all(OTHER_FORMS[family] in refusal.reason for refusal in both.entry.refusals)
    else:
        assert (both.entry.hits, both.entry.refusals) == (layers, [])


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_dynamic_number_of_tokens(family: str) -> None:
    """One graph for all numbers; the scaling factor, which Dynamo then lifts to an input, is an argument."""
    model = enliven(make(family))
    run = compiled(model, "moe_gemm", "fuse_routing", dynamic=True)
    with torch.no_grad():
        for length in (9, 14):
            expected = model(**batch(length), use_cache=False).logits
            torch.testing.assert_close(run(**batch(length), use_cache=False).logits, expected, **LOGITS)
    (report,) = reports
    assert (report.passes[1].hits, report.passes[1].refusals) == (EXPECTED[family][0], [])


@pytest.mark.usefixtures("_kernels")
def test_logits_of_routers_that_are_returned_stay() -> None:
    model = enliven(make("qwen3_moe", output_router_logits=True))
    with torch.no_grad():
        expected = model(**batch(9), use_cache=False)
        actual = compiled(model, "moe_gemm", "fuse_routing")(**batch(9), use_cache=False)
    torch.testing.assert_close(actual.router_logits, expected.router_logits, **LOGITS)
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss, **LOGITS)
    assert reports[-1].passes[1].hits == 2


# -- one router, as a program of a few lines --------------------------------------------------------------------------

N, E, D, K, GROUPS = 6, 12, 8, 3, 4
OP = torch.ops.effpass.moe_ffn


def layer(x: Tensor, ids: Tensor, weights: Tensor, w: dict[str, Tensor]) -> Tensor:
    return OP(x, ids, weights, w["gate_up"], None, w["down"], None, "silu", 1.0, 0.0, 0.0, False, False)[0]


def inputs() -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (N, D), "router": (E, D), "gate_up": (E, 2 * D, D), "down": (E, D, D), "bias": (E,)}
    w = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return w.pop("x"), w


def softmaxed(
    x: Tensor, w: dict[str, Tensor], score: Any = lambda z: z.softmax(-1), topk: Any = lambda s: s.topk(K),
    norm: Any = lambda v: v / v.sum(-1, keepdim=True), finish: Any = lambda v: v,
) -> Any:  # fmt: skip
    values, ids = topk(score(F.linear(x, w["router"])))
    return layer(x, ids, finish(norm(values)), w)


def grouped(
    x: Tensor, w: dict[str, Tensor], fill: float = -torch.inf, best: int = 2, ones: float = 1.0, kept: int = 2,
    biased: Any = lambda s, b: s + b, eps: float = 1e-20, out_of_place: bool = False, summed: str = "topk", k: int = K,
) -> Tensor:  # fmt: skip
    scores = F.linear(x, w["router"]).sigmoid()
    chosen = biased(scores, w["bias"])
    by_group = chosen.view(-1, GROUPS, E // GROUPS)
    of_groups = by_group.topk(best, dim=-1)[0].sum(-1) if summed == "topk" else by_group.max(-1).values
    index = of_groups.topk(kept, dim=-1, sorted=False)[1]
    flags = torch.zeros_like(of_groups)
    flags = flags.scatter(1, index, ones) if out_of_place else flags.scatter_(1, index, ones)
    mask = flags.unsqueeze(-1).expand(-1, GROUPS, E // GROUPS).reshape(-1, E)
    ids = torch.topk(chosen.masked_fill(~mask.bool(), fill), k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return layer(x, ids, weights / (weights.sum(-1, keepdim=True) + eps) * 2.5, w)


def flagged_late(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The flags are copied before they are set: nothing is masked but everything."""
    scores = F.linear(x, w["router"]).sigmoid()
    of_groups = scores.view(-1, GROUPS, E // GROUPS).max(-1).values
    flags = torch.zeros_like(of_groups)
    mask = flags.unsqueeze(-1).expand(-1, GROUPS, E // GROUPS).reshape(-1, E)
    flags.scatter_(1, of_groups.topk(2)[1], 1)
    values, ids = scores.masked_fill(~mask.bool(), 0.0).topk(K)
    return layer(x, ids * 0, values, w) + values.sum() * 0 + layer(x, ids, values, w)


def divided_apart(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """What divides in place is not what the layer reads, although it is the same memory."""
    values, ids = F.linear(x, w["router"]).softmax(-1).topk(K)
    values.div_(values.sum(-1, keepdim=True))
    return layer(x, ids, values * 1.0, w)


def written_through_a_view(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    values, ids = F.linear(x, w["router"]).softmax(-1).topk(K)
    values[:, 0].mul_(0.5)
    return layer(x, ids, values, w)


def logits_written(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    logits = F.linear(x, w["router"])
    values, ids = logits.softmax(-1).topk(K)
    logits.mul_(0)
    return layer(x, ids, values * 2.0, w) + logits.sum()


def returned(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    scores = F.linear(x, w["router"]).softmax(-1)
    values, ids = scores.topk(K)
    return layer(x, ids, values, w), scores


def cast_like(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Of x, which other operators read too, the cast reads the dtype."""
    x, w = x.bfloat16(), {name: weight.bfloat16() for name, weight in w.items()}
    values, ids = F.linear(x, w["router"]).float().topk(K)
    return layer(x, ids, values.softmax(1).type_as(x), w)


def called(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    return lambda x, w: function(x, w, **how)


def normed(norm: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return called(softmaxed, norm=norm)


FORMS = {
    "softmax": called(softmaxed),
    "divided in place": normed(lambda v: v.div_(v.sum(-1, keepdim=True))),
    "eps, scaled in place": normed(lambda v: (v / (v.sum(-1, keepdim=True) + 1e-6)).mul_(3)),
    "softmax of the largest": called(softmaxed, score=lambda z: z, norm=lambda v: v.softmax(-1)),
    "sigmoid without a bias": called(softmaxed, score=torch.sigmoid),
    "cast like another tensor": cast_like,
    "logits in bfloat16": called(softmaxed, score=lambda z: z.bfloat16().softmax(-1, dtype=torch.float32)),
    "groups": called(grouped),
    "groups, out of place": called(grouped, out_of_place=True),
    "bias first": called(grouped, biased=lambda s, b: b + s),
    "all groups": called(grouped, kept=GROUPS, fill=0.0, best=1),
    "groups by their largest": called(grouped, biased=lambda s, b: s, summed="max", fill=0.0),
}  # fmt: skip


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("name", FORMS)
def test_what_is_a_router(name: str) -> None:
    x, w = inputs()
    with torch.no_grad():
        got = compiled(FORMS[name], "fuse_routing")(x, w)
        torch.testing.assert_close(got, FORMS[name](x, w), **LOGITS)
    (entry,) = reports[-1].passes
    assert (entry.hits, entry.refusals) == (1, [])
    left = {op for op, count in entry.ops.items() if count > 0}
    assert left <= {"effpass.moe_router.default", "getitem"}


REFUSED = {
    "logarithm": (called(softmaxed, score=lambda z: z.log_softmax(-1)), "neither a softmax nor a sigmoid"),
    "softmax over tokens": (called(softmaxed, score=lambda z: z.softmax(0)), "it is a softmax over dimension 0"),
    "scores in bfloat16": (called(softmaxed, score=lambda z: z.bfloat16().softmax(-1)), "is bfloat16"),
    "smallest": (called(softmaxed, topk=lambda s: s.topk(K, largest=False)), "not one of the largest values"),
    "divided by the largest": (normed(lambda v: v / v.amax(-1, keepdim=True)), "else than their sum"),
    "divided by a sum over tokens": (normed(lambda v: v / v.sum(0, keepdim=True)), "else than their sum"),
    "divided by a number": (normed(lambda v: v / 2.0), "divided by 2.0"),
    "clamped": (normed(lambda v: v.clamp(min=0.1)), "neither topk nor a gather"),
    "squared": (called(softmaxed, finish=lambda v: v * v), "neither topk nor a gather"),
    "ids of their own": (called(softmaxed, topk=lambda s: (s.topk(K)[0], s.topk(K)[1] + 0)),
        "not those that a topk returns"),
    "scored by one": (called(grouped, best=1), "not the sum of the two largest values"),
    "scored by three": (called(grouped, best=3), "not the sum of the two largest values"),
    "scored by the largest": (called(grouped, summed="max"), "not the sum of the two largest values"),
    "scored by two without a bias": (called(grouped, biased=lambda s, b: s), "not the largest value"),
    "masked by 0": (called(grouped, fill=0.0), "masked by 0.0, which can be a largest value"),
    "flags of 2": (called(grouped, ones=2.0), "not made of ones"),
    "too few left": (called(grouped, kept=1, k=4), "4 experts are more than the 1 best groups have"),
    "bias times 2": (called(grouped, biased=lambda s, b: torch.add(s, b, alpha=2)), "else than scores with a bias"),
    "bias of one number": (called(grouped, biased=lambda s, b: s + b[:1]), "no bias of one number for each expert"),
    "flagged late": (flagged_late, "not made of ones"),
    "divided apart": (divided_apart, "writes in place inside the router"),
    "written through a view": (written_through_a_view, "is also written by"),
    "logits written": (logits_written, "is written between"),
    "scores returned": (returned, "its value is also read by output"),
}  # fmt: skip


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none(name: str) -> None:
    function, reason = REFUSED[name]
    x, w = inputs()
    with torch.no_grad():
        torch.testing.assert_close(compiled(function, "fuse_routing")(x, w), function(x, w), rtol=0, atol=0)
    (entry,) = reports[-1].passes
    assert entry.hits == 0
    assert any(reason in refusal.reason for refusal in entry.refusals), entry.refusals


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    ("constant", "reason"), [("MAX_EXPERTS", "12 experts, and"), ("MAX_TOP_K", "3 experts of a token")]
)
def test_sizes_of_the_kernel(constant: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effpass.lowering.ops.moe_router, constant, 2)
    with torch.no_grad():
        compiled(softmaxed, "fuse_routing")(*inputs())
    assert reason in reports[-1].passes[0].refusals[0].reason


def test_there_is_no_kernel_for_a_cpu() -> None:
    with torch.no_grad():
        compiled(softmaxed, "fuse_routing")(*inputs())
    (entry,) = reports[-1].passes
    assert [refusal.reason for refusal in entry.refusals] == ["no kernel for cpu: this fuses launches on a GPU"]


@pytest.mark.usefixtures("_kernels")
def test_a_program_that_records_gradients_stays() -> None:
    x, w = inputs()
    compiled(softmaxed, "fuse_routing")(x.requires_grad_(), w).sum().backward()
    assert x.grad is not None
    assert reports[-1].passes[0].refusals[0].reason == "the program records gradients"


@pytest.mark.usefixtures("_kernels")
def test_it_names_the_pass_that_it_needs() -> None:
    model = enliven(make("mixtral", num_hidden_layers=1))
    with torch.no_grad():
        compiled(model, "fuse_routing", "moe_gemm")(**batch(9), use_cache=False)
    (refusal,) = reports[-1].passes[0].refusals
    assert refusal.hint == "name moe_gemm before fuse_routing"


def test_only_models_with_experts_are_retraced_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert FuseRouting().could_act(["model.layers.0.mlp.experts.gate_up_proj"])
    assert not FuseRouting().could_act(["model.layers.0.mlp.up_proj.weight"])
