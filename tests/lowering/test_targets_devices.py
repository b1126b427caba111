"""Where a file runs, as far as a machine without a GPU can tell; test_targets_gpu.py runs what these only ask about."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import effpass
from effpass.core.errors import ExportError
from effpass.core.model import weights_size
from effpass.lowering.targets import export, gpu, host_memory, publish, tolerance
from effpass.lowering.targets.assumptions import any_size
from effpass.lowering.targets.cache_layers import CacheLayer
from effpass.lowering.targets.decode_graph import DecodeGraph, export_decode_graph
from effpass.lowering.targets.device import model_device
from effpass.lowering.targets.limits import Limits, check_indices, limited
from effpass.lowering.targets.manifest import Manifest, seal
from effpass.lowering.targets.onnx import OnnxTarget
from effpass.lowering.targets.target import find_target, target_of_file
from effpass.lowering.targets.validation import decode_cases, record_step

H100 = {"gpu": "NVIDIA H100", "compute capability": "9.0"}


def small() -> Any:
    return families.make("llama", num_hidden_layers=1)


def fake_gpu_model(index: int = 0) -> Any:
    """A model whose weights say that they are on a GPU, and hold nothing."""
    model = small()
    with FakeTensorMode():
        for module in model.modules():
            for weights in (module._parameters, module._buffers):
                for name, tensor in weights.items():
                    if tensor is not None:
                        weights[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=f"cuda:{index}")
    return model


@pytest.fixture(scope="module")
def graph() -> DecodeGraph:
    return export_decode_graph(small())


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, int], None]:
    """Pretend that PyTorch finds a GPU."""

    def there_is(name: str, major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    return there_is


# -- the model --------------------------------------------------------------------------------------------------------


def test_a_model_is_on_one_device() -> None:
    model = small()
    assert model_device(model) == torch.device("cpu")
    assert model_device(fake_gpu_model(1)) == torch.device("cuda:1")
    model.model.norm.to("meta")
    with pytest.raises(ExportError, match=r"LlamaForCausalLM is spread over cpu, meta, .*\n.*without device_map"):
        model_device(model)
    with pytest.raises(ExportError, match="weights on meta"):
        model_device(small().to("meta"))


@pytest.mark.parametrize("name", ["onnx", "tensorrt"])
def test_targets_of_the_cpu_ask_for_the_model_there(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    message = rf"{name} files are written from a model on cpu, not on cuda\n.*model\.to\('cpu'\)"
    with pytest.raises(ExportError, match=message):
        effpass.export(fake_gpu_model(), {"passes": []}, tmp_path / f"m{target.suffix}", target=name)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tolerance, "find_spec", lambda name: name)
    with pytest.raises(ExportError, match=r"on cuda:1, and PyTorch's current GPU is cuda:0\n.*CUDA_VISIBLE_DEVICES=1"):
        effpass.export(fake_gpu_model(1), {"passes": []}, tmp_path / "m.pt2", target="aoti")


def test_what_must_be_installed_depends_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerance, "has_cpp_compiler", lambda: False)
    monkeypatch.setattr(tolerance, "find_spec", lambda name: name)
    find_target("inductor").require("cuda")  # Triton brings its own compiler
    for name, device in (("inductor", "cpu"), ("aoti", "cpu"), ("aoti", "cuda")):
        with pytest.raises(ExportError, match=r"needs a C\+\+ compiler"):
            find_target(name).require(device)
    monkeypatch.setattr(tolerance, "has_cpp_compiler", lambda: True)
    monkeypatch.setattr(tolerance, "find_spec", lambda name: None)
    for name in ("inductor", "aoti"):
        find_target(name).require("cpu")
        with pytest.raises(ExportError, match=rf"exporting to {name} on a GPU needs triton, not installed here"):
            find_target(name).require("cuda")


def test_the_tolerance_wants_a_cpp_compiler_for_the_cpu_alone(
    graph: DecodeGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tolerance, "has_cpp_compiler", lambda: False)
    monkeypatch.setattr(tolerance, "layers_compiled", lambda module: module)
    asked: list[torch.device] = []

    def on_the_cpu(step: Any, layers: Any, dtype: Any, cases: Any, device: torch.device) -> Any:
        asked.append(device)
        return record_step(step, layers, dtype, cases)

    monkeypatch.setattr(tolerance, "record_step", on_the_cpu)
    cases, device = decode_cases(96), torch.device("cuda:0")
    rewritten = record_step(graph.module(), graph.layers, graph.dtype, cases)
    assert "without Inductor" in tolerance.measure_tolerance(graph, cases, rewritten).why
    asked.clear()
    assert "without" not in tolerance.measure_tolerance(replace(graph, device=device), cases, rewritten).why
    assert asked == [device] * 3


# -- the file ---------------------------------------------------------------------------------------------------------


def stamped(path: Path, **values: str) -> Path:
    """The file with other metadata, under a digest that fits."""
    target = target_of_file(path)
    metadata = {k: v for k, v in target.read(path).items() if k != "effpass.digest"}
    assert all(f"effpass.{key}" in metadata for key in values)
    metadata |= {f"effpass.{key}": value for key, value in values.items()}
    target.stamp(path, seal(metadata, target.digest(path)))
    return path


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one-layer Llama."""
    from fixed_tolerance import fixed_tolerance

    out = tmp_path_factory.mktemp("file") / "m.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "measure_tolerance", fixed_tolerance)
        return export.export_decoder(small(), None, [], out, target=OnnxTarget()).path


