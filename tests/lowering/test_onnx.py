"""ONNX export: right for every family, validated, whole or not at all, and clear when it can't be done."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import onnx
import pytest
import torch

import effpass
from effpass.core.errors import ExportError, PassRefusedError
from effpass.core.manager import Planned
from effpass.core.pass_ import GraphPass, Match, RuntimePass
from effpass.core.program import Program
from effpass.core.recipe import Recipe
from effpass.lowering.targets import export, onnx_file, onnx_ops
from effpass.lowering.targets import target as target_module
from effpass.lowering.targets.cache_layers import CacheLayer
from effpass.lowering.targets.export import ExportedDecoder
from effpass.lowering.targets.onnx import OnnxTarget, export_onnx, onnx_step
from effpass.lowering.targets.publish import check_output
from effpass.lowering.targets.validation import (
    Tolerance,
    compare,
    decode_cases,
    record_model,
    record_step,
    require_ok,
)

# float32, two layers, logits of about 0.5 and keys of about 4: a few hundred roundings of 6e-8
ROUNDING = 2e-5


def export_decoder(*args: Any, target: OnnxTarget | None = None, **options: Any) -> ExportedDecoder:
    return export.export_decoder(*args, target=target or OnnxTarget(), **options)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def metadata(path: Path) -> dict[str, str]:
    return {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}


def small(**overrides: Any) -> Any:
    return families.make("llama", num_hidden_layers=1, **overrides)


# -- what comes out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_exports_and_validates(family: str, tmp_path: Path) -> None:
    out = tmp_path / f"{family}.onnx"
    # One layer where all are alike: an export costs seconds a layer.
    layers = {"gemma3": {}, "gpt2": {"n_layer": 1}, "deepseek_v3": {"num_hidden_layers": 1, "first_k_dense_replace": 0}}
    result = export_decoder(families.make(family, **layers.get(family, {"num_hidden_layers": 1})), None, [], out)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    assert result.size == out.stat().st_size
    assert len(result.checks) == 5
    for check in result.checks:
        assert check.ok
        assert max(check.export_error, check.cache_error, check.method_loss) < ROUNDING
        assert 1e-6 < check.tolerance < 1e-3
    onnx.checker.check_model(out)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A two-layer Llama and its file, exported with a recipe of no passes."""
    out = tmp_path_factory.mktemp("llama") / "model.onnx"
    model = families.make("llama")
    export_decoder(model, Recipe.parse({"passes": []}), [], out)
    return model, out


def test_names_and_axes_are_optimums(llama: tuple[Any, Path]) -> None:
    graph = onnx.load(llama[1]).graph
    axes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*graph.input, *graph.output]
    }
    batch, tokens, past = "batch_size", "sequence_length", "past_sequence_length"
    total = f"{past} + {tokens}"
    cache = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert axes == {
        "input_ids": [batch, tokens],
        "attention_mask": [batch, total],
        "position_ids": [batch, tokens],
        **{f"past_key_values.{c}": [batch, 2, past, 16] for c in cache},
        "logits": [batch, tokens, 96],
        **{f"present.{c}": [batch, 2, total, 16] for c in cache},
    }


def test_the_file_generates_what_the_model_generates(llama: tuple[Any, Path]) -> None:
    model, path = llama
    batch = families.batch(7)
    expected = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8, do_sample=False
    )
    step = onnx_step(path)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    past = [torch.zeros(2, 2, 0, 16)] * 4
    tokens = ids
    while ids.shape[1] < expected.shape[1]:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits, *past = step(tokens, mask, positions, *past)
        tokens = logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    assert torch.equal(ids, expected)


def test_padding_never_makes_a_nan(llama: tuple[Any, Path]) -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    outputs = onnx_step(llama[1])(ids, torch.zeros_like(ids), torch.zeros_like(ids), *[torch.zeros(1, 2, 0, 16)] * 4)
    assert all(bool(t.isfinite().all()) for t in outputs)


