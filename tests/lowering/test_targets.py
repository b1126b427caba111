"""Files for Inductor, AOTInductor and TensorRT, and what all targets share: ranges, checks later, refusals."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from fixed_tolerance import fixed_tolerance
from safetensors import safe_open

import effpass
from effpass.core import available_memory
from effpass.core.errors import ExportError
from effpass.core.recipe import Recipe
from effpass.lowering.targets import export, host_memory, publish, tolerance
from effpass.lowering.targets.assumptions import any_size
from effpass.lowering.targets.decode_graph import DecodeGraph, Step, export_decode_graph
from effpass.lowering.targets.graph_text import graph_from_text, graph_to_text
from effpass.lowering.targets.manifest import seal
from effpass.lowering.targets.onnx import OnnxTarget
from effpass.lowering.targets.target import TARGETS, find_target
from effpass.lowering.targets.validation import TOLERANCE, DecodeCase, decode_cases, record_model, record_step

# float32, one layer, logits of about 0.5: a few hundred roundings of 6e-8
ROUNDING = 2e-5

LENGTH = 48


def small() -> Any:
    return families.make("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def graph() -> DecodeGraph:
    return export_decode_graph(small())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Export the one-layer Llama to a target, once; holds at most 48 positions."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "measure_tolerance", fixed_tolerance)

        def make(name: str) -> Path:
            target = find_target(name)
            out = folder / f"model{target.suffix}"
            if not out.exists():
                result = export.export_decoder(
                    small(), Recipe.parse({"passes": []}), [], out, target=target, max_length=LENGTH
                )
                assert len(result.checks) == 5
                assert max(c.export_error for c in result.checks) < ROUNDING
                assert result.executed
            return out

        yield make


@pytest.fixture
def copied(exported: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy to damage."""
    return lambda name: Path(shutil.copy(exported(name), tmp_path))


