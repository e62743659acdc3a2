"""The two kernels for CUDA against the lines that they stand for; without a GPU in Triton's interpreter (see conftest.py)."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import dual_lora

triton = pytest.importorskip("triton")
if torch.__version__ < "2.5" and np.__version__ >= "2":
    pytest.skip("Triton 3.0's interpreter computes nonsense with NumPy 2", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(out, width, r1, r2, weight_dtype, dtype, conv1d=False):
    torch.manual_seed(0)
    A, B, C, D, G = (torch.randn(shape, device=DEVICE) for shape in ((r1, width), (out, r1), (r2, width), (out, r2), (out, width)))
    weight = torch.randn((width, out) if conv1d else (out, width), device=DEVICE)
    weight = None if weight_dtype is None else (weight.t() if conv1d else weight).to(weight_dtype)
    return weight, A, B, C, D, G.to(dtype), torch.tensor(0.7, device=DEVICE), torch.empty(out, width, dtype=dtype, device=DEVICE)


def assert_close(ours, reference):
    """To rounding: 16-bit numbers to one unit in the last place, since the interpreter rounds a half the other way."""
    bits = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[ours.dtype]
    torch.testing.assert_close(ours, reference, rtol=bits, atol=1e-5 * reference.abs().max().item())


CASES = [  # more than one tile and span each way, sizes that are no multiples of a tile, ranks below and above 16
    (130, 700, 3, 5, torch.float32, torch.float32, "relu", "sign", "clip", False),
    (64, 128, 16, 20, torch.bfloat16, torch.bfloat16, "relu", "sign", "clip", True),
    (70, 90, 1, 40, torch.float32, torch.float16, "relu", "sign", "xnor", False),
    (70, 90, 2, 1, None, torch.bfloat16, "none", "sign", "xnor", False),
    (1, 600, 64, 64, torch.float32, torch.float32, "relu", "sign", "identity", False),
    (33, 50, 4, 2, torch.float32, torch.bfloat16, "relu", "none", "clip", False),
    (33, 50, 4, 2, torch.float32, torch.float32, "none", "none", "clip", True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_give_the_readable_paths_numbers(case):
    *sizes, magnitude, direction, ste, conv1d = case
    weight, A, B, C, D, G, scale, W = inputs(*sizes, conv1d)
    expected, counts = torch.empty_like(W), [torch.zeros(2, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    dual_lora.put_weight(expected, weight, A, B, C, D, scale, magnitude, direction)
    dual_lora.fused_weight(W, weight, A, B, C, D, scale, magnitude, direction)
    assert_close(W, expected)
    theirs = dual_lora.put_weight_and_gradients(expected, G, weight, A, B, C, D, scale, counts[0], magnitude, direction, ste)
    ours = dual_lora.fused_weight_and_gradients(W.zero_(), G, weight, A, B, C, D, scale, counts[1], magnitude, direction, ste)
    assert_close(W, expected)
    for mine, reference in zip(ours, theirs):
        tolerance = 5e-3 if DEVICE == "cuda" and G.dtype != torch.float32 else 1e-5  # TF32, where G has 16 bits
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance * reference.abs().max().item())
    assert counts[0].tolist() == counts[1].tolist()
    assert (ste == "identity" or direction == "none") == (counts[0][0] == 0), "the clip must bite, or the test says nothing about it"


def test_a_nan_passes_through_the_kernels():
    weight, A, B, C, D, G, scale, W = inputs(20, 30, 2, 2, torch.float32, torch.float32)
    A[0, 3], C[1, 4], G[5, 6] = float("nan"), float("nan"), float("nan")
    dA, dB, dC, dD = dual_lora.fused_weight_and_gradients(W, G, weight, A, B, C, D, scale, torch.zeros(2, dtype=torch.int64, device=DEVICE), "relu", "sign", "clip")
    assert W[:, 3].isnan().all() and W[:, 4].isnan().all() and not W[:, 5].isnan().any()
    assert dB[5].isnan().all() and dD[5].isnan().all() and dC[:, 6].isnan().all()


def test_which_tensors_the_kernels_take():
    weight, A, B, C, D, *_ = inputs(20, 30, 2, 2, torch.bfloat16, torch.float32)
    assert not dual_lora.can_fuse(weight.cpu(), A.cpu(), B.cpu(), C.cpu(), D.cpu(), torch.float32), "a CPU has the readable path"
    assert not dual_lora.can_fuse(weight, A.double(), B.double(), C.double(), D.double(), torch.float64)
    if DEVICE == "cuda":
        assert dual_lora.can_fuse(weight, A, B, C, D, torch.bfloat16) and dual_lora.can_fuse(None, A, B, C, D, torch.float32)
        assert not dual_lora.can_fuse(weight, torch.zeros(65, 30, device=DEVICE), B, C, D, torch.bfloat16)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_on_the_kernels_has_the_readable_paths_outputs_and_gradients(dropout, monkeypatch):
    layer = dual_lora.DualLoRALinear(torch.nn.Linear(96, 150, device=DEVICE), r1=3, r2=4, dropout=dropout)
    monkeypatch.setattr(dual_lora, "row_blocks", lambda B, A: [slice(s, s + 70) for s in range(0, len(B), 70)])
    x, gy, results = torch.randn(5, 96, device=DEVICE, requires_grad=True), torch.randn(5, 150, device=DEVICE), []
    for fuse in (False, True):
        monkeypatch.setattr(dual_lora, "can_fuse", lambda *args: fuse)
        torch.manual_seed(0)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, [x, *(p for _, p in layer.adapters())], gy)])
    for ours, reference in zip(*reversed(results)):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


COMPILE = """
import itertools, sys
import dual_lora
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

numbers = {name: "i32" for name in ("n_out", "n_in", "r1", "r2", "weight_row", "weight_column", "B_row", "D_row")}
factors = {name: "*fp32" for name in ("A", "B", "C", "D", "scale", "dA", "dB", "dC", "dD")}
for kind, relu, sign, ste, rank in (("*bf16", 1, 1, "clip", 16), ("*fp32", 1, 1, "xnor", 64), ("*bf16", 0, 1, "identity", 32), (None, 1, 0, "clip", 16)):
    what = dict(HAS_WEIGHT=kind is not None, RELU=bool(relu), SIGN=bool(sign), R1=rank, R2=16, ROWS=dual_lora.TILE, COLUMNS=dual_lora.TILE)
    for kernel, more, options in ((dual_lora.weight_kernel, {}, {"num_warps": 8}),
                                  (dual_lora.gradients_kernel, dict(STE=ste, PRECISION="ieee" if kind == "*fp32" else "tf32", TILES=dual_lora.TILES),
                                   {"num_warps": 8, "num_stages": 1})):
        types = {**numbers, **factors, "cut": "*i64", "W": kind or "*bf16", "G": kind or "*bf16", "weight": kind or "constexpr"}
        constants = {**what, **more, **({} if kind else {"weight": None})}
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = compile(ASTSource(fn=kernel, signature=signature, constexprs=places), target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 227 * 1024, "a Hopper program has 227 KiB of shared memory"
        print(kernel.__name__, kind, compiled.metadata.shared)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_without_one(tmp_path):
    """All that can be known of them on a machine without a GPU, beside their numbers: that they become machine code and fit."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("an older Triton is asked in another way")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.path.dirname(dual_lora.__file__)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, cwd=tmp_path)
    if "ptxas" in done.stderr and "not found" in done.stderr:
        pytest.skip("Triton came without ptxas")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 8, done.stderr[-2000:]