def test_the_graph_is_lean(llama: tuple[Any, Path]) -> None:
    count = operators(llama[1])
    of_angles = int(families.writes_angles_as_a_product())
    assert count["MatMul"] == 2 * (7 + 2) + 1 + of_angles  # per layer 7 linear and 2 of attention; the head
    assert count["Softmax"] == 2
    assert count["Where"] == 1  # the mask, shared by the layers
    assert count["Div"] == 5  # x / sqrt in each RMSNorm: runtimes fuse that form
    assert count["Reciprocal"] == count["Constant"] == count["Identity"] == 0


def test_the_file_says_where_it_comes_from(llama: tuple[Any, Path]) -> None:
    said = metadata(llama[1])
    assert said["effpass.version"] == effpass.__version__
    assert Recipe.parse(said["effpass.recipe"]).steps == ()
    assert said["effpass.target"] == "onnx"
    tolerance = json.loads(said["effpass.tolerance"])  # measured: the fixture is made before conftest's stand-in
    assert tolerance["why"].startswith("4 times the spread of right evaluations")
    assert all(1e-7 < allowed < ROUNDING for allowed in tolerance["logits"])
    assert json.loads(said["effpass.cache"]) == [[2, 16, 16], [2, 16, 16]]
    assert len(json.loads(said["effpass.reference"])) == 5
    checks = json.loads(said["effpass.validation"])
    assert [c["ok"] for c in checks] == [True] * 5
    assert all(c["export_error"] < ROUNDING and c["method_loss"] < ROUNDING for c in checks)
    text = llama[1].read_bytes()
    assert os.fsencode(os.getcwd()) not in text
    assert b"modeling_llama" not in text


def test_float16_with_a_line_for_each_step(tmp_path: Path) -> None:
    lines: list[str] = []
    result = export_decoder(small().half(), None, [], tmp_path / "m.onnx", progress=lines.append)
    assert all(check.ok for check in result.checks)
    assert result.checks[0].export_error > ROUNDING
    assert lines == [
        "running the original model",
        "rewriting",
        "capturing the decode graph",
        "running the rewritten model",
        "writing for onnx",
        "measuring the tolerance",
        "checking with onnxruntime on the CPU",
    ]


# -- with passes --------------------------------------------------------------------------------------------------


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(families.make("llama"), config).eval()


def test_a_merged_adapter_leaves_the_plain_graph(llama: tuple[Any, Path], tmp_path: Path) -> None:
    recipe = Recipe.parse({"passes": [{"merge_lora": {"require": True}}]})
    planned = [Planned(p, s.require) for p, s in zip(recipe.build(), recipe.steps, strict=True)]
    result = export_decoder(adapted(), recipe, planned, tmp_path / "merged.onnx")
    assert operators(result.path) == operators(llama[1])
    assert sum(r.hits for r in result.reports) == 14
    assert all(0 < c.method_loss < ROUNDING for c in result.checks)
    assert Recipe.parse(metadata(result.path)["effpass.recipe"]).steps[0].name == "merge_lora"
    names = [i.name for i in onnx.load(result.path).graph.initializer]
    assert "model.layers.0.mlp.up_proj.weight" in names or not any("lora" in n for n in names)


