"""Which parameter gets which algorithm, and how it is cut into matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effpass.core.errors import EffpassError, ModelError
from effpass.trainers import MONA
from effpass.trainers.mona import Layout, NewtonSchulz, choose


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.randn(4, 16, 8))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv1d(8, 8, 4, groups=8)
        self.scalar_gate = nn.Linear(8, 1)
        self.frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.head = nn.Linear(8, 20, bias=False)


def chosen(model: nn.Module, **overrides) -> dict[str, tuple[str, str]]:
    return {choice.name: (choice.algorithm, choice.reason) for choice in choose(model, overrides.get("overrides"))}


def test_the_module_tree():
    found = chosen(Model())
    assert found["embed.weight"] == ("adamw", "embedding")
    assert found["head.weight"] == ("adamw", "output head")
    for layer in "01":
        at = f"layers.{layer}"
        assert found[f"{at}.norm.weight"] == ("adamw", "vector")
        assert found[f"{at}.attention.in_proj_weight"] == ("mona", "q, k, v apart")
        assert found[f"{at}.attention.out_proj.weight"] == ("mona", "matrix")
        assert found[f"{at}.gate.weight"] == ("adamw", "router")
        assert found[f"{at}.experts.up_proj"] == ("mona", "stack of matrices")
    assert found["conv.weight"] == ("mona", "convolution, flattened")
    assert found["depthwise.weight"] == ("adamw", "depthwise convolution")
    assert found["scalar_gate.weight"] == ("adamw", "vector in two dimensions")
    assert "frozen.weight" not in found


def test_a_tied_head_is_an_embedding_and_counted_once():
    model = Model()
    model.head.weight = model.embed.weight
    found = chosen(model)
    assert found["embed.weight"] == ("adamw", "embedding")
    assert "head.weight" not in found


def test_transformers_models():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}  # fmt: skip
    phi = transformers.Phi3ForCausalLM(transformers.Phi3Config(**small))
    found = {choice.name: choice for choice in choose(phi)}
    assert found["model.layers.0.self_attn.qkv_proj.weight"].layout == Layout(split=(16, 8, 8))
    assert found["model.layers.0.mlp.gate_up_proj.weight"].layout == Layout(split=(24, 24))
    assert found["lm_head.weight"].algorithm == "adamw"
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    found = {choice.name: choice for choice in choose(gpt2)}
    assert found["transformer.h.0.attn.c_attn.weight"].layout == Layout(split=(16, 16, 16), dim=1)
    assert found["transformer.h.0.mlp.c_fc.weight"].layout == Layout()
    assert found["transformer.wpe.weight"].algorithm == "adamw"
    moe = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**small, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    )
    found = {choice.name: choice for choice in choose(moe)}
    assert found["model.layers.0.mlp.gate.weight"].reason == "router"
    assert found["model.layers.0.mlp.experts.down_proj"].reason == "stack of matrices"


def test_overrides():
    overrides = {"head.weight": "mona", "*.out_proj.weight": Layout(heads=2), "conv.*": "adamw"}
    found = {choice.name: choice for choice in choose(Model(), overrides)}
    assert found["head.weight"].algorithm == "mona"
    assert found["layers.1.attention.out_proj.weight"].layout.heads == 2
    assert found["conv.weight"].reason == "override 'conv.*'"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"haed.weight": "mona"}, "fits no trainable parameter, did you mean 'head.weight'"),
        ({"head.weight": "sgd"}, "override 'head.weight' is 'sgd'"),
        ({"head.weight": Layout(split=(3, 4))}, r"head.weight of shape \(20, 8\) can't be split into \(3, 4\)"),
        ({"head.weight": Layout(heads=3)}, "20 rows are not 3 heads"),
        ({"layers.0.norm.weight": "mona"}, r"layers.0.norm.weight of shape \(8,\) is no stack of matrices"),
    ],
)
def test_overrides_that_do_not_fit(overrides, message):
    with pytest.raises(ModelError, match=message):
        choose(Model(), overrides)


@pytest.mark.parametrize(
    ("shape", "layout", "matrices"),
    [
        ((6, 4), Layout(), [(1, 6, 4)]),
        ((3, 6, 4), Layout(), [(3, 6, 4)]),
        ((6, 4), Layout(heads=3), [(3, 2, 4)]),
        ((8, 4), Layout(split=(4, 2, 2)), [(1, 4, 4), (1, 2, 4), (1, 2, 4)]),
        ((4, 6), Layout(split=(3, 3), dim=1), [(1, 4, 3), (1, 4, 3)]),
        ((3, 8, 4), Layout(split=(4, 4), dim=1), [(3, 4, 4), (3, 4, 4)]),
        ((8, 3, 2, 2), Layout(convolution=True), [(1, 8, 12)]),
    ],
)
def test_each_matrix_is_orthogonalized_by_itself(shape, layout, matrices):
    torch.manual_seed(0)
    parts = layout.parts(shape)
    assert [part.matrices for part in parts] == matrices
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = MONA([("w", parameter)], lr=1.0, weight_decay=0, overrides={"w": layout}, scale="spectral")
    parameter.grad = torch.randn(shape, dtype=torch.float64)
    optimizer.step()
    for part in parts:
        for grad, moved in zip(part.take(parameter.grad), part.take(parameter.detach()), strict=True):
            expected = -(max(1, grad.shape[0] / grad.shape[1]) ** 0.5) * NewtonSchulz()(grad[None])[0]
            torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)


def test_the_table():
    text = MONA(Model()).describe()
    lines = text.replace("\u00d7", "x").splitlines()
    (experts,) = [line for line in lines if "experts" in line]
    assert experts.split() == ["layers.*.experts.up_proj", "2", "4x16x8", "mona", "4x16x8", "stack", "of", "matrices"]
    (fused,) = [line for line in lines if "in_proj_weight" in line]
    assert "1x8x8 + 1x8x8 + 1x8x8" in fused
    matrices = 2 * (3 * 64 + 64 + 4 * 16 * 8) + 8 * 27  # of MONA: float32 momentum and bfloat16 average
    rest = sum(p.numel() for p in Model().parameters() if p.requires_grad) - matrices
    assert lines[-1].startswith(f"{matrices + rest:,} parameters; state {(6 * matrices + 8 * rest) / 2**20:,.1f} MiB")


def test_groups_by_shape_name_and_hand():
    a, b, c, d = (nn.Parameter(torch.randn(s)) for s in ((4, 4), (4,), (9, 4), (4, 6)))
    bare = MONA([a, b], lr=0.1)
    assert [(g["algorithm"], len(g["params"])) for g in bare.param_groups] == [("mona", 1), ("adamw", 1)]
    named = MONA([("layer.weight", a), ("embed_tokens.weight", c)])
    assert [(g["algorithm"], g["param_names"]) for g in named.param_groups] == [
        ("mona", ["layer.weight"]), ("adamw", ["embed_tokens.weight"])
    ]  # fmt: skip
    by_hand = MONA([{"params": [c, d], "algorithm": "adamw", "lr": 0.5}, {"params": [a], "beta_a": 0.9, "alpha": -1.0}])
    assert [(g["algorithm"], g["lr"], g["alpha"]) for g in by_hand.param_groups] == [
        ("adamw", 0.5, pytest.approx(-50)), ("mona", 1e-3, -1.0)
    ]  # fmt: skip
    by_hand.add_param_group({"params": [b]})
    assert by_hand.param_groups[-1]["algorithm"] == "adamw"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, r"lr=-1 is outside"),
        ({"momentum": 1.0}, r"momentum=1.0 is outside"),
        ({"beta_a": 1.0}, r"beta_a=1.0 is outside"),
        ({"alpha": 0.2}, "alpha=0.2 is positive"),
        ({"form": "two"}, "unknown form 'two'"),
        ({"scale": "spectrl"}, "unknown scale 'spectrl', did you mean 'spectral'"),
        ({"nan_policy": "ignore"}, "unknown nan_policy 'ignore'"),
        ({"capturable": True}, "nan_policy='raise' has to wait"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"newton_schulz": "polar"}, "unknown Newton-Schulz coefficients 'polar'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(EffpassError, match=message):
        MONA([nn.Parameter(torch.ones(2, 2))], **options)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([torch.ones(2, 2, dtype=torch.complex64).requires_grad_()], "torch.complex64: only real"),
        (["weight"], "parameter 0 is a str, not a tensor"),
        (nn.Linear(2, 2).requires_grad_(False), "no parameter that requires a gradient"),
        ([("deep", nn.Parameter(torch.ones(2, 2, 2, 2, 2)))], None),
    ],
)
def test_parameters_that_can_not_be_optimized(parameters, message):
    if message is None:
        assert MONA(parameters).param_groups[0]["algorithm"] == "mona"  # flattened like a convolution
        return
    with pytest.raises(ModelError, match=message):
        MONA(parameters)
