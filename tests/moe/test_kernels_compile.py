"""The interpreter forgives what a compiler does not: every kernel of a layer is compiled for Hopper, GPU or not."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from adamac.moe.choices import triton as choices
from adamac.moe.rows import triton as rows
from adamac.ops.activation import ACTIVATIONS
from adamac.ops.activation import triton as activation
from adamac.ops.gate import triton as gate

POINTERS = {
    "logits": "*fp32", "bias": "*fp32", "weights": "*fp32", "sums": "*fp32", "of_weights": "*fp32", "of_mass": "*fp32",
    "out": "*fp32", "chosen": "*i64", "labels": "*i64", "counts": "*i32", "ends": "*i64", "flat": "*i64",
    "sources": "*i64", "where": "*i64", "lengths": "*i64", "dropped": "*i1", "numbers": "*i32", "places": "*i64",
    "codes": "*i32", "begun": "*i32", "table": "*fp32",
}


def compiled(kernel, others={}, **constants):
    types = POINTERS | others
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [place for place, name in enumerate(kernel.arg_names) if types.get(name) == "*bf16" or name == "width"]
    hints = {(place,): [["tt.divisibility", 16]] for place in aligned}
    return compile(ASTSource(kernel, signature, constants, hints), target=GPUTarget("cuda", 90, 32)).asm["ptx"]


for softmax in (True, False):
    shape = {"TOP_K": 8, "SOFTMAX": softmax, "NORMALISE": not softmax, "BLOCK": 32, "EXPERTS": 64}
    compiled(gate._gate, SLOTS=8, BIASED=not softmax, **shape)
    compiled(gate._gradient, OF_WEIGHTS=True, OF_MASS=True, **shape)
compiled(rows._count, BLOCK=256, NUMBER=64)
compiled(rows._place, BLOCK=256, NUMBER=64)
compiled(rows._runs, RUNS=64, ALL=64, BLOCK=256)
for ranks in (2, 100):
    shape = {"TOP_K": 8, "DROPPED": ranks == 2, "BLOCK": 32, "RANKS": 128 if ranks == 100 else 2}
    experts = {"experts": "*i64", "counts": "*i64"}
    compiled(choices._count, experts, **shape)
    compiled(choices._place, experts, **shape)
compiled(choices._begun, BLOCK=1024)
compiled(choices._tables, {"experts": "*i32"}, BLOCK=1024)
for way in ACTIVATIONS:
    for gated in (False, True):
        values = dict.fromkeys(("inner", "out", "wanted", "found"), "*bf16") | {"rows": "*i32"}
        shape = {"ACTIVATION": way, "GATED": gated, "COUNTED": True, "ROWS": 8, "COLUMNS": 1024}
        for kernel in (activation._activation, activation._activation_gradient):
            code = compiled(kernel, values, **shape)
            assert "ld.global.v4" in code and "ld.global.b16" not in code, "not read in pieces of 16 bytes"
            assert "st.global.v4" in code and "st.global.b16" not in code, "not written in pieces of 16 bytes"
print("compiled")
"""


def test_kernels_of_the_router_of_sorting_of_choices_and_of_activations_compile_for_hopper():
    command = [sys.executable, "-c", PROGRAM]
    answer = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}
    )
    assert answer.stdout.strip() == "compiled", answer.stderr[-3000:]
