"""Area `export`: exported decoders against PyTorch and against the strongest other exporter, and what an export costs.

The peer of `onnxruntime` is a file that Optimum made of the same weights. Optimum wants an older transformers, so the
file comes from an environment of its own, and both files run in this process, in the same loop:

    python -m benchmarks export --case checkpoint                            # SmolLM2 as a folder, ./smollm2
    optimum-cli export onnx --model ./smollm2 --task text-generation-with-past ./peer
    EFFPASS_OPTIMUM_ONNX=./peer/model.onnx python -m benchmarks export --case onnxruntime
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.backend import _decode_step, _free, _weight_bytes
from benchmarks.rows import Row, bandwidth, measure_pair, row
from benchmarks.shapes import random_model

if TYPE_CHECKING:
    from effpass.lowering.targets.decode_graph import DecodeGraph, Step

AREA = "export"
PROMPT, NEW = 64, 32


def checkpoint(device: str, smoke: bool) -> Iterator[Row]:
    """Write SmolLM2 in float32 to ./smollm2 for other exporters; measures nothing."""
    import effpass

    loaded = effpass.load_model("smollm2")
    loaded.model.float().save_pretrained("smollm2")
    loaded.tokenizer.save_pretrained("smollm2")
    yield from ()


# -- onnxruntime ------------------------------------------------------------------------------------------------------


class _OnnxDecoder:
    """Greedy decoding with an ONNX decoder in Optimum's layout; outputs stay onnxruntime's from step to step."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.value: Callable[..., Any] = onnxruntime.OrtValue.ortvalue_from_numpy
        self.takes = {i.name: i for i in self.session.get_inputs()}
        self.gives = [o.name for o in self.session.get_outputs()]

    def decode(self, ids: Tensor) -> list[int]:
        past = {
            name: self.value(torch.zeros(1, given.shape[1], 0, given.shape[3]).numpy())
            for name, given in self.takes.items()
            if name.startswith("past")
        }
        mask, new = torch.ones_like(ids), []
        while len(new) < NEW:
            feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -ids.shape[1] :] - 1}
            given = {name: self.value(t.contiguous().numpy()) for name, t in feeds.items() if name in self.takes}
            outputs = dict(zip(self.gives, self.session.run_with_ort_values(None, {**given, **past}), strict=True))
            past = {n.replace("present", "past_key_values"): v for n, v in outputs.items() if n.startswith("present")}
            new.append(int(outputs["logits"].numpy()[0, -1].argmax()))
            ids = torch.tensor([[new[-1]]])
            mask = torch.ones(1, mask.shape[1] + 1, dtype=torch.long)
        return new


def _eager_decode(model: Any, ids: Tensor) -> list[int]:
    from transformers import DynamicCache

    cache, new = DynamicCache(config=model.config), []
    with torch.inference_mode():
        while len(new) < NEW:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            new.append(int(logits[0, -1].argmax()))
            ids = torch.tensor([[new[-1]]])
    return new


def onnxruntime(device: str, smoke: bool) -> Iterator[Row]:
    """SmolLM2 with its own weights, float32, batch 1: a prompt of 64 tokens and 32 greedy ones, on the CPU."""
    import effpass

    model = random_model("tiny", "cpu", torch.float32) if smoke else effpass.load_model("smollm2").model.float()
    ids = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    runs = 2 if smoke else 5
    with tempfile.TemporaryDirectory() as folder:
        exported = effpass.export(model, {"passes": []}, Path(folder) / "model.onnx", target="onnx")
        ours = _OnnxDecoder(exported.path)
        optimum = os.environ.get("EFFPASS_OPTIMUM_ONNX")
        peers: dict[str, Callable[[], list[int]]] = {"eager PyTorch": lambda: _eager_decode(model, ids)}
        if optimum:
            theirs = _OnnxDecoder(Path(optimum))
            peers["optimum-onnx's file"] = lambda: theirs.decode(ids)
        for name, peer in peers.items():
            same = sum(a == b for a, b in zip(ours.decode(ids), peer(), strict=True))
            a, b = measure_pair(lambda: ours.decode(ids), peer, "cpu", warmup=1, runs=runs)
            shape = "tiny" if smoke else "SmolLM2-135M"
            yield (
                row(AREA, f"{shape} in onnxruntime, float32, batch 1, {PROMPT} + {NEW} tokens",
                    "throughput, prefill included", NEW / a.median, "tokens/s", device="cpu", peer=NEW / b.median,
                    peer_name=name, lower_is_better=False, runs=runs, note=f"{same} of {NEW} tokens are the same")
            )  # fmt: skip


