"""No command asks the network where everything that it names is on the disk."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tuning import sums


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was looked up or connected to; each attempt fails."""
    found: list[object] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        found.append(arguments)
        raise OSError("no network")

    connect = socket.socket.connect

    def refuse_hosts(own: socket.socket, address: Any) -> None:
        if own.family == socket.AF_UNIX:
            return connect(own, address)
        return refuse(address)

    monkeypatch.setattr(socket.socket, "connect", refuse_hosts)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_the_guard_itself(asked):
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("localhost", 80))
    with socket.socket() as own, pytest.raises(OSError, match="no network"):
        own.connect(("127.0.0.1", 80))
    assert len(asked) == 2


def test_commands(
    asked: list[object],
    run: Callable[..., Any],
    recipe_file: Callable[..., Path],
    tiny_model: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path / "cache"))
    recipe = recipe_file(f"- merge_lora: {{adapter: {tiny_adapter}}}")
    data, text = sums(tmp_path / "d.jsonl"), tmp_path / "t.txt"
    text.write_text("the quick brown fox. " * 200)
    steps = ("--steps", 1, "--batch", 2)
    for words in (
        ("passes",),
        ("recipe", "check", recipe),
        ("inspect", tiny_model, "-r", recipe),
        ("optimize", tiny_model, "-r", recipe, "-o", tmp_path / "merged"),
        ("generate", tiny_model, "-p", "hi", "--adapter", tiny_adapter, "--max-new-tokens", 2),
        ("generate", tiny_model, "-p", "hi", "-r", recipe, "--draft", "ngram", "--max-new-tokens", 2),
        ("train", "sft", tiny_model, "--data", data, "-o", tmp_path / "tuned", *steps),
        ("train", "afa-lora", tiny_model, "--data", data, "-o", tmp_path / "adapter", "--steps", 2, "--batch", 2),
        ("calibrate", "prefix-kv", tiny_model, "--data", text, "--tokens", 128, "--samples", 1, "-o", tmp_path / "p"),
        ("cache", "clear"),
    ):
        result = run(*words)
        assert result.exit_code == 0, (words, result.output)
    assert asked == []


@pytest.mark.slow
def test_exports(
    asked: list[object], run: Callable[..., Any], recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    for target, suffix in (("onnx", "onnx"), ("aoti", "pt2"), ("inductor", "safetensors")):
        out = tmp_path / f"m.{suffix}"
        for words in (
            ("export", tiny_model, "-r", recipe_file("- fuse_linears"), "--target", target, "-o", out),
            ("validate", out, "--allow-native"),
        ):
            result = run(*words)
            assert result.exit_code == 0, (words, result.output)
    assert asked == []
