"""Bad input: one message that names it, exit code 1 (2 for wrong usage), no traceback, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

COMMANDS = {
    "inspect": lambda model, recipe, out: ("inspect", model, "-r", recipe),
    "optimize": lambda model, recipe, out: ("optimize", model, "-r", recipe, "-o", out),
    "generate": lambda model, recipe, out: ("generate", model, "-r", recipe, "-p", "hi"),
    "export": lambda model, recipe, out: ("export", model, "-r", recipe, "-o", out.with_suffix(".onnx")),
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where commands would write; must stay empty."""
    folder = tmp_path / "results"
    folder.mkdir()
    yield folder / "out"
    assert list(folder.iterdir()) == []


@pytest.fixture(params=COMMANDS)
def command(request):
    return COMMANDS[request.param]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["- merge_laro"], "passes[0]: unknown pass 'merge_laro', did you mean 'merge_lora'?"),
        (["- merge_lora: {adaptor: ./a}"], "passes[0].merge_lora.adaptor: unknown option, did you mean 'adapter'?"),
        (["- merge_lora: {adapter: 3}"], "passes[0].merge_lora.adapter: got 3 (int), expected"),
    ],
)
def test_recipes_that_are_wrong(command, refused, recipe_file, out, items, message):
    assert message in refused(*command("/no/such/model", recipe_file(*items), out))


def test_unknown_key_of_the_recipe(command, refused, recipe_file, out):
    file = recipe_file("- merge_lora", more="targets: onnx")
    assert "targets: unknown key, did you mean 'target'?" in refused(*command("/no/such/model", file, out))


def test_a_missing_recipe(command, refused, tmp_path, out):
    message = refused(*command("/no/such/model", tmp_path / "none.yaml", out))
    assert message == f"error: {tmp_path / 'none.yaml'}: can't be read: No such file or directory"


def test_a_missing_model(command, refused, recipe_file, out):
    assert "no file or folder '/no/such/model'" in refused(*command("/no/such/model", recipe_file("- merge_lora"), out))


def test_no_causal_lm(command, refused, recipe_file, tmp_path, out):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    message = refused(*command(tmp_path / "bert", recipe_file("- merge_lora"), out))
    assert "is a BertForMaskedLM, which is no causal language model" in message


def test_truncated_weights(command, refused, recipe_file, tiny_model, tmp_path, out):
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused(*command(tmp_path / "cut", recipe_file("- merge_lora"), out))
    assert f"{weights} can't be read" in message
    assert "→ download or save the file again" in message