class Rescale(GraphPass):
    """Multiplies the head's output by 1.5."""

    name = "rescale"
    exact = False

    def find(self, program: Program) -> Iterator[Match]:
        *_, head = (n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
        yield Match(head, {})

    def rewrite(self, program: Program, match: Match) -> None:
        head = match.anchor
        with program.graph.inserting_after(head):
            scaled = program.graph.call_function(torch.ops.aten.mul.Tensor, (head, 1.5))
        scaled.meta["val"] = head.meta["val"] * 1.5
        head.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


class RescaleAndClaimToBeExact(Rescale):
    exact = True


def test_export_error_and_method_loss_are_two_numbers(tmp_path: Path) -> None:
    result = export_decoder(small(), None, [Planned(Rescale())], tmp_path / "m.onnx")
    for check in result.checks:
        assert check.export_error < ROUNDING
        assert check.method_loss > 1000 * check.tolerance


def test_a_method_loss_of_exact_passes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="every pass is exact, but in 'one token, and one on a cache of 1'"):
        export_decoder(small(), None, [Planned(RescaleAndClaimToBeExact())], tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_pass_that_has_no_hand_for_programs_is_refused_before_work(tmp_path: Path) -> None:
    class NeedsALoop(RuntimePass):
        name = "needs_a_loop"
        exact = True

    with pytest.raises(PassRefusedError, match="needs_a_loop can't act on an exported program: it is a runtime pass"):
        export_decoder(small(), None, [Planned(NeedsALoop())], tmp_path / "m.onnx")


# -- whole or not at all ------------------------------------------------------------------------------------------


def wrong_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Forgets the mask."""
    op = onnx_ops.op
    heads, groups, size = query.shape[1], key.shape[1], query.shape[3]
    rows = op.Reshape(query, op.Constant(value_ints=[0, groups, -1, size]))
    weights = op.Softmax(op.MatMul(rows, op.Transpose(key, perm=[0, 1, 3, 2])), axis=-1)
    return op.Reshape(op.MatMul(weights, value), op.Constant(value_ints=[0, heads, -1, size]))


def test_a_file_out_of_tolerance_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    right = onnx_ops.translations()
    monkeypatch.setattr(onnx_ops, "translations", lambda: {**right, sdpa: wrong_attention})
    out = tmp_path / "m.onnx"
    out.write_text("an earlier export")
    with pytest.raises(ExportError, match=r"m\.onnx is out of tolerance in [45] of 5 cases: in '.*' its logits differ"):
        export_decoder(small(), None, [], out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert out.read_text() == "an earlier export"


def test_a_nan_is_out_of_tolerance(llama: tuple[Any, Path]) -> None:
    model, path = llama
    cases = decode_cases(96)
    original = record_model(model, cases)
    layers = (CacheLayer(2, 16, 16),) * 2
    step = onnx_step(path)
    right = record_step(step, layers, torch.float32, cases)
    wrong = record_step(lambda *inputs: [t * float("nan") for t in step(*inputs)], layers, torch.float32, cases)
    tolerance = Tolerance((1e-4,) * 5, (1e-4,) * 5, "")
    require_ok(compare(cases, right, right, original, tolerance), "m.onnx")
    with pytest.raises(ExportError, match="out of tolerance in 5 of 5 cases"):
        require_ok(compare(cases, wrong, right, original, tolerance), "m.onnx")


def linear() -> torch.export.ExportedProgram:
    return torch.export.export(torch.nn.Linear(64, 64), (torch.ones(1, 64),))


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    out, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    program = linear()
    export_onnx(program, out, external_data=True, metadata={"key": "value"})
    assert data.stat().st_size >= 64 * 64 * 4 > out.stat().st_size
    assert metadata(out) == {"key": "value"}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (out, data):
        file.rename(moved / file.name)
    x = torch.randn(1, 64)
    expected = torch.nn.functional.linear(x, program.state_dict["weight"], program.state_dict["bias"])
    torch.testing.assert_close(onnx_step(moved / out.name)(x)[0], expected)
    # Replaced by a single file, the old data goes.
    export_onnx(program, moved / out.name, overwrite=True, external_data=False)
    assert [p.name for p in moved.iterdir()] == ["m.onnx"]
    torch.testing.assert_close(onnx_step(moved / out.name)(x)[0], expected)


def test_large_weights_get_a_file_of_their_own_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST_SINGLE_FILE", 16_000)
    export_onnx(linear(), tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises(ExportError, match=r"m\.onnx can't be written: No space left on device"):
        export_onnx(linear(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


# -- refused before work ------------------------------------------------------------------------------------------


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "there.onnx").touch()
    (tmp_path / "orphan.onnx.data").touch()
    for path, message in [
        (tmp_path, f"is a folder\n  → name the file: {tmp_path / 'model.onnx'}"),
        (tmp_path / "model.pt", "does not end in .onnx"),
        (tmp_path / "there.onnx", r"exists\n.*--overwrite"),
        (tmp_path / "orphan.onnx", r"orphan.onnx.data exists"),
        (tmp_path / "there.onnx" / "m.onnx", "can't be written"),
        (Path("/proc/no/m.onnx"), "can't be written"),
    ]:
        with pytest.raises(ExportError, match=message):
            check_output(path, OnnxTarget())
    check_output(tmp_path / "there.onnx", OnnxTarget(), overwrite=True)
    check_output(tmp_path / "new" / "folder" / "m.onnx", OnnxTarget())


class Untouchable:
    """Stands for a model: using it at all is work."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"work was started: {name}")


def test_missing_packages_are_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ExportError, match=r"needs onnxruntime, not installed here\n.*pip install 'effpass\[onnx\]'"):
        export_decoder(small(), None, [], tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    with pytest.raises(ExportError, match="exists"):
        export_decoder(Untouchable(), None, [], tmp_path / "m.onnx")


def test_bfloat16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"torch.bfloat16, which onnx files can't hold or be checked in\n.*float32"):
        export_decoder(small().bfloat16(), None, [], tmp_path / "m.onnx")


