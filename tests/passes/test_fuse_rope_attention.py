"""What `fuse_rope_attention` recognizes, and what it leaves alone, on one attention layer over a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.core.manager import PassManager
from effpass.core.program import Program
from effpass.lowering.ops import cached_attention as operators
from effpass.lowering.ops.fused_linear import rms_norm
from effpass.passes.graph.fuse_rope_attention import FuseRopeAttention

B, T, H, G, K, V, S = 2, 3, 4, 2, 8, 6, 12
NAMES = ("query", "key", "value", "cos", "sin", "query_norm", "key_norm", "keys", "values", "positions", "start")
ops = torch.ops.effpass


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(operators, "has_kernel", lambda device, dtype, rows: True)


def inputs(features: int = K, batch: int = B, tokens: int = T) -> dict[str, torch.Tensor]:
    """Projections `[B, T, heads · size]`, a cache with four slots filled, and the angles' cosines and sines."""
    angles = torch.rand(1, tokens, features // 2).repeat(1, 1, 2) * 3
    positions = torch.full((batch, S), -1, dtype=torch.int32)
    positions[:, : 4 + tokens] = torch.arange(4 + tokens, dtype=torch.int32)
    return {
        "query": torch.randn(batch, tokens, H * K),
        "key": torch.randn(batch, tokens, G * K),
        "value": torch.randn(batch, tokens, G * V),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "query_norm": torch.rand(K) + 0.5,
        "key_norm": torch.rand(K) + 0.5,
        "keys": torch.randn(batch, G, S, K),
        "values": torch.randn(batch, G, S, V),
        "positions": positions,
        "start": torch.tensor([4], dtype=torch.int32),
    }


def heads(x, size):
    return x.view(*x.shape[:2], -1, size).transpose(1, 2)


def rotate_half(x):
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def rotate(x, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    features = cos.shape[-1]
    turned, rest = x[..., :features], x[..., features:]
    turned = turned * cos + rotate_half(turned) * sin
    return turned if features == x.shape[-1] else torch.cat([turned, rest], dim=-1)


def attend(q, k, v, given, window=0, softcap=0.0):
    ops.cache_write(given["keys"], given["values"], k, v, given["start"])
    tokens = q.shape[2]
    return ops.cached_attention(
        q,
        given["keys"],
        given["values"],
        given["positions"],
        given["positions"][:, 4 : 4 + tokens],
        given["start"] + tokens,
        0.3,
        window,
        softcap,
    )


def plain(given):
    q, k = (rotate(heads(given[name], K), given["cos"], given["sin"]) for name in ("query", "key"))
    return attend(q, k, heads(given["value"], V), given)


Layer = Callable[[dict[str, torch.Tensor]], Any]


def program_of(layer: Layer, given: dict[str, torch.Tensor], mode: str = "fake", grad: bool = False) -> Program:
    names = list(given)
    with torch.set_grad_enabled(grad):
        gm = make_fx(lambda *a: layer(dict(zip(names, a, strict=True))), tracing_mode=mode, pre_dispatch=True)(
            *given.values()
        )
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), names, strict=True):
        node._rename(name)
    return Program(gm, "dynamo", {}, list(given.values()), grad_enabled=grad)


def fused(layer: Layer, given: dict[str, torch.Tensor]) -> tuple[dict[str, Any], Program]:
    """Run the pass: one hit, equal outputs and equal caches. Returns the new operator's arguments."""
    program = program_of(layer, given)
    entry = PassManager([FuseRopeAttention()]).run(program).passes[0]
    assert (entry.hits, entry.refusals) == (1, [])
    left = {op for op in program.op_counts() if op.startswith("effpass")}
    assert left == {"effpass.rope_cached_attention.default"}
    ours, theirs = ({name: t.clone() for name, t in given.items()} for _ in range(2))
    with torch.no_grad():
        # The same float32 arithmetic in the same order, but for the layout of a product's operands.
        torch.testing.assert_close(program.gm(*ours.values()), layer(theirs), rtol=1e-6, atol=1e-6)
    for name in given:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
    (new,) = program.graph.find_nodes(op="call_function", target=ops.rope_cached_attention.default)
    return dict(zip((a.name for a in new.target._schema.arguments), new.args, strict=True)), program


def refused(layer: Layer, given: dict[str, torch.Tensor], **how: Any) -> str:
    program = program_of(layer, given, **how)
    before = program.op_counts()
    entry = PassManager([FuseRopeAttention()]).run(program).passes[0]
    assert entry.hits == 0
    assert program.op_counts() == before
    (refusal,) = entry.refusals
    return str(refusal)