# -- ahead of time ----------------------------------------------------------------------------------------------------


def aoti(device: str, smoke: bool) -> Iterator[Row]:
    """One decode step of the AOTInductor file against torch.compile, of the same graph and of the model."""
    if device == "cuda":
        for shape in ("tiny",) if smoke else ("smollm2-135m", "qwen3-1.7b"):
            yield from _aoti_on_a_gpu(shape, PROMPT if smoke else 512, runs=3 if smoke else 15)
            _free("cuda")
        return
    shape = "tiny" if smoke else "smollm2-135m"
    model = random_model(shape, "cpu", torch.float32)
    runs = 3 if smoke else 15
    with tempfile.TemporaryDirectory() as folder:
        step, graph = _exported(model, Path(folder))
        inputs = _decode_inputs(graph, PROMPT)
        compiled = torch.compile(graph.module(), dynamic=True)
        static = _decode_step(model, "cpu", torch.compile(model))
        with torch.inference_mode():
            for name, peer in (("torch.compile, the same graph", lambda: compiled(*inputs)),
                               ("torch.compile, the model with a static cache", static)):  # fmt: skip
                a, b = measure_pair(lambda: step(*inputs), peer, "cpu", warmup=3, runs=runs)
                yield (
                    row(AREA, f"{shape} decode, batch 1, past {PROMPT}, float32", "step time of the .pt2 file",
                        a.median * 1e3, "ms", device="cpu", peer=b.median * 1e3, peer_name=name, runs=runs)
                )  # fmt: skip


def _exported(model: Any, folder: Path) -> tuple[Step, DecodeGraph]:
    import effpass
    from effpass.lowering.targets.decode_graph import export_decode_graph

    path = effpass.export(model, {"passes": []}, folder / "model.pt2", target="aoti").path
    return effpass.load_exported(path, allow_native=True), export_decode_graph(model)


def _decode_inputs(graph: DecodeGraph, past: int) -> tuple[Tensor, ...]:
    """One token on a cache of `past` positions."""
    fixed = (torch.tensor([[5]]), torch.ones(1, past + 1, dtype=torch.long), torch.tensor([[past]]))
    cache = [torch.randn(1, y.heads, past, n).to(graph.dtype) for y in graph.layers for n in (y.key_size, y.value_size)]
    return tuple(t.to(graph.device) for t in (*fixed, *cache))


