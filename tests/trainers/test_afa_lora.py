"""AFA adapters: what they compute, how they end, and what is refused on the way."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from families import batch, make
from torch import nn

import effpass
from effpass.core.errors import ArtifactError, EffpassError, ModelError
from effpass.passes.weights.peft_adapter import read_adapter
from effpass.trainers import MONA
from effpass.trainers.afa_lora import AfaLora, AnnealSchedule, LoraSettings, add_lora, attach
from effpass.trainers.afa_lora.variant import annealed

peft = pytest.importorskip("peft")

# Float32 logits of size one, summed in another order.
ROUNDING = 5e-6


def stirred(adapter: AfaLora, seed: int = 1) -> AfaLora:
    """Both factors at random, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def advanced(adapter: AfaLora, steps: int) -> AfaLora:
    for _ in range(steps):
        adapter.step()
    return adapter


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(12), use_cache=False).logits


def saved(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_schedules_fall_from_one_to_exactly_zero():
    linear = AnnealSchedule(10, start=0.2, end=0.7, kind="linear")
    assert [linear.beta(i) for i in range(10)] == [1, 1, 1, 0.8, 0.6, 0.4, pytest.approx(0.2), 0, 0, 0]
    cosine = AnnealSchedule(100, end=0.5)
    assert cosine.last == 50
    assert [cosine.beta(i) for i in (0, 50, 99)] == [1, 0, 0]
    assert cosine.beta(25) == pytest.approx(0.5)
    assert cosine.beta(10) == pytest.approx((1 + math.cos(math.pi / 5)) / 2)


def test_a_held_beta_changes_only_between_cycles():
    schedule = AnnealSchedule(24, end=0.5, kind="linear", hold=4)
    found = [schedule.beta(i) for i in range(24)]
    assert all(len(set(found[i : i + 4])) == 1 for i in range(0, 24, 4))
    assert found[::4] == [1, pytest.approx(2 / 3), pytest.approx(1 / 3), 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "anneal steps: got 0"),
        ({"steps": 10, "end": 0.95}, "anneal from 0.0 to 0.95"),
        ({"steps": 10, "start": 0.5, "end": 0.4}, "anneal from 0.5 to 0.4"),
        ({"steps": 1}, "1 steps, with β held for 1, leave none at β = 0"),
        ({"steps": 8, "hold": 8}, "8 steps, with β held for 8, leave none"),
        ({"steps": 8, "kind": "exp"}, "anneal kind: got 'exp'"),
    ],
)
def test_schedules_that_leave_no_linear_steps_are_refused(options, says):
    with pytest.raises(EffpassError, match=says):
        AnnealSchedule(**options)


# -- what a layer computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_a_layer_is_the_formula(activation):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5)).double()
    plain = copy.deepcopy(base)
    adapter = attach(
        base, AnnealSchedule(10, end=0.8, kind="linear"), LoraSettings(3, alpha=7.5), activation=activation
    )
    stirred(adapter)
    advanced(adapter, 6)
    a, b = (p.detach().double() for p in adapter.parameters())
    x = torch.randn(4, 6, dtype=torch.float64)
    z = x @ a.T
    sigma = {
        "relu": z.clamp(min=0),
        "silu": z * torch.sigmoid(z),
        "gelu": 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    }[activation]
    assert adapter.beta == pytest.approx(0.25)
    wanted = plain(x) + 7.5 / 3 * (z + 0.25 * (sigma - z)) @ b.T
    assert torch.allclose(base(x).double(), wanted, atol=1e-5)  # the adapter computes in float32


def test_a_bias_of_b_is_scaled_as_by_peft():
    torch.manual_seed(0)
    plain = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 5)), peft.LoraConfig(r=3, lora_alpha=7.5, lora_bias=True, target_modules=["0"])
    )
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 6)
    wanted = plain(x)
    adapter = advanced(AfaLora(plain, AnnealSchedule(4, end=0.5)), 4)
    assert torch.equal(adapter.model(x), wanted)


def test_beta_zero_is_the_identity_to_the_bit():
    z = torch.randn(1000, dtype=torch.bfloat16) * 30
    for activation in ("relu", "silu", "gelu"):
        assert torch.equal(annealed(z, torch.tensor(0.0), activation), z)


