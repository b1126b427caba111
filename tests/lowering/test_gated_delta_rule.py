"""The gated delta rule: its meaning, chunks against tokens, gradients, decoding steps, ONNX, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from gated_delta_cases import NAMES, SMALL, Case, expected, placed, ratio
from torch.utils.flop_counter import FlopCounterMode

from effpass.core.errors import EffpassError
from effpass.lowering.ops.gated_delta_rule import TOLERANCE, gated_delta_rule, reference
from effpass.lowering.ops.gated_delta_rule_inputs import Inputs, Settings
from effpass.lowering.ops.gated_delta_rule_step import gated_delta_rule_step

MODES = ("gdn", "kda", "fg2", "fg2+")


def options(case: Case, given: list) -> dict:
    bound, scale, normalize, logits = case.settings
    return {"A_log": given[6], "dt_bias": given[7], "lower_bound": bound, "scale": scale, "normalize": normalize,
            "beta_logits": logits}  # fmt: skip


def called(case: Case, given: list) -> tuple[torch.Tensor, torch.Tensor]:
    ends = None if case.ends is None else torch.tensor(case.ends)
    return gated_delta_rule(*given[:6], initial_state=given[8], cu_seqlens=ends, **options(case, given))


# -- meaning ----------------------------------------------------------------------------------------------------------


def literally(q, state, decay, a, b, z, scale):
    """S ← (I − a bᵀ) Diag(decay) S + a zᵀ, and Sᵀ q · scale, of one head and token, as matrices."""
    size = q.shape[0]
    state = (torch.eye(size, dtype=q.dtype) - torch.outer(a, b)) @ torch.diag(decay) @ state + torch.outer(a, z)
    return state, scale * (state.T @ q)


@pytest.mark.parametrize("mode", MODES)
def test_reference_is_the_recurrence_of_the_papers(mode):
    case = Case(mode, "bounded", 9, heads=1, value_heads=2, key_size=6, value_size=6)
    tensors = case.tensors(torch.float64)
    q, k, v, gate, beta, write, A_log, dt_bias, initial = tensors
    found, last = reference(Inputs(*tensors[:8]), case.settings, initial, case.starts())
    for head in range(2):
        state = initial[0, head]
        for t in range(case.tokens):
            # The norm has 1e-6 under its root.
            query, key = (x[0, t, 0] / (x[0, t, 0].square().sum() + 1e-6).sqrt() for x in (q, k))
            decay = (-5 * torch.sigmoid(A_log[head].exp() * (gate[0, t, head] + dt_bias[head]))).exp().expand(6)
            strength, value = beta[0, t, head].sigmoid(), v[0, t, head]
            if mode in ("gdn", "kda"):  # as the delta rule is written: β k kᵀ and β k vᵀ
                a, b, z = strength * key, key, value
            else:
                a = b = strength.sqrt() * key
                z = (strength if mode == "fg2" else write[0, t, head].sigmoid()).sqrt() * value
            state, out = literally(query, state, decay, a, b, z, 0.3)
            torch.testing.assert_close(found[0, t, head], out)
        torch.testing.assert_close(last[0, head], state)


# -- chunks -----------------------------------------------------------------------------------------------------------

CASES = {
    **SMALL,
    "fg2+, packed, ragged": Case("fg2+", tokens=256, value_size=24, ends=(0, 15, 100, 256)),
    "fg2, bounded, probabilities, two rows": Case("fg2", "bounded", 67, 2, 1, 2, beta_logits=False),
    "gdn, one token": Case("gdn", "bounded", 1, 2),
    "kda, decay to -60": Case("kda", "log", 100, value_heads=2, value_size=8),
}


@pytest.mark.parametrize("name", CASES)
def test_chunks_and_their_gradients_equal_the_token_loop(name):
    case = CASES[name]
    tensors, gradients, wanted = expected(case, torch.float64)
    outputs = called(case, tensors)
    given = {n: x for n, x in zip(NAMES, tensors, strict=True) if x is not None}
    found = torch.autograd.grad(outputs, list(given.values()), gradients)
    results = dict(zip(wanted, (*outputs, *found), strict=True))
    assert {n: e for n, x in wanted.items() if (e := ratio(results[n], x)) > 1e-11} == {}


@pytest.mark.parametrize("mode", MODES)
def test_float32_and_bfloat16_inputs(mode):
    for dtype, state_type in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        case = Case(mode, tokens=130, value_heads=2)
        tensors, _, wanted = expected(case, dtype)
        output, state = called(case, placed(tensors, dtype, "cpu"))
        assert (output.dtype, state.dtype) == (dtype, state_type)
        assert ratio(output, wanted["output"]) <= TOLERANCE[dtype]
        assert ratio(state, wanted["state"]) <= TOLERANCE[torch.float32]


def test_a_sequence_in_pieces_equals_the_whole():
    case = Case("fg2+", tokens=150, batch=2)
    given = case.tensors(torch.float64)
    output, state = called(case, given)
    pieces, held = [], given[8]
    for a, b in itertools.pairwise((0, 1, 70, 134, 150)):
        piece = [None if x is None else x[:, a:b] for x in given[:6]]
        out, held = gated_delta_rule(*piece, initial_state=held, **options(case, given))
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), output)
    torch.testing.assert_close(held, state)


def test_only_one_of_the_outputs_needs_a_gradient():
    case = Case("kda", tokens=20)
    for used in (0, 1):
        tensors = [None if x is None else x.requires_grad_() for x in case.tensors(torch.float64)]
        leaves = [x for x in tensors if x is not None]
        found = torch.autograd.grad(called(case, tensors)[used].sum(), leaves, allow_unused=True)
        plain = reference(Inputs(*tensors[:8]), case.settings, tensors[8], case.starts())[used].sum()
        for a, b in zip(found, torch.autograd.grad(plain, leaves, allow_unused=True), strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("mode", MODES)
def test_extreme_inputs_stay_finite(mode):
    case = Case(mode, tokens=80)
    for dtype in (torch.float32, torch.float64):
        given = [None if x is None else x.to(dtype) for x in case.tensors(torch.float64)]
        q, k, _, gate, beta, write, *_ = given
        q[:, ::3], k[:, ::5] = 0, 0
        gate[:, ::2], gate[:, 1::2] = 1e3, -1e3
        for x in (beta, write):
            if x is not None:
                x[:, ::7], x[:, 1::7] = 200, -200
        given = [None if x is None else x.requires_grad_() for x in given]
        outputs = called(case, given)
        found = torch.autograd.grad([x.sum() for x in outputs], [x for x in given if x is not None])
        assert all(bool(x.isfinite().all()) for x in (*outputs, *found))


def test_a_strength_of_zero_has_the_gradient_of_a_small_one():
    case = Case("kda", tokens=12, beta_logits=False)
    given = case.tensors(torch.float64)
    found = []
    for strength in (0.0, 1e-7):
        given[4] = given[4].clone()
        given[4][:, 5] = strength
        given[4].requires_grad_()
        found.append(torch.autograd.grad(called(case, given)[0].square().sum(), given[4])[0])
        given[4] = given[4].detach()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert float(found[0][0, 5].abs().max()) > 1e-3


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_steps_write_the_state_and_equal_chunks(mode):
    case = Case(mode, "bounded", 7, 2, 1, 2)
    given = case.tensors(torch.float64)
    output, last = called(case, given)
    state = given[8].clone()
    address, pieces = state.data_ptr(), []
    for a, b in ((0, 1), (1, 2), (2, 7)):
        piece = [None if x is None else x[:, a:b] for x in given[:6]]
        pieces.append(gated_delta_rule_step(*piece, state, **options(case, given)))
    assert state.data_ptr() == address
    torch.testing.assert_close(torch.cat(pieces, 1), output)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("has_state", [False, True])
def test_no_sequences_have_empty_results(mode, has_state):
    case = Case(mode, tokens=5, batch=0, value_heads=2, has_state=has_state)
    given = [None if x is None else x.requires_grad_() for x in case.tensors(torch.float64)]
    output, state = called(case, given)
    assert output.shape == (0, 5, 2, 16)
    assert state.shape == (0, 2, 16, 16)
    leaves = [x for x in given if x is not None]
    for x, gradient in zip(leaves, torch.autograd.grad(output.sum() + state.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))
    detached = [None if x is None else x.detach() for x in given[:6]]
    assert gated_delta_rule_step(*detached, state.detach(), **options(case, given)).shape == (0, 5, 2, 16)


# -- what PyTorch asks of an operator ---------------------------------------------------------------------------------


def _arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list, tuple]:
    given = placed(case.tensors(dtype), dtype, "cpu")
    ends = None if case.ends is None else torch.tensor(case.ends)
    return given, (*given[:9], ends, *case.settings)


@pytest.mark.parametrize("case", [Case("fg2+", tokens=5), Case("gdn", tokens=9, ends=(0, 4, 9), has_state=False)])
def test_opcheck(case):
    given, arguments = _arguments(case)
    leaves = [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
    torch.library.opcheck(torch.ops.effpass.gated_delta_rule, tuple(leaves))
    results = torch.ops.effpass.gated_delta_rule(*leaves)
    assert [x.requires_grad for x in results] == [True, True, False, False]
    detached = [x.detach() if torch.is_tensor(x) else x for x in arguments]
    (output, gradient), (scores, inverses) = torch.randn(2, *given[2].shape), torch.empty(2, 0)
    made = (output, scores, inverses, gradient, None)
    torch.library.opcheck(torch.ops.effpass.gated_delta_rule_backward, (*made, *detached))
    if case.ends is None:
        torch.library.opcheck(torch.ops.effpass.gated_delta_rule_step, (*detached[:9], *case.settings))


def test_compiles_as_one_graph_with_gradients_for_several_lengths():
    case = Case("fg2+", "bounded", tokens=20)

    def loss(*given):
        output, state = called(case, list(given))
        return output.square().sum() + state.square().sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (20, 33, 71):
        given = replace(case, tokens=tokens).tensors(torch.float64)
        leaves = [x.requires_grad_() for x in given if x is not None]
        for a, b in zip(*(torch.autograd.grad(f(*given), leaves) for f in (compiled, loss)), strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_flops_are_those_of_the_recurrence():
    case = Case("kda", tokens=10, batch=2, value_heads=3, key_size=8, value_size=4)
    given = [None if x is None else x.requires_grad_() for x in case.tensors(torch.float64)]
    with FlopCounterMode(display=False) as counter:
        output, _ = called(case, given)
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == 6 * 2 * 10 * 3 * 8 * 4
    assert counter.get_total_flops() == 4 * forward


@pytest.mark.parametrize("mode", ["gdn", "fg2+"])
def test_onnx_runtime_computes_the_same(mode):
    import onnx_ir
    import onnxruntime

    from effpass.lowering.targets.onnx_translate import translate

    case = Case(mode, "bounded" if mode == "gdn" else "softplus", 5, 2, 1, 2, has_state=mode == "fg2+")

    class Module(torch.nn.Module):
        def forward(self, *given):
            return called(case, list(given))

    given = placed(case.tensors(torch.float32), torch.float32, "cpu")
    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = [{1: tokens} if x is not None and i < 6 else None for i, x in enumerate(given)]
    program = torch.export.export(Module(), tuple(given), dynamic_shapes={"given": tuple(shapes)})
    proto = onnx_ir.to_proto(translate(program, None, None, {}))
    assert {node.domain for node in proto.graph.node} == {""}
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    longer = [None if x is None else torch.cat((x, x), 1) if i < 6 else x for i, x in enumerate(given)]
    names = [x.name for x in session.get_inputs()]
    feeds = dict(zip(names, (x.numpy() for x in longer if x is not None), strict=True))
    for a, b in zip(session.run(None, feeds), called(case, longer), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-5, atol=1e-5)


def test_a_step_is_exported_as_a_call_that_returns_the_state():
    from effpass.core.errors import ExportError
    from effpass.lowering.targets.onnx_translate import translate

    case = Case("kda", tokens=1)
    given = placed(case.tensors(torch.float32), torch.float32, "cpu")

    class Module(torch.nn.Module):
        def forward(self, *given):
            state = given[8].clone()
            return gated_delta_rule_step(*given[:6], state, **options(case, list(given))), state

    with pytest.raises(ExportError, match="gated_delta_rule_step") as caught:
        translate(torch.export.export(Module(), tuple(given)), None, None, {})
    assert "call gated_delta_rule, which returns the new state" in caught.value.hint


# -- what it refuses --------------------------------------------------------------------------------------------------


def _refused(message: str, case: Case = Case("fg2", tokens=6), name: str = "gated_delta_rule", **changes) -> None:  # noqa: B008
    given = dict(zip(NAMES, placed(case.tensors(torch.float32), torch.float32, "cpu"), strict=True))
    given["cu_seqlens"] = None
    constants = case.settings._asdict()
    for field, value in changes.items():
        (constants if field in constants else given)[field] = value
    if name == "gated_delta_rule_step":
        del given["cu_seqlens"]
    with pytest.raises(EffpassError, match=message) as caught:
        getattr(torch.ops.effpass, name)(*given.values(), *constants.values())
    assert caught.value.hint
    assert f"effpass::{name}" in caught.value.message


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"k \(1, 6, 1, 15\)", {"k": torch.randn(1, 6, 1, 15)}),
        (r"v \(1, 5, 1, 16\)", {"v": torch.randn(1, 5, 1, 16)}),
        ("T = 0", {name: torch.randn(1, 0, 1, 16) for name in ("q", "k", "v", "gate", "beta")}),
        (r"q is \(1, 6, 0, 16\) and v \(1, 6, 1, 16\): H = 0", {name: torch.randn(1, 6, 0, 16) for name in ("q", "k")}),
        ("HV = 0", {"v": torch.randn(1, 6, 0, 16)}),
        ("K = 0", {name: torch.randn(1, 6, 1, 0) for name in ("q", "k")}),
        ("V = 0", {"v": torch.randn(1, 6, 1, 0)}),
        (r"gate is \(1, 6, 2\)", {"gate": torch.randn(1, 6, 2)}),
        (r"beta is \(1, 6, 1, 8\)", {"beta": torch.randn(1, 6, 1, 8)}),
        (r"16 and values of 8 channels", {"v": torch.randn(1, 6, 1, 8), "initial_state": None}),
        (r"write_beta \(1, 6, 1\)", {"write_beta": torch.randn(1, 6, 1)}),
        ("without A_log", {"A_log": None}),
        (r"A_log is \(3,\)", {"A_log": torch.randn(3)}),
        (r"dt_bias is \(16,\)", {"dt_bias": torch.randn(16)}),
        ("lower_bound is 5.0", {"lower_bound": 5.0}),
        ("float32, float64", {"k": torch.randn(1, 6, 1, 16, dtype=torch.float64)}),
        (r"state is bfloat16 \(1, 1, 16, 16\)", {"initial_state": torch.zeros(1, 1, 16, 16, dtype=torch.bfloat16)}),
        (r"state is float32 \(2, 1, 16, 16\)", {"initial_state": torch.zeros(2, 1, 16, 16)}),
        ("beta holds -0.5 to 1", {"beta": torch.linspace(-0.5, 1, 96).view(1, 6, 1, 16), "beta_logits": False}),
        ("log of the decay is up to 0.25", {"gate": torch.full((1, 6, 1), 0.25), "A_log": None, "dt_bias": None}),
        (r"cu_seqlens is \[0, 4, 3, 6\]", {"cu_seqlens": torch.tensor([0, 4, 3, 6]), "initial_state": None}),
        (r"cu_seqlens is \[0, 5\] for 6 tokens", {"cu_seqlens": torch.tensor([0, 5])}),
        (r"cu_seqlens is float32", {"cu_seqlens": torch.tensor([0.0, 6.0])}),
        (r"cu_seqlens is int64 \(1,\)", {"cu_seqlens": torch.tensor([0])}),
        ("q is on cpu and A_log on meta", {"A_log": torch.randn(1, device="meta")}),
        ("q is on cpu and cu_seqlens on meta", {"cu_seqlens": torch.empty(2, dtype=torch.int32, device="meta")}),
    ],
)
def test_refuses(message, changes):
    _refused(message, **changes)


def test_packed_sequences_lie_in_one_row():
    _refused(r"q \(2, 6, 1, 16\)", Case("fg2", tokens=6, batch=2), cu_seqlens=torch.tensor([0, 6]))


def test_a_step_refuses_too():
    _refused("H = 0", name="gated_delta_rule_step", q=torch.randn(1, 6, 0, 16), k=torch.randn(1, 6, 0, 16))
    half = torch.zeros(1, 1, 16, 16, dtype=torch.float16)
    _refused("state is float16", name="gated_delta_rule_step", initial_state=half)
    _refused("beta holds", name="gated_delta_rule_step", beta=torch.full((1, 6, 1), 3.0), beta_logits=False)


def test_a_settings_default_scale_is_that_of_attention():
    given = Case("kda", tokens=4).tensors(torch.float64)
    inputs = Inputs(*given[:8])
    wanted, _ = reference(inputs, Settings(None, 0.25, True, True), None, [0, 4])
    torch.testing.assert_close(gated_delta_rule(*given[:6], A_log=given[6], dt_bias=given[7])[0], wanted)