def flip(path: Path, at: int) -> None:
    """Change one bit of byte `at`."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# -- what comes out -----------------------------------------------------------------------------------------------


def greedy(step: Step, ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    past = [torch.zeros(len(ids), 2, 0, 16)] * 2
    tokens = ids
    for _ in range(count):
        # A strided view: compiled code reads memory as if it were packed.
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits, *past = step(tokens, mask, positions, *past)
        tokens = logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    return ids


@pytest.mark.parametrize("name", ["aoti", "inductor"])
def test_the_file_generates_what_the_model_generates(name: str, exported: Callable[[str], Path]) -> None:
    batch = families.batch(7)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    step = effpass.load_exported(exported(name), allow_native=True)
    expected = small().generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(greedy(step, ids, mask, 8), expected)
    # Sizes that were not among the cases of the export, the smallest included.
    for size, length in ((1, 1), (1, 40), (5, 13)):
        tokens = torch.randint(3, 96, (size, length))
        (right,) = record_model(small(), [DecodeCase("", tokens, torch.ones_like(tokens), (length,))])
        logits = step(tokens, torch.ones_like(tokens), torch.arange(length).expand(size, -1), *empty(size))[0]
        assert float((logits.flatten(0, 1) - right.logits).abs().max()) < ROUNDING


def empty(batch: int, past: int = 0) -> list[torch.Tensor]:
    return [torch.zeros(batch, 2, past, 16)] * 2


@pytest.mark.parametrize("name", ["aoti", "onnx"])
def test_calls_outside_the_range_are_refused(name: str, exported: Callable[[str], Path]) -> None:
    step = effpass.load_exported(exported(name), allow_native=True)

    def call(tokens: int, mask: int | None = None, past: int = 0, dtype: torch.dtype = torch.long) -> Any:
        ids = torch.ones(1, tokens, dtype=dtype)
        positions = torch.arange(tokens)[None]
        return step(ids, torch.ones(1, mask or tokens + past, dtype=torch.long), positions, *empty(1, past))

    assert call(2, past=LENGTH - 2)[0].shape == (1, 2, 96)
    with pytest.raises(ExportError, match=r"a length of 49 is outside its range, 1 to 48\n.*--max-length"):
        call(2, past=LENGTH - 1)
    with pytest.raises(ExportError, match="B and T of at least 1"):
        call(0)
    with pytest.raises(ExportError, match=r"attention_mask is int64\[1, 3\]; .* must be int64\[1, 5\]"):
        call(2, mask=3, past=3)
    with pytest.raises(ExportError, match=r"input_ids is int32\[1, 2\]"):
        call(2, dtype=torch.int32)
    with pytest.raises(ExportError, match="takes 5 tensors, 3 were given"):
        step(*[torch.ones(1, 1, dtype=torch.long)] * 3)


def test_weights_of_an_inductor_file_are_there_for_other_tools(exported: Callable[[str], Path]) -> None:
    with safe_open(exported("inductor"), "pt") as file:
        assert "model.layers.0.mlp.up_proj.weight" in file.keys()  # noqa: SIM118 (it is no mapping)
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert torch.equal(weights["lm_head.weight"], small().lm_head.weight)
    assert json.loads(metadata["graph"])["inputs"][:2] == ["input_ids", "attention_mask"]
    assert metadata["effpass.version"] == effpass.__version__


def test_a_compiler_that_took_a_size_for_granted_is_found_out(graph: DecodeGraph) -> None:
    ids = next(n.meta["val"] for n in graph.program.graph.nodes if n.name == "input_ids")
    tokens = ids.shape[1]
    with any_size(graph.program, "Inductor"):
        assert tokens > 0  # always
    with (
        pytest.raises(ExportError, match=r"Inductor compiled the graph for sizes with \S+ <= 50 only"),
        any_size(graph.program, "Inductor"),
    ):
        assert tokens <= 50


# -- a graph as text --------------------------------------------------------------------------------------------------


def test_a_graph_survives_as_text(graph: DecodeGraph) -> None:
    text, tensors = graph_to_text(graph.program)
    again = graph_from_text(json.loads(json.dumps(text)), tensors)
    inputs = [torch.ones(2, 3, dtype=torch.long), torch.ones(2, 7, dtype=torch.long), torch.arange(4, 7).expand(2, 3)]
    inputs += [torch.randn(2, 2, 4, 16) for _ in range(2)]
    with torch.no_grad():
        for ours, theirs in zip(again(*inputs), graph.module()(*inputs), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("os.system", ["true"]),
        ("torch.load", ["x"]),
        ("aten.from_file.default", ["x", True, 1]),
        ("aten.linear", []),
        ("aten.__class__.default", []),
        ("higher_order.map.default", []),
        ("builtins.eval", ["1"]),
        ("operator.call", []),
        (["aten.add.Tensor"], []),
    ],
)
def test_a_graph_can_name_nothing_but_operators_on_tensors(operator: Any, arguments: list[Any]) -> None:
    text = {"inputs": ["x"], "weights": {}, "outputs": [{"node": "x"}], "nodes": [["y", operator, arguments, {}]]}
    with pytest.raises((ValueError, TypeError)):
        graph_from_text(text, {})


@pytest.mark.parametrize("argument", [{"dtype": "load"}, {"dtype": "hub.load"}, {"code": "1"}, {"node": "z"}])
def test_arguments_are_values_and_nodes(argument: Any) -> None:
    nodes = [["y", "aten.relu.default", [argument], {}]]
    with pytest.raises((ValueError, KeyError)):
        graph_from_text({"inputs": ["x"], "weights": {}, "outputs": [], "nodes": nodes}, {})


@pytest.mark.parametrize(
    ("operator", "keyword"),
    [
        ("aten.relu.default", "self=print('ran'), other"),  # the module's Python is written from these names
        ("aten.relu.default", "other"),
        ("operator.add", "a"),
    ],
)
def test_a_keyword_is_one_of_the_operators(operator: str, keyword: str) -> None:
    nodes = [["y", operator, [], {keyword: {"node": "x"}}]]
    with pytest.raises(ValueError, match=re.escape(f"{operator} has no argument {keyword!r}")):
        graph_from_text({"inputs": ["x"], "weights": {}, "outputs": [{"node": "y"}], "nodes": nodes}, {})


def test_what_the_text_cannot_hold_is_named() -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    program = torch.export.export(Branch(), (torch.ones(2),))
    with pytest.raises(ExportError, match=r"can't hold .*\(node \w+\)\n.*leave out the pass"):
        graph_to_text(program)


# -- checked later ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aoti", "inductor", "onnx"])
def test_a_good_file_validates(name: str, exported: Callable[[str], Path]) -> None:
    found = effpass.validate(exported(name), allow_native=True)
    assert (found.ok, found.target, found.executed, found.version) == (True, name, True, effpass.__version__)
    assert Recipe.parse(found.recipe).steps == ()
    assert len(found.cases) == 5
    assert all(case.error < ROUNDING < 1e-3 > case.tolerance > 1e-6 for case in found.cases)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("name", ["aoti", "inductor", "onnx"])
def test_a_flipped_bit_is_noticed(name: str, share: float, copied: Callable[[str], Path]) -> None:
    path = copied(name)
    flip(path, int(path.stat().st_size * share))
    with pytest.raises(ExportError):
        effpass.validate(path, allow_native=True)


@pytest.mark.parametrize("name", ["aoti", "inductor", "onnx"])
def test_a_flipped_bit_of_a_weight_is_called_a_change(name: str, copied: Callable[[str], Path]) -> None:
    path = copied(name)
    weight = small().model.embed_tokens.weight.detach().numpy().tobytes()
    flip(path, path.read_bytes().index(weight) + 1001)
    with pytest.raises(ExportError, match="was changed"):
        effpass.validate(path, allow_native=True)


@pytest.mark.parametrize("length", [0, 7, 5000, -1])
@pytest.mark.parametrize("name", ["aoti", "inductor", "onnx"])
def test_a_file_cut_short_is_noticed(name: str, length: int, copied: Callable[[str], Path]) -> None:
    path = copied(name)
    os.truncate(path, length if length >= 0 else path.stat().st_size - 1)
    with pytest.raises(ExportError, match=r"no whole|was changed|truncated|no record|is no ONNX"):
        effpass.validate(path, allow_native=True)


def test_files_of_another_kind(exported: Callable[[str], Path], tmp_path: Path) -> None:
    import onnx

    (tmp_path / "m.txt").touch()
    disguised = Path(shutil.copy(exported("onnx"), tmp_path / "m.pt2"))
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    foreign = tmp_path / "foreign.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), foreign)
    for path, message in [
        (tmp_path / "m.txt", r"ends in \.txt, which is no exported file's\n.*\.onnx \(onnx\)"),
        (tmp_path / "no.onnx", "no such file"),
        (disguised, "no whole .pt2 archive"),
        (text, "ONNX"),
        (foreign, "holds no record of a check by effpass"),
    ]:
        with pytest.raises(ExportError, match=message):
            effpass.validate(path)


def test_native_code_is_not_run_unasked(exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported("aoti")  # an export runs what it built: before the patch
    monkeypatch.setattr(torch._inductor, "aoti_load_package", None)  # not reached
    for call in (effpass.validate, effpass.load_exported):
        with pytest.raises(ExportError, match=r"holds native code for aoti.*\n.*--allow-native"):
            call(path)


def test_native_code_for_another_cpu(exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported("aoti")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ZVECTOR")
    with pytest.raises(ExportError, match=r"was made for CPUs with \w+ instead of ZVECTOR"):
        effpass.load_exported(path, allow_native=True)


def test_wrong_numbers_on_this_machine_are_told(exported: Callable[[str], Path], copied: Callable[[str], Path]) -> None:
    path, target = copied("onnx"), OnnxTarget()
    metadata = {k: v for k, v in target.read(path).items() if k != "effpass.digest"}
    reference = json.loads(metadata["effpass.reference"])
    reference[1]["logits"][0][0] += 0.01
    metadata["effpass.reference"] = json.dumps(reference)
    target.stamp(path, seal(metadata, target.digest(path)))
    found = effpass.validate(path)
    assert not found.ok
    assert [case.ok for case in found.cases] == [True, False, True, True, True]
    assert found.cases[1].error == pytest.approx(0.01, rel=1e-3)


# -- the tolerance ----------------------------------------------------------------------------------------------------


def measured(graph: DecodeGraph) -> tuple[Any, list[float]]:
    """The tolerance for a graph, and the largest logit of each case."""
    cases = decode_cases(96)
    rewritten = record_step(graph.module(), graph.layers, graph.dtype, cases)
    found = tolerance.measure_tolerance(graph, cases, rewritten)
    return found, [float(r.logits.abs().max()) for r in rewritten]


def test_layers_that_are_alike_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiled: list[torch.fx.GraphModule] = []
    wrong = False

    def count(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(gm)
        return lambda *args: tuple(t * 1.0001 if wrong and t.is_floating_point() else t for t in gm.forward(*args))

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: real(module, backend=count, **options))
    monkeypatch.setattr(tolerance, "has_cpp_compiler", lambda: True)
    graph = export_decode_graph(families.make("llama", num_hidden_layers=4))
    right, scales = measured(graph)
    assert len(compiled) == 3  # what comes before the layers, a layer, what comes after
    assert all(1e-7 < allowed < ROUNDING for allowed in right.logits)
    wrong = True
    # A compiler with other roundings makes it larger.
    for allowed, before, scale in zip(measured(graph)[0].logits, right.logits, scales, strict=True):
        assert max(4e-4 * scale, 10 * before) < allowed <= TOLERANCE[torch.float32] * scale


def test_the_tolerance_has_bounds(graph: DecodeGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    least, most = tolerance.FLOOR * torch.finfo(torch.float32).eps, TOLERANCE[torch.float32]
    monkeypatch.setattr(tolerance, "has_cpp_compiler", lambda: False)
    for spread, expected in ((0.0, least), (5e-5, 4 * 5e-5), (1.0, most)):
        monkeypatch.setattr(tolerance, "largest_difference", lambda *_, s=spread: s)
        found, scales = measured(graph)
        if spread == 5e-5:
            assert found.logits == pytest.approx([expected] * 5)
        else:
            assert found.logits == pytest.approx([expected * scale for scale in scales])
        assert found.why.startswith("4 times the spread")
        assert found.why.endswith("without Inductor: there is no C++ compiler")


# -- whole or not at all ----------------------------------------------------------------------------------------------

EXPORT = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import families
from effpass.lowering.targets import export
from effpass.lowering.targets.onnx import OnnxTarget
from fixed_tolerance import fixed_tolerance
export.measure_tolerance = fixed_tolerance
model = families.make("llama", num_hidden_layers=1, vocab_size=4000)
export.export_decoder(
    model, None, [], Path({out!r}), target=OnnxTarget(), overwrite=True, progress=lambda s: print(s, flush=True)
)
"""


