"""Passes together: the plain model's function where nothing is left out, on every family and kind of weight."""

from __future__ import annotations

import copy
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composition.cells import (
    CELLS,
    KEEP_HALF,
    NOT_BUILT,
    SPARSE_FEW,
    WEIGHTS,
    Cell,
    Made,
    refused_pairs,
    weighted,
)
from families import make, padded
from typer.testing import CliRunner

import effpass
import effpass.backend
from effpass.cli.app import app
from effpass.core.errors import PassRefusedError

LENGTH, NEW = 100, 10
HOW = {
    "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    "return_dict_in_generate": True, "output_logits": True,
}  # fmt: skip

LOOSE = {"return_dict_in_generate": False, "output_logits": False}  # what speculative decoding does not give

EVERY = [
    pytest.param(cell, family, weights, id=f"{cell.title}, {family}, {weights}")
    for cell in CELLS
    for family in cell.families
    for weights in WEIGHTS
]


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meaning is checked here, and a model a minute is too slow for it."""
    inner = effpass.backend.inner_backend
    monkeypatch.setattr(
        effpass.backend, "inner_backend", lambda options, mode: inner(replace(options, inner="aot_eager"), mode)
    )


def recipe(*items: Any) -> dict[str, Any]:
    return {"version": 1, "passes": list(items)}


def combined(cell: Cell, made: Made, weights: str, others: tuple[Any, ...]) -> Any:
    """The model with all of a cell's passes."""
    first = cell.first(made)
    model = weighted(make(made.family), weights if weights in ("float32", "bfloat16") else "float32")
    if weights in ("float32", "bfloat16"):
        return effpass.prepare(model, recipe(*first, *others))
    model = weighted(effpass.prepare(model, recipe(*first)), weights)
    return effpass.prepare(model, recipe(*others))


def assert_same(got: Any, expected: Any, within: float, plain: Any) -> None:
    """Equal logits up to rounding, row by row, as long as the tokens before are equal.

    Where they part, the model's two best tokens were closer together than rounding is, or two experts.
    """
    prompt = padded(LENGTH)["input_ids"].shape[1]
    for row in range(4):
        for step in range(NEW):
            ours, theirs = (out.logits[step][row].float() for out in (got, expected))
            scale = theirs.abs().max()
            is_far = bool((ours - theirs).abs().max() > within * scale)
            assert not is_far or moved_by_rounding(plain, expected.sequences, row, step, within), (row, step)
            if got.sequences[row, prompt + step] != expected.sequences[row, prompt + step]:
                best = theirs.topk(2).values
                assert is_far or best[0] - best[1] <= 2 * within * scale, (row, step)
                break


def moved_by_rounding(plain: Any, sequences: torch.Tensor, row: int, step: int, within: float) -> bool:
    """Whether errors of one rounding in its embeddings move the model's own logits there by more than `within`."""
    before = scored(plain, sequences)[row, step]
    for seed in range(8):
        other = copy.deepcopy(plain)
        weight = other.get_input_embeddings().weight
        noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
        with torch.no_grad():
            weight.copy_(weight.float() * (1 + 2 * torch.finfo(weight.dtype).eps * noise))
        if (scored(other, sequences)[row, step] - before).abs().max() > within * before.abs().max():
            return True
    return False


