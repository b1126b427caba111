"""Parts of the benchmark of experts that need no GPU: vLLM's files are found, routings are even, reads are wide."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import moe, rows
from benchmarks.moe_pairs import LAYERS, even_routings

#: Files as a wheel of vLLM has them, with what these import and in the same ways; the layer is that of one expert.
WHEEL = {
    "vllm-9.8.7.dist-info/METADATA": "",
    "vllm/model_executor/layers/fused_moe/activation.py": "SILU = 'silu'",
    "vllm/model_executor/layers/fused_moe/moe_align_block_size.py": "from vllm.utils.math_utils import round_up",
    "vllm/model_executor/layers/fused_moe/fused_moe.py": """
import torch
import vllm.envs as envs
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import SILU
from vllm.model_executor.layers.fused_moe.moe_align_block_size import round_up
from vllm.triton_utils import tl, triton

logger = init_logger(__name__)

class TritonExperts(mk.FusedMoEExpertsModular):
    def workspace(self, about: mk.ExpertTokensMetadata | None): ...

def fused_experts_impl(x, w1, w2, weights, ids, inplace, activation=SILU):
    assert ids.dtype == torch.int32 and not inplace and not envs.VLLM_BATCH_INVARIANT and round_up(5, 4) == 8
    assert mk.FusedMoEExpertsModular.adjust_N_for_activation(w1.shape[1], activation) == w2.shape[2]
    assert callable(ops.moe_sum) and tl.constexpr and triton.jit
    logger.warning_once("one expert, %s", activation)
    gate, up = (x @ w1[0].T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ w2[0].T * weights.sum(1, keepdim=True)
""",
}


@pytest.fixture
def loader(monkeypatch):
    pytest.importorskip("triton")
    from benchmarks import moe_vllm

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    moe_vllm._load.cache_clear()
    yield moe_vllm
    moe_vllm._load.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def test_vllm_is_a_peer_where_its_wheel_is(loader, monkeypatch, tmp_path, capsys):
    for name, text in WHEEL.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("EFFPASS_VLLM", str(tmp_path))
    gate_up, down, x = torch.randn(1, 48, 16), torch.randn(1, 16, 24), torch.randn(5, 16)
    ids, weights = torch.zeros(5, 1, dtype=torch.long), torch.rand(5, 1)
    peers = dict(moe._peers(moe.TINY, 5, gate_up, down))
    found = peers["vLLM 9.8.7 fused_moe"](x, ids, weights)
    torch.testing.assert_close(found, moe._ours(gate_up, down)(x, ids, weights), rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().out == "vLLM: one expert, silu\n"


def test_without_vllm_there_is_no_such_peer(loader, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("EFFPASS_VLLM", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tensors = torch.randn(1, 48, 16), torch.randn(1, 16, 24)
    assert loader.vllm_experts(*tensors) is None
    monkeypatch.setenv("EFFPASS_VLLM", str(tmp_path))  # a folder without a wheel
    assert loader.vllm_experts(*tensors) is None
    assert "vLLM does not load: ValueError" in capsys.readouterr().out


@pytest.mark.parametrize("shape", LAYERS)
def test_pairs_have_equally_many_rows_for_each_expert(shape):
    ids = even_routings(shape, 264, 2, "cpu")
    assert ids.shape[2] == shape.each
    for routing in ids:
        assert routing.flatten().bincount(minlength=shape.experts).unique().tolist() == [264]
    assert not ids[0].equal(ids[1])


def test_the_bandwidth_of_a_cpu_is_measured_once():
    found = rows.bandwidth("cpu")
    assert 1e8 < found < 1e13
    assert rows.bandwidth("cpu") == found


def test_the_kernel_that_reads_loads_128_bits_at_once():
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from benchmarks.read_kernel import BLOCK, _read

    aligned = [["tt.divisibility", 16]]
    types = {"x": "*fp32", "largest": "*fp32", "COUNT": "constexpr"}
    source = ASTSource(_read, types, {"COUNT": BLOCK}, {(0,): aligned, (1,): aligned})
    assembly = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    loads = [line for line in assembly.splitlines() if "ld.global" in line]
    assert len(loads) == BLOCK // (8 * 32 * 4)
    assert all(".v4" in line for line in loads)


@pytest.mark.gpu
def test_the_bandwidth_of_a_gpu_is_no_less_than_that_of_a_sum():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    buffer = torch.ones(2**29, device="cuda")
    alone = rows.measure(lambda: buffer.sum(), "cuda", inner=10)
    assert rows.bandwidth("cuda") > 0.98 * 2**31 / alone.median