def start(out: Path, **options: Any) -> subprocess.Popen[str]:
    code = EXPORT.format(tests=str(Path(families.__file__).parent), out=str(out))
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, **options)


def test_killed_in_the_middle_leaves_no_file_that_looks_good(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    with start(out) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("checking"):  # written, not yet checked
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p for p in left if not p.parent.name.endswith(".tmp")] == []
    for path in left:
        with pytest.raises(ExportError):
            effpass.validate(path)


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    out.write_text("an earlier export")

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    with start(out, preexec_fn=small_files_only) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.strip().splitlines()[-2].endswith("m.onnx can't be written: File too large")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert out.read_text() == "an earlier export"


@pytest.mark.parametrize("step", ["write", "finish", "stamp"])
def test_a_full_disk_at_any_step_leaves_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OnnxTarget, step, full)
    with pytest.raises(ExportError, match=r"m\.onnx can't be written: No space left on device\n.*free room"):
        export.export_decoder(small(), None, [], tmp_path / "m.onnx", target=OnnxTarget())
    assert list(tmp_path.iterdir()) == []


def test_weights_beside_the_file_are_part_of_its_check(tmp_path: Path) -> None:
    out, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    export.export_decoder(small(), None, [], out, target=OnnxTarget(external_data=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert effpass.validate(out).ok
    flip(data, data.stat().st_size // 2)
    with pytest.raises(ExportError, match="was changed after it was exported"):
        effpass.validate(out)
    data.unlink()
    with pytest.raises(ExportError):
        effpass.validate(out)


@pytest.mark.slow
def test_a_model_of_3_gigabytes(tmp_path: Path) -> None:
    model = families.make(
        "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=11, vocab_size=16000,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    assert sum(p.numel() * 4 for p in model.parameters()) > 3e9
    result = export.export_decoder(model, None, [], tmp_path / "m.onnx", target=OnnxTarget())
    assert result.path.stat().st_size < 5e6
    assert (tmp_path / "m.onnx.data").stat().st_size > 3e9
    del model
    assert effpass.validate(result.path).ok


# -- refused before work ----------------------------------------------------------------------------------------------


class Untouchable:
    """Stands for a model: using it at all is work."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"work was started: {name}")


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_names_its_suffix_and_its_checks(target: str) -> None:
    found = find_target(target)
    assert found.name == target
    assert found.suffix.startswith(".")
    assert found.checked_by


def test_targets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"unknown target 'onxx', did you mean 'onnx'\?\n.*inductor, aoti, onnx"):
        effpass.export(Untouchable(), None, tmp_path / "m.onnx", target="onxx")  # type: ignore[arg-type]


@pytest.mark.parametrize(("target", "suffix"), [("aoti", ".pt2"), ("inductor", ".safetensors")])
def test_a_wrong_suffix_and_a_missing_compiler(
    target: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match=rf"m\.onnx does not end in \{suffix}, as files for {target} do"):
        effpass.export(Untouchable(), None, tmp_path / "m.onnx", target=target)  # type: ignore[arg-type]
    monkeypatch.setattr(tolerance, "has_cpp_compiler", lambda: False)
    with pytest.raises(ExportError, match=rf"exporting to {target} needs a C\+\+ compiler"):
        effpass.export(small(), None, tmp_path / f"m{suffix}", target=target)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_with_a_libstdcxx_of_its_own(tmp_path: Path) -> None:
    """Its files would crash whatever loads them."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    with (
        torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}),
        pytest.raises(ExportError, match=r"g\+\+ links libstdc\+\+ statically, and aoti files .*\n.*CXX"),
    ):
        effpass.export(small(), None, tmp_path / "m.pt2", target="aoti")
    assert [path.name for path in tmp_path.iterdir()] == ["g++"]


def test_sizes_that_the_model_cannot_hold(tmp_path: Path) -> None:
    for options, message in [
        ({"max_length": 257}, r"max_length is 257, but LlamaForCausalLM holds 256 positions .*\n.*at most 256"),
        ({"max_length": 1}, "max_length is 1, at least 2 is needed"),
        ({"max_batch": 0}, "max_batch is 0, at least 1 is needed"),
    ]:
        with pytest.raises(ExportError, match=message):
            effpass.export(small(), {"passes": []}, tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match=r"will take at least 0\.0 GB, and 0\.0 GB are free there"):
        export.export_decoder(small(), None, [], tmp_path / "m.onnx", target=OnnxTarget())


def test_memory_that_is_not_there_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    monkeypatch.setattr(host_memory, "available_memory", lambda: weights)
    with pytest.raises(ExportError, match=r"aoti takes 2\.3 times the weights in host memory: .* more than now, and"):
        export.export_decoder(model, None, [], tmp_path / "m.pt2", target=find_target("aoti"))
    assert list(tmp_path.iterdir()) == []
    host_memory.check_memory(OnnxTarget(), weights, torch.float32)
    with pytest.raises(ExportError, match=r"exporting to onnx takes 3\.5 times"):
        host_memory.check_memory(OnnxTarget(), weights, torch.float16)


def test_available_memory_is_the_machines_or_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(available_memory, "_CGROUP", tmp_path)
    assert available_memory.available_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     500 kB\n")
    assert available_memory.available_memory() == 500 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory.available_memory() == 500 * 1024
    (tmp_path / "memory.max").write_text("300000\n")
    (tmp_path / "memory.current").write_text("100000\n")
    (tmp_path / "memory.stat").write_text("anon 60000\ninactive_file 40000\n")  # a cache that can be dropped
    assert available_memory.available_memory() == 240_000


# -- TensorRT ---------------------------------------------------------------------------------------------------------

no_tensorrt = not any(find_spec(name) for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"))


@pytest.mark.skipif(no_tensorrt, reason="TensorRT for RTX is not installed")
def test_a_tensorrt_engine(tmp_path: Path) -> None:
    out, record = tmp_path / "m.engine", tmp_path / "m.engine.json"
    result = export.export_decoder(small(), None, [], out, target=find_target("tensorrt"), max_batch=2, max_length=64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.engine", "m.engine.json"]
    assert out.stat().st_size > 4 * sum(p.numel() for p in small().parameters())
    assert (result.executed, "the engine is not run" in result.checked_by) == (False, True)
    assert all(check.ok for check in result.checks)
    said = json.loads(record.read_text())
    assert said["effpass.executed"] == "false"
    assert json.loads(said["effpass.limits"]) == {"batch": 2, "length": 64, "indices": []}
    found = effpass.validate(out)
    assert (found.ok, found.executed, found.cases) == (True, False, [])
    with pytest.raises(ExportError, match="effpass does not run TensorRT engines"):
        effpass.load_exported(out, allow_native=True)
    flip(out, out.stat().st_size // 2)
    with pytest.raises(ExportError, match="was changed after it was exported"):
        effpass.validate(out)
    record.unlink()
    with pytest.raises(ExportError, match=r"m\.engine\.json can't be read"):
        effpass.validate(out)


@pytest.mark.parametrize(("gpu", "chosen"), [(True, "tensorrt"), (False, "tensorrt_rtx")])
def test_of_two_tensorrts_the_one_that_can_build_here(gpu: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from effpass.lowering.targets import tensorrt

    monkeypatch.setattr(tensorrt, "find_spec", lambda name: name != "tensorrt_rtx_bindings")
    monkeypatch.setattr(tensorrt.importlib, "import_module", str)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert tensorrt._tensorrt() == chosen


def test_tensorrt_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effpass.lowering.targets import tensorrt

    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs tensorrt or tensorrt_rtx, not installed here\n.*onnx,tensorrt"):
        effpass.export(small(), None, tmp_path / "m.engine", target="tensorrt")