@torch.no_grad()
def scored(model: Any, sequences: torch.Tensor) -> torch.Tensor:
    """Logits [rows, NEW, vocabulary] of the answers in `sequences`."""
    mask = torch.cat((padded(LENGTH)["attention_mask"], torch.ones(4, NEW, dtype=torch.long)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=sequences, attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits[:, -NEW - 1 : -1].float()


def assert_best(plain: Any, sequences: torch.Tensor, within: float) -> None:
    """Every token of the answers is the plain model's best one, up to rounding."""
    assert sequences.shape[1] == padded(LENGTH)["input_ids"].shape[1] + NEW
    logits = scored(plain, sequences)
    chosen = logits.gather(2, sequences[:, -NEW:, None])[..., 0]
    assert (logits.amax(-1) - chosen <= 2 * within * logits.abs().amax(-1)).all()


@pytest.mark.parametrize(("cell", "family", "weights"), EVERY)
def test_together_they_are_the_plain_model(cell: Cell, family: str, weights: str, tmp_path: Path) -> None:
    made = Made(family, tmp_path)
    others = cell.then if cell.neutral is None else cell.neutral
    model = combined(cell, made, weights, others)
    reports = model.effpass_report.passes
    assert all(entry.hits for entry in reports), [entry.line() for entry in reports]
    plain = weighted(cell.reference(made), weights)
    if cell.generate is not None:
        text = model.generate(**padded(LENGTH), **{**HOW, **LOOSE}, **cell.generate(made, model))
        assert_best(plain, text, WEIGHTS[weights])
    else:
        expected = type(plain).generate(plain, **padded(LENGTH), **HOW)
        assert_same(model.generate(**padded(LENGTH), **HOW), expected, WEIGHTS[weights], plain)


ACTING = [
    pytest.param(cell, family, id=f"{cell.title}, {family}")
    for cell in CELLS
    if cell.neutral not in (None, cell.then) and cell.generate is None
    for family in cell.families
]


@pytest.mark.parametrize(("cell", "family"), ACTING)
def test_each_of_them_acts(cell: Cell, family: str, tmp_path: Path) -> None:
    """A prompt is attended to whole; steps are others than with any one of the lossy passes at rest."""
    made = Made(family, tmp_path)
    assert cell.neutral is not None
    pairs = list(zip(cell.then, cell.neutral, strict=True))
    lossy = [i for i, (acting, neutral) in enumerate(pairs) if acting != neutral]
    variants = [cell.then, *(tuple(p[1] if i == j else p[0] for j, p in enumerate(pairs)) for i in lossy)]
    outs = [combined(cell, made, "float32", others).generate(**padded(LENGTH), **HOW) for others in variants]
    plain = cell.reference(made)
    expected = type(plain).generate(plain, **padded(LENGTH), **HOW)
    for out in outs:
        torch.testing.assert_close(out.logits[0], expected.logits[0], rtol=1e-4, atol=1e-4)
    steps = [out.logits[1] for out in outs] + ([expected.logits[1]] if len(lossy) > 1 else [])
    for i, one in enumerate(steps):
        assert one.isfinite().all()
        assert all((one - other).abs().max() > 1e-4 for other in steps[:i])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_sparse_verification_acts_beside_moe_gemm(family: str, tmp_path: Path) -> None:
    (cell,) = [cell for cell in CELLS if "sparse_verification" in cell.names]
    made, texts = Made(family, tmp_path), []
    assert cell.neutral is not None
    assert cell.generate is not None
    for others in (cell.neutral, cell.then):
        model = combined(cell, made, "float32", others)
        texts.append(
            model.generate(**padded(LENGTH), **{**HOW, **LOOSE, "max_new_tokens": 24}, **cell.generate(made, model))
        )
    assert not torch.equal(*texts)


def test_every_order_of_two_works_or_is_refused_before_anything_changes(tmp_path: Path) -> None:
    made = Made("qwen3", tmp_path)
    items = {
        "merge_lora": made.adapter(), "structured_pruning": made.pruned(), "fg2_gdn": made.linear(),
        "prefix_kv": KEEP_HALF, "sparse_attention": SPARSE_FEW,
        "sparse_verification": {"sparse_verification": {"attention": None, "channels": 0.5}},
    }  # fmt: skip
    file, refused = tmp_path / "recipe.yaml", set()
    for first, second in itertools.permutations(items, 2):
        model = make("qwen3")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        file.write_text(json.dumps(recipe(items[first], items[second])))
        checked = CliRunner().invoke(app, ["recipe", "check", str(file), "--json"])
        if checked.exit_code:
            refused.add((first, second))
            told = json.loads(checked.stdout)
            assert " before " in told["hint"] or "leave one of" in told["hint"]
            with pytest.raises(PassRefusedError, match=re.escape(told["error"])):
                effpass.prepare(model, recipe(items[first], items[second]))
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            continue
        model = effpass.prepare(model, recipe(items[first], items[second]))
        assert all(entry.hits for entry in model.effpass_report.passes)
        text = model.generate(**padded(40), **{**HOW, **LOOSE, "max_new_tokens": 2})
        assert text.shape == (4, 42)
    weights = ("merge_lora", "structured_pruning", "fg2_gdn")
    runtime = ("prefix_kv", "sparse_attention", "sparse_verification")
    wrong = {(b, a) for a, b in itertools.combinations(weights, 2)} | set(itertools.product(runtime, weights))
    trees = {(a, b) for a, b in itertools.permutations(runtime, 2) if "sparse_verification" in (a, b)}
    assert refused == wrong | trees


def test_the_front_page_counts_what_is_refused_for_no_reason() -> None:
    pairs, page = refused_pairs(), Path(__file__).parents[2] / "README.md"
    assert set(pairs) >= NOT_BUILT
    assert len(NOT_BUILT) == 3
    assert "* Three pairs of passes that could work together are refused" in page.read_text(encoding="utf-8")
