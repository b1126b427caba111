"""The trained models under `models/`: stock transformers loads them, and they are the ones that their records name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

MODELS = Path(__file__).resolve().parents[2] / "models"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/config.yaml"))


def test_there_are_four():
    assert NAMES == ["tiny-long", "tiny-mla", "tiny-moe", "tiny-vlm"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_its_record_says(name):
    folder = MODELS / name
    weights = folder / "model.safetensors"
    record = json.loads((folder / "training.json").read_text())
    assert record["weights_sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert weights.stat().st_size <= 15e6
    assert {"seed", "data", "curves", "device", "versions"} <= set(record)
    assert (folder / "loss.png").stat().st_size


@pytest.mark.parametrize("name", NAMES)
def test_stock_transformers_loads_it(name):
    """And it predicts English far better than chance, which is 8 bits a byte."""
    kind = AutoModelForImageTextToText if name == "tiny-vlm" else AutoModelForCausalLM
    model, told = kind.from_pretrained(MODELS / name, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    if name == "tiny-vlm":
        return  # it learned captions and answers
    tokens = AutoTokenizer.from_pretrained(MODELS / name)
    text = "We the People of the United States, in Order to form a more perfect Union, establish Justice"
    ids = tokens(text, return_tensors="pt").input_ids
    with torch.no_grad():
        bits = float(model(input_ids=ids, labels=ids).loss) / torch.log(torch.tensor(2.0))
    assert bits < 4
