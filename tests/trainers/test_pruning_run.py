"""`effpass train prune`: runs that end, resume and load again, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from tiny_tuning import checkpoint, metrics, quiet, weights

import effpass
from effpass.core.errors import EffpassError, ModelError
from effpass.passes.weights.keep_indices import KeepIndices
from effpass.passes.weights.structured_pruning import save_pruned
from effpass.trainers.afa_lora import LoraSettings
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.loop import Loop
from effpass.trainers.pruning import run as pruning_run
from effpass.trainers.pruning import stages
from effpass.trainers.pruning.run import prune
from effpass.trainers.pruning.settings import Settings

SETTINGS = Settings(
    OptimizerConfig(lr=3e-3, name="adamw", weight_decay=0.0), keep=0.7, recovery="afa-lora", steps=30, learning=0.5,
    batch=4, accumulate=2, sequence_length=32, calibration=2, warmup=2, lora=LoraSettings(4, dropout=0.1), log_every=3,
    save_every=6,
)  # fmt: skip
GROUPS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"), "qwen3", **GROUPS)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} plus {i % 7} makes {i + i % 7}. " for i in range(400)))
    return path


def run(model: Path, text: Path, folder: Path, settings: Settings = SETTINGS, **options: Any) -> Path:
    options = {"save_model": folder / "model", "validation": text, "say": quiet, **options}
    return prune(str(model), text, folder / "keep", settings, **options)


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(model, text, folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).view(2, 20), use_cache=False).logits


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_an_artifact_for_the_whole_model_and_a_stock_checkpoint(finished, model):
    keep = KeepIndices.load(finished / "keep")
    assert keep.after.intermediate_size < 96 or keep.after.num_key_value_heads < 4
    files = {"effpass.json", "effpass.safetensors", "training.json", "metrics.jsonl", "loss.png", "kept.png"}
    assert {path.name for path in (finished / "keep").iterdir()} == files
    assert not (finished / "keep.training").exists()
    record = json.loads((finished / "keep" / "training.json").read_text())
    lines = metrics(finished / "keep")
    whole, cut, recovered = (record["final"][f"eval_loss_{name}"] for name in ("whole", "cut", "recovered"))
    assert recovered < cut < whole + 1
    assert [line["step"] for line in lines if "eval_loss_recovered" in line] == [30]
    (last,) = [line for line in lines if line["step"] == 15 and "cost" in line]
    assert last["cost"] == pytest.approx(0.7, abs=0.02)
    assert last["softness"] == 0

    from transformers import AutoModelForCausalLM

    smaller, info = AutoModelForCausalLM.from_pretrained(finished / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (smaller.config.num_key_value_heads, smaller.config.intermediate_size) == (
        keep.after.num_key_value_heads, keep.after.intermediate_size,
    )  # fmt: skip
    names = {path.name for path in (finished / "model").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= names
    assert smaller.config.use_cache
    ids = torch.arange(8)[None]
    assert smaller.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 12)
    # The artifact cuts the whole model to the same shapes; its weights are those before any training.
    recipe = {"version": 1, "passes": [{"structured_pruning": {"artifact": str(finished / "keep")}}]}
    applied = effpass.prepare(effpass.load_model(model).model, recipe)
    assert {n: p.shape for n, p in applied.named_parameters()} == {n: p.shape for n, p in smaller.named_parameters()}
    assert not torch.equal(logits(applied), logits(smaller))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_the_checkpoint_is_the_masked_model_and_trains_on_as_it_does(family, tmp_path):
    """Its logits, its text, and a step of the Trainer on it; none of them needs more than transformers."""
    from transformers import AutoModelForCausalLM

    extra = {"qwen3": GROUPS, "qwen3_moe": {"num_experts": 8}, "deepseek_v3": {"n_routed_experts": 8}}[family]
    folder = checkpoint(tmp_path / "model", family, **extra)
    whole, masked = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    problem = stages.state_problem(whole, SETTINGS)
    learned = stages.choose(whole, problem, replace(SETTINGS, choose="random"), _Calibration())
    stages.cut_model(whole, learned.keep)
    save_pruned(whole, tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    masks = stages.hard_masks(masked, problem, learned)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = torch.arange(8)[None]
    with masks.attached():
        torch.testing.assert_close(logits(small), logits(masked), rtol=0, atol=1e-5)
        assert torch.equal(small.generate(ids, **options), masked.generate(ids, **options))
        _train_one_step(masked, tmp_path / "masked")
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    _train_one_step(small, tmp_path / "trained")
    stages.cut_model(masked, learned.keep)
    for (name, ours), theirs in zip(small.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in small.named_parameters()}
    readers = [name for name in moved if "o_proj" in name or "down_proj" in name]
    assert readers
    assert all(moved[name] > 1e-3 for name in readers), "the step must move them, or this test is empty"


def _train_one_step(model: Any, folder: Path) -> None:
    """Of plain gradient descent: an adaptive step blows the rounding of small gradients up."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(folder), max_steps=1, optim="sgd", learning_rate=5.0, report_to="none", use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(8)]
    Trainer(model, args, train_dataset=rows).train()


