"""Each command does what it says, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import effpass
from effpass.cli.groups import BUILTIN

REPOSITORY = Path(__file__).parents[2]


def test_help_names_every_command_and_imports_nothing_heavy():
    started = time.perf_counter()
    code = (
        "import sys, effpass.cli; sys.argv = ['effpass', '--help']\ntry: effpass.cli.main()\nexcept SystemExit: pass\n"
    )
    code += "print([m for m in ('torch', 'transformers', 'peft', 'onnx', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 10
    *text, loaded = done.stdout.strip().splitlines()
    assert loaded == "[]"
    for command in (
        "passes",
        "recipe",
        "inspect",
        "optimize",
        "generate",
        "export",
        "validate",
        "train",
        "calibrate",
        "cache",
        "demo",
    ):
        assert command in "\n".join(text)


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "effpass", "--version"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "effpass 0.1.0"


def test_passes_as_text_and_json(run, toy_passes, monkeypatch):
    from effpass.core import registry

    monkeypatch.setitem(registry.BUILTIN, "broken", "no_such_module:Broken")
    rows = {row["name"]: row for row in json.loads(run("passes", "--json").stdout)}
    assert rows["merge_lora"]["kind"] == "weights"
    assert rows["merge_lora"]["exact"] is True
    assert rows["merge_lora"]["entrances"] == ["model", "program", "backend"]
    assert rows["scale"]["exact"] is False
    assert rows["needs_cache"]["entrances"] == ["model"]
    assert "No module named 'no_such_module'" in rows["broken"]["error"]
    lines = [line.strip() for line in run("passes").stdout.splitlines()]
    at = lines.index("scale: weights, approximate; acts on model, program, backend; from effpass 0.1.0")
    assert lines[at + 1] == "Multiplies chosen weights by a factor: the smallest derived weight."
    at = lines.index("broken: not available, from effpass 0.1.0")
    assert lines[at + 1].startswith("pass 'broken' from effpass 0.1.0 can't be imported: ModuleNotFoundError")


def test_recipe_check(run, recipe_file, tiny_adapter):
    file = recipe_file(f"- merge_lora: {{adapter: {tiny_adapter}, require: true}}", more="target: onnx")
    result = run("recipe", "check", file)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{file}: valid, 1 pass",
        "  merge_lora: weights, exact, require",
        "  target: onnx",
    ]
    report = json.loads(run("recipe", "check", file, "--json").stdout)
    row = {"pass": "merge_lora", "kind": "weights", "exact": True, "require": True, "verify": False}
    assert report == {"valid": True, "file": str(file), "target": "onnx", "passes": [row]}


def test_recipe_check_gives_its_verdict_as_json(run, recipe_file):
    file = recipe_file("- merge_lora: {adaptor: ./a}")
    result = run("recipe", "check", file, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["valid"] is False
    assert "passes[0].merge_lora.adaptor: unknown option, did you mean 'adapter'?" in report["error"]
    assert result.stderr == ""


def test_inspect_counts_what_fires_and_what_it_costs(run, recipe_file, tiny_model, tiny_adapter):
    file = recipe_file(f"- merge_lora: {{adapter: {tiny_adapter}}}")
    result = run("inspect", tiny_model, "--recipe", file, "--json")
    found = json.loads(result.stdout)
    assert found["graphs"] == 1
    (report,) = found["reports"]
    (entry,) = report["passes"]
    assert (entry["name"], entry["hits"]) == ("merge_lora", 14)
    # Every layer's weights once more; embedding, head and norms have no copy. float32.
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert found["derived_bytes"] == 4 * 2 * per_layer
    assert found["weight_bytes"] == 4 * (2 * per_layer + 257 * 32 + 5 * 32)
    assert found["unmet"] == []
    text = run("inspect", tiny_model, "--recipe", file, "--tokens", 0).stdout  # a prompt was traced above
    assert "merge_lora (exact): 14 rewritten" in text
    assert "original + 61,440 bytes derived" in text


def test_inspect_says_why_per_candidate(run, recipe_file, tiny_model, toy_passes):
    file = recipe_file("- scale: {only: q_proj}")
    arguments = ("inspect", tiny_model, "-r", file, "--tokens", 0)
    text = run(*arguments).stdout
    assert "scale (approximate): 2 rewritten" in text
    assert "left alone: model.layers.0.self_attn.k_proj.weight and 12 more: not selected → name it in `only`" in text
    assert "model.layers.1.mlp.up_proj.weight" not in text
    assert "model.layers.1.mlp.up_proj.weight" in run(*arguments, "-v").stdout


def test_inspect_fails_when_a_required_pass_would_do_nothing(run, recipe_file, tiny_model, toy_passes):
    result = run("inspect", tiny_model, "-r", recipe_file("- scale: {only: nowhere, require: true}"), "--tokens", 0)
    assert result.exit_code == 1
    assert "scale is required and would rewrite nothing" in result.stdout


def test_inspect_names_passes_that_act_before_tracing(run, recipe_file, tiny_model, toy_passes):
    text = run("inspect", tiny_model, "-r", recipe_file("- needs_cache"), "--tokens", 0).stdout
    assert "needs_cache acts on the model itself, through effpass.prepare" in text
    assert "  nothing for 2 layers\n" in text


def test_optimize_saves_a_checkpoint_that_transformers_loads(run, recipe_file, tiny_model, tiny_adapter, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "new" / "merged"
    result = run("optimize", tiny_model, "-r", recipe_file(f"- merge_lora: {{adapter: {tiny_adapter}}}"), "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["merge_lora: 14 rewritten", f"saved {out}"]
    ids = torch.randint(0, 257, (2, 9))
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tiny_adapter))
        expected = unmerged(ids).logits
        plain = unmerged.unload()(ids).logits
        got = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    # float32 sums in another order; the adapter itself moves the logits far more.
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    assert (plain - expected).abs().max() > 0.05
    assert (
        AutoTokenizer.from_pretrained(out)("hi")["input_ids"]
        == AutoTokenizer.from_pretrained(tiny_model)("hi")["input_ids"]
    )
    from effpass import Recipe

    assert Recipe.load(out / "effpass.yaml").steps[0].options.adapter == tiny_adapter
    assert [p.name for p in out.parent.iterdir()] == ["merged"]
    assert (out / "effpass.yaml").stat().st_mode == (out / "config.json").stat().st_mode


def test_optimize_replaces_only_a_checkpoint_and_only_when_told(
    run, refused, recipe_file, tiny_model, tiny_adapter, tmp_path
):
    file = recipe_file(f"- merge_lora: {{adapter: {tiny_adapter}}}")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "exists" in refused("optimize", tiny_model, "-r", file, "-o", out)
    assert "is no checkpoint" in refused("optimize", tiny_model, "-r", file, "-o", out, "--overwrite")
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "config.json").write_text("{}")
    assert run("optimize", tiny_model, "-r", file, "-o", out, "--overwrite").exit_code == 0
    assert (out / "model.safetensors").is_file()
    assert not (out / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "r.yaml"]


def test_generate_streams_the_same_text_merged_and_unmerged(run, recipe_file, tiny_model, tiny_adapter):
    options = ["generate", tiny_model, "--max-new-tokens", 12]
    plain = run(*options, "--prompt", "hello")
    assert plain.exit_code == 0, plain.output
    attached = run(*options, "--prompt", "-", "--adapter", tiny_adapter, stdin="hello")
    merged = run(*options, "--prompt", "hello", "--adapter", tiny_adapter, "--recipe", recipe_file("- merge_lora"))
    named = run(
        *options, "-p", "hello", "-r", recipe_file(f"- merge_lora: {{adapter: {tiny_adapter}}}", name="named.yaml")
    )
    assert len(plain.stdout) > 4
    assert attached.stdout == merged.stdout == named.stdout
    assert attached.stdout != plain.stdout


def test_a_graph_pass_runs_in_generate(run, recipe_file, tiny_model, toy_passes, monkeypatch):
    """`touch` rewrites graphs only, so the model is compiled, and its text must not change."""
    import effpass.backend

    monkeypatch.setattr(effpass.backend, "inner_backend", lambda options, mode: lambda gm, inputs: gm)
    effpass.backend.reports.clear()
    options = ["generate", tiny_model, "-p", "hi", "--max-new-tokens", 3]
    assert run(*options, "-r", recipe_file("- touch")).stdout == run(*options).stdout
    assert [p.name for report in effpass.backend.reports for p in report.passes if p.hits] != []


def test_cache_clear_removes_only_what_effpass_made(run, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path))
    (tmp_path / "gguf" / "abc").mkdir(parents=True)
    (tmp_path / "gguf" / "abc" / "model.safetensors").write_bytes(b"x" * 250_000)
    (tmp_path / "notes.txt").write_text("mine")
    assert run("cache", "clear").stdout == f"{tmp_path}: 0.2 MB removed\n"
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert run("cache", "clear").stdout == f"{tmp_path}: nothing to remove\n"


@pytest.mark.parametrize("command", ["train", "calibrate"])
def test_plugin_commands_are_listed_and_run(run, monkeypatch, tmp_path, command):
    (tmp_path / "toy_trainers.py").write_text(
        "import typer\n"
        "def fit(steps: int = 3):\n    'Fit a toy.'\n    print('fitted', steps)\n"
        "app = typer.Typer()\n"
        "@app.command()\ndef one():\n    print('one')\n"
        "@app.command()\ndef two():\n    print('two')\n"
    )
    (tmp_path / "toy-1.2.dist-info").mkdir()
    (tmp_path / "toy-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.2\n")
    points = "fit = toy_trainers:fit\nmany = toy_trainers:app\nbroken = no_such_module:x\nodd = os:sep\n"
    (tmp_path / "toy-1.2.dist-info" / "entry_points.txt").write_text(f"[effpass.{command}]\n{points}")
    own = [f"{name}  from effpass 0.1.0" for name in BUILTIN[f"effpass.{command}"]]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_trainers", raising=False)
    listed = run(command).stdout
    assert listed.splitlines() == sorted(
        [*own, *(f"{name}  from toy 1.2" for name in ("broken", "fit", "many", "odd"))]
    )
    assert run(command, "fit", "--steps", 5).stdout == "fitted 5\n"
    assert run(command, "many", "two").stdout == "two\n"
    helped = run(command, "--help").stdout
    assert "Fit a toy." in helped
    assert "Can't be loaded" in helped
    broken = run(command, "broken")
    assert broken.exit_code == 1
    assert "error: 'broken' from toy 1.2 can't be imported: ModuleNotFoundError" in broken.stderr
    assert "expected a function or a typer.Typer" in run(command, "odd").stderr
    assert run(command, "nothing").exit_code == 2


def test_two_distributions_with_one_trainer(run, monkeypatch, tmp_path):
    for name in ("left", "right"):
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        (tmp_path / f"{name}-1.0.dist-info" / "entry_points.txt").write_text("[effpass.train]\nfit = os:getcwd\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("train", "fit")
    assert result.exit_code == 1
    assert "two distributions provide `effpass train fit`: " in result.stderr
    assert "left 1.0" in result.stderr
    assert "right 1.0" in result.stderr


def test_optimize_prunes(run, recipe_file, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    from effpass.passes.weights.structured_pruning import make_keep_artifact

    make_keep_artifact(
        AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "keep", ffn_channels=32, kv_groups=1
    )
    out = tmp_path / "pruned"
    assert (
        run("optimize", tiny_model, "-r", recipe_file("- structured_pruning: {artifact: ./keep}"), "-o", out).exit_code
        == 0
    )
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert (config.intermediate_size, config.num_key_value_heads, config.num_attention_heads) == (32, 1, 2)


def test_export_writes_a_file_that_onnxruntime_was_asked_about(run, recipe_file, tiny_model, tiny_adapter, tmp_path):
    import onnx

    out = tmp_path / "new" / "model.onnx"
    arguments = ["export", tiny_model, "-r", recipe_file(f"- merge_lora: {{adapter: {tiny_adapter}}}"), "-o", out]
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["path"] == str(out)
    assert report["size"] == out.stat().st_size
    assert [check["ok"] for check in report["checks"]] == [True] * len(report["checks"])
    metadata = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert "merge_lora" in metadata["effpass.recipe"]
    assert [p.name for p in out.parent.iterdir()] == ["model.onnx"]
    again = run(*arguments)
    assert again.exit_code == 1
    assert f"error: {out} exists" in again.stderr
    shown = run(*arguments, "--overwrite")
    assert "merge_lora: 14 rewritten" in shown.stdout
    assert f"saved {out}" in shown.stdout
    assert "export error" in shown.stdout
    assert "tolerance: 4 times the spread of right evaluations" in shown.stdout
    checked = run("validate", out)
    assert checked.exit_code == 0, checked.output
    assert f"{out}: onnx, written by effpass {effpass.__version__}, unaltered" in checked.stdout
    assert checked.stdout.count(" ok") == len(report["checks"])
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    out.write_bytes(data)
    altered = run("validate", out, "--json")
    assert altered.exit_code == 1
    assert "was changed after it was exported" in altered.stderr
