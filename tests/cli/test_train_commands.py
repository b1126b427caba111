"""`effpass train sft|afa-lora|grpo`: what they write, and one message for each fault."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tuning import checkpoint, metrics, sums, write
from typer.testing import CliRunner

from effpass.cli.app import app
from effpass.passes.weights.peft_adapter import read_adapter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"))


def train(*words: object) -> tuple[int, str]:
    """Exit code, and what stands on stderr as one line of words."""
    done = CliRunner().invoke(app, ["train", *map(str, words)])
    return done.exit_code, " ".join(done.stderr.split())


def test_afa_lora_from_the_command_line_ends_as_a_file_that_generate_merges(llama, tmp_path):
    data, held_out = sums(tmp_path / "d.jsonl"), sums(tmp_path / "v.jsonl", 6, 40)
    out = tmp_path / "adapter"
    code, said = train(
        "afa-lora", llama, "--data", data, "--validation", held_out, "-o", out, "--steps", 6, "--batch", 4,
        "--rank", 2, "--activation", "silu", "--anneal", "linear", "--anneal-end", 0.5, "--lr", 1e-2, "--log-every", 2,
        "--targets", "q_proj,v_proj",
    )  # fmt: skip
    assert code == 0, said
    assert "40 samples, 81 graded tokens of 241; 6 steps of 4 rows of up to 64 tokens, 94% full, 6 epochs" in said
    assert "GB of weights, gradients and optimizer state" in said
    assert "step 6/6" in said
    assert [line["anneal"] for line in metrics(out)] == [1, pytest.approx(1 / 3), 0, 0, 0]
    assert len(read_adapter(out).updates) == 4
    (tmp_path / "r.yaml").write_text(f"version: 1\npasses:\n  - merge_lora: {{adapter: {out}}}\n")
    done = CliRunner().invoke(
        app, ["generate", str(llama), "--recipe", str(tmp_path / "r.yaml"), "--prompt", "1+1=", "--max-new-tokens", "2"]
    )
    assert done.exit_code == 0, done.stderr


def test_sft_tunes_all_weights_by_default_with_mona(llama, tmp_path):
    out = tmp_path / "tuned"
    code, said = train("sft", llama, "--data", sums(tmp_path / "d.jsonl"), "-o", out, "--steps", 2, "--batch", 2)
    assert code == 0, said
    record = json.loads((out / "training.json").read_text())
    assert record["settings"]["optimizer"]["name"] == "mona"
    assert record["settings"]["method"] == "full"
    assert (out / "model.safetensors").exists()
    assert (out / "tokenizer.json").exists()


def test_faults_are_one_message_that_names_the_place(llama, tmp_path):
    good = sums(tmp_path / "d.jsonl")
    bad = write(tmp_path / "bad.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "a", "answer": "b"})
    out = tmp_path / "out"
    for words, says in (
        (
            ("sft", llama, "--data", bad, "-o", out),
            "bad.jsonl:2: field 'completion' is missing; it has 'prompt', 'answer'",
        ),
        (("sft", llama, "--data", tmp_path / "no.jsonl", "-o", out), "no.jsonl: No such file or directory"),
        (("sft", llama, "--data", good, "-o", tmp_path), "exists → give another folder, or remove it"),
        (("sft", llama, "--data", good, "-o", out, "--resume"), "holds no run to go on with → leave out --resume"),
        (("sft", llama, "--data", good, "-o", out, "--method", "dora"), "--method: got 'dora'"),
        (("sft", llama, "--data", good, "-o", out, "--optimizer", "adam"), "got 'adam', did you mean 'adamw'?"),
        (("sft", llama, "--data", good, "-o", out, "--lr", -1), "lr: got -1.0, expected a positive number"),
        (("afa-lora", llama, "--data", good, "-o", out, "--anneal-end", 1), "anneal from 0.0 to 1.0 of the steps"),
        (("afa-lora", llama, "--data", good, "-o", out, "--activation", "tanh"), "unknown activation 'tanh'"),
        (("afa-lora", llama, "--data", good, "-o", out, "--rank", 0), "rank: got 0, expected at least 1"),
        (("sft", tmp_path / "nothing", "--data", good, "-o", out), "no file or folder"),
    ):
        code, said = train(*words)
        assert code == 1, words
        assert says in said, said
        assert said.startswith("error: ")
    assert not list(tmp_path.glob("out*"))


def test_grpo_says_what_to_install(llama, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trl" else found(name, *a))
    data = write(tmp_path / "d.jsonl", {"prompt": "a"})
    code, said = train("grpo", llama, "--data", data, "--reward", "a:b", "-o", tmp_path / "out")
    assert (code, said) == (1, "error: GRPO runs on trl, which is not installed → pip install 'effpass[grpo]'")


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_grpo_from_the_command_line_takes_a_reward_of_the_working_folder(llama, tmp_path):
    (tmp_path / "command_rewards.py").write_text("def f(completions): return [len(c) for c in completions]")
    data = write(tmp_path / "d.jsonl", *({"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(4)))
    (tmp_path / "d2.jsonl").write_text(data.read_text().replace("?", "!"))
    done = subprocess.run(
        [sys.executable, "-m", "effpass", "train", "grpo", llama, "--data", data, "--reward", "command_rewards:f",
         "-o", "out", "--method", "afa-lora", "--steps", "4", "--prompts", "2", "--group", "2",
         "--max-new-tokens", "3"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 prompts; 4 steps, 2 x 2 completions of up to 3 tokens a cycle of 1" in done.stderr
    assert len(read_adapter(tmp_path / "out").updates) == 14
    assert all("reward" in line for line in metrics(tmp_path / "out"))


def test_the_groups_help_lists_the_commands():
    done = CliRunner().invoke(app, ["train", "--help"])
    for name in ("afa-lora", "grpo", "lm", "sft"):
        assert name in done.stdout
    options = CliRunner().invoke(app, ["train", "afa-lora", "--help"]).stdout
    assert "--anneal-end" in options
    assert "--method" not in options