class _KilledError(Exception):
    pass


def stop_after(monkeypatch, steps: int) -> None:
    """Kill the run in the step that follows `steps` calls of a training step."""
    original, done = Loop.training_step, [0]

    def step(self, *args, **kwargs):
        if done[0] == steps * self.args.gradient_accumulation_steps:
            raise _KilledError
        done[0] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "training_step", step)


def _killed(*args):
    raise _KilledError


def test_an_interrupted_run_resumes_to_the_bit(model, text, finished, tmp_path, monkeypatch):
    """Killed while masks are learned, after the cut, while the activation is annealed, and between the two outputs."""
    stop_after(monkeypatch, 14)  # two steps after the second checkpoint
    with pytest.raises(_KilledError):
        run(model, text, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "keep.training" / "learning").exists()
    assert not (tmp_path / "keep").exists()
    stop_after(monkeypatch, 3 + 8)  # 12 to 15, and eight of the second loop
    with pytest.raises(_KilledError):
        run(model, text, tmp_path, resume=True)
    monkeypatch.undo()
    assert (tmp_path / "keep.training" / "keep").exists()
    monkeypatch.setattr(pruning_run, "_publish", _killed)
    with pytest.raises(_KilledError):
        run(model, text, tmp_path, resume=True)
    monkeypatch.undo()
    assert (tmp_path / "model").exists()
    with pytest.raises(EffpassError, match="exists"):
        run(model, text, tmp_path, resume=True, save_model=finished / "model")
    run(model, text, tmp_path, resume=True)
    assert metrics(tmp_path / "keep") == metrics(finished / "keep")
    for name in ("keep", "model"):
        one, two = weights(tmp_path / name), weights(finished / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_resume_with_other_settings_is_refused(model, text, tmp_path, monkeypatch):
    stop_after(monkeypatch, 3)
    with pytest.raises(_KilledError):
        run(model, text, tmp_path)
    monkeypatch.undo()
    with pytest.raises(EffpassError, match=r"keep 0\.7 -> 0\.6"):
        run(model, text, tmp_path, replace(SETTINGS, keep=0.6), resume=True)
    with pytest.raises(EffpassError, match="saves True -> False"):
        run(model, text, tmp_path, resume=True, save_model=None)
    with pytest.raises(EffpassError, match="holds a run that did not end"):
        run(model, text, tmp_path)


@pytest.mark.parametrize("choose", ["taylor", "activation"])
def test_other_choosers_cut_at_once_and_keep_the_same_share_of_everything(model, text, tmp_path, choose):
    said: list[str] = []
    run(model, text, tmp_path, replace(SETTINGS, choose=choose), save_model=None, say=said.append)
    assert any("3 of 4 kv_groups, 64 of 96 ffn_channels; 0.70" in line for line in said)
    assert not (tmp_path / "model").exists()
    assert KeepIndices.load(tmp_path / "keep").after.num_key_value_heads == 3


def test_whole_layers_go_and_recover_in_the_same_way(model, text, tmp_path):
    run(model, text, tmp_path, replace(SETTINGS, choose="depth", keep=0.5, steps=20, recovery="lora"))
    smaller = effpass.load_model(tmp_path / "model").model
    assert smaller.config.num_hidden_layers == 1
    (kept,) = KeepIndices.load(tmp_path / "keep").layers
    recipe = {"version": 1, "passes": [{"structured_pruning": {"artifact": str(tmp_path / "keep")}}]}
    whole = effpass.load_model(model).model
    layer = whole.model.layers[kept]
    applied = effpass.prepare(whole, recipe)
    assert applied.model.layers[0] is layer
    lines = metrics(tmp_path / "keep")
    assert lines[-1]["eval_loss_recovered"] < next(line["eval_loss_cut"] for line in lines if "eval_loss_cut" in line)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_mixtures_of_experts(family, text, tmp_path):
    settings = {"n_routed_experts": 8} if family == "deepseek_v3" else {"num_experts": 8}
    folder = checkpoint(tmp_path / "moe", family, **settings)
    method, recovery = ("lora", "full") if family == "qwen3_moe" else ("full", "afa-lora")
    tuned = replace(
        SETTINGS, steps=20, save_every=0, method=method, recovery=recovery, optimizer=OptimizerConfig(lr=1e-3)
    )
    run(folder, text, tmp_path, tuned, validation=None)
    smaller = effpass.load_model(tmp_path / "model").model
    assert logits(smaller).isfinite().all()
    models = (make(family, **settings), smaller)
    whole, left = (sum(p.numel() for n, p in m.named_parameters() if ".layers." in n) for m in models)
    assert left / whole == pytest.approx(0.7, abs=0.02)


def test_a_cut_that_is_not_what_the_masks_were_is_an_error(model, monkeypatch):
    """The check of the cut can fail."""
    whole = effpass.load_model(model).model
    problem = stages.state_problem(whole, SETTINGS)
    rows = _Calibration()
    learned = stages.choose(whole, problem, replace(SETTINGS, choose="random"), rows)
    original = stages.cut_model

    def other(cut: Any, keep: Any) -> None:
        original(cut, keep)
        with torch.no_grad():
            cut.model.layers[1].mlp.down_proj.weight[:, 3] *= 2

    monkeypatch.setattr(stages, "cut_model", other)
    with pytest.raises(EffpassError, match=r"the cut model's logits are .* from those of the masked one"):
        stages.cut(whole, problem, learned, torch.arange(32).view(2, 16))


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("how", ["magnitude", "random", "activation", "taylor"])
def test_the_bound_lies_between_the_rounding_of_a_real_cut_and_one_wrong_channel(monkeypatch, how):
    whole = effpass.load_model("smollm2").model
    torch.manual_seed(0)
    ids = torch.randint(100, 40000, (2, 256))
    problem = stages.state_problem(whole, SETTINGS)
    settings = replace(SETTINGS, keep=0.5, choose=how)
    learned = stages.choose(whole, problem, settings, _Calibration())
    original, bound = stages.cut_model, stages._ROUNDING[torch.float64]

    def wrong(cut: Any, keep: Any) -> None:
        original(cut, keep)
        with torch.no_grad():
            cut.model.layers[-1].mlp.down_proj.weight[:, 100] = 0

    monkeypatch.setitem(stages._ROUNDING, torch.float64, bound / 10)
    pruned = copy.deepcopy(whole)
    stages.cut(pruned, problem, learned, ids)
    assert {p.dtype for p in pruned.parameters()} == {torch.float32}
    monkeypatch.setitem(stages._ROUNDING, torch.float64, 3 * bound)
    monkeypatch.setattr(stages, "cut_model", wrong)
    with pytest.raises(EffpassError, match="from those of the masked one"):
        stages.cut(copy.deepcopy(whole), problem, learned, ids)


class _Calibration:
    def calibration(self, count: int) -> list[torch.Tensor]:
        return [torch.arange(32).view(2, 16)] * count


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_can_not_be_is_said_before_anything_is_made(model, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"text": "fine"}\n{"messages": [{"role": "user", "content": "a"}]}\n')
    for options, says in (
        (
            {"settings": replace(SETTINGS, keep=0.02)},
            r"no shape keeps 0\.02 of the parameters: the nearest keeps 0\.\d+",
        ),
        ({"settings": replace(SETTINGS, keep=0.97, multiple=48)}, r"no shape keeps 0\.97 .* the nearest keeps"),
        ({"settings": replace(SETTINGS, units=("experts",))}, "has no experts to drop"),
        ({"settings": replace(SETTINGS, keep_of={"experts": 0.5})}, "this model has kv_groups, ffn_channels"),
        ({"settings": replace(SETTINGS, choose="depth", keep=0.7)}, "no number of layers keeps 0.7"),
        ({"settings": replace(SETTINGS, sequence_length=1000)}, "has 256 positions"),
        ({"text": short}, r"short\.txt: 10 tokens, and a batch of 4 rows takes 128"),
        ({"text": chat}, r"chat\.jsonl:2: no text; it has 'messages'"),
        ({"text": tmp_path / "no.txt"}, r"no\.txt: no such file"),
        ({"validation": short}, r"short\.txt: 10 tokens, and a batch of 1 rows takes 32"),
    ):
        with pytest.raises(EffpassError, match=says):
            run(model, options.pop("text", text), tmp_path, options.pop("settings", SETTINGS), **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "short.txt"]
    (tmp_path / "model").mkdir()
    with pytest.raises(EffpassError, match="model exists"):
        run(model, text, tmp_path)


def test_several_processes_are_refused(model, text, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EffpassError, match="pruning runs in one process"):
        run(model, text, tmp_path)


def test_heads_that_make_no_groups_are_refused(text, tmp_path):
    folder = checkpoint(tmp_path / "odd", "qwen3", num_attention_heads=6, num_key_value_heads=4, head_dim=8)
    with pytest.raises(ModelError, match="6 query heads can't be paired with 4 key-value heads"):
        run(folder, text, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


def test_quantized_models_are_refused(text, tmp_path):
    folder = checkpoint(tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"are quantized \(gptq\)"):
        run(folder, text, tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep": 1.0}, "keep: got 1.0, expected a share above 0 and below 1"),
        ({"keep_of": {"ffn": 0.5}}, "unknown units 'ffn'"),
        ({"keep_of": {"ffn_channels": 0.0}}, "keep of ffn_channels: got 0.0"),
        ({"steps": 5}, "steps: got 5, expected at least 20"),
        ({"learning": 1.0}, "learning: got 1.0"),
        ({"recovery_lr": 0.0}, "recovery_lr: got 0.0, expected a positive number"),
        ({"batch": 3}, "a batch of 3 rows can't be cut into 2 micro-batches"),
        ({"save_every": 7}, r"save_every: got 7, expected a multiple of log_every \(3\)"),
    ],
)
def test_settings_out_of_range_are_refused(changes, says):
    with pytest.raises(EffpassError, match=says):
        replace(SETTINGS, **changes)