def _aoti_on_a_gpu(shape: str, past: int, runs: int) -> Iterator[Row]:
    """The same in bfloat16: with both sides captured in CUDA graphs by hand, and both called from Python.

    The peer compiles the same graph, in Inductor's default mode, with attention as the file has it.
    """
    from effpass.lowering.targets.tracing import plain_attention

    model = random_model(shape, "cuda", torch.bfloat16)
    case = f"{shape} decode, batch 1, past {past}, bfloat16"
    weights = _weight_bytes(model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), plain_attention(torch.device("cuda")):
        with _PeakOfGpu() as taken:
            step, graph = _exported(model, Path(folder))
        yield row(AREA, case, "peak GPU memory of the export over weights", 1 + taken.peak / weights, "x",
                  device="cuda", bound=2.0, note=f"weights of {weights / 1e9:.2f} GB")  # fmt: skip
        inputs = _decode_inputs(graph, past)
        compiled = torch.compile(graph.module(), dynamic=True)
        calls: list[Callable[[], Any]] = [lambda: step(*inputs), lambda: compiled(*inputs)]
        outputs = [call()[0].float() for call in calls]
        difference = float((outputs[0] - outputs[1]).abs().max())
        for how, (ours, peer) in {
            "in a CUDA graph": [_captured(call) for call in calls],
            "called from Python": calls,
        }.items():
            a, b = measure_pair(ours, peer, "cuda", warmup=5, runs=runs, inner=20)
            yield row(AREA, case, f"step time of the .pt2 file, {how}", a.median * 1e3, "ms", device="cuda",
                      peer=b.median * 1e3, peer_name=f"torch.compile, the same graph, {how}",
                      bound=weights / bandwidth("cuda") * 1e3, runs=runs,
                      note=f"largest logit difference {difference:.2g}")  # fmt: skip


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` as a CUDA graph over the inputs that it closes over."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


class _PeakOfGpu:
    """Most memory of the GPU taken inside, over what was taken before; AOTInductor's weights are not PyTorch's."""

    def __enter__(self) -> _PeakOfGpu:
        torch.cuda.empty_cache()
        self.peak, self._before, self._done = 0, torch.cuda.mem_get_info()[0], threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._before - torch.cuda.mem_get_info()[0])

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


# -- memory -----------------------------------------------------------------------------------------------------------

_MEASURED = """
import gc, json, sys, tempfile, threading, time
from pathlib import Path
import torch
from benchmarks.shapes import random_model
import effpass
target, dtype, overrides = sys.argv[1], getattr(torch, sys.argv[2]), json.loads(sys.argv[3])
if sys.argv[4]:
    from effpass.lowering.targets import aoti
    aoti._WEIGHTS_APPENDED = json.loads(sys.argv[4])

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

with tempfile.TemporaryDirectory() as folder:
    suffix = {"onnx": ".onnx", "aoti": ".pt2", "inductor": ".safetensors", "tensorrt": ".engine"}[target]
    # Once with a model of no size: imports, the compiler's caches and onnxruntime's arena are not the export's.
    tiny = random_model("tiny", "cpu", torch.float32)
    effpass.export(tiny, {"passes": []}, Path(folder) / f"tiny{suffix}", target=target)
    gc.collect()
    before, peak, done = anonymous(), 0, False

    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous() - before)
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    model = random_model("tiny", "cpu", dtype, **overrides)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    effpass.export(model, {"passes": []}, Path(folder) / f"model{suffix}", target=target)
    done = True
    thread.join()
print("measured", peak / weights, weights)
"""


# Where AOTInductor puts the weights: effpass's choice is to append them to the library.
_ASSEMBLED = {"aot_inductor.force_mmap_weights": False}
_OWN_FILE = {"aot_inductor.package_constants_on_disk_format": "binary_blob"}


def memory(device: str, smoke: bool) -> Iterator[Row]:
    """Peak anonymous memory of an export over an idle process's, as a multiple of the weights, themselves included."""
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 16000,
            "num_attention_heads": 16, "num_key_value_heads": 16}  # fmt: skip
    runs: list[tuple[str, str, str, dict[str, Any] | None]] = [
        ("onnx", "float32", "", None),
        ("onnx", "float16", "", None),
        ("inductor", "float32", "", None),
        ("aoti", "float32", "", None),
        ("aoti", "float32", ", weights assembled into the library", _ASSEMBLED),
        ("aoti", "float32", ", weights in a file of their own", _OWN_FILE),
        ("tensorrt", "float32", "", None),
    ]
    for target, dtype, variant, settings in runs:
        if target == "tensorrt" and find_spec("tensorrt_rtx_bindings") is None and find_spec("tensorrt_rtx") is None:
            continue
        options = [json.dumps({} if smoke else size), json.dumps(settings) if settings else ""]
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, target, dtype, *options], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        share, weights = map(float, done.stdout.split("measured")[1].split())
        yield row(AREA, f"Llama of {weights / 1e9:.2f} GB, {dtype}, target {target}{variant}",
                  "peak memory over weights", share, "x", device="cpu", bound=1.0)  # fmt: skip


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "onnxruntime": onnxruntime,
    "aoti": aoti,
    "memory": memory,
    "checkpoint": checkpoint,
}
