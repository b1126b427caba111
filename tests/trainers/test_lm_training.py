"""`effpass train lm` end to end, on a tiny model and the CPU."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from effpass.core.errors import EffpassError
from effpass.core.plain_yaml import write_yaml
from effpass.trainers.lm import run as lm_run
from effpass.trainers.lm.config import load_config
from effpass.trainers.lm.memory import estimate
from effpass.trainers.lm.model import model_config
from effpass.trainers.lm.run import train
from effpass.trainers.lm.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip
GOOD: dict[str, Any] = {
    "version": 1,
    "model": MODEL,
    "data": [{"text": ["text.txt"]}, {"task": "copy", "options": {"letters": 2}}],
    "stages": [{"steps": 6, "sequence_length": 128, "batch": 4}, {"steps": 4, "sequence_length": 256, "batch": 2}],
    "optimizer": {"name": "adamw", "lr": 1e-2},
    "held_out": 0.2,
    "schedule": {"warmup": 2},
    "log_every": 1,
    "save_every": 4,
}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], size=20_000)
    (folder / "text.txt").write_text(" ".join(words))
    path = folder / "c.yaml"
    path.write_text(write_yaml({**GOOD, **changes}))
    return path


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    return train(write(folder), folder / "out", say=quiet)


# -- what is left at the end ----------------------------------------------------------------------------------------


def test_the_result_is_a_stock_checkpoint_with_its_history(finished):
    model = AutoModelForCausalLM.from_pretrained(finished)
    assert model.config.use_cache
    assert model.generation_config.use_cache is not False
    assert model.config.model_type == "llama"
    assert len(AutoTokenizer.from_pretrained(finished)) == 259
    assert (finished / "training.yaml").read_text() == (finished.parent / "c.yaml").read_text()
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((finished / "training.json").read_text())
    weights = (finished / "model.safetensors").read_bytes()
    assert record["weights_sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert (record["seed"], record["steps"], record["tokens"]) == (0, 10, 6 * 4 * 128 + 4 * 2 * 256)
    (file,) = record["data"][0]["files"]
    text = (finished.parent / "text.txt").read_bytes()
    assert file == {"name": "text.txt", "sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
    assert record["final"]["loss"] == losses(finished)[-1]
    assert not (finished.parent / "out.training").exists()
    assert sorted(path.name for path in finished.parent.iterdir()) == ["c.yaml", "out", "text.txt"]


def test_it_learns_and_every_source_is_measured(finished):
    found = losses(finished)
    assert len(found) == 10
    assert found[0] == pytest.approx(np.log(259), abs=0.3)
    assert found[-1] < found[0] - 1
    (evaluation,) = [line for line in lines(finished) if "eval_loss_text" in line]
    assert set(evaluation) == {"step", "eval_sequence_length", "eval_loss_text", "eval_loss_copy", "eval_accuracy_copy"}


def test_the_held_out_loss_is_that_of_the_saved_model(finished, tmp_path):
    """Computed again by transformers' own loss, over text that no training sequence touched."""
    path = write(tmp_path)
    corpus = _corpus(path, tmp_path)
    kept = torch.from_numpy(corpus.held_out[: len(corpus.held_out) // 256 * 256].astype(np.int64)).view(-1, 256)[:64]
    model = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32)
    with torch.no_grad():
        expected = np.mean([model(input_ids=row[None], labels=row[None]).loss.item() for row in kept])
    (evaluation,) = [line for line in lines(finished) if "eval_loss_text" in line]
    assert evaluation["eval_loss_text"] == pytest.approx(expected, rel=1e-5)


def _corpus(path: Path, folder: Path) -> Any:
    from effpass.trainers.lm.corpus import find_files, read_corpus, write_corpus

    config = load_config(path)
    write_corpus(folder / "d", find_files(["text.txt"], folder, "d"), None, config.held_out, config.seed, "d")
    return read_corpus(folder / "d")


def test_bfloat16_is_saved_as_such(tmp_path):
    path = write(tmp_path, dtype="bfloat16", stages=[{"steps": 3, "sequence_length": 128, "batch": 2}], save_every=0)
    folder = train(path, tmp_path / "out", say=quiet)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert all(np.isfinite(losses(folder)))


def test_training_goes_on_from_a_checkpoint_of_its_own(finished, tmp_path):
    stages = [{"steps": 3, "sequence_length": 128, "batch": 4}]
    path = write(
        tmp_path, model={"from": str(finished)}, stages=stages, save_every=0, optimizer={"name": "adamw", "lr": 1e-5}
    )
    assert losses(train(path, tmp_path / "out", say=quiet))[0] < 4.8  # a new model begins at 5.56


# -- exactness ------------------------------------------------------------------------------------------------------


def test_accumulated_gradients_equal_those_of_the_whole_batch(finished, tmp_path):
    stages = [{**stage, "accumulate": 2} for stage in GOOD["stages"]]
    folder = train(write(tmp_path, stages=stages), tmp_path / "out", say=quiet)
    # The order of sums differs; ten AdamW steps let the last bits grow.
    assert losses(folder) == pytest.approx(losses(finished), rel=1e-4)


def test_a_run_that_was_interrupted_and_resumed_is_bit_for_bit_the_same(finished, tmp_path):
    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("step 7/"):
            raise Stop

    path = write(tmp_path)
    with pytest.raises(Stop):
        train(path, tmp_path / "out", say=stop)
    assert not (tmp_path / "out").exists()
    assert len(lines(tmp_path / "out.training")) == 7  # three more than the checkpoint knows
    folder = train(path, tmp_path / "out", resume=True, say=quiet)
    assert lines(folder) == lines(finished)
    one, other = (load_file(f / "model.safetensors") for f in (folder, finished))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_run_leaves_nothing_that_looks_finished_and_goes_on(tmp_path):
    stages = [{"steps": 24, "sequence_length": 128, "batch": 4}]
    path = write(tmp_path, stages=stages, save_every=2)
    command = [sys.executable, "-m", "effpass", "train", "lm", str(path), "-o", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    checkpoints = tmp_path / "out.training" / "checkpoints"
    deadline = time.monotonic() + 90
    while not list(checkpoints.glob("checkpoint-[2-9]/trainer_state.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    half = checkpoints / "checkpoint-999"  # a checkpoint that the kill cut short: no state at its end
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"\0" * 10)
    folder = train(path, tmp_path / "out", resume=True, say=quiet)
    assert [line["step"] for line in lines(folder) if "loss" in line] == list(range(1, 25))
    whole = train(path, tmp_path / "whole", say=quiet)
    assert lines(folder) == lines(whole)


@pytest.mark.parametrize("name", ["adamw", "muon", "mona"])
def test_each_optimizer_learns_and_resumes(name, tmp_path):
    optimizer = {"name": name, "lr": 1e-2}
    path = write(tmp_path, optimizer=optimizer, stages=GOOD["stages"][:1], save_every=4)
    whole = train(path, tmp_path / "whole", say=quiet)
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    with pytest.raises(ZeroDivisionError):
        train(path, tmp_path / "out", say=lambda line: 1 / 0 if line.startswith("step 5/") else None)
    assert lines(train(path, tmp_path / "out", resume=True, say=quiet)) == lines(whole)
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "out"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_model_that_is_saved_under_other_names_resumes(tmp_path):
    """Qwen3-MoE's stacked experts are one tensor in memory and many in a checkpoint."""
    given = {**MODEL, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
             "moe_intermediate_size": 16, "head_dim": 16, "tie_word_embeddings": False}  # fmt: skip
    path = write(tmp_path, model=given, stages=GOOD["stages"][:1])
    whole = train(path, tmp_path / "whole", say=quiet)
    with pytest.raises(ZeroDivisionError):
        train(path, tmp_path / "out", say=lambda line: 1 / 0 if line.startswith("step 5/") else None)
    assert lines(train(path, tmp_path / "out", resume=True, say=quiet)) == lines(whole)


def test_muon_takes_the_hidden_matrices_alone():
    from effpass.trainers.lm.config import OptimizerConfig
    from effpass.trainers.lm.model import make_model
    from effpass.trainers.lm.optimizers import make_optimizer

    model = make_model(model_config(MODEL, byte_tokenizer(), 128), None, 0)
    optimizer = make_optimizer(OptimizerConfig(lr=1e-2, name="muon"), model)
    muon, matrices, vectors = optimizer.param_groups
    assert len(muon["params"]) == 2 * 7
    assert [p.shape for p in matrices["params"]] == [(259, 32)]
    assert {p.ndim for p in vectors["params"]} == {1}
    assert vectors["weight_decay"] == 0
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


# -- refusals -------------------------------------------------------------------------------------------------------


def test_a_run_that_does_not_fit_is_refused_before_it_starts(tmp_path):
    path = write(tmp_path, stages=[{"steps": 300, "sequence_length": 128, "batch": 1 << 24}])
    with pytest.raises(
        EffpassError, match=r"the run does not fit: 0\.03 M parameters; \d+\.\d\d GB on each .* available: "
    ) as caught:
        train(path, tmp_path / "out", say=quiet)
    assert "'accumulate'" in caught.value.hint
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "deepseek_v3"])
def test_the_estimate_counts_what_autograd_keeps(model_type, tmp_path):
    """Against the same count on real tensors."""
    given = {**MODEL, "model_type": model_type, "tie_word_embeddings": False}
    if model_type == "qwen3_moe":
        given |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    if model_type == "deepseek_v3":
        given |= {"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                  "first_k_dense_replace": 2, "num_key_value_heads": 2}  # fmt: skip
    # On tensors without data, products of stacked experts are known in bfloat16 alone.
    is_moe = model_type == "qwen3_moe"
    dtype = "bfloat16" if is_moe else "float32"
    config = load_config(write(tmp_path, model=given, stages=GOOD["stages"][:1], dtype=dtype))
    architecture = model_config(given, byte_tokenizer(), 128)
    found = estimate(config, architecture, torch.device("cpu"), 1)
    model = lm_run.make_model(architecture, None, 0)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    # Float32 weights and gradients, two moments, and autocast's copy of the weights.
    assert found.state == found.parameters * (18 if is_moe else 16)
    storages: dict[int, Any] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.randint(0, 256, (4, 128))
    lm_run.set_experts(model)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=is_moe),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage()) and t, lambda t: t
        ),
    ):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").sum()
    kept = sum(s.nbytes() for address, s in storages.items() if address not in own)
    # Beside kept tensors, two gradients as large as the logits. Experts' row counts depend on data.
    assert found.activations == pytest.approx(kept + 2 * 4 * logits.numel(), rel=0.1)


