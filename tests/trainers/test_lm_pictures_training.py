"""`effpass train lm` on pictures: sequences, a tiny LLaVA from end to end, and what its processor gives."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from benchmarks import quality, quality_pictures
from effpass.core.errors import EffpassError, ModelError
from effpass.core.plain_yaml import write_yaml
from effpass.trainers.lm.batches import MicroBatches, evaluation_batches, most_pictures
from effpass.trainers.lm.config import Config, OptimizerConfig, Schedule, Source, Stage, load_config
from effpass.trainers.lm.memory import estimate
from effpass.trainers.lm.model import compile_layers, make_model, model_config
from effpass.trainers.lm.pictures import PICTURES, ROOM, make_picture
from effpass.trainers.lm.pictures_input import PictureInput, make_processor, model_inputs, picture_input
from effpass.trainers.lm.run import train
from effpass.trainers.lm.tokenizer import END, PAD, byte_tokenizer
from effpass.trainers.mona import choose

ROOT = Path(__file__).parents[2]
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
TEXT = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip
MODEL = {
    "model_type": "llava", "vision_config": VISION, "text_config": TEXT, "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}  # fmt: skip
GOOD: dict[str, Any] = {
    "version": 1,
    "model": MODEL,
    "data": [{"text": ["text.txt"]}, {"pictures": "colour", "weight": 2}, {"pictures": "caption"}],
    "stages": [{"steps": 4, "sequence_length": 256, "batch": 4}, {"steps": 2, "sequence_length": 512, "batch": 2}],
    "optimizer": {"name": "mona", "lr": 1e-2},
    "held_out": 0.2,
    "schedule": {"warmup": 2},
    "log_every": 1,
    "save_every": 2,
}
TAKEN = PictureInput(size=56, patch=14, tokens=16, token=258)


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], size=20_000)
    (folder / "text.txt").write_text(" ".join(words))
    path = folder / "c.yaml"
    path.write_text(write_yaml({**GOOD, **changes}))
    return path


def quiet(_: str) -> None:
    pass


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pictures")
    return train(write(folder), folder / "out", say=quiet)


@pytest.fixture(scope="module")
def llava() -> Any:
    return make_model(model_config(MODEL, byte_tokenizer(), 256), None, 0).eval()


# -- sequences ------------------------------------------------------------------------------------------------------


def config(accumulate: int = 1, **changes: Any) -> Config:
    data = [Source(pictures="count"), Source(pictures="caption"), Source(task="copy", options={"letters": 4})]
    given = {
        "model": {}, "data": data, "optimizer": OptimizerConfig(lr=1.0), "schedule": Schedule(warmup=0),
        "stages": [Stage(2, 256, 8, accumulate), Stage(2, 500, 8, accumulate)],
    }  # fmt: skip
    return Config(**{**given, **changes})


def test_a_sequence_is_a_picture_with_its_answers_graded():
    only = config(data=[Source(pictures="count")])
    batch = MicroBatches(only, {}, pictures=TAKEN)[0]
    assert (batch["pixels"].shape, batch["pixels"].dtype) == ((8, 56, 56, 3), torch.uint8)
    for row in range(8):
        picture = make_picture("count", np.random.default_rng((0, 0, 0, row)), 56)
        assert np.array_equal(batch["pixels"][row], picture.pixels)
        ids, weights = batch["input_ids"][row], batch["weights"][row]
        assert ids[:16].tolist() == [258] * 16
        text, graded = [], []
        for question, answer in picture.pairs:
            text += [*question, *answer, END]
            graded += [False] * len(question) + [True] * (len(answer) + 1)
        assert ids[16:].tolist() == text + [PAD] * (240 - len(text))
        assert (weights[16:] > 0).tolist() == graded + [False] * (240 - len(text))
        assert weights.sum() == pytest.approx(1)
        assert not weights[:16].any()


def test_a_long_sequence_holds_several_pictures_each_before_its_text():
    batch = MicroBatches(config(data=[Source(pictures="digit")]), {}, pictures=TAKEN)[2]
    assert batch["input_ids"].shape == (8, 500)
    assert len(batch["pixels"]) == 16
    assert 16 + ROOM <= 500 // 2
    is_picture = batch["input_ids"] == 258
    expected = torch.zeros(500, dtype=torch.bool)
    expected[:16], expected[250:266] = True, True
    assert torch.equal(is_picture, expected.expand(8, -1))
    for half in (slice(0, 250), slice(250, 500)):
        assert ((batch["weights"][:, half] > 0).sum(1) >= 3).all()  # " 7<end>"


@pytest.mark.parametrize(("accumulate", "world"), [(2, 1), (1, 2), (2, 2)])
def test_the_batch_is_the_same_however_it_is_cut(accumulate, world):
    def steps(run: Config, world: int) -> list[dict[str, torch.Tensor]]:
        ranks = [MicroBatches(run, {}, rank, world, TAKEN) for rank in range(world)]
        found = []
        for step in range(4):
            parts = [ranks[r][step * run.accumulate + m] for m in range(run.accumulate) for r in range(world)]
            keys = set().union(*parts)
            found.append({key: torch.cat([part[key] for part in parts if key in part]) for key in keys})
        return found

    for one, whole in zip(steps(config(accumulate), world), steps(config(), 1), strict=True):
        assert one.keys() == whole.keys()
        assert all(torch.equal(one[key], whole[key]) for key in whole)


def test_a_micro_batch_of_text_alone_has_no_pixels():
    batch = MicroBatches(config(data=[Source(task="copy")]), {}, pictures=TAKEN)[0]
    assert "pixels" not in batch
    assert set(model_inputs(batch)) == {"input_ids"}


def test_the_most_pictures_are_those_of_the_fullest_micro_batch():
    run = config(2)
    batches = MicroBatches(run, {}, pictures=TAKEN)
    counts = [len(batches[i].get("pixels", ())) for i in range(8)]
    assert [most_pictures(run, i, 1, TAKEN) for i in (0, 1)] == [max(counts[:4]), max(counts[4:])]
    assert most_pictures(run, 0, 1, None) == 0


def test_held_out_pictures_have_one_question_each():
    run = config()
    for batch in evaluation_batches(run, {}, run.stages[1], TAKEN):
        (source,) = set(batch["source"].tolist())
        if source < 2:
            assert len(batch["pixels"]) == len(batch["input_ids"])
            assert ((batch["input_ids"] == END).sum(1) == 1).all()


# -- the model ------------------------------------------------------------------------------------------------------


def test_the_config_is_filled_in(llava):
    found = llava.config
    assert (found.image_token_id, found.image_seq_length) == (258, 16)
    assert (found.text_config.vocab_size, found.text_config.eos_token_id) == (259, 256)
    assert found.text_config.max_position_embeddings == 256
    assert found.tie_word_embeddings
    assert llava.lm_head.weight is llava.model.language_model.embed_tokens.weight
    assert picture_input(found) == TAKEN


def test_mona_takes_the_matrices_of_both_towers(llava):
    by = {choice.name: choice.algorithm for choice in choose(llava)}
    adamw = {name for name, p in llava.named_parameters() if p.ndim < 2}
    adamw |= {"model.vision_tower.embeddings.position_embedding.weight", "model.language_model.embed_tokens.weight"}
    assert {name for name, algorithm in by.items() if algorithm == "adamw"} == adamw
    assert sum(algorithm == "mona" for algorithm in by.values()) == 1 + 2 * 6 + 2 + 2 * 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, r"model\.text_config: got None, expected a mapping with its model_type"),
        ({"vision_config": {"hidden_size": 32}}, r"model\.vision_config\.model_type: unknown None"),
        (
            {"text_config": {**TEXT, "hiden_size": 3}},
            r"model\.text_config\.hiden_size: unknown key of llama, did you mean 'hidden_size'\?",
        ),
        ({"text_config": {**TEXT, "vocab_size": 100}}, r"model\.text_config\.vocab_size: got 100"),
        ({"text_config": {**TEXT, "max_position_embeddings": 64}}, r"text_config\.max_position.*: got 64.* of 256"),
        ({"vision_config": {**VISION, "patchsize": 7}}, r"model\.vision_config\.patchsize: unknown key of siglip"),
    ],
)
def test_a_wrong_model_is_refused(changes, message):
    with pytest.raises(EffpassError, match=message):
        model_config({**MODEL, **changes}, byte_tokenizer(), 256)


def test_a_tower_without_class_token_keeps_all_its_tokens():
    wrong = model_config({**MODEL, "vision_feature_select_strategy": "default"}, byte_tokenizer(), 256)
    with pytest.raises(ModelError, match=r"image_seq_length: got 16, and the model makes 15 tokens") as caught:
        picture_input(wrong)
    assert "full" in caught.value.hint


def test_a_tower_with_class_token_has_its_processor_too(tmp_path):
    clip = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 14}  # fmt: skip
    tokenizer = byte_tokenizer()
    given = {**MODEL, "vision_config": clip, "vision_feature_select_strategy": "default"}
    architecture = model_config(given, tokenizer, 256)
    taken = picture_input(architecture)
    assert taken == TAKEN
    processor = make_processor(taken, architecture, tokenizer)
    pixels = make_picture("colour", np.random.default_rng(0), 56).pixels
    assert processor(images=pixels, text="<image>?")["input_ids"] == [[258] * 16 + [ord("?")]]


def test_compiled_layers_give_the_same_for_any_number_of_pictures(llava, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = make_model(llava.config, None, 0).eval()
    compile_layers(compiled)
    assert compiled.state_dict().keys() == llava.state_dict().keys()
    for count in (2, 3, 5):
        ids = torch.full((5, 24), 100)
        ids[:count, :16] = 258
        pixels = torch.randint(0, 256, (count, 56, 56, 3), dtype=torch.uint8)
        inputs = model_inputs({"input_ids": ids, "pixels": pixels})
        with torch.no_grad():
            one, other = (m(**inputs, use_cache=False).logits for m in (compiled, llava))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_estimate_counts_pictures(tmp_path):
    """Against the same count on real tensors."""
    stages = [{"steps": 3, "sequence_length": 256, "batch": 4}]
    run = load_config(write(tmp_path, data=[{"pictures": "count"}], stages=stages, save_every=0))
    architecture = model_config(MODEL, byte_tokenizer(), 256)
    found = estimate(run, architecture, torch.device("cpu"), 1, TAKEN)
    model = make_model(architecture, None, 0)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    batch = MicroBatches(run, {}, pictures=TAKEN)[0]
    storages: dict[int, Any] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage()) and t, lambda t: t
    )
    with hooks:
        logits = model(**model_inputs(batch), use_cache=False).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten(), reduction="none").sum()
    kept = sum(s.nbytes() for address, s in storages.items() if address not in own)
    expected = kept + 2 * 4 * logits.numel() + batch["pixels"].nbytes
    assert found.activations == pytest.approx(expected, rel=0.05)


# -- from end to end ------------------------------------------------------------------------------------------------


def test_the_result_is_a_stock_checkpoint_with_its_processor(finished):
    model = AutoModelForImageTextToText.from_pretrained(finished)
    processor = AutoProcessor.from_pretrained(finished)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    for seed in range(3):
        picture = make_picture("colour", np.random.default_rng(seed), 56)
        question = picture.pairs[0][0]
        made = processor(images=picture.pixels, text=f"<image>{question.decode()}", return_tensors="pt")
        ids = torch.tensor([[258] * 16 + list(question)])
        expected = model_inputs({"input_ids": ids, "pixels": torch.from_numpy(picture.pixels[None])})
        assert torch.equal(made["input_ids"], ids)
        assert torch.equal(made["pixel_values"], expected["pixel_values"])  # to the last bit
        made = model.generate(**made, max_new_tokens=2, do_sample=False)
        assert made.shape[1] > ids.shape[1]
    record = json.loads((finished / "training.json").read_text())
    assert record["data"][1] == {"name": "colour", "weight": 2, "pictures": "colour"}


def test_it_learns_and_every_source_is_measured(finished):
    found = [line["loss"] for line in lines(finished) if "loss" in line]
    assert found[0] == pytest.approx(np.log(259), abs=0.3)
    assert found[-1] < found[0] - 0.4
    (evaluation,) = [line for line in lines(finished) if "eval_loss_text" in line]
    wanted = ("loss_text", "loss_colour", "accuracy_colour", "loss_caption", "accuracy_caption", "sequence_length")
    assert set(evaluation) == {"step", *(f"eval_{name}" for name in wanted)}


def test_the_held_out_loss_is_what_the_stock_model_makes_of_the_processors_inputs(finished):
    model = AutoModelForImageTextToText.from_pretrained(finished, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(finished)
    expected = []
    for number in range(64):
        picture = make_picture("colour", np.random.default_rng((0, 1, 1, number, 512)), 56)
        question, answer = (part.decode() for part in picture.pairs[0])
        inputs = processor(images=picture.pixels, text=f"<image>{question}{answer}<end>", return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, : 16 + len(question)] = -100
        with torch.no_grad():
            expected.append(model(**inputs, labels=labels).loss.item())
    (evaluation,) = [line for line in lines(finished) if "eval_loss_colour" in line]
    assert evaluation["eval_loss_colour"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_resumed_run_is_bit_for_bit_the_same(finished, tmp_path):
    path = write(tmp_path)
    with pytest.raises(ZeroDivisionError):
        train(path, tmp_path / "out", say=lambda line: 1 / 0 if line.startswith("step 3/") else None)
    folder = train(path, tmp_path / "out", resume=True, say=quiet)
    assert lines(folder) == lines(finished)
    one, other = (load_file(f / "model.safetensors") for f in (folder, finished))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_accumulated_gradients_equal_those_of_the_whole_batch(finished, tmp_path):
    stages = [{**stage, "accumulate": 2} for stage in GOOD["stages"]]
    folder = train(write(tmp_path, stages=stages), tmp_path / "out", say=quiet)
    found, expected = ([line["loss"] for line in lines(f) if "loss" in line] for f in (folder, finished))
    # MONA's orthogonalized updates are in bfloat16 on the way; six steps let the last bits grow.
    assert found == pytest.approx(expected, rel=5e-3)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": TEXT},
            r"data\[1\]: pictures of colour need a model that reads pictures, and llama reads text alone",
        ),
        (
            {"stages": [{"steps": 3, "sequence_length": 128, "batch": 4}]},
            r"data\[1\]: pictures of colour need 240 tokens \(16 for the picture, 224 for text\).* sequences of 128",
        ),
        (
            {"model": {**MODEL, "vision_config": {**VISION, "image_size": 42}}},
            r"data\[1\]: pictures of colour need 56 x 56 pixels, and model\.vision_config\.image_size is 42",
        ),
        ({"fsdp": True}, r"data\[1\]: pictures of colour: a sharded model needs a picture in every process"),
        (
            {"data": [{"pictures": "color"}]},
            r"data\[0\]\.pictures: unknown 'color', did you mean 'colour'\?",
        ),
        (
            {"data": [{"pictures": "colour", "options": {"a": 1}}]},
            r"data\[0\]: .*'options' are a task's; text and pictures have none",
        ),
        ({"data": [{"pictures": "colour", "task": "copy"}]}, r"data\[0\]: .*either 'text' or 'task' or 'pictures'"),
        ({"tokenizer": "t"}, r"data\[1\]: tasks and pictures fill sequences byte by byte and need `tokenizer: bytes`"),
    ],
)
def test_pictures_that_cannot_be_used(changes, message, tmp_path):
    with pytest.raises(EffpassError, match=message):
        train(write(tmp_path, **changes), tmp_path / "out", say=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "text.txt"]


# -- scoring --------------------------------------------------------------------------------------------------------


def drawn_and_scored(model: Any, kind: str, selection: str) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    drawn = quality_pictures._drawn(kind, 0, 6, TAKEN)
    ((losses, is_wrong),) = quality_pictures._scored(model, TAKEN, drawn, selection, 0)
    return drawn, losses, is_wrong


@pytest.mark.parametrize("kind", ["caption", "left"])
def test_scores_are_those_of_the_stock_model(llava, kind):
    drawn, losses, is_wrong = drawn_and_scored(llava, kind, "all keys")
    expected, wrong = [], []
    for picture in drawn:
        text = [*picture.pairs[0][0], *picture.pairs[0][1], END]
        ids = torch.tensor([[258] * 16 + text])
        inputs = model_inputs({"input_ids": ids, "pixels": torch.from_numpy(picture.pixels[None])})
        with torch.no_grad():
            logits = llava(**inputs).logits[0, :-1]
        first = 16 + len(picture.pairs[0][0])
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        expected.append(nats[first - 1 :])
        wrong.append((logits.argmax(-1) != ids[0, 1:])[first - 1 :].any().item())
    torch.testing.assert_close(losses, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert is_wrong.tolist() == wrong


def test_bad_selections_hide_parts_of_the_picture(llava):
    losses = {kind: drawn_and_scored(llava, "left", kind)[1] for kind in quality.SELECTIONS}
    for kind in quality.SELECTIONS[1:]:
        assert not torch.allclose(losses[kind], losses["all keys"], atol=1e-5)
    assert llava.config.text_config._attn_implementation == "sdpa"


def test_rows_of_pictures_name_chance_and_signal(llava):
    rows = list(quality_pictures.question_rows(llava, "m", "cpu", smoke=True))
    asked = [kind for kind in PICTURES if kind != "caption"]
    assert [row.case for row in rows] == [f"m, pictures, {kind}" for kind in asked for _ in quality.SELECTIONS]
    assert all(row.note.endswith("no signal") for row in rows)
    (count, *_) = [row.note for row in rows if "count" in row.case]
    assert count.startswith("chance 12.5%; ")
    rows = list(quality_pictures.caption_rows(llava, "m", "cpu", smoke=True))
    assert rows[0].metric == "perplexity of a caption's token, all keys"
    assert rows[0].ours == pytest.approx(259, rel=0.2)
    assert len(rows) == 4


def test_text_models_have_no_rows_of_pictures(monkeypatch):
    model = make_model(model_config(TEXT, byte_tokenizer(), 256), None, 0)
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])
    monkeypatch.setattr(quality, "_models", lambda device, smoke: [(model, byte_tokenizer(), "m")])
    assert list(quality.pictures("cpu", False)) == []
