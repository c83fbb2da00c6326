"""Training steps of a model that is replicated on all ranks, and of the same in shares: time, memory, and whether both learn the same.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.moe_layouts --out rows.jsonl
    torchrun --standalone --nproc-per-node 2 -m benchmarks.moe_layouts --tiny --device cpu --out rows.jsonl

Random weights, random tokens, the trainer's own update. Layouts take turns; the first steps of a layout are compared, not timed:
losses have to agree, in bfloat16 on a GPU and in float32 on a processor, before anything is written. Peak memory is of the
steps, with weights, gradients and moments, as PyTorch's allocator counts it; building a model before it is shared out is left out.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch

from adamac.moe.lm.corpus import Order
from adamac.moe.lm.layout import LayoutName
from adamac.moe.lm.learner import Learner
from adamac.moe.lm.recipe import Recipe
from adamac.moe.lm.world import World

from .jsonl import write

_COMPARED = 3
_TOLD = ("layout", "expert_ranks", "pieces", "p50_ms", "peak_gib", "parameters", "parameters_held", "losses")
_VOCAB = {False: 32_768, True: 300}
# Of the relative difference of losses and gradient norms in the compared steps.
_TOLERANCE = {"cuda": 2e-2, "cpu": 1e-4}
_TINY = {"hidden": 64, "layers": 2, "heads": 4, "context": 64, "num_experts": 8, "top_k": 2}


def run(options: argparse.Namespace) -> None:
    """Measure both layouts on each grid of ranks and write the rows."""
    rows: list[dict[str, Any]] = []
    for expert_ranks in options.expert_ranks:
        world = World.join(options.device, expert_ranks)
        if world.size < 2:
            raise ValueError("one rank has nothing to share: run it under torchrun with two ranks or more")
        for pieces in options.pieces:
            recipe = _recipe(options, world, pieces)
            found = [
                _measure(layout, recipe, world, options)
                for _ in range(options.rounds)
                for layout in get_args(LayoutName)
            ]
            rows += _merged(found, world.device.type)
            if world.first:
                for row in rows[-2:]:
                    print(*(f"{name} {row[name]}" for name in _TOLD), sep=", ", flush=True)
    if world.first:
        write(options.out, rows)
    world.leave()


def _recipe(options: argparse.Namespace, world: World, pieces: int) -> Recipe:
    shape = {name: getattr(options, name) for name in _TINY} | (_TINY if options.tiny else {})
    micro_batch = options.micro_batch
    return Recipe(
        preset=options.preset,
        vocab=_VOCAB[options.tiny],
        batch=pieces * micro_batch * world.size,
        micro_batch=micro_batch,
        lr=1e-4,
        **shape,
    )


def _measure(layout: LayoutName, recipe: Recipe, world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of a fresh learner: what they computed, how long they took, and what they held."""
    tokens = np.random.default_rng(0).integers(recipe.vocab, size=2**20)
    order, cuda = Order(tokens, recipe.context, recipe.seed), world.device.type == "cuda"
    learner = Learner(recipe, recipe.model(recipe.vocab), world, amp=cuda, layout=layout)
    updates = [learner.update(step, order) for step in range(_COMPARED)]
    if cuda:
        torch.cuda.reset_peak_memory_stats(world.device)
    times_ms = []
    for step in range(_COMPARED, _COMPARED + options.steps):
        world.add(torch.zeros(1, device=world.device)).item()  # all begin together
        began = time.perf_counter()
        learner.update(step, order)  # reads its loss, so that the device is done but for the optimizer
        if cuda:
            torch.cuda.synchronize(world.device)
        times_ms.append((time.perf_counter() - began) * 1e3)
    row = {
        "benchmark": "moe_layouts",
        "layout": layout,
        "ranks": world.size,
        "expert_ranks": world.expert_ranks,
        "pieces": learner.pieces,
        "tokens": recipe.batch * recipe.context,
        "recipe": recipe.to_dict(),
        "parameters": learner.parameters,
        "parameters_held": sum(value.numel() for value in learner.held.values()),
        "losses": [update.loss for update in updates],
        "gradient_norms": [update.gradient_norm for update in updates],
        "peak_gib": torch.cuda.max_memory_allocated(world.device) / 2**30 if cuda else None,
        "times_ms": times_ms,
    }
    del learner
    gc.collect()  # hooks of FSDP2 hold a model in a circle
    if cuda:
        torch.cuda.empty_cache()
    return row


def _merged(found: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """A row for each layout, of all its rounds; refused if the two do not compute the same.

    Raises:
        ValueError: If so.
    """
    by_layout = {layout: [row for row in found if row["layout"] == layout] for layout in get_args(LayoutName)}
    first, second = (rounds[0] for rounds in by_layout.values())
    for what in ("losses", "gradient_norms"):
        worst = max(abs(a - b) / abs(a) for a, b in zip(first[what], second[what], strict=True))
        if not worst < _TOLERANCE[device]:
            raise ValueError(f"{what} of the layouts differ: {first[what]} and {second[what]}")
    rows = []
    for rounds in by_layout.values():
        times_ms = [value for row in rounds for value in row["times_ms"]]
        rows.append(rounds[0] | {"times_ms": times_ms, "p50_ms": median(times_ms), "n": len(times_ms)})
    return rows


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="the smallest shape, to rehearse")
    parser.add_argument("--preset", default="bigmac_stable")
    for name, value in {**_TINY, "hidden": 1024, "layers": 12, "heads": 16, "context": 1024}.items():
        default = {"num_experts": 64, "top_k": 8}.get(name, value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--pieces", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--expert-ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=2)
    try:
        run(parser.parse_args())
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