# -- what it recognizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [K, K // 2], ids=["all", "half"])
def test_rotation_write_and_attention(features):
    call, program = fused(plain, inputs(features))
    assert [call[name].name for name in ("cos", "sin", "keys", "values", "start")] == [
        "cos",
        "sin",
        "keys",
        "values",
        "start",
    ]
    assert [tuple(call[name].meta["val"].shape) for name in ("query", "key", "value")] == [
        (B, T, H, K),
        (B, T, G, K),
        (B, T, G, V),
    ]
    assert (call["query_norm"], call["key_norm"]) == (None, None)
    assert set(program.op_counts()) == {
        "aten.view.default",
        "aten.slice.Tensor",  # of the positions
        "effpass.rope_cached_attention.default",
    }


@pytest.mark.parametrize(("window", "softcap"), [(3, 0.0), (0, 5.0)])
def test_window_and_softcap(window, softcap):
    def layer(given):
        q, k = (rotate(heads(given[name], K), given["cos"], given["sin"]) for name in ("query", "key"))
        return attend(q, k, heads(given["value"], V), given, window, softcap)

    call, _ = fused(layer, inputs())
    assert (call["scale"], call["window"], call["softcap"]) == (0.3, window, softcap)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("transposed", [True, False])
def test_norms_of_heads(transposed, offset):
    """Gemma's stand behind the transposition, Qwen's in front of it."""

    def normed(given, name):
        x, weight = given[name].view(*given[name].shape[:2], -1, K), given[f"{name}_norm"]
        x = rms_norm(x.transpose(1, 2), weight, 1e-5, offset) if transposed else rms_norm(x, weight, 1e-5, offset)
        return x if transposed else x.transpose(1, 2)

    def layer(given):
        q, k = (rotate(normed(given, name), given["cos"], given["sin"]) for name in ("query", "key"))
        return attend(q, k, heads(given["value"], V), given)

    call, program = fused(layer, inputs())
    assert (call["query_norm"].name, call["key_norm"].name) == ("query_norm", "key_norm")
    assert (call["norm_eps"], call["norm_offset"]) == (1e-5, offset)
    assert "aten.rsqrt.default" not in program.op_counts()


def test_norms_with_two_epsilons_stay_outside():
    def layer(given):
        q = rotate(rms_norm(heads(given["query"], K), given["query_norm"], 1e-5, 0.0), given["cos"], given["sin"])
        k = rotate(rms_norm(heads(given["key"], K), given["key_norm"], 1e-6, 0.0), given["cos"], given["sin"])
        return attend(q, k, heads(given["value"], V), given)

    call, program = fused(layer, inputs())
    assert (call["query_norm"], call["key_norm"]) == (None, None)
    assert program.op_counts()["aten.rsqrt.default"] == 2


def test_a_norm_of_the_query_alone():
    def layer(given):
        q = rotate(rms_norm(heads(given["query"], K), given["query_norm"], 1e-5, 0.0), given["cos"], given["sin"])
        k = rotate(heads(given["key"], K), given["cos"], given["sin"])
        return attend(q, k, heads(given["value"], V), given)

    call, _ = fused(layer, inputs())
    assert (call["query_norm"].name, call["key_norm"], call["norm_eps"]) == ("query_norm", None, 1e-5)


def test_a_value_that_comes_heads_first():
    def layer(given):
        q, k = (rotate(heads(given[name], K), given["cos"], given["sin"]) for name in ("query", "key"))
        return attend(q, k, heads(given["value"], V) * 2, given)

    call, _ = fused(layer, inputs())
    assert tuple(call["value"].meta["val"].shape) == (B, T, G, V)


def test_cosines_of_a_wider_type():
    """OLMo's angles are float32, and what they rotate is cast back."""
    given = inputs()
    given = {n: t.bfloat16() if t.is_floating_point() and n not in ("cos", "sin") else t for n, t in given.items()}

    def layer(given):
        q, k = (
            rotate(heads(given[name], K), given["cos"], given["sin"]).to(torch.bfloat16) for name in ("query", "key")
        )
        return attend(q, k, heads(given["value"], V), given)

    fused(layer, given)


def test_two_layers_with_a_cache_each():
    def layer(given):
        first = plain(given)
        second = {**given, "query": first.flatten(2).repeat(1, 1, 2)[..., : H * K], "keys": given["keys2"]}
        return plain({**second, "values": given["values2"]})

    given = inputs()
    given = {**given, "keys2": given["keys"].flip(0), "values2": given["values"].flip(0)}
    program = program_of(layer, given)
    assert PassManager([FuseRopeAttention()]).run(program).hits == 2
    ours, theirs = ({name: t.clone() for name, t in given.items()} for _ in range(2))
    torch.testing.assert_close(program.gm(*ours.values()), layer(theirs), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours["keys2"], theirs["keys2"])


# -- where it stays away ----------------------------------------------------------------------------------------------


def test_more_than_64_rows():
    assert refused(plain, inputs(batch=33, tokens=2)).endswith(": 66 rows, and the kernel is for up to 64")


def test_training():
    given = inputs()
    assert refused(plain, given, grad=True).endswith(
        "the program records gradients → run the model under torch.no_grad()"
    )