def package(path: Path, onnx_file: Path, **values: str) -> Path:
    """A .pt2 that says of itself what the ONNX file says, and `values`; there is no code in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data/library.so", "no library")
    metadata = {k: v for k, v in OnnxTarget().read(onnx_file).items() if k != "effpass.digest"}
    metadata |= {f"effpass.{key}": value for key, value in {"target": "aoti", **values}.items()}
    target = find_target("aoti")
    target.stamp(path, seal(metadata, target.digest(path)))
    return path


def test_a_file_for_a_gpu_wants_one_of_its_kind(
    onnx_file: Path, tmp_path: Path, a_gpu: Callable[[str, int, int], None]
) -> None:
    machine = find_target("aoti").machine()
    assert "gpu" not in machine
    path = package(tmp_path / "m.pt2", onnx_file, device="cuda", machine=json.dumps(machine | H100))
    calls = (effpass.validate, effpass.load_exported)
    for call in calls:
        with pytest.raises(ExportError, match=r"m\.pt2 was exported on a GPU and runs on one; PyTorch finds none here"):
            call(path, allow_native=True)
    a_gpu("NVIDIA A100", 8, 0)
    for call in calls:
        with pytest.raises(
            ExportError,
            match=r"for GPUs of compute capability 9\.0 \(NVIDIA H100\); this one has 8\.0 \(NVIDIA A100\)\n.*again",
        ):
            call(path, allow_native=True)
    a_gpu("NVIDIA H200", 9, 0)
    for call in calls:  # this one fits, and is loaded
        with pytest.raises(ExportError, match=r"AOTInductor's runtime can't load m\.pt2"):
            call(path, allow_native=True)
    other = package(tmp_path / "other.pt2", onnx_file, device="tpu")
    with pytest.raises(ExportError, match="'tpu' is no device that files run on"):
        effpass.validate(other, allow_native=True)


def test_what_a_file_says_of_its_gpu(a_gpu: Callable[[str, int, int], None]) -> None:
    a_gpu("NVIDIA H200", 9, 0)
    device = gpu.device_here("cuda", "m.pt2")
    assert device == torch.device("cuda:0")
    assert gpu.describe_gpu(device) == {"gpu": "NVIDIA H200", "compute capability": "9.0"}
    gpu.check_gpu(H100, device, "m.pt2")  # another name, the same machine code
    gpu.require_current(device)
    machine = find_target("aoti").machine(device)
    assert (machine["gpu"], machine["compute capability"]) == ("NVIDIA H200", "9.0")
    assert {"system", "cpu"} < machine.keys()  # what calls the kernels is code for a CPU


def test_tensors_on_another_device_are_refused_at_each_call() -> None:
    called: list[torch.device] = []

    def step(*inputs: torch.Tensor) -> list[torch.Tensor]:
        called.extend(t.device for t in inputs)
        return list(inputs)

    checked = limited(step, [CacheLayer(2, 16, 16)], torch.float32, Limits(), "m.pt2", torch.device("meta"))
    inputs = [torch.ones(1, n, dtype=torch.long, device="meta") for n in (1, 4, 1)]
    inputs += [torch.ones(1, 2, 3, 16, device="meta") for _ in range(2)]
    checked(*inputs)
    assert called == [torch.device("meta")] * 5
    for index, name in ((0, "input_ids"), (4, r"past_key_values\.0\.value")):
        wrong = [torch.zeros_like(t, device="cpu") if i == index else t for i, t in enumerate(inputs)]
        with pytest.raises(ExportError, match=rf"m\.pt2 runs on meta, and {name} is on cpu\n.*device='meta'"):
            checked(*wrong)
    assert len(called) == 5


def test_a_mask_covers_the_past_and_the_tokens() -> None:
    """Of layers without a past, such as linear attention's, the mask alone tells how long it is."""
    checked = limited(lambda *inputs: list(inputs), [], torch.float32, Limits(), "m.onnx", torch.device("cpu"))
    assert len(checked(torch.ones(1, 3, dtype=torch.long), *(torch.ones(1, n, dtype=torch.long) for n in (5, 3)))) == 3
    for mask in (torch.ones(1, 2, dtype=torch.long), torch.ones(4, dtype=torch.long)):
        with pytest.raises(ExportError, match=r"attention_mask is \[.*\]; it covers the past and the 3 input_ids"):
            checked(torch.ones(1, 3, dtype=torch.long), mask, torch.ones(1, 3, dtype=torch.long))


