"""`effpass train fg2-gdn`: what it starts from, its losses, runs that end, resume and apply, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, make
from safetensors.torch import load_file, save_file
from tiny_tuning import checkpoint, metrics, quiet
from typer.testing import CliRunner

import effpass
from effpass.cli.app import app
from effpass.core.errors import EffpassError, ModelError
from effpass.core.model import load_model
from effpass.passes.weights.fg2_gdn import Learned
from effpass.runtime.linear_attention import make_hybrid
from effpass.runtime.linear_attention.attention_layers import attention_layers
from effpass.trainers.fg2_gdn.alignment import alignment, fit_outputs, recorded
from effpass.trainers.fg2_gdn.initial import chosen_layers, layer_settings, projections, start_from
from effpass.trainers.fg2_gdn.run import convert
from effpass.trainers.fg2_gdn.settings import Settings
from effpass.trainers.fg2_gdn.stages import learners
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.loop import Loop

SETTINGS = Settings(
    OptimizerConfig(lr=2e-3, name="adamw", weight_decay=0.0), share=0.5, steps=24, align=0.5, whole=0.25, batch=4,
    accumulate=2, sequence_length=32, warmup=2, gate_rank=8, dtype="float32", log_every=3, save_every=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} plus {i % 7} makes {i + i % 7}. " for i in range(200)))
    return path


def run(model: Path, text: Path, folder: Path, settings: Settings = SETTINGS, **options: Any) -> Path:
    return convert(str(model), text, folder, settings, **{"validation": text, "say": quiet, **options})


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory) -> Path:
    return run(model, text, tmp_path_factory.mktemp("finished") / "layers")


# -- what it starts from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "share", "wanted"),
    [(4, 0.75, [0, 1, 2]), (4, 0.5, [0, 2]), (8, 0.75, [0, 1, 2, 4, 5, 6]), (3, 1.0, [0, 1, 2]), (4, 0.25, [0])],
)
def test_a_share_is_spread_and_keeps_the_last_of_each_run(count, share, wanted):
    assert chosen_layers(replace(SETTINGS, share=share), count) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_those_of_the_attention(family):
    model = make(family)
    shape = layer_settings(SETTINGS, model.config)
    parent, name = attention_layers(model, [1])[1]
    old = getattr(parent, name)
    new = make_hybrid(model, [1], shape)[1]
    if family == "deepseek_v3":  # latents
        assert projections(old) is None
        assert not start_from(new, old)
        return
    x = torch.randn(1, 3, 64)
    assert start_from(new, old)
    given = projections(old)
    assert given is not None
    groups = given["k_proj"].shape[0] // shape.key_head_dim
    for ours, theirs in ((new.q_proj, given["q_proj"]), (new.k_proj, given["k_proj"]), (new.v_proj, given["v_proj"])):
        wanted = (x @ theirs.T).unflatten(-1, (-1, shape.key_head_dim))
        wanted = wanted.repeat_interleave(4 // wanted.shape[2], 2)
        torch.testing.assert_close(ours(x).view(1, 3, 4, 16), wanted)
    assert groups in (2, 4)
    torch.testing.assert_close(new.o_proj(x), x @ given["o_proj"].T)
    mixed = torch.randn(1, 5, new.conv.weight.shape[0])
    torch.testing.assert_close(new._convolved(mixed, None)[0], torch.nn.functional.silu(mixed))


SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}  # fmt: skip
OLD = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0}
OTHERS = {
    "Llama": {**SIZES, "num_key_value_heads": 2},
    "Phi3": {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0},
    "GPT2": OLD,
    "OPT": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "Phi": SIZES,
    "GPTJ": {**OLD, "rotary_dim": 8},
    "CodeGen": {**OLD, "rotary_dim": 8},
    "GPTBigCode": OLD,
    "GPTBigCode, keys of each head": {**OLD, "multi_query": False},
    "Persimmon": {**SIZES, "qk_layernorm": False},
}


@pytest.mark.parametrize("name", OTHERS)
def test_projections_of_other_families_compute_their_attention(name):
    family = name.partition(",")[0]
    config = getattr(transformers, f"{family}Config")(**OTHERS[name], bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config).eval()
    parent, place = attention_layers(model, [1])[1]
    old = getattr(parent, place)
    if family == "CodeGen":  # in an order of its own
        assert projections(old) is None
        return
    with torch.no_grad():
        for key, parameter in old.named_parameters():
            parameter.mul_(0 if key.endswith("bias") else 8)
        given = projections(old)
        assert given is not None
        ids = torch.arange(3, 15).view(2, 6)
        positions, mask = torch.zeros_like(ids), torch.ones_like(ids)  # at position 0, nothing is rotated
        with recorded(model, [1]) as found:
            model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        x, wanted = found[1]
        heads = [(x @ given[key].T).unflatten(-1, (-1, 16)).transpose(1, 2) for key in ("q_proj", "k_proj", "v_proj")]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out.transpose(1, 2).flatten(2) @ given["o_proj"].T, wanted, rtol=1e-3, atol=1e-5)
    assert start_from(make_hybrid(model, [1], layer_settings(SETTINGS, config))[1], old)


def test_alignment_compares_the_layers_with_the_attention_they_replace():
    teacher, student = make("llama"), make("llama")
    made = make_hybrid(student, [0, 1], layer_settings(SETTINGS, student.config))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad(), recorded(teacher, [0, 1]) as found:
        states = teacher(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[0][0], teacher.model.layers[0].input_layernorm(states[0]))
    wanted = 0.0
    for index, layer in made.items():
        given, output = found[index]
        wanted += float(((layer(given)[0] - output).square().mean() / output.square().mean()).detach()) / 2
    loss = alignment(made, teacher, ids)
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for layer in made.values() for p in layer.parameters())
    assert all(p.grad is None for p in student.model.layers[0].mlp.parameters())


def test_output_projections_are_fitted_in_closed_form():
    """No other projection misses less of the attention's outputs, but for the small price of large weights."""
    teacher, student = make("llama"), make("llama")
    made = make_hybrid(student, [0, 1], layer_settings(SETTINGS, student.config))
    before = {name: p.clone() for name, p in student.named_parameters()}
    rows = torch.randint(0, teacher.config.vocab_size, (6, 4, 32), generator=torch.Generator().manual_seed(0))
    worst = float(alignment(made, teacher, rows.flatten(0, 1)).detach())
    fit_outputs(made, teacher, rows)
    changed = [name for name, p in student.named_parameters() if not torch.equal(p, before[name])]
    assert changed == [f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)]
    best = float(alignment(made, teacher, rows.flatten(0, 1)).detach())
    assert best < 0.9 * worst
    with recorded(teacher, [0, 1]) as found, torch.no_grad():
        teacher(rows.flatten(0, 1))
    for i, layer in made.items():
        given, wanted = (t.flatten(0, 1).double() for t in found[i])
        z: list[torch.Tensor] = []
        handle = layer.o_proj.register_forward_pre_hook(lambda module, args, z=z: z.append(args[0]))
        layer(found[i][0])
        handle.remove()
        inputs = z[0].detach().flatten(0, 1).double()
        ridge = 1e-3 * inputs.square().sum(0).mean()
        largest = torch.linalg.lstsq(  # the same problem, as one of ordinary least squares
            torch.cat((inputs, ridge.sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64))),
            torch.cat((wanted, wanted.new_zeros(inputs.shape[1], wanted.shape[1]))),
        ).solution.T
        torch.testing.assert_close(layer.o_proj.weight.detach().double(), largest, rtol=1e-3, atol=1e-5)
        assert given.shape[1] == wanted.shape[1]


