"""The Hopper kernel cannot be interpreted, but it can be compiled anywhere: for its GPU, with the installed Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from adamac.ops.cluster_attention import hopper_kernels

dtype, head_dim = sys.argv[1], int(sys.argv[2])
kernel = hopper_kernels.attend_kernel
chosen = hopper_kernels.configuration(head_dim)
warps = chosen.pop("num_warps")
halves, floats = ("query", "key", "value", "output"), ("lse", "skipped")
tables = ("q_order", "q_starts", "k_starts", "ends", "tile_cluster", "tile_first", "listed", "counted")
types = {name: "*" + dtype for name in halves} | {name: "*fp32" for name in floats} | {name: "*i32" for name in tables}
signature = {name: "constexpr" if name in chosen else types.get(name, "i32") for name in kernel.arg_names}
signature["scale"] = "fp32"
aligned = [[["tt.divisibility", 16]] if name in types or "stride" in name else [] for name in kernel.arg_names]
attributes = {(place,): hints for place, hints in enumerate(aligned) if hints}
source = GluonASTSource(kernel, signature, chosen, attributes)
compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
print(compiled.asm["ptx"].count("wgmma.mma_async"), compiled.metadata.shared)
"""


@pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 128), ("fp16", 64)])
def test_the_kernel_compiles_for_hopper_and_fits_its_shared_memory(dtype, head_dim):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", PROGRAM, dtype, str(head_dim)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr[-2000:]
    products, shared = map(int, answer.stdout.split())
    assert products > 0  # by the matrix units' own instruction
    assert shared <= 232_448
