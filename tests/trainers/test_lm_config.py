"""The config of `effpass train lm`: every fault is named with its path, before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from effpass.core.errors import EffpassError, ModelError, RecipeError
from effpass.core.plain_yaml import write_yaml
from effpass.trainers.lm.config import Config, load_config
from effpass.trainers.lm.model import make_model, model_config
from effpass.trainers.lm.optimizers import rate
from effpass.trainers.lm.tokenizer import byte_ids, byte_tokenizer, load_tokenizer

GOOD = {
    "version": 1,
    "model": {"model_type": "llama", "hidden_size": 32},
    "data": [{"text": ["a.txt"]}, {"task": "needle", "options": {"keys": 2}}],
    "stages": [{"steps": 200, "sequence_length": 128, "batch": 4}],
    "optimizer": {"name": "adamw", "lr": 1e-3},
}


def load(tmp_path: Path, **changes: object) -> Config:
    path = tmp_path / "c.yaml"
    content = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path.write_text(write_yaml(content))
    return load_config(path)


def test_a_good_config(tmp_path):
    config = load(tmp_path, stages=[{"steps": 3, "sequence_length": 128, "batch": 4}, GOOD["stages"][0]])
    assert (config.steps, config.accumulate, config.optimizer.name) == (203, 1, "adamw")
    assert config.schedule.kind == "cosine"
    assert config.data[1].options == {"keys": 2}


def test_the_default_optimizer_is_mona(tmp_path):
    assert load(tmp_path, optimizer={"lr": 1e-3}).optimizer.name == "mona"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 1}, r"c\.yaml: stepz: unknown option; known: "),
        ({"optimiser": {"lr": 1}}, r"c\.yaml: optimiser: unknown option, did you mean 'optimizer'\?"),
        ({"optimizer": {"name": "adamw"}}, r"c\.yaml: optimizer\.lr: got .*: Field required"),
        ({"optimizer": {"name": "adam", "lr": 1.0}}, r"c\.yaml: optimizer\.name: got 'adam'"),
        ({"optimizer": {"name": "adamw", "lr": "1e-3"}}, r"c\.yaml: optimizer\.lr: got '1e-3' \(str\)"),
        ({"optimizer": {"name": "adamw", "lr": 0.0}}, r"lr: got 0\.0, expected a positive number"),
        (
            {"optimizer": {"name": "adamw", "lr": 1.0, "options": {"epz": 1}}},
            r"c\.yaml: optimizer\.options\.epz: unknown option, did you mean 'eps'\?",
        ),
        ({"data": []}, r"'data' is empty"),
        ({"data": [{"weight": 1.0}]}, r"c\.yaml: data\[0\]: .*either 'text' or 'task' or 'pictures'"),
        (
            {"data": [{"text": ["a"], "options": {"keys": 1}}]},
            r"data\[0\]: .*'options' are a task's; text and pictures have none",
        ),
        ({"data": [{"task": "needles"}]}, r"c\.yaml: data\[0\]\.task: unknown task 'needles', did you mean 'needle'\?"),
        (
            {"data": [{"task": "needle", "options": {"key": 1}}]},
            r"data\[0\]\.options\.key: unknown option, did you mean 'keys'\?",
        ),
        ({"data": [{"task": "needle", "weight": -1.0}]}, r"weight: got -1\.0, expected a positive number"),
        ({"stages": [{"steps": 101, "sequence_length": 32, "batch": 1}]}, r"data\[1\]: needle needs 49 tokens.* of 32"),
        (
            {"stages": [{"steps": 1, "sequence_length": 128, "batch": 3, "accumulate": 2}]},
            r"stages\[0\]: .*a batch of 3 sequences can't be cut into 2 micro-batches",
        ),
        (
            {"stages": [GOOD["stages"][0], {**GOOD["stages"][0], "accumulate": 2}]},
            r"all stages have the same 'accumulate'",
        ),
        ({"save_every": 15}, r"save_every: got 15, expected a multiple of log_every \(10\)"),
        ({"schedule": {"warmup": 200}}, r"schedule\.warmup: got 200 of 200 steps"),
        ({"tokenizer": "t"}, r"data\[1\]: tasks and pictures fill sequences byte by byte and need `tokenizer: bytes`"),
        ({"model": {"hidden_size": 32}}, r"model: got .*, expected 'model_type' or 'from'"),
        ({"model": {"from": "x", "hidden_size": 1}}, r"model: 'from' takes the config .*; remove hidden_size"),
        ({"version": None}, r"'version' is missing"),
        ({"version": 2}, r"version: got 2"),
    ],
)
def test_faults_name_their_place(tmp_path, changes, message):
    with pytest.raises(EffpassError, match=message):
        load(tmp_path, **changes)


def test_all_faults_come_at_once(tmp_path):
    with pytest.raises(EffpassError, match=r"(?s)2 faults.*data\[0\]\.task.*optimizer\.options|2 faults") as caught:
        load(tmp_path, data=[{"task": "x"}], optimizer={"name": "adamw", "lr": 1.0, "options": {"q": 1}})
    assert "data[0].task" in caught.value.message
    assert "optimizer.options.q" in caught.value.message


def test_an_empty_file_says_what_to_begin_with(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    with pytest.raises(RecipeError, match=r"the config is empty\n.*`version:`, `model:`"):
        load_config(tmp_path / "c.yaml")


# -- model and tokenizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "lama"}, r"model\.model_type: unknown 'lama', did you mean 'llama'\?"),
        (
            {"model_type": "llama", "hiden_size": 4},
            r"model\.hiden_size: unknown key of llama, did you mean 'hidden_size'\?",
        ),
        ({"model_type": "llama", "vocab_size": 100}, r"model\.vocab_size: got 100, and the tokenizer has 259 tokens"),
        ({"model_type": "llama", "max_position_embeddings": 64}, r"max_position_embeddings: got 64.* of 128"),
        ({"model_type": "llama", "hidden_size": "wide"}, r"model: llama refuses it"),
    ],
)
def test_a_wrong_model_is_refused(given, message):
    with pytest.raises(EffpassError, match=message):
        model_config(given, byte_tokenizer(), 128)


def test_a_model_that_is_no_causal_language_model_is_refused():
    config = model_config({"model_type": "t5"}, byte_tokenizer(), 128)
    with pytest.raises(ModelError, match="Unrecognized configuration class"):
        make_model(config, None, 0)


def test_what_the_model_section_leaves_out_comes_from_the_run():
    config = model_config({"model_type": "llama", "num_hidden_layers": 1}, byte_tokenizer(), 128)
    assert (config.vocab_size, config.max_position_embeddings) == (259, 128)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (256, 257, None)


def test_the_byte_tokenizer_gives_bytes_and_comes_back_from_disk(tmp_path):
    from transformers import AutoTokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Zwölf Boxkämpfer's\n\t\x00 <end>日本  x"
    plain = text.replace("<end>", "")
    assert tokenizer(plain)["input_ids"] == byte_ids(plain.encode()).tolist() == list(plain.encode())
    assert tokenizer(text)["input_ids"].count(256) == 1
    assert tokenizer.decode(tokenizer(plain)["input_ids"]) == plain
    assert len(tokenizer) == 259
    assert tokenizer.eos_token == "<end>"


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match=r"nothing: can't be loaded"):
        load_tokenizer(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("cosine", [0.5, 1, 1, 0.55, 0.1]), ("wsd", [0.5, 1, 1, 1, 0.1]), ("constant", [0.5, 1, 1, 1, 1])],
)
def test_schedules(kind, expected):
    from effpass.trainers.lm.config import Schedule

    factor = rate(Schedule(warmup=2, kind=kind, final=0.1, decay=0.2), 103)
    middle = 52  # half-way from the end of the warm-up to the last step
    assert [factor(step) for step in (0, 1, 2, middle, 102)] == pytest.approx(expected, abs=1e-3)


ROOT = Path(__file__).parents[2]
CONFIGS = [*sorted(ROOT.glob("models/*/config.yaml")), *sorted(ROOT.glob("examples/train/*.yaml"))]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_configs_are_valid_and_name_no_place(path):
    assert load_config(path).steps > 100
    patterns = [pattern for source in load_config(path).data for pattern in source.text or ()]
    assert all(pattern.startswith(("$EFFPASS_DATA/", "$STDLIB/", "$CORPUS/")) for pattern in patterns)
    # What is reported on is never trained on.
    assert not any("wikitext" in pattern or "test" in pattern.replace("unittest", "") for pattern in patterns)


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.parent.name == "models"], ids=lambda p: p.parent.name
)
def test_reference_models_have_at_most_15_megabytes(path):
    config = load_config(path)
    longest = max(stage.sequence_length for stage in config.stages)
    architecture = model_config(config.model, byte_tokenizer(), longest)
    with torch.device("meta"):
        model = make_model(architecture, None, 0)
    assert 2 * sum(p.numel() for p in model.parameters()) < 15e6
    assert architecture.get_text_config().max_position_embeddings == longest
