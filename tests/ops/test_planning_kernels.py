"""Claims about the machine code of the clustering kernels, compiled for Hopper without a GPU."""

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
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from adamac.ops.kmeans import triton as kmeans
from adamac.ops.segment import triton as segment

# What Triton finds in the arguments of a call in bfloat16 with heads of 128: rows that begin at multiples of 16 elements.
kernel, chosen, warps = {
    "nearest": (kmeans._nearest, dict(ROWS=128, BLOCK=64, FULL=True, UPCAST=False, PRECISION="tf32"), 4),
    "directions": (kmeans._directions, dict(ROWS=16, CHUNK=32, FORM=True, COSINE=False), 4),
    "moments": (segment._moments, dict(ROWS=32, MODE=1, NORMALISE=False), 4),
}[sys.argv[1]]
chosen["WIDTH"] = 128
types = {"points": "*bf16", "centroids": "*bf16", "values": "*bf16", "rounded": "*bf16"}
types |= dict.fromkeys(("offset", "offsets", "form", "former", "first", "second"), "*fp32")
if sys.argv[1] == "directions":
    types["centroids"] = "*fp32"
types |= dict.fromkeys(("labels", "order", "starts"), "*i32")
signature = {n: "constexpr" if n in chosen else types.get(n, "i32") for n in kernel.arg_names}
fixed = {p.name for p in kernel.params if p.do_not_specialize}
attributes = {
    (place,): [["tt.divisibility", 16]]
    for place, name in enumerate(kernel.arg_names)
    if name in types or ((name == "dim" or "stride" in name) and name not in fixed)
}
source = ASTSource(kernel, signature, chosen, attributes)
compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
with open(sys.argv[2], "wb") as file:
    file.write(compiled.asm["cubin"])
"""
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@pytest.mark.parametrize("kernel", ["nearest", "directions", "moments"])
def test_tokens_are_read_in_pieces_of_16_bytes(kernel, tmp_path):
    code = tmp_path / "kernel.cubin"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", PROGRAM, kernel, str(code)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr[-2000:]
    listing = subprocess.run([DISASSEMBLER, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "LDG.E.128" in listing
    assert not re.search(r"LDG\S*\.U16", listing)
