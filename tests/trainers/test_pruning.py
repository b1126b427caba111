"""Pruning, its parts: units, masks, scores, costs, shapes, the loss, and the minimax learner."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import batch, make
from torch.nn.functional import cross_entropy

from effpass.core.errors import EffpassError, ModelError
from effpass.core.roofline import known
from effpass.passes.weights.structured_pruning import cut_model
from effpass.trainers.pruning import step_cost as step_cost_module
from effpass.trainers.pruning.choice import best_layers, best_units, keep_indices, layer_count, score_units
from effpass.trainers.pruning.cost import Cost, Term, parameter_cost
from effpass.trainers.pruning.distillation import Distillation, check_head, hidden_states
from effpass.trainers.pruning.masks import Masks
from effpass.trainers.pruning.minimax import Minimax, Rates
from effpass.trainers.pruning.scores import Calibration
from effpass.trainers.pruning.shapes import Shapes, _multiple
from effpass.trainers.pruning.step_cost import step_cost
from effpass.trainers.pruning.units import find_units

IDS = batch(16, padding=0)["input_ids"]
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


def trainable(family: str, **settings: Any) -> Any:
    return make(family, **settings).requires_grad_(True)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# -- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shapes"),
    [
        ("llama", {"kv_groups": (2, 1, 2), "ffn_channels": (2, 1, 96)}),
        ("gpt2", {"ffn_channels": (2, 1, 256)}),  # its heads can't go
        ("olmo2", {"ffn_channels": (2, 1, 96)}),
        ("mixtral", {"kv_groups": (2, 1, 2), "experts": (2, 1, 4), "expert_channels": (2, 4, 96)}),
        (
            "deepseek_v3",
            {
                "kv_groups": (2, 1, 4), "ffn_channels": (1, 1, 96), "experts": (1, 2, 2),
                "expert_channels": (1, 4, 32), "shared_channels": (1, 1, 32),
            },
        ),
    ],
)  # fmt: skip
def test_every_kind_of_unit_that_a_model_can_lose(family, shapes):
    assert {name: units.shape for name, units in find_units(make(family)).items()} == shapes


def test_units_that_are_asked_for():
    model = make("qwen3", **GROUPED)
    assert {name: u.shape for name, u in find_units(model, ["query_heads"]).items()} == {"query_heads": (2, 4, 2)}
    assert list(find_units(make("deepseek_v3"), ["expert_channels"])) == ["expert_channels", "shared_channels"]  # tied
    with pytest.raises(EffpassError, match="unknown units 'kv_group', did you mean 'kv_groups'"):
        find_units(model, ["kv_group"])
    with pytest.raises(ModelError, match="has no experts to drop"):
        find_units(model, ["experts"])
    with pytest.raises(ModelError, match="their size is width / heads"):
        find_units(make("gpt2"), ["kv_groups"])


# -- masks ------------------------------------------------------------------------------------------------------------


def test_masks_go_over_from_soft_to_hard_and_gradients_pass_straight_through():
    model = make("llama")
    masks = Masks(model, find_units(model))
    soft = masks.soft["ffn_channels"]
    with torch.no_grad():
        soft[0, 0, :3] = torch.tensor([0.5, 0.25, 1.0])
    masks.hard["ffn_channels"][0, 0, :3] = torch.tensor([0.0, 1.0, 0.0])
    for softness, expected in ((1.0, [0.5, 0.25, 1.0]), (0.5, [0.25, 0.625, 0.5]), (0.0, [0.0, 1.0, 0.0])):
        masks.softness = softness
        value = masks.effective("ffn_channels")
        assert value[0, 0, :3].tolist() == expected
        (gradient,) = torch.autograd.grad((value * 3).sum(), soft)
        assert torch.equal(gradient, torch.full_like(soft, 3.0))


@pytest.mark.parametrize(
    ("family", "settings", "names"),
    [
        ("qwen3", GROUPED, ["kv_groups", "query_heads", "ffn_channels"]),
        ("gpt2", {}, []),
        ("mixtral", {}, []),
        ("deepseek_v3", {"n_routed_experts": 8}, []),
    ],
)
def test_a_model_under_hard_masks_is_the_cut_one(family, settings, names):
    """And under masks of 1, and without them again, it is what it was."""
    model = make(family, **settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate.weight"):
                p.normal_()
    before = logits(model)
    units = find_units(model, names)
    masks = Masks(model, units)
    with masks.attached():
        assert torch.equal(logits(model), before)
        scores = score_units("random", model, units, Calibration([], 1))
        shapes = Shapes(model.config, units, multiple=8)
        sizes = {size: numbers[len(numbers) // 2 - 1] for size, numbers in shapes.allowed.items()}
        kept = best_units(scores, units, shapes, sizes)
        masks.softness = 0.0
        for name, of_layers in kept.items():
            masks.hard[name] = torch.zeros(units[name].shape).scatter_(-1, torch.stack(list(of_layers.values())), 1.0)
        masks.refresh()
        masked = logits(model)
    assert torch.equal(logits(model), before)
    assert not [name for name, _ in model.named_parameters() if "parametrizations" in name]
    assert (masked - before).abs().max() > 0.01, "the masks must do something, or this test is empty"
    cut_model(model, keep_indices(model, units, kept))
    torch.testing.assert_close(logits(model), masked, rtol=0, atol=2e-6)


def test_a_router_of_another_kind_is_refused():
    model = make("mixtral")
    gate = model.model.layers[1].mlp.gate

    class MixtralTopKRouter(type(gate)):
        def forward(self, x):
            raw, weights, chosen = super().forward(x)
            return raw, weights * x.mean(-1, keepdim=True), chosen

    gate.__class__ = MixtralTopKRouter
    masks = Masks(model, find_units(model, ["experts"]))
    with pytest.raises(ModelError, match="MixtralTopKRouter chooses experts in a way that is not known here"):  # noqa: SIM117
        with masks.attached():
            pass
    assert "forward" not in model.model.layers[0].mlp.gate.__dict__


# -- scores -----------------------------------------------------------------------------------------------------------


def planted() -> tuple[Any, dict[str, torch.Tensor]]:
    """A model some of whose units do nothing, and which those are: True `[L, 1, N]` where a unit lives."""
    model = trainable("qwen3", num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    generator = torch.Generator().manual_seed(0)
    lives: dict[str, list[torch.Tensor]] = {"kv_groups": [], "ffn_channels": []}
    with torch.no_grad():
        for layer in model.model.layers:
            for family, linear, count in (
                ("kv_groups", layer.self_attn.o_proj, 4),
                ("ffn_channels", layer.mlp.down_proj, 96),
            ):
                alive = torch.zeros(count, dtype=torch.bool)
                alive[torch.randperm(count, generator=generator)[: count // 2]] = True
                width = linear.weight.shape[1] // count
                linear.weight.normal_(generator=generator).mul_(0.2 * alive.repeat_interleave(width))
                lives[family].append(alive[None])
    return model, {family: torch.stack(rows) for family, rows in lives.items()}


@pytest.mark.parametrize("method", ["taylor", "activation", "magnitude"])
def test_units_that_do_nothing_have_the_lowest_scores(method):
    model, lives = planted()
    units = find_units(model)
    found = score_units(method, model, units, Calibration([IDS, IDS.flip(0)]))
    for family, alive in lives.items():
        assert found[family][~alive].max() == 0 < found[family][alive].min()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_taylor_is_the_squared_derivative_of_the_loss_by_a_scale():
    model = trainable("llama")
    units = find_units(model)
    found = score_units("taylor", model, units, Calibration([IDS, IDS.flip(0)]))

    def loss(scale: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: (a[0] * scale,))
        try:
            out = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        return cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    ones = torch.ones(96, requires_grad=True)
    gradients = [torch.autograd.grad(loss(ones, ids), ones)[0] for ids in (IDS, IDS.flip(0))]
    expected = (gradients[0].square() + gradients[1].square()) / 2
    torch.testing.assert_close(found["ffn_channels"][1, 0], expected, rtol=1e-4, atol=1e-12)


def test_activation_is_the_size_of_what_a_unit_adds():
    model = make("mixtral")
    seen: dict[str, list[torch.Tensor]] = {}
    layer = model.model.layers[0]
    layer.self_attn.o_proj.register_forward_hook(lambda m, a, o: seen.setdefault("o", []).append(a[0]))
    layer.mlp.gate.register_forward_hook(lambda m, a, o: seen.setdefault("gate", []).append((a[0], o)))
    found = score_units("activation", model, find_units(model), Calibration([IDS]))
    inputs = seen["o"][0].flatten(0, 1)
    added = [
        inputs[:, d : d + 1].square().sum() * layer.self_attn.o_proj.weight[:, d].square().sum() for d in range(32)
    ]
    torch.testing.assert_close(found["kv_groups"][0, 0, 0], torch.stack(added).sum().sqrt())
    (hidden, (_, weights, chosen)) = seen["gate"][0]
    experts, total = layer.mlp.experts, torch.tensor(0.0)
    for token, place in zip(*torch.where(chosen == 2), strict=True):
        gate, up = (experts.gate_up_proj[2] @ hidden[token]).chunk(2)
        inner = torch.nn.functional.silu(gate[5]) * up[5] * weights[token, place]
        total += inner.square()
    expected = (total * experts.down_proj[2, :, 5].square().sum()).sqrt()
    torch.testing.assert_close(found["expert_channels"][0, 2, 5], expected, rtol=1e-4, atol=1e-9)


def test_random_units_are_those_of_the_seed():
    model = make("llama")
    units = find_units(model)
    one, same, other = (score_units("random", model, units, Calibration([], seed)) for seed in (1, 1, 2))
    assert torch.equal(one["ffn_channels"], same["ffn_channels"])
    assert not torch.equal(one["ffn_channels"], other["ffn_channels"])


def test_the_layer_that_does_nothing_goes_first():
    model = trainable("llama", num_hidden_layers=4)
    with torch.no_grad():
        for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            linear.weight.zero_()
    units = find_units(model)
    cost = parameter_cost(model, units)
    assert best_layers(model, units, Calibration([IDS]), layer_count(cost, 4, 0.75)) == [0, 1, 3]
    with pytest.raises(
        EffpassError, match=r"no number of layers keeps 0\.6 of the parameters: the nearest is 2 of 4, 0\.5"
    ):
        layer_count(cost, 4, 0.6)
    with pytest.raises(EffpassError, match=r"no number of layers keeps 0\.5"):
        layer_count(cost, 1, 0.5)
    half_outside = Cost("time", (Term(10.0),), outside=5.0)
    assert layer_count(half_outside, 4, 0.75) == 2


# -- costs and shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "sizes"),
    [
        ("qwen3", GROUPED, {"kv_groups": 2, "query_heads": 1, "ffn_channels": 40}),
        ("gpt2", {}, {"ffn_channels": 64}),
        (
            "deepseek_v3", {"n_routed_experts": 8},
            {"kv_groups": 3, "ffn_channels": 48, "experts": 2, "expert_channels": 16},
        ),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_cut_model(family, settings, sizes):
    model = make(family, **settings)
    units = find_units(model, list(sizes))
    cost, shapes = parameter_cost(model, units), Shapes(model.config, units, multiple=8)
    layers = [p for n, p in model.named_parameters() if "layers." in n or ".h." in n]
    before = sum(p.numel() for p in layers)
    kept = best_units(score_units("random", model, units, Calibration([])), units, shapes, sizes)
    cut_model(model, keep_indices(model, units, kept))
    after = sum(p.numel() for n, p in model.named_parameters() if "layers." in n or ".h." in n)
    assert cost.share(shapes.share(sizes)) == pytest.approx(after / before, abs=1e-12)
    assert cost.share({}) == 1


@pytest.mark.parametrize("unit", ["bytes", "latency"])
def test_a_step_s_cost_is_that_of_the_cut_model(unit, monkeypatch):
    """Predicted from one trace of the whole model, against a trace of the cut one."""
    monkeypatch.setattr(step_cost_module, "ceilings", lambda device, dtype: known("h100"))
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = make("qwen3", **wide, head_dim=64, num_hidden_layers=2)
    units = find_units(model)
    cost = step_cost(model, units, unit, 1, 64)
    sizes = {"kv_groups": 2, "ffn_channels": 1024}
    shares = {"kv_groups": 0.5, "ffn_channels": 0.5}
    kept = best_units(score_units("random", model, units, Calibration([])), units, Shapes(model.config, units), sizes)
    cut_model(model, keep_indices(model, units, kept))
    smaller = step_cost(model, find_units(model), unit, 1, 64)
    total, left = (sum(term.amount for term in c.terms) for c in (cost, smaller))
    assert left < 0.97 * total
    # Of time, what a kernel of activations alone takes is a latency either way.
    assert cost.share(shares) == pytest.approx(left / total, rel=1e-12 if unit == "bytes" else 0.01)


def test_experts_that_no_token_chooses_save_no_bytes(monkeypatch):
    monkeypatch.setattr(step_cost_module, "ceilings", lambda device, dtype: known("h100"))
    model = make("qwen3_moe")
    units = find_units(model)
    one, many = (step_cost(model, units, "bytes", rows, 32) for rows in (1, 4))
    assert one.share({"experts": 0.5}) > 0.98 > 0.9 > many.share({"experts": 0.5})


def test_sizes_that_kernels_devices_and_configs_take():
    model = make("llama", num_attention_heads=8, num_key_value_heads=4, intermediate_size=1536)
    units = find_units(model)
    shapes = Shapes(model.config, units)
    assert shapes.allowed["kv_groups"] == (1, 2, 4)  # Llama wants its width of 64 divisible by the number of heads
    assert shapes.allowed["ffn_channels"] == tuple(range(64, 1537, 64))
    shared = Shapes(model.config, units, multiple=128, devices=2)
    assert shared.allowed == {"kv_groups": (2, 4), "ffn_channels": tuple(range(128, 1537, 128))}
    wide = make("llama", intermediate_size=2048)
    assert Shapes(wide.config, find_units(wide)).allowed["ffn_channels"][0] == 128
    experts = make("deepseek_v3", n_routed_experts=16)
    assert Shapes(experts.config, find_units(experts)).allowed["experts"] == tuple(range(2, 9))  # of each of two groups
    with pytest.raises(EffpassError, match="no units can go"):
        Shapes(model.config, units, multiple=2048, devices=4)
    with pytest.raises(EffpassError, match="no number of kv_groups up to 4 can be shared by 8 devices"):
        Shapes(model.config, units, devices=8)
    three = make("qwen3", num_attention_heads=6, num_key_value_heads=3, head_dim=8)  # all three can't be shared either
    assert Shapes(three.config, find_units(three), devices=2).allowed["kv_groups"] == (2,)


def test_heads_that_only_together_make_no_config():
    """Llama wants its width of 96 divisible by the number of heads: 3 groups of 4 heads or 4 of 3, and not 3 of 3."""
    model = make("llama", hidden_size=96, num_attention_heads=16, num_key_value_heads=4, head_dim=8)
    units = find_units(model, ("kv_groups", "query_heads"))
    cost, shapes = parameter_cost(model, units), Shapes(model.config, units)
    assert shapes.allowed == {"kv_groups": (1, 2, 3, 4), "query_heads": (1, 2, 3, 4)}
    wanted = {"kv_groups": 0.75, "query_heads": 0.75}
    sizes = shapes.nearest(cost, cost.share(wanted), wanted)
    assert 96 % (sizes["kv_groups"] * sizes["query_heads"]) == 0
    assert sizes not in ({"kv_groups": 3, "query_heads": 3}, shapes.counts)


def test_the_shape_next_to_what_is_wanted_costs_what_is_asked_for():
    model = make("qwen3", num_attention_heads=8, num_key_value_heads=4, head_dim=8, intermediate_size=1536)
    units = find_units(model)
    cost, shapes = parameter_cost(model, units), Shapes(model.config, units)
    for wanted, groups in ((1.0, 4), (0.5, 2), (0.7, 3)):
        sizes = shapes.nearest(cost, 0.6, {"kv_groups": wanted, "ffn_channels": 0.6})
        assert sizes["kv_groups"] == groups
        assert cost.share(shapes.share(sizes)) == pytest.approx(0.6, abs=0.02)
    assert shapes.nearest(cost, 0.6, {"kv_groups": 1, "ffn_channels": 1}, {"kv_groups": 0.3})["kv_groups"] == 1
    with pytest.raises(
        EffpassError, match=r"no shape keeps 0\.02 of the parameters: the nearest keeps 0\.05\d \(kv_groups 1"
    ):
        shapes.nearest(cost, 0.02, {"kv_groups": 1, "ffn_channels": 1})
    with pytest.raises(EffpassError, match=r"the nearest keeps 0\.\d+ .*\n.*--keep 0\."):
        Shapes(model.config, units, multiple=768).nearest(
            cost, 0.8, {"kv_groups": 1, "ffn_channels": 0.5}, {"kv_groups": 0.99}
        )
    sizes = shapes.nearest(cost, 0.995, {"kv_groups": 1, "ffn_channels": 1})
    assert sizes != shapes.counts, "something goes"
    with pytest.raises(EffpassError, match="single kinds leaves kv_groups 4 of 4, ffn_channels 1536 of 1536"):
        shapes.nearest(cost, 0.7, {}, {"kv_groups": 0.9, "ffn_channels": 0.99})


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_loss_in_pieces_is_the_loss(family, monkeypatch):
    settings = {"final_logit_softcapping": 2.0} if family == "gemma3" else {}
    student, teacher = trainable(family, **settings), make(family, seed=1, **settings)
    check_head(student)
    monkeypatch.setattr("effpass.trainers.pruning.distillation.PIECE", 96 * 7)
    loss, parts = Distillation(0.5, 2.0, 3.0).loss(student, teacher, IDS)
    ours, theirs = (m(input_ids=IDS, use_cache=False, output_hidden_states=True) for m in (student, teacher))
    labels = IDS[:, 1:].flatten()
    task = cross_entropy(ours.logits[:, :-1].flatten(0, 1), labels)
    p, q = (o.logits[:, :-1].log_softmax(-1) for o in (theirs, ours))
    logit = (p.exp() * (p - q)).sum(-1).mean()
    pairs = zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    hidden = torch.stack([(a - b).square().mean() / b.square().mean() for a, b in pairs]).mean()
    for name, expected in (("task", task), ("logits", logit), ("hidden", hidden)):
        torch.testing.assert_close(parts[name], expected.detach(), rtol=1e-5, atol=1e-7)
    expected = 0.5 * task + 2 * logit + 3 * hidden
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    wanted = torch.autograd.grad(expected, list(student.parameters()))
    loss.backward()
    for parameter, gradient in zip(student.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_teacher_of_another_depth_has_no_hidden_part_and_other_heads_are_refused():
    student, teacher = trainable("llama"), make("llama", num_hidden_layers=3)
    assert Distillation().loss(student, teacher, IDS)[1].keys() == {"task", "logits"}
    student.lm_head.register_forward_hook(lambda m, a, o: o if a[0].shape[1] == 1 else o * 2)
    student.forward = _scaled(student.forward)
    with pytest.raises(ModelError, match="computes its logits in a way that is not known"):
        check_head(student)
    with pytest.raises(EffpassError, match="both the task and the logits have weight 0"):
        Distillation(0, 0, 1)


def _scaled(forward: Any) -> Any:
    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    return scaled


# -- minimax ----------------------------------------------------------------------------------------------------------


def learn(
    model: Any, keep: float, steps: int = 60, lr: float = 1e-3, **options: Any
) -> tuple[Minimax, list[dict[str, float]]]:
    """The learner over a model whose weights learn too, on one batch; what it logged."""
    units = find_units(model, options.pop("units", ()))
    cost, shapes = parameter_cost(model, units), Shapes(model.config, units, multiple=8)
    masks = Masks(model, units)
    learner = Minimax(masks, cost, shapes, keep, steps, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    lines = []
    with masks.attached():
        for step in range(steps):
            masks.refresh()
            ids = IDS.roll(step, 1)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            learner.step()
            lines.append(learner.metrics())
    return learner, lines


def test_the_learner_keeps_the_units_that_do_something():
    model, lives = planted()
    learner, lines = learn(model, 0.5, lr=0.0, keep_of={"kv_groups": 0.5})
    assert learner.sizes == {"kv_groups": 2, "ffn_channels": 48}
    kept = learner.kept()
    for family, alive in lives.items():
        for row, index in zip(alive, kept[family].values(), strict=True):
            assert sorted(index[0].tolist()) == row[0].nonzero().flatten().tolist()
    assert [line["softness"] for line in lines][-1] == 0
    assert lines[-1]["cost"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("keep", [0.7, 0.4])
def test_the_budget_is_met_before_the_model_closes(keep):
    """Sizes, still fractions, cost what was asked for; after that they are a shape, alike in every layer."""
    learner, lines = learn(trainable("qwen3", **GROUPED), keep, steps=120)
    closing = int(learner.rates.closing * 120)
    assert lines[0]["cost"] == 1
    assert lines[closing - 2]["cost"] == pytest.approx(keep, abs=0.06)
    assert lines[-1]["cost"] == pytest.approx(keep, abs=0.02)
    assert min(line["cost"] for line in lines) > keep - 0.15, "the multiplier winds up"
    for family, of_layers in learner.kept().items():
        assert {index.shape for index in of_layers.values()} == {(1, learner.sizes[family])}


def test_a_multiplier_stands_still_while_sizes_can_not_follow():
    """As long as every size moves at full speed, the pressure says nothing new."""
    model = trainable("llama")
    units = find_units(model, ["ffn_channels"])
    masks = Masks(model, units)
    shapes = Shapes(model.config, units, multiple=8)
    learner = Minimax(masks, parameter_cost(model, units), shapes, 0.5, 100)
    learner.importance = {"ffn_channels": torch.full((2, 1, 96), 1e-12)}
    learner.pressure = {"": 1.0}
    learner._move_sizes()
    assert learner.pressure == {"": 1.0}
    assert learner.removed["ffn_channels"] == pytest.approx(Rates().sizes / 100)
    learner.importance = {"ffn_channels": torch.ones(2, 1, 96)}
    learner.removed = {"ffn_channels": 0.75}
    price = float(learner.prices("ffn_channels", {"ffn_channels": 0.25})[0])
    learner.pressure = {"": price}
    learner._move_sizes()
    assert learner.pressure[""] > price, "the budget is not met yet"


def test_masks_that_go_shrink_by_the_proximal_step_and_the_others_by_nothing():
    model = trainable("llama")
    masks = Masks(model, find_units(model, ["ffn_channels"]))
    shapes = Shapes(model.config, masks.units, multiple=8)
    learner = Minimax(masks, parameter_cost(model, masks.units), shapes, 0.5, 100)
    learner.importance["ffn_channels"] = torch.arange(96.0).expand(2, 1, 96).clone() + 1
    learner.removed["ffn_channels"] = 10.5 / 96
    masks.soft["ffn_channels"].grad = torch.zeros(2, 1, 96)
    with torch.no_grad():
        learner._move_masks()
    shrunk = 1 / (1 + 2 * Rates().masks / 100 * 10.0)
    found = masks.soft["ffn_channels"][1, 0]
    torch.testing.assert_close(found[:10], torch.full((10,), shrunk))
    assert float(found[10].detach()) == pytest.approx(1 / (1 + 2 * Rates().masks / 100 * 10.0 * 0.5))  # half of it goes
    assert bool((found[11:] == 1).all())


def test_the_learner_goes_on_to_the_bit_and_ends_only_when_it_is_done():
    whole, lines = learn(trainable("llama"), 0.6, steps=40)
    model = trainable("llama")
    units = find_units(model)
    cost, shapes = parameter_cost(model, units), Shapes(model.config, units, multiple=8)

    def run(learner: Minimax, model: Any, first: int, last: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with learner.masks.attached():
            for step in range(first, last):
                learner.masks.refresh()
                ids = IDS.roll(step, 1)
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                learner.step()

    first = Minimax(Masks(model, units), cost, shapes, 0.6, 40)
    run(first, model, 0, 29)
    with pytest.raises(EffpassError, match="the masks are learned for 29 of 40 steps"):
        first.kept()
    tensors, plain = first.state_dict()
    tensors = {name: t.clone() for name, t in tensors.items()}
    model = copy.deepcopy(model)
    second = Minimax(Masks(model, units), cost, shapes, 0.6, 40)
    second.load_state_dict(tensors, plain)
    run(second, model, 29, 40)
    assert second.metrics() == lines[-1]
    for family, of_layers in second.kept().items():
        assert all(torch.equal(a, b) for a, b in zip(of_layers.values(), whole.kept()[family].values(), strict=True))
    second.masks.softness = 0.5
    with pytest.raises(EffpassError, match="that are to be 0 are 0"):
        second.kept()


@pytest.mark.parametrize("changes", [{"closing": 0.95}, {"frozen": 1.0}, {"warmup": 0.7}])
def test_rates_out_of_order_are_refused(changes):
    with pytest.raises(EffpassError, match="0 < warmup < closing < frozen < 1"):
        Rates(**changes)


def test_experts_and_their_channels_are_learned_together():
    model = trainable("qwen3_moe", num_experts=8)
    learner, lines = learn(model, 0.6, steps=60)
    assert lines[-1]["cost"] == pytest.approx(0.6, abs=0.02)
    kept = learner.kept()
    before = copy.deepcopy(model)
    cut_model(model, keep_indices(before, learner.masks.units, kept))
    assert hidden_states(model, IDS)[-1].shape == (2, 16, 64)
    assert model.config.num_experts == learner.sizes["experts"] < 8 or learner.sizes["expert_channels"] < 32


@pytest.mark.parametrize(
    ("count", "multiple"), [(8, 1), (48, 8), (200, 8), (600, 32), (1536, 64), (4096, 128), (11000, 64), (11008, 128)]
)
def test_channels_are_kept_in_multiples_that_kernels_like(count: int, multiple: int) -> None:
    assert _multiple(count) == multiple
