"""A tiny Llama with a byte-level tokenizer, an adapter for it, and a way to run commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: 2 layers, 4 heads, tied embeddings, 15 linear layers with the head."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock PEFT adapter on the 14 linear layers inside `tiny_model`'s blocks."""
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


def make_adapter(model: Path, folder: Path) -> Path:
    """Save a rank-4 LoRA adapter with random A and B for the checkpoint `model`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe: ``recipe_file("- merge_lora: {adapter: /path}")``."""

    def write(*items: str, name: str = "r.yaml", more: str = "") -> Path:
        passes = "\n".join(f"  {item}" for item in items)
        (tmp_path / name).write_text(f"version: 1\npasses:\n{passes}\n{more}")
        return tmp_path / name

    return write


@pytest.fixture
def run() -> Callable[..., Any]:
    """Run the command line in this process: ``run("passes", "--json")``."""
    from typer.testing import CliRunner

    from effpass.cli.app import app

    def invoke(*arguments: object, stdin: str | None = None, debug: bool = False) -> Any:
        words = [*(["--debug"] if debug else []), *map(str, arguments)]
        return CliRunner().invoke(app, words, input=stdin, prog_name="effpass")

    return invoke


@pytest.fixture
def refused(run: Callable[..., Any]) -> Callable[..., str]:
    """Run a command that must fail with one message on stderr; returns the message."""

    def invoke(*arguments: object, stdin: str | None = None) -> str:
        result = run(*arguments, stdin=stdin)
        assert result.exit_code == 1, result.output
        assert "Traceback" not in result.output
        lines = [line for line in result.stderr.splitlines() if " …" not in line and not line.endswith(" s")]
        assert lines[0].startswith("error: "), result.stderr
        assert sum(line.startswith("error: ") for line in lines) == 1, result.stderr
        assert result.stdout == ""
        return "\n".join(lines)

    return invoke