def test_a_stage_of_alignment_begins_and_ends_with_fitted_projections(model, text, tmp_path, monkeypatch):
    fitted: list[list[torch.Tensor]] = []

    def fit(layers: Any, teacher: Any, batches: Any) -> None:
        fit_outputs(layers, teacher, batches)
        fitted.append([layer.o_proj.weight.detach().clone() for layer in layers.values()])

    monkeypatch.setattr("effpass.trainers.fg2_gdn.stages.fit_outputs", fit)
    settings = replace(SETTINGS, steps=4, align=1.0, whole=0.0, save_every=0)
    learned = Learned.load(run(model, text, tmp_path / "a", settings))
    assert len(fitted) == 2
    assert torch.equal(learned.layers[0]["o_proj.weight"].float(), fitted[1][0])
    assert not torch.equal(*(weights[0] for weights in fitted))


def test_what_learns_in_each_stage():
    student = make("llama")
    made = make_hybrid(student, [1], layer_settings(SETTINGS, student.config))
    own = sum(p.numel() for p in made[1].parameters())
    assert sum(p.numel() for p in learners(student, made, "align")) == own
    assert sum(p.numel() for p in learners(student, made, "distill")) == own
    assert sum(p.numel() for p in learners(student, made, "whole")) == sum(p.numel() for p in student.parameters())


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_its_artifact_is_the_hybrid_it_measured(finished, model, text):
    lines = metrics(finished)
    losses = {key: value for line in lines for key, value in line.items() if key.startswith("eval_")}
    assert list(losses) == [
        "eval_loss_teacher",
        "eval_loss_after_align",
        "eval_loss_after_distill",
        "eval_loss_after_whole",
    ]
    aligned = [line["loss"] for line in lines if "loss" in line and line["step"] <= 12]
    assert aligned[-1] < 0.9 * aligned[0]
    assert losses["eval_loss_after_whole"] < losses["eval_loss_after_align"]
    learned = Learned.load(finished)
    assert sorted(learned.layers) == [0]
    assert learned.artifact.provenance["state_bytes"] == 4 * 4 * 16 * 16
    assert learned.artifact.metrics["eval_perplexity_teacher"] > 1
    recipe = {"version": 1, "passes": [{"fg2_gdn": {"artifact": str(finished)}}]}
    hybrid = effpass.prepare(load_model(model).model, recipe)
    tokens = load_model(model).tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
    rows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        loss = sum(float(hybrid(input_ids=part, labels=part).loss) for part in rows.split(4) if len(part) == 4)
    found = loss / (len(rows) // 4)
    assert found == pytest.approx(losses["eval_loss_after_whole"], rel=1e-4)
    assert (finished / "loss.png").stat().st_size > 1000
    assert json.loads((finished / "training.json").read_text())["layers"] == [0]


def test_bfloat16_learns_as_float32_does(finished, model, text, tmp_path):
    """Each step computes with the weights of that step, not with copies that autocast made before."""
    found = [metrics(f) for f in (finished, run(model, text, tmp_path / "a", replace(SETTINGS, dtype="bfloat16")))]
    wide, narrow = ([line["loss"] for line in lines if "loss" in line] for lines in found)
    assert len(wide) == 8
    assert narrow == pytest.approx(wide, rel=0.05)


def test_stages_that_train_no_other_weights_leave_them_out(model, text, tmp_path):
    settings = replace(SETTINGS, steps=4, align=0.5, whole=0.0, mode="kda", layers=(1,), save_every=0)
    learned = Learned.load(run(model, text, tmp_path / "a", settings, validation=None))
    assert learned.rest == {}
    assert learned.settings.mode == "kda"
    assert sorted(learned.layers) == [1]


def test_a_resumed_run_is_the_whole_run(finished, model, text, tmp_path, monkeypatch):
    """Stopped after steps 6, 14 and 22, in each of the stages once; steps 4, 12 and 22 were saved last."""
    whole = Loop.training_step
    count = last = 0

    def stops(self: Loop, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > last * SETTINGS.accumulate:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    folder = tmp_path / "layers"
    monkeypatch.setattr(Loop, "training_step", stops)
    for begin, stop in ((0, 6), (4, 14), (12, 22)):
        count, last = 0, stop - begin
        with pytest.raises(KeyboardInterrupt):
            run(model, text, folder, resume=begin > 0)
        assert not folder.exists()
    count, last = 0, 24 - 22
    run(model, text, folder, resume=True)
    assert count == last * SETTINGS.accumulate
    found, wanted = Learned.load(folder), Learned.load(finished)
    for name, tensor in wanted.artifact.tensors.items():
        torch.testing.assert_close(found.artifact.tensors[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert [line["step"] for line in metrics(folder)] == [line["step"] for line in metrics(finished)]


def test_a_run_is_not_resumed_with_another_model(text, tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "model", "qwen3")
    monkeypatch.setattr("effpass.trainers.fg2_gdn.run.run_stage", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(source, text, tmp_path / "a")
    monkeypatch.undo()
    weights = next(source.glob("*.safetensors"))
    tensors = {name: tensor + 0.1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(EffpassError, match="not the one that the run began with: wrong weights"):
        run(source, text, tmp_path / "a", resume=True)


def _interrupt(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_the_command(model, text, tmp_path):
    how = ["--steps", "3", "--align", "0.4", "--batch", "2", "--sequence-length", "16", "--optimizer", "mona",
           "--layers", "0,1", "--mode", "fg2", "--gate-rank", "4", "--conv-size", "3", "--unbounded",
           "--save-every", "0"]  # fmt: skip
    given = ["train", "fg2-gdn", str(model), "--text", str(text), "-o", str(tmp_path / "out"), *how]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    learned = Learned.load(tmp_path / "out")
    assert sorted(learned.layers) == [0, 1]
    assert (learned.settings.conv_kernel_size, learned.settings.lower_bound) == (3, None)
    both = CliRunner().invoke(app, [*given[:-2], "--share", "0.5"])
    assert both.exit_code != 0
    assert "--layers says which layers already" in (both.output or str(both.exception))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "fg3"}, "mode: got 'fg3'"),
        ({"share": 0.0}, "share: got 0.0"),
        ({"align": 0.7, "whole": 0.6}, "take 1.3 of the steps"),
        ({"whole": -0.1}, "whole: got -0.1"),
        ({"batch": 3}, "can't be cut into 2"),
        ({"steps": 0}, "steps: got 0"),
        ({"whole_rate": 0.0}, "whole_rate: got 0.0"),
    ],
)
def test_settings_that_are_none(changes, message):
    with pytest.raises(EffpassError, match=message):
        replace(SETTINGS, **changes)


def test_models_layers_and_texts_that_are_refused_leave_nothing_behind(model, text, finished, tmp_path):
    def refused(message: str, source: Path = model, data: Path = text, settings: Settings = SETTINGS) -> None:
        with pytest.raises(EffpassError, match=message):
            run(source, data, tmp_path / "out", settings)
        assert list(tmp_path.glob("out*")) == []

    short = tmp_path / "short.txt"
    short.write_text("few words")
    refused("a batch of 4 rows takes 128", data=short)
    refused("no such file", data=tmp_path / "none.txt")
    refused("share: 0.1 of 2 layers is none", settings=replace(SETTINGS, share=0.1))
    refused(r"layers: got \[5\]", settings=replace(SETTINGS, layers=(5,)))
    refused("has 256 positions", settings=replace(SETTINGS, sequence_length=512))
    hybrid = effpass.prepare(
        load_model(model).model, {"version": 1, "passes": [{"fg2_gdn": {"artifact": str(finished)}}]}
    )
    hybrid.save_pretrained(tmp_path / "hybrid")
    load_model(model).tokenizer.save_pretrained(tmp_path / "hybrid")
    with pytest.raises(ModelError, match="has linear attention already"):
        run(tmp_path / "hybrid", text, tmp_path / "out")
    with pytest.raises(EffpassError, match="exists"):
        run(model, text, finished)
