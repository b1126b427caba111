"""Each option of each command with a value that it can't have: one message that names it, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_tuning import checkpoint, sums
from typer.main import get_command

from effpass.cli.app import app

# What each command is given beside the option that is wrong; M is a model, D lines of JSON, T a text, R a recipe.
GIVEN: dict[str, str] = {
    "inspect": "M -r R",
    "optimize": "M -r R",
    "generate": "M -p hi",
    "export": "M -r R --target onnx",
    "train sft": "M --data D",
    "train afa-lora": "M --data D --steps 20",
    "train grpo": "M --data D --reward math:sqrt --max-new-tokens 8",
    "train prune": "M --data T --steps 20 --batch 2 --sequence-length 32",
    "train fg2-gdn": "M --data T --steps 20 --batch 2 --sequence-length 32",
    "train draft": "M --data D --answers 0",
    "train c2t": "M --data D --draft M",
    "calibrate prefix-kv": "M --data T --tokens 128 --samples 1",
    "calibrate sparse-attention": "M --data T --tokens 32 --samples 1",
    "calibrate sparse-verification": "M --data T --tokens 32 --samples 1",
}

# Command, option, value, and what is said. Numbers below a bound that typer knows are in the other test.
BAD = """
inspect | --predict-for | h1000 | no ceilings are known for 'h1000'
generate | --device | cuba | device 'cuba' can't be used
generate | --dtype | float61 | unknown dtype 'float61'
generate | --image | none.png | none.png
generate | --draft | layers:9 | layers [9] can't be kept of a model with 2
generate | --tree | bush | bush
export | --target | onx | unknown target 'onx', did you mean 'onnx'?
export | --max-length | 0 | max_length is 0, at least 2 is needed
export | --max-batch | -1 | max_batch is -1, at least 1 is needed
train sft | --method | dora | --method: got 'dora', did you mean 'lora'?
train sft | --validation | none | none: No such file or directory
train sft | --optimizer | adam | --optimizer: got 'adam', did you mean 'adamw'?
train sft | --lr | nan | lr: got nan, expected a positive number
train sft | --lr-schedule | linear | --lr-schedule: got 'linear'
train sft | --warmup | -1 | warmup: got -1, expected at least 0
train sft | --weight-decay | -1 | weight_decay: got -1.0, expected at least 0
train sft | --clip | nan | clip: got nan, expected at least 0
train sft | --steps | 0 | steps: got 0, expected at least 1
train sft | --epochs | 0 | epochs: got 0, expected at least 1
train sft | --batch | 0 | batch: got 0, expected at least 1
train sft | --accumulate | -1 | accumulate: got -1, expected at least 1
train sft | --sequence-length | 1 | sequence_length: got 1, expected at least 2
train sft | --alpha | nan | alpha: got nan, expected a positive number
train sft | --dropout | 1 | dropout: got 1.0, expected a share from 0 to below 1
train sft | --rank | 16 | --rank does nothing without method lora or afa-lora
train sft | --targets | q_proj | --targets does nothing without method lora or afa-lora
train sft | --anneal | linear | --anneal does nothing without method afa-lora
train sft | --anneal | step | --anneal: got 'step'; known: cosine, linear
train sft | --anneal-end | nan | anneal from 0.0 to nan of the steps
train sft | --dtype | int8 | --dtype: got 'int8'; known: bfloat16, float32
train sft | --attention | dense | --attention: got 'dense'; known: sparse
train sft | --attention-budget | 64 | --attention-budget does nothing without --attention sparse
train sft | --attention-block | 64 | --attention-block does nothing without --attention sparse
train sft | --anchor | max | --anchor does nothing without --balance
train sft | --guard | -1 | --guard does nothing without --balance
train sft | --latency-table | none | none: No such file or directory
train sft | --seed | -1 | seed: got -1, expected at least 0
train sft | --log-every | 0 | log_every: got 0, expected at least 1
train sft | --evaluate-every | -1 | evaluate_every: got -1, expected at least 0
train sft | --save-every | -1 | save_every: got -1, expected at least 0
train afa-lora | --targets | nothing | no linear layer of LlamaForCausalLM is called 'nothing'
train grpo | --reward | nothing | --reward: got 'nothing'
train grpo | --prompts | 0 | prompts: got 0, expected at least 1
train grpo | --group | 1 | group: got 1, expected at least 2
train grpo | --updates | 0 | updates: got 0, expected at least 1
train grpo | --max-new-tokens | 0 | max_new_tokens: got 0, expected at least 1
train grpo | --temperature | nan | temperature: got nan, expected a number from 1e-06
train grpo | --kl | -1 | kl: got -1.0, expected a number from 0
train grpo | --clip-ratio | nan | clip_ratio: got nan, expected a number from 0
train prune | --keep | 1 | keep: got 1.0, expected a share above 0 and below 1
train prune | --choose | best | --choose: got 'best'
train prune | --keep-of | experts | --keep-of: got 'experts', expected UNITS=SHARE
train prune | --units | heads | unknown units 'heads'
train prune | --cost | euros | --cost: got 'euros'; known: bytes, latency, parameters
train prune | --cost-batch | 0 | cost_batch: got 0, expected at least 1
train prune | --cost-context | 0 | cost_context: got 0, expected at least 1
train prune | --multiple | 0 | multiple: got 0, expected at least 1
train prune | --tensor-parallel | 0 | devices: got 0, expected at least 1
train prune | --validation | none | none: no such file
train prune | --recovery | none | --recovery: got 'none'; known: afa-lora, full, lora
train prune | --task | nan | task: got nan, expected at least 0
train prune | --recovery-lr | 0 | recovery_lr: got 0.0, expected a positive number
train prune | --learning | 1 | learning: got 1.0, expected a share above 0 and below 1
train prune | --calibration | 0 | calibration: got 0, expected at least 1
train fg2-gdn | --mode | fg3 | --mode: got 'fg3', did you mean 'fg2'?
train fg2-gdn | --share | nan | share: got nan, expected more than 0 and at most 1
train fg2-gdn | --layers | all | --layers: got 'all', expected numbers with commas
train fg2-gdn | --align | -1 | align: got -1.0, expected a share from 0 to 1
train fg2-gdn | --whole-rate | 0 | whole_rate: got 0.0, expected more than 0
train fg2-gdn | --gate-rank | 0 | gate_rank: got 0
train fg2-gdn | --beta-rank | -1 | beta_rank: got -1
train fg2-gdn | --seed | -1 | seed: got -1, expected 0 at least
train draft | --from | none | none/config.json: can't be read
train draft | --vocabulary | 0 | vocabulary: got 0, expected at least 1
train draft | --taps | first | --taps: got 'first'
train draft | --unrolled | 0 | unrolled: got 0, expected at least 1
train draft | --decay | nan | decay: got nan, expected a weight from above 0 to 1
train draft | --temperature | nan | temperature: got nan, expected at least 0
train c2t | --draft | /none | /none
train c2t | --top-k | 0 | top_k of a tree is 0
train c2t | --depth | 0 | depth of a tree is 0
train c2t | --trees | 0 | trees: got 0, expected at least 1
train c2t | --answers | 1 | answer: got 1, expected at least 2
train c2t | --epochs | 0 | epochs: got 0, expected at least 1
train c2t | --seed | -1 | seed: got -1, expected at least 0
calibrate prefix-kv | --device | cuba | device 'cuba' can't be used
calibrate sparse-attention | --dtype | int3 | dtype torch.int3 is no floating-point type
calibrate sparse-verification | --device | cuba | device 'cuba' can't be used
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("given")
    (folder / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (folder / "r.yaml").write_text("version: 1\npasses:\n  - fuse_linears\n")
    return {
        "M": checkpoint(folder / "llama"),
        "D": sums(folder / "d.jsonl"),
        "T": folder / "t.txt",
        "R": folder / "r.yaml",
    }


def leaves(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its full name."""
    command = get_command(app) if command is None else command
    if not hasattr(command, "list_commands"):
        yield name, command
        return
    context = command.make_context(name, [], resilient_parsing=True)
    for part in command.list_commands(context):
        yield from leaves(command.get_command(context, part), f"{name} {part}".strip())


def test_a_word_where_a_number_belongs(run: Callable[..., Any]) -> None:
    """And a number that typer knows to be too small, wherever there is a bound."""
    asked = 0
    for name, command in leaves():
        for option in command.params:
            kind = repr(option.bare_type())
            if not option.opts[0].startswith("--") or not ("int" in kind or "float" in kind):
                continue
            for value in ("word", *(() if option.min is None else (option.min - 1,))):
                result = run(*name.split(), option.opts[0], value)
                said = " ".join(result.stderr.replace("│", " ").split())
                assert result.exit_code == 2, (name, option.opts)
                assert f"Invalid value for '{option.opts[0]}'" in said or "Missing" in said, said
                assert "Traceback" not in said
                asked += 1
    assert asked > 100


def test_every_command_has_a_line_here() -> None:
    """Those that take no option but files, or none that could be wrong, are in other tests."""
    elsewhere = {"passes", "recipe check", "validate", "cache clear", "demo", "train lm", "calibrate moe"}
    assert {name for name, _ in leaves()} == GIVEN.keys() | elsewhere


@pytest.mark.parametrize("line", BAD.strip().splitlines(), ids=lambda line: "".join(line.split(" | ")[:3]))
def test_what_is_said(line: str, run: Callable[..., Any], places: dict[str, Path], tmp_path: Path) -> None:
    name, option, value, says = (part.strip() for part in line.split(" | "))
    words = [str(places.get(word, word)) for word in GIVEN[name].split()]
    if name not in ("inspect", "generate"):
        words += ["-o", str(tmp_path / ("out.onnx" if name == "export" else "out"))]
    if option in words:
        at = words.index(option)
        del words[at : at + 2]
    result = run(*name.split(), *words, option, value)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code in (1, 2), result.output
    assert says in said
    assert said.count("error: ") + said.count("Usage: ") == 1, said
    assert "unexpected" not in said
    assert list(tmp_path.iterdir()) == []
