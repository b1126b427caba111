"""A process that is killed while it writes leaves what was there before, or what it was to write: nothing between."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killed import killed_at_each_step, killed_in_each_write

from effpass.core import whole
from effpass.core.artifact import Artifact, read_safetensors
from effpass.core.errors import ArtifactError
from effpass.core.fingerprint import Fingerprint
from effpass.core.recipe import Recipe

SIZES = (0, 1, 100, 1000)


def deaths(action: Callable[[], object], folder: Path) -> list[str]:
    """Names for the ways in which `action` was killed; the caller's test looks at `folder` after each."""
    yield from (f"step {n}" for n in killed_at_each_step(action, folder))
    yield from (f"byte {n}" for n in killed_in_each_write(action, SIZES))


def artifact(value: float) -> Artifact:
    made_for = Fingerprint.of(torch.nn.Linear(2, 2))
    return Artifact("toy", 1, {"value": value}, made_for, tensors={"t": torch.full((300,), value)})


def state(folder: Path) -> tuple[dict, float] | None:
    if not folder.exists():
        return None
    found = Artifact.load(folder, expect_pass="toy", max_version=1)
    return found.options, float(found.tensors["t"].mean())


@pytest.mark.parametrize("old", [None, ({"value": 1.0}, 1.0)], ids=["nothing", "an artifact"])
def test_an_artifact(tmp_path, old):
    folder, new = tmp_path / "a", ({"value": 2.0}, 2.0)
    seen = []
    if old:
        artifact(1.0).save(folder)
    for death in deaths(lambda: artifact(2.0).save(folder), tmp_path):
        assert state(folder) in (old, new), death
        seen.append(state(folder))
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        if old:
            artifact(1.0).save(folder)
    assert len(seen) > 6
    assert old in seen
    artifact(2.0).save(folder)
    assert state(folder) == new


def test_a_recipe(tmp_path):
    old, new = "version: 1\npasses: []\n", Recipe.parse({"version": 1, "passes": ["fuse_linears"]})
    file = tmp_path / "r.yaml"
    for death in deaths(lambda: new.save(file), tmp_path):
        assert not file.exists() or file.read_text() in (old, new.to_yaml()), death
        file.write_text(old)
    new.save(file)
    assert file.read_text() == new.to_yaml()


def test_a_checkpoint(tmp_path):
    """`effpass optimize --overwrite`."""
    import families

    from effpass import api

    def model(layers: int):
        return families.make("llama", num_hidden_layers=layers, vocab_size=64, hidden_size=32, intermediate_size=32)

    def layers() -> int:
        """By the config and by the weights, which must agree."""
        count = json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"]
        names = read_safetensors(tmp_path / "m" / "model.safetensors")
        assert {name.split(".")[2] for name in names if ".layers." in name} == {str(i) for i in range(count)}
        return count

    new, seen = model(2), []
    model(1).save_pretrained(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "m")
    for death in deaths(lambda: api.save(new, tmp_path / "m", overwrite=True), tmp_path):
        seen.append(layers())
        assert seen[-1] in (1, 2), death
        for left in set(tmp_path.iterdir()) - {tmp_path / "old"}:
            shutil.rmtree(left)
        shutil.copytree(tmp_path / "old", tmp_path / "m")
    assert set(seen) == {1, 2}


@pytest.mark.parametrize("beside", [(None, None), (None, "new"), ("old", None), ("old", "new")])
def test_an_export(tmp_path, beside):
    """A model and the weights that may stand beside it are of one export; where both change, there may be no model."""
    from effpass.lowering.targets.onnx import OnnxTarget, data_file
    from effpass.lowering.targets.publish import published

    model = tmp_path / "m.onnx"
    sets = {"old": beside[0], "new": beside[1]}

    def write(at: Path, word: str) -> None:
        at.write_text(word)
        if sets[word]:
            data_file(at).write_text(word)

    def export() -> None:
        with published(model, OnnxTarget()) as file:
            write(file, "new")

    write(model, "old")
    seen = []
    for death in deaths(export, tmp_path):
        word = model.read_text() if model.exists() else None
        weights = data_file(model).read_text() if data_file(model).exists() else None
        assert word is None or weights == sets[word], death
        assert word is not None or beside != (None, None), death
        seen.append(word)
        for left in tmp_path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        write(model, "old")
    assert {"old", "new"} <= set(seen)


# -- where names can't be exchanged -----------------------------------------------------------------------------------


def test_without_the_system_s_exchange_a_folder_is_replaced_too(tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "_exchange", lambda one, other: False)
    artifact(1.0).save(tmp_path / "a")
    artifact(2.0).save(tmp_path / "a")
    assert state(tmp_path / "a") == ({"value": 2.0}, 2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    artifact(1.0).save(tmp_path / "a")
    rename = os.rename

    def fail_on_new(old, new, **kwargs):
        if os.path.basename(old) == "new":
            raise OSError("disk full")
        rename(old, new, **kwargs)

    monkeypatch.setattr(whole, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail_on_new)
    with pytest.raises(ArtifactError, match="a: can't be written: disk full"):
        artifact(2.0).save(tmp_path / "a")
    assert state(tmp_path / "a") == ({"value": 1.0}, 1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_system_without_the_call(tmp_path, monkeypatch):
    monkeypatch.setattr(whole.ctypes, "CDLL", lambda name: object())
    assert not whole._exchange(tmp_path, tmp_path)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    artifact(1.0).save(tmp_path / "v1")
    (tmp_path / "latest").symlink_to("v1")
    artifact(2.0).save(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert state(tmp_path / "v1") == ({"value": 2.0}, 2.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "v1"]
