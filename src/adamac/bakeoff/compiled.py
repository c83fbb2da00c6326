"""Compiled blocks, the same for every arm.

The transformer's blocks are compiled once a run and stay so while methods come and go: compiled code passes attention by and
finds the method when it runs, so that all sparse arms share their code, and dense has its own. Each arm's short first video
pays for compiling. What is compiled later all the same, for a shape that came later, marks its video as a first call.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from adamac.bakeoff.errors import BadInput, one_line
from adamac.bakeoff.pipelines import Pipeline


def compile_blocks(pipe: Pipeline) -> None:
    """Compile every block of a pipeline's transformers in full graphs, as ``adamac.enable(compile=True)`` does.

    Raises:
        BadInput: If the model is of no family whose blocks are known.
    """
    for block in _blocks(pipe):
        block.compile(fullgraph=True)


@contextmanager
def uncompiled(pipe: Pipeline) -> Generator[None]:
    """Run a pipeline without its compiled code for a while."""
    code = {block: block._compiled_call_impl for block in _blocks(pipe)}
    try:
        for block in code:
            block._compiled_call_impl = None
        yield
    finally:
        for block, compiled in code.items():
            block._compiled_call_impl = compiled


def graphs_compiled() -> int:
    """How many graphs this process has compiled."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _blocks(pipe: Pipeline) -> list[torch.nn.Module]:
    from adamac.integrations.diffusers.families import UnsupportedModelError, family_of, transformers_of

    try:
        return [block for part in transformers_of(pipe) for block in family_of(part).blocks(part)]
    except UnsupportedModelError as error:
        raise BadInput(f"compile: {one_line(error)}") from None