def test_attaching_changes_no_output_and_freezes_the_rest():
    model = make("llama")
    before = logits(model)
    adapter = attach(model, AnnealSchedule(10))
    assert torch.equal(logits(model), before)
    assert len(adapter.parameters()) == 2 * 14
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_beta_follows_the_model_in_place_and_keeps_its_type():
    model = make("llama")
    adapter = attach(model, AnnealSchedule(10))
    (buffer,) = [b for name, b in model.named_buffers() if "afa" in name]
    adapter.step()
    assert float(buffer) == pytest.approx(adapter.beta) == pytest.approx(0.75)
    model.to(torch.bfloat16)
    assert adapter.anneal.beta is buffer
    assert buffer.dtype == torch.float32
    assert not any("afa" in name for name in model.state_dict())
    other = copy.deepcopy(model)
    advanced(adapter, 5)
    assert [float(b) for name, b in other.named_buffers() if "afa" in name] == [pytest.approx(0.75)]
    assert float(buffer) == 0
    adapter.finish()
    assert not [name for name, _ in model.named_buffers() if "afa" in name]


def test_one_compilation_for_the_whole_anneal():
    model = make("llama")
    adapter = attach(model, AnnealSchedule(8, end=0.75))
    optimizer = MONA(adapter.model, lr=1e-2)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    betas = []
    for _ in range(8):
        betas.append(adapter.beta)
        compiled(**batch(12), labels=batch(12)["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        adapter.step()
    assert len(set(betas)) == 7
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_layer_without_a_frame_around_it_takes_an_adapter():
    """A draft head, or any other module."""
    head = nn.ModuleDict({"up": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "down": nn.Linear(16, 8, bias=False)})
    plain = copy.deepcopy(head)
    adapter = stirred(attach(head, AnnealSchedule(4, end=0.5), LoraSettings(2, targets=("down",))))
    assert len(adapter.parameters()) == 2
    advanced(adapter, 4)
    x = torch.randn(3, 16)
    a, b = (p.detach() for p in adapter.parameters())
    merged = adapter.merge()
    assert merged is head
    assert type(head["down"]) is nn.Linear
    assert torch.allclose(head["down"](x), plain["down"](x) + 2 * x @ a.T @ b.T, atol=1e-6)


def test_routers_heads_and_stacked_experts_are_left_alone():
    model = make("qwen3_moe")
    adapter = attach(model, AnnealSchedule(4), LoraSettings(2))
    adapted = {
        name.partition(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(adapter.parameters()) == 2 * 4 * 2


def test_layers_that_peft_takes_for_experts_are_left_alone_and_refused_by_name():
    """PEFT would put an adapter on the stacked experts in the place of dense and shared feed-forward layers."""
    model = make("deepseek_v3")
    attach(model, AnnealSchedule(4), LoraSettings(2))
    adapted = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapted) == 2 * 5
    assert all(".self_attn." in name for name in adapted)
    whole = make("deepseek_v3")
    for targets in (("o_proj", "down_proj"), ("model.layers.0.mlp.down_proj",)):
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj can have no adapter: PEFT takes its name"):
            add_lora(whole, LoraSettings(2, targets=targets))
    assert not [name for name, _ in whole.named_parameters() if "lora" in name]


# -- how it ends ------------------------------------------------------------------------------------------------------


def test_the_file_is_stock_lora_that_peft_loads_and_merges_and_merge_lora_folds(tmp_path):
    model = make("llama")
    adapter = advanced(stirred(attach(model, AnnealSchedule(10), LoraSettings(4))), 10)
    annealed_logits = logits(model)
    folder = adapter.save(tmp_path / "adapter")
    assert torch.equal(logits(model), annealed_logits)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not [key for key in config if "afa" in key]
    assert config["r"] == 4
    assert config["lora_alpha"] == 8
    assert len(read_adapter(folder).updates) == 14
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(make("llama"), folder)
    assert torch.equal(logits(loaded), annealed_logits)
    assert (logits(loaded.merge_and_unload()) - annealed_logits).abs().max() < ROUNDING
    folded = effpass.prepare(make("llama"), {"version": 1, "passes": [{"merge_lora": {"adapter": str(folder)}}]})
    difference = (logits(folded) - annealed_logits).abs().max()
    assert difference < ROUNDING < (logits(make("llama")) - annealed_logits).abs().max()
    assert (logits(adapter.merge()) - annealed_logits).abs().max() < ROUNDING


def test_saves_and_merges_are_refused_or_flagged_while_beta_is_positive(tmp_path):
    model = make("llama")
    adapter = advanced(stirred(attach(model, AnnealSchedule(10, end=0.5))), 2)
    before = logits(model)
    with pytest.raises(EffpassError, match=r"β is 0\.655 after 2 of 10 steps, and 0 only from step 5 on"):
        adapter.save(tmp_path / "a")
    for merge in (adapter.merge, adapter.model.merge_and_unload, adapter.model.merge_adapter):
        with pytest.raises(EffpassError, match=r"annealed to β = 0\.655 and not to 0"):
            merge()
    prepared = {"version": 1, "passes": [{"merge_lora": {}}]}
    with pytest.raises(EffpassError, match="its activation is still annealed"):
        effpass.prepare(model, {**prepared, "passes": [{"merge_lora": {"require": True}}]})
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model), before)
    flagged = saved(adapter.model, tmp_path / "flagged")
    assert json.loads((flagged / "adapter_config.json").read_text())["effpass_afa"]["steps_done"] == 2
    with pytest.raises(ArtifactError, match=r"saved while its activation was annealed \(AFA-LoRA, β = 0\.65"):
        read_adapter(flagged)
    with pytest.warns(UserWarning, match="effpass_afa"):
        peft.PeftModel.from_pretrained(make("llama"), flagged)
    advanced(adapter, 3)
    read_adapter(saved(adapter.model, tmp_path / "whole"))


def test_what_stands_in_the_way_stays(tmp_path):
    adapter = advanced(attach(make("llama"), AnnealSchedule(2, end=0.5)), 2)
    with pytest.raises(EffpassError, match="exists"):
        adapter.save(tmp_path)


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_state_goes_on_with_the_same_schedule_alone():
    schedule = AnnealSchedule(10, end=0.5)
    state = json.loads(json.dumps(advanced(attach(make("llama"), schedule), 2).state_dict()))
    again = attach(make("llama"), schedule)
    again.load_state_dict(state)
    assert again.beta == schedule.beta(2) == pytest.approx(float(again.anneal.beta))
    other = attach(make("llama"), AnnealSchedule(12, end=0.5, kind="linear"))
    with pytest.raises(ArtifactError, match="steps 10 -> 12, kind cosine -> linear"):
        other.load_state_dict(state)
    assert other.steps_done == 0


class _KilledError(Exception):
    pass


def test_beta_follows_the_steps_of_a_trainer_and_its_resume(tmp_path):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    samples = [{"input_ids": batch(9)["input_ids"][0], "labels": batch(9)["input_ids"][0]}] * 32

    def train(folder: str, *, resume: bool = False, stop: int | None = None) -> tuple[AfaLora, list[float]]:
        torch.manual_seed(0)
        adapter = attach(make("llama"), AnnealSchedule(8, end=0.75), LoraSettings(2))
        seen = []

        class Watch(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                seen.append(adapter.beta)
                if state.global_step == stop:
                    raise _KilledError

        args = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=8, per_device_train_batch_size=2, save_steps=2,
            report_to="none", disable_tqdm=True, use_cpu=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(adapter.model, args, train_dataset=samples, callbacks=[adapter.callback(), Watch()])
        try:
            trainer.train(resume_from_checkpoint=resume)
        except _KilledError:
            assert stop is not None
        return adapter, seen

    whole, betas = train("whole")
    assert betas == [whole.schedule.beta(i) for i in range(8)]
    train("cut", stop=5)
    again, rest = train("cut", resume=True)
    assert rest == betas[4:]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    again.save(tmp_path / "adapter")


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_other_adapters_and_quantized_layers_are_refused():
    schedule = AnnealSchedule(4)
    with pytest.raises(EffpassError, match="unknown activation 'rellu', did you mean 'relu'"):
        attach(make("llama"), schedule, activation="rellu")
    with pytest.raises(ModelError, match="no linear layer of LlamaForCausalLM is called 'query'"):
        attach(make("llama"), schedule, LoraSettings(targets="query"))
    once = attach(make("llama"), schedule)
    with pytest.raises(ModelError, match="adapters attached already"):
        attach(once.model.get_base_model(), schedule)
    dora = peft.get_peft_model(make("llama"), peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"q_proj is no plain LoRA on a linear layer \(Linear, DoraLinearVariant\)"):
        AfaLora(dora, schedule)
    with pytest.raises(ModelError, match="takes a PeftModel with one adapter, got Linear"):
        AfaLora(nn.Linear(2, 2), schedule)
    quantized = make("llama")
    layer = quantized.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj is quantized"):
        attach(quantized, schedule)
    assert not [name for name, _ in quantized.named_modules() if "lora" in name]
