"""The demo: on a tiny model in seconds, and (slow) as a user runs it."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest

tensorrt = any(find_spec(name) for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"))


def test_demo_on_a_tiny_model(tiny_model, tmp_path, capsys, monkeypatch):
    from effpass import Recipe, backend
    from effpass.cli.demo import run_demo

    monkeypatch.setattr(backend, "inner_backend", lambda options, mode: lambda gm, inputs: gm)
    run_demo(str(tiny_model), tmp_path, lessons=3, max_new_tokens=8, rounds=1, workload=(1, 128, 8, 2))
    shown = capsys.readouterr()
    assert shown.err == ""
    text = " ".join(shown.out.split())
    steps = [line for line in shown.out.splitlines() if line.startswith("✓")]
    assert len(steps) == 6 + tensorrt + 4
    assert all(re.search(r"  \d+\.\d s$", line) for line in steps)
    first, last = map(float, re.search(r"loss ([\d.]+) → ([\d.]+)", text).groups())
    assert last < first
    # 14 layers: three products, one scaling and one sum each become one product.
    assert "compiled step merge_lora 14" in text
    assert "exported model merge_lora 14" in text
    for change in ("-28 linear", "-14 mul", "-14 add"):
        assert change in text
    assert text.count("the same 8 tokens as the unrewritten model") == 2
    for way in ("unrewritten: adapter beside", "merged, eager", "merged, onnxruntime", "merged, compiled"):
        assert way in text
    assert "Needs a GPU, and was not measured here" in text
    assert Recipe.load(tmp_path / "recipe.yaml").steps[0].name == "merge_lora"
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    assert (tmp_path / "model.onnx").is_file()
    assert (tmp_path / "model.engine").is_file() == ("compute capabilities SM80," in text) == tensorrt
    assert f"{tmp_path}/report.html" in shown.out
    assert "merge_lora" in (tmp_path / "report.html").read_text()
    before, after = map(float, re.search(r"cost model predicts ([\d.]+) ms .*?and ([\d.]+) ms merged", text).groups())
    assert after <= before
    rows = {
        name: re.search(rf"^ +{name} +[\d.]+ ms +[\d.]+ .* \+ ([\d,]+) bytes +[\d.]+ +([-+][\d.]+) %", shown.out, re.M)
        for name in ("dense", "fast-decode", "small-memory")
    }
    assert rows["dense"][2] == "+0.00"
    cache = {name: int(row[1].replace(",", "")) for name, row in rows.items()}
    assert cache["small-memory"] < cache["fast-decode"] < cache["dense"]
    assert "long-context" in text
    assert text.endswith("s.")


def test_demo_keeps_nothing_over_what_is_there(refused, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert f"{tmp_path} exists and is no empty folder" in refused("demo", "--keep", tmp_path)


@pytest.mark.slow
@pytest.mark.smollm2
def test_demo_as_a_user_runs_it(run, tmp_path):
    result = run("demo", "--keep", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    assert "Ada Finch" in result.stdout
    assert result.stdout.count(" tokens as the unrewritten model") == 2
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [
        "adapter",
        *(["model.engine"] if tensorrt else []),
        "model.onnx",
        "recipe.yaml",
        "report.html",
    ]


def test_the_demo_keeps_its_report_alone(run, monkeypatch, tmp_path):
    from effpass.cli import demo

    def tell(source, folder, **_):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text("w")
        (folder / "model.onnx").write_text("m")
        (folder / demo.REPORT).write_text("r")

    monkeypatch.setattr(demo, "run_demo", tell)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run("demo")
    assert result.exit_code == 0, result.output
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    assert f"Kept in {folder}: report.html" in result.stdout
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: 1 / 0)
    assert run("demo").exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