def test_no_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(operators, "has_kernel", lambda *of: asked.append(of))
    reason = refused(plain, inputs())
    assert reason == "cached_attention: no kernel for cpu: this fuses launches on a GPU → move the model to a GPU"
    assert asked == [(torch.device("cpu"), torch.float32, B * T)]


def test_positions_that_come_another_way():
    def layer(given):
        return attend(heads(given["query"], K), heads(given["key"], K), heads(given["value"], V), given)

    assert refused(layer, inputs()) == (
        "cached_attention: its query, transpose, is not rotated, or not by halves from the first feature on"
    )


def test_neighbors_rotated_against_each_other():
    """GLM's way: features 0 and 1, 2 and 3, …"""

    def turned(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    def layer(given):
        cos, sin = given["cos"].unsqueeze(1), given["sin"].unsqueeze(1)
        q, k = (heads(given[name], K) for name in ("query", "key"))
        return attend(q * cos + turned(q) * sin, k * cos + turned(k) * sin, heads(given["value"], V), given)

    assert "is not rotated, or not by halves" in refused(layer, inputs())


@pytest.mark.parametrize(
    "turn",
    [
        lambda x: torch.cat((x[..., K // 2 :], x[..., : K // 2]), -1),
        lambda x: torch.cat((-x[..., : K // 2], x[..., K // 2 :]), -1),
        lambda x: torch.cat((-x[..., 2:], x[..., :2]), -1),
        lambda x: torch.cat((-x[..., K // 2 :], (x + 1)[..., : K // 2]), -1),
    ],
)
def test_other_turns(turn):
    def layer(given):
        cos, sin = given["cos"].unsqueeze(1), given["sin"].unsqueeze(1)
        q, k = (heads(given[name], K) for name in ("query", "key"))
        return attend(q * cos + turn(q) * sin, k * cos + turn(k) * sin, heads(given["value"], V), given)

    assert "is not rotated, or not by halves" in refused(layer, inputs())


def test_the_last_features_rotated():
    def layer(given):
        q, k = (heads(given[name], K) for name in ("query", "key"))
        q, k = (torch.cat([x[..., :4], rotate(x[..., 4:], given["cos"], given["sin"])], -1) for x in (q, k))
        return attend(q, k, heads(given["value"], V), given)

    assert "not by halves from the first feature on" in refused(layer, inputs(features=4))


def test_different_angles():
    def layer(given):
        q = rotate(heads(given["query"], K), given["cos"], given["sin"])
        k = rotate(heads(given["key"], K), given["sin"], given["cos"])
        return attend(q, k, heads(given["value"], V), given)

    assert refused(layer, inputs()).endswith("its query and its key are rotated by different angles")


def test_a_part_of_the_buffers():
    """A prompt looks at the filled slots alone."""

    def layer(given):
        q, k = (rotate(heads(given[name], K), given["cos"], given["sin"]) for name in ("query", "key"))
        ops.cache_write(given["keys"], given["values"], k, heads(given["value"], V), given["start"])
        keys, values, positions = given["keys"][:, :, :7], given["values"][:, :, :7], given["positions"][:, :7]
        return ops.cached_attention(q, keys, values, positions, positions[:, 4:], given["start"] + T, 0.3, 0, 0.0)

    assert "is no buffer that a cache_write in front of it filled" in refused(layer, inputs())


@pytest.mark.parametrize("change", [lambda keys: keys.sum(), lambda keys: keys.mul_(2).sum()], ids=["read", "write"])
def test_somebody_else_between_write_and_attention(change):
    def layer(given):
        q, k = (rotate(heads(given[name], K), given["cos"], given["sin"]) for name in ("query", "key"))
        ops.cache_write(given["keys"], given["values"], k, heads(given["value"], V), given["start"])
        total = change(given["keys"][0])
        positions = given["positions"]
        return total, ops.cached_attention(
            q, given["keys"], given["values"], positions, positions[:, 4:7], given["start"] + T, 0.3, 0, 0.0
        )

    assert refused(layer, inputs()).endswith("keys is read or written between cache_write and cached_attention")


def test_a_start_that_moves_on_in_between():
    def layer(given):
        q, k = (rotate(heads(given[name], K), given["cos"], given["sin"]) for name in ("query", "key"))
        ops.cache_write(given["keys"], given["values"], k, heads(given["value"], V), given["start"])
        given["start"].add_(T)
        positions = given["positions"]
        return ops.cached_attention(
            q, given["keys"], given["values"], positions, positions[:, 4:7], given["start"] + 0, 0.3, 0, 0.0
        )

    assert refused(layer, inputs()).endswith(
        "start is written between cache_write, which reads it, and cached_attention"
    )


def test_a_graph_without_such_attention_is_no_candidate():
    program = program_of(lambda given: given["query"] * 2, inputs(), grad=True)
    (entry,) = PassManager([FuseRopeAttention()]).run(program).passes
    assert (entry.hits, entry.refusals) == (0, [])