# -- operators ----------------------------------------------------------------------------------------------------


def exported(function: Any, *args: torch.Tensor) -> torch.export.ExportedProgram:
    module = torch.nn.Module()
    module.forward = function  # type: ignore[assignment]
    return torch.export.export(module, args)


def test_an_operator_of_another_library_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.library._scoped_library("effpass_test_onnx", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        library.impl("twice", torch.empty_like, "Meta")
        program = exported(lambda x: torch.ops.effpass_test_onnx.twice(x).relu(), torch.ones(2))
        monkeypatch.setattr(torch.onnx, "export", None)  # not reached
        with pytest.raises(ExportError, match=r"operator effpass_test_onnx\.twice\.default \(node twice\) has no ONNX"):
            export_onnx(program, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_the_exporter_lacks_is_named(tmp_path: Path) -> None:
    program = exported(lambda x: torch.linalg.eigvalsh(x) + 1, torch.eye(2))
    with pytest.raises(ExportError, match=r"operator aten\._linalg_eigh\.default \(node \w+\) has no ONNX translation"):
        export_onnx(program, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("heads", [4, 2], ids=["grouped", "one head per group"])
@pytest.mark.parametrize("mask", ["boolean", "additive", "causal", "none"])
def test_attention_as_onnx(heads: int, mask: str, tmp_path: Path) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        given = {"boolean": m, "additive": torch.where(m, 0.0, -1e4), "causal": None, "none": None}[mask]
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=given, is_causal=mask == "causal", scale=0.3, enable_gqa=heads != 2
        )

    q, k, v = torch.randn(2, heads, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    m = torch.rand(2, 1, 5, 5) > 0.4
    m[..., 0] = True
    export_onnx(exported(attention, q, k, v, m), tmp_path / "m.onnx")
    (out,) = onnx_step(tmp_path / "m.onnx")(q, k, v, m) if mask in ("boolean", "additive") else run(tmp_path, q, k, v)
    torch.testing.assert_close(out, attention(q, k, v, m), atol=1e-5, rtol=1e-5)


def run(folder: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Feed a file that may have dropped its unused last input."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "m.onnx")
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=False)}
    feeds |= {i.name: np.ones((2, 1, 5, 5), bool) for i in session.get_inputs()[len(inputs) :]}
    return [torch.from_numpy(o) for o in session.run(None, feeds)]


@pytest.mark.parametrize("sizes", [[3, 0, 4, 1], [0, 0, 0, 8], [2, 2, 2, 2]])
def test_grouped_mm_as_onnx(sizes: list[int], tmp_path: Path) -> None:
    import transformers.integrations.moe  # noqa: F401 (registers the operator)

    def grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)

    rows, weight = torch.randn(8, 5), torch.randn(4, 5, 3)
    ends = torch.tensor(sizes).cumsum(0).int()
    export_onnx(exported(grouped, rows, weight, ends), tmp_path / "m.onnx")
    (out,) = onnx_step(tmp_path / "m.onnx")(rows, weight, ends)
    groups = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    torch.testing.assert_close(out, torch.einsum("rk,rkn->rn", rows, weight[groups]), atol=1e-5, rtol=1e-5)
