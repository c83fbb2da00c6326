"""The Hopper kernel cannot be interpreted, but it can be compiled anywhere: for its GPU, with the installed Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

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
with open(sys.argv[3], "wb") as file:
    file.write(compiled.asm["cubin"])
"""
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@pytest.fixture(scope="module", params=[("bf16", 128), ("fp16", 64)], ids=["bf16-128", "fp16-64"])
def compiled(request, tmp_path_factory):
    """Number of matrix products, bytes of shared memory, and the machine code."""
    code = tmp_path_factory.mktemp("kernel") / "kernel.cubin"
    command = [sys.executable, "-c", PROGRAM, *map(str, request.param), str(code)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr[-2000:]
    listing = subprocess.run([DISASSEMBLER, "-c", code], capture_output=True, text=True, check=True).stdout
    return *map(int, answer.stdout.split()), listing


def test_the_kernel_compiles_for_hopper_and_fits_its_shared_memory(compiled):
    products, shared, _ = compiled
    assert products > 0  # by the matrix units' own instruction
    assert shared <= 232_448


def test_the_softmax_is_taken_while_values_are_multiplied(compiled):
    """The assembler is free to wait for the values first, and did before a branch stood between."""
    waits = re.split(r"DEPBAR\.LE gsb0, (0x[01])", compiled[2])
    after_keys = [text for wait, text in zip(waits[1::2], waits[2::2], strict=True) if wait == "0x1"]
    assert len(after_keys) == 4  # two groups, blocks with and without a bias
    assert all(text.count("MUFU.EX2") >= 64 // 2 for text in after_keys)