# -- how far kernels count --------------------------------------------------------------------------------------------


def sizes(graph: DecodeGraph) -> tuple[Any, Any, Any]:
    values = {n.name: n.meta["val"] for n in graph.program.graph.nodes if "val" in n.meta}
    (batch, tokens), past = values["input_ids"].shape, values["past_key_values_0_key"].shape[2]
    return batch, tokens, past


def test_what_a_compiler_counts_with_32_bits_becomes_a_limit() -> None:
    graph = export_decode_graph(small())
    batch, tokens, past = sizes(graph)
    with any_size(graph.program, "Inductor") as counted:
        assert batch * tokens * 96 <= 2**31 - 1
        assert batch * tokens * 64 < 2**31  # holds where the one before does
        assert 4 * batch * tokens * (past + tokens) <= 2**31 - 1
        assert 32 * batch * past + 31 * past <= 16 * tokens + 2**31 - 10  # taken away, and added
    assert sorted(sorted(elements) for elements in counted) == [
        [(4, 1, 1, 1), (4, 1, 2, 0)],
        [(9, 0, 0, 0), (31, 0, 0, 1), (32, 1, 0, 1)],
        [(96, 1, 1, 0)],
    ]
    check_indices(counted, 1, 20_000, 0, "m.pt2")
    check_indices(counted, 1, 1, 34_000_000, "m.pt2")
    with pytest.raises(ExportError, match="1 x 1 tokens on a past of 34100000 make a tensor of 2,148,300,009 elements"):
        check_indices(counted, 1, 1, 34_100_000, "m.pt2")
    with pytest.raises(
        ExportError, match=r"1 x 24000 tokens on a past of 0 make a tensor of 2,304,000,000 .*\n.*parts"
    ):
        check_indices(counted, 1, 24_000, 0, "m.pt2")
    with pytest.raises(
        ExportError, match="2 x 2000 tokens on a past of 200000 make a tensor of 3,232,000,000 elements"
    ):
        check_indices(counted, 2, 2000, 200_000, "m.pt2")
    with (
        pytest.raises(ExportError, match=r"Inductor compiled the graph for sizes with .* only"),
        any_size(graph.program, "Inductor"),
    ):
        assert batch * tokens * 97 <= 2**30  # a condition of another kind


def test_a_mask_with_a_size_of_its_own_counts_as_past_and_tokens() -> None:
    from torch._dynamo.source import ConstantSource

    graph = export_decode_graph(small())
    batch, *_ = sizes(graph)
    (mask,) = [n for n in graph.program.graph.nodes if n.op == "placeholder" and n.name == "attention_mask"]
    mode = mask.meta["val"].fake_mode
    mask.meta["val"] = own = mode.from_tensor(torch.zeros(7, 9), source=ConstantSource("own"), static_shapes=False)
    with any_size(graph.program, "Inductor") as counted:
        assert batch * own.shape[1] <= 2**31 - 1
    assert [sorted(elements) for elements in counted] == [[(1, 1, 0, 1), (1, 1, 1, 0)]]