def test_places_that_are_taken(tmp_path, finished):
    path = write(tmp_path)
    with pytest.raises(EffpassError, match="out exists"):
        train(finished.parent / "c.yaml", finished, say=quiet)
    with pytest.raises(EffpassError, match="holds no run to go on with"):
        train(path, tmp_path / "new", resume=True, say=quiet)
    (tmp_path / "new.training").mkdir()
    with pytest.raises(EffpassError, match="holds what a run wrote before it began"):
        train(path, tmp_path / "new", say=quiet)
    (tmp_path / "new.training" / "run.json").write_text("{}")
    with pytest.raises(EffpassError, match="holds a run that did not end"):
        train(path, tmp_path / "new", say=quiet)


def test_another_config_or_text_does_not_go_on_with_an_old_run(tmp_path):
    path = write(tmp_path)
    with pytest.raises(ZeroDivisionError):
        train(path, tmp_path / "out", say=lambda line: 1 / 0 if line.startswith("step 5/") else None)
    write(tmp_path, seed=1, log_every=2)
    with pytest.raises(EffpassError, match=r"not the one that the run .* began with: seed changed"):
        train(path, tmp_path / "out", resume=True, say=quiet)
    write(tmp_path)
    (tmp_path / "text.txt").write_text("other")
    with pytest.raises(EffpassError, match=r"data\[0\]: text\.txt has changed since the run"):
        train(path, tmp_path / "out", resume=True, say=quiet)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    path = write(tmp_path, optimizer={"name": "adamw", "lr": 1e30})
    with pytest.raises(EffpassError, match=r"the loss is (nan|inf) at step \d+"):
        train(path, tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


def test_sharding_over_one_process_is_refused(tmp_path):
    with pytest.raises(EffpassError, match="one process has nothing to share"):
        train(write(tmp_path, fsdp=True), tmp_path / "out", say=quiet)


def test_the_command_is_in_both_tables():
    from effpass.cli.groups import BUILTIN

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {group: project["entry-points"][group] for group in BUILTIN} == BUILTIN


def test_help_shows_the_command_and_a_fault_is_one_message(tmp_path):
    from effpass.cli.app import app

    assert "lm" in CliRunner().invoke(app, ["train", "--help"]).stdout
    text = CliRunner().invoke(app, ["train", "lm", "--help"]).stdout
    assert "--resume" in text
    assert "CONFIG.yaml" in text
    result = CliRunner().invoke(app, ["train", "lm", str(write(tmp_path, steps=1)), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "c.yaml: steps: unknown option" in result.stderr


# -- several processes ----------------------------------------------------------------------------------------------


def start(path: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    """The command in two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    command = [*torchrun, "-m", "effpass", "--debug", "train", "lm", str(path), "-o", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def launch(path: Path, folder: Path, *options: str) -> str:
    """Run it to its end; what it wrote to stderr."""
    process = start(path, folder, *options)
    written = process.communicate(timeout=300)[1]
    assert process.returncode == 0, written[-4000:]
    return written


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "mona"])
@pytest.mark.parametrize("fsdp", [True, False])
def test_two_processes_give_the_losses_of_one(finished, tmp_path, fsdp, name):
    optimizer = {"name": name, "lr": 1e-2}
    one = finished if name == "adamw" else train(write(tmp_path, optimizer=optimizer), tmp_path / "one", say=quiet)
    written = launch(write(tmp_path, optimizer=optimizer, fsdp=fsdp), tmp_path / "out")
    assert losses(tmp_path / "out") == pytest.approx(losses(one), abs=1e-4)
    assert written.count("step 1/10") == 1
    assert ("DDP constructor" in written) != fsdp  # each is what it says
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", one))
    assert weights.keys() == expected.keys()
    # AdamW divides gradients that are nearly nothing by their own size: where they differ in their last bits only, a
    # step may go either way.
    assert all(torch.allclose(weights[key], expected[key], atol=5e-3) for key in weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "mona"])
def test_a_sharded_run_that_was_killed_goes_on_from_its_checkpoint(tmp_path, name):
    stages = [{"steps": 60, "sequence_length": 128, "batch": 4}]
    path = write(tmp_path, optimizer={"name": name, "lr": 1e-2}, fsdp=True, stages=stages)
    launch(path, tmp_path / "whole")
    process = start(path, tmp_path / "out")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out.training").glob("checkpoints/checkpoint-[48]/trainer_state.json")):
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()  # torchrun ends its processes
    process.communicate()
    assert not (tmp_path / "out").exists()
    launch(path, tmp_path / "out", "--resume")
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