def test_code_that_comes_with_a_model_is_not_run(command, refused, recipe_file, tiny_model, tmp_path, out):
    shutil.copytree(tiny_model, tmp_path / "custom")
    config = json.loads((tmp_path / "custom" / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "custom" / "config.json").write_text(json.dumps(config))
    (tmp_path / "custom" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    message = refused(*command(tmp_path / "custom", recipe_file("- merge_lora"), out))
    assert "brings its own Python code" in message
    assert "--trust-remote-code" in message
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_is_not_there(command, refused, recipe_file, tiny_model, out):
    message = refused(*command(tiny_model, recipe_file("- merge_lora: {adapter: ./nothing}"), out))
    assert "nothing" in message


def test_an_adapter_of_another_model(command, refused, recipe_file, tiny_model, tiny_adapter, tmp_path, out):
    from safetensors.torch import load_file, save_file

    wrong = tmp_path / "wrong"
    shutil.copytree(tiny_adapter, wrong)
    tensors = load_file(wrong / "adapter_model.safetensors")
    tensors = {k: torch.cat([t, t]) if "lora_B" in k else t for k, t in tensors.items()}
    save_file(tensors, wrong / "adapter_model.safetensors")
    message = refused(*command(tiny_model, recipe_file(f"- merge_lora: {{adapter: {wrong}}}"), out))
    assert "the update of model.layers.0." in message
    assert "use the base model that the adapter was trained on" in message


def test_a_truncated_adapter(command, refused, recipe_file, tiny_model, tiny_adapter, tmp_path, out):
    cut = tmp_path / "cut"
    shutil.copytree(tiny_adapter, cut)
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert str(weights) in refused(*command(tiny_model, recipe_file(f"- merge_lora: {{adapter: {cut}}}"), out))


def test_a_required_pass_that_finds_nothing(refused, recipe_file, tiny_model, out):
    file = recipe_file("- merge_lora: {require: true}")
    for name in ("optimize", "generate", "export"):
        assert "merge_lora is required and rewrote nothing" in refused(*COMMANDS[name](tiny_model, file, out))


def test_a_recipe_that_changes_nothing_saves_nothing(refused, recipe_file, tiny_model, out):
    message = refused("optimize", tiny_model, "-r", recipe_file("- merge_lora"), "-o", out)
    assert "no pass changed a weight; nothing to save: merge_lora: nothing to rewrite" in message


def test_graph_passes_have_no_place_in_a_checkpoint(refused, recipe_file, toy_passes, out):
    message = refused("optimize", "/no/such/model", "-r", recipe_file("- touch"), "-o", out)
    assert "touch rewrites the graph or the runtime, which a checkpoint can't hold" in message


def test_export_refuses_its_target_and_its_file_before_the_model(refused, recipe_file, out):
    file = recipe_file("- merge_lora", more="target: aoti")
    start = ("export", "/no/such/model", "-r", file, "-o")
    assert "does not end in .pt2, as files for aoti do" in refused(*start, out.with_suffix(".onnx"))
    assert "does not end in .onnx" in refused(*start, out, "--target", "onnx")
    assert "unknown target 'onx', did you mean 'onnx'?" in refused(*start, out, "--target", "onx")


def test_export_refuses_a_length_that_the_model_cannot_hold(refused, recipe_file, tiny_model, out):
    recipe = recipe_file("- merge_lora")
    message = refused("export", tiny_model, "-r", recipe, "-o", out.with_suffix(".onnx"), "--max-length", 257)
    assert "max_length is 257, but LlamaForCausalLM holds 256 positions" in message


def test_validate_refuses_what_no_export_wrote(refused, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"")
    (tmp_path / "m.txt").touch()
    assert "holds no record of a check by effpass" in refused("validate", tmp_path / "m.onnx")
    assert "ends in .txt, which is no exported file's" in refused("validate", tmp_path / "m.txt")
    assert "no such file" in refused("validate", tmp_path / "none.pt2")


def test_recipe_check_finds_missing_files(refused, recipe_file, tmp_path):
    file = recipe_file("- merge_lora: {adapters: [{path: ./a}, {path: .}]}", "- merge_lora: {adapter: /no/b}")
    message = refused("recipe", "check", file)
    assert f"passes[0].merge_lora.adapters[0].path: no such file or folder: {tmp_path / 'a'}" in message
    assert "passes[1].merge_lora.adapter: no such file or folder: /no/b" in message
    assert "adapters[1]" not in message


def test_generate_refuses_what_it_cannot_start_with(refused, run, tiny_model, tmp_path):
    assert "the prompt is empty" in refused("generate", tiny_model, "-p", " ")
    assert "the prompt is empty" in refused("generate", tiny_model, "-p", "-", stdin="")
    assert "nothing" in refused("generate", tiny_model, "-p", "hi", "--adapter", tmp_path / "nothing")
    assert "device 'cuba' can't be used" in refused("generate", tiny_model, "-p", "hi", "--device", "cuba")
    assert "unknown dtype 'bfloat61', did you mean 'bfloat16'?" in refused(
        "generate", tiny_model, "-p", "hi", "--dtype", "bfloat61"
    )
    for file in tiny_model.iterdir():
        if not file.name.startswith("tokenizer"):
            shutil.copy(file, tmp_path)
    assert "has no tokenizer" in refused("generate", tmp_path, "-p", "hi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimise"], "No such command 'optimise'"),
        (["inspect", "smollm2"], "Missing option '--recipe'"),
        (["optimize", "smollm2", "-r", "r.yaml"], "Missing option '--out'"),
        (["generate", "smollm2", "-p", "hi", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["export", "smollm2", "-r", "r.yaml"], "Missing option '--out'"),
        (["train", "nothing"], "No such command 'nothing'"),
    ],
)
def test_wrong_usage_is_exit_code_2(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


def test_debug_shows_the_traceback(run, recipe_file):
    from effpass.core.errors import RecipeError

    result = run("recipe", "check", recipe_file("- merge_laro"), debug=True)
    assert isinstance(result.exception, RecipeError)


def test_the_compiler_s_wrapping_is_taken_off(run, recipe_file, tiny_model, toy_passes, refused):
    """torch.compile wraps what its backend raises; the message is effpass's own."""
    file = recipe_file("- touch", "- scale: {only: nowhere, require: true}")
    message = refused("generate", tiny_model, "-p", "hi", "-r", file, "--max-new-tokens", 2)
    assert message.startswith("error: scale is required and rewrote nothing")


def test_a_missing_package_names_the_extra(refused, monkeypatch, tiny_model, tiny_adapter):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    message = refused("generate", tiny_model, "-p", "hi", "--adapter", tiny_adapter)
    assert message == "error: this needs peft, which is not installed\n  → pip install 'effpass[hf]'"


def test_an_error_nobody_expected_is_one_message_too(run, monkeypatch):
    import effpass.core.registry

    def fail():
        raise KeyError("surprise")

    monkeypatch.setattr(effpass.core.registry, "describe", fail)
    result = run("passes")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: unexpected KeyError: 'surprise'",
        "  → `effpass --debug ...` shows where it came from",
    ]