def test_inductor_takes_things_for_granted_where_they_are_seen(
    graph: DecodeGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config
    from torch._inductor.sizevars import SizeVarAllocator

    compile_, given, used = torch._inductor.standalone_compile, [], []

    def compiled(gm: Any, values: list[Any], **options: Any) -> Any:
        given.append(values[-1].fake_mode.shape_env)
        return compile_(gm, values, **options)

    def allocated(self: Any, shape_env: Any = None) -> None:
        used.append(shape_env)
        raise RuntimeError("seen enough")

    monkeypatch.setattr(torch._inductor, "standalone_compile", compiled)
    monkeypatch.setattr(SizeVarAllocator, "__init__", allocated)
    target, file = find_target("inductor"), tmp_path / "m.safetensors"
    assert target.write(graph, file, Limits(2, 48)) == Limits(2, 48)
    with torch._inductor.config.patch(force_disable_caches=True), pytest.raises(ExportError, match="seen enough"):
        target.load(file, torch.device("cpu"))
    assert len(given) == len(used) == 1
    assert used[0] is given[0]


def test_the_limit_is_written_and_kept(onnx_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(onnx_file, tmp_path))
    limits = {"batch": None, "length": None, "indices": [[[2**29, 1, 1, 0]], [[96, 1, 1, 0], [4, 1, 1, 1]]]}
    stamped(path, limits=json.dumps(limits))
    found = Manifest.from_metadata(OnnxTarget().read(path))
    assert found.limits.indices == (((2**29, 1, 1, 0),), ((96, 1, 1, 0), (4, 1, 1, 1)))
    step = effpass.load_exported(path)

    def call(tokens: int) -> Any:
        ids = torch.ones(1, tokens, dtype=torch.long)
        return step(ids, ids, torch.arange(tokens)[None], *[torch.zeros(1, 2, 0, 16)] * 2)

    assert call(3)[0].shape == (1, 3, 96)
    with pytest.raises(ExportError, match="1 x 4 tokens on a past of 0 make a tensor of 2,147,483,648 elements"):
        call(4)


# -- memory, before anything is loaded --------------------------------------------------------------------------------


def test_memory_of_a_gpu_is_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    target, device, weights = find_target("aoti"), torch.device("cuda:0"), 10**9
    host, there = 10**10, 10**10
    monkeypatch.setattr(host_memory, "available_memory", lambda: host)
    monkeypatch.setattr(host_memory, "available_gpu_memory", lambda device: there)

    def check(loaded: bool) -> None:
        host_memory.check_memory(target, weights, torch.bfloat16, device, loaded=loaded)

    check(loaded=True)
    host = int(2.29e9)  # on the CPU, 1.3 times the weights would do
    host_memory.check_memory(target, weights, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ExportError, match=r"2\.3 times the weights in host memory: 2\.3 GB more than now, and 2\.3 GB"):
        check(loaded=True)
    host, there = 10**10, int(1.41e9)
    check(loaded=True)
    with pytest.raises(ExportError, match=r"2\.2 times the weights in memory of cuda:0: 2\.4 GB more .* 1\.4 GB"):
        check(loaded=False)
    there = int(1.3e9)
    with pytest.raises(ExportError, match=r"1\.4 GB more than now, and 1\.3 GB are available\n.*smaller dtype"):
        check(loaded=True)


def test_free_memory_of_a_gpu_counts_what_pytorch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (5, 100)), ("memory_reserved", 30), ("memory_allocated", 10)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert gpu.available_gpu_memory(torch.device("cuda:0")) == 5 + 30 - 10


def test_the_size_of_weights_is_known_from_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from safetensors.torch import save_file

    model = families.make("qwen3", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")  # not read
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    count = sum(p.numel() for p in model.parameters())
    assert weights_size(str(tmp_path)) == (4 * count, torch.float32)
    assert weights_size(str(tmp_path), dtype="bfloat16") == (2 * count, torch.bfloat16)
    model.config.dtype = "float16"
    model.config.save_pretrained(tmp_path)
    assert weights_size(str(tmp_path), dtype="auto") == (2 * count, torch.float16)
    assert weights_size(str(tmp_path), device_map={"": "cuda"}) == (2 * count, torch.float16)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.config.save_pretrained(tmp_path)
    assert weights_size(str(tmp_path)) is None


# -- what killed exports leave ----------------------------------------------------------------------------------------


def test_leftovers_of_dead_processes_go_and_no_others(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        own = publish._working_name(out)
        dead = tmp_path / f"{own}{gone.pid}.abc_12.tmp"
        stay = [
            tmp_path / f"{own}{other.pid}.abc.tmp",
            tmp_path / f"{own}{os.getpid()}.abc.tmp",
            tmp_path / f".m.onnx.elsewhere-{gone.pid}.abc.tmp",  # of another machine, on a disk that both share
            tmp_path / f"{publish._working_name(tmp_path / 'other.onnx')}{gone.pid}.abc.tmp",
            tmp_path / ".m.onnx.notes.tmp",
        ]
        for folder in (dead, *stay):
            folder.mkdir()
            (folder / "m.onnx").write_text("half a file")
        publish.check_output(out, OnnxTarget())
        assert sorted(tmp_path.iterdir()) == sorted(stay)
        other.communicate(b"\n")


def test_the_next_export_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    code = (
        "import os, signal\nfrom pathlib import Path\n"
        "from effpass.lowering.targets.onnx import OnnxTarget\n"
        "from effpass.lowering.targets.publish import published\n"
        f"with published(Path({str(out)!r}), OnnxTarget()) as file:\n"
        "    file.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".m.onnx.")
    export.export_decoder(small(), None, [], out, target=OnnxTarget())
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
