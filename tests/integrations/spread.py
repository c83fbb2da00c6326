"""What the tests of context parallelism run, on each of two ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partialmethod
from typing import Any
from unittest.mock import patch

import tiny
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import FirstBlockCacheConfig, context_parallel
from torch import Tensor

from adamac.attention import AdaCluster, Dense, Schedule, Tokens
from adamac.integrations.diffusers import Report, enable, parallelize

# Many outliers, so that layers get further clusters.
METHOD = AdaCluster(
    query_clusters=8, key_clusters=16, max_key_clusters=64, outlier_factor=1.5, budget=Tokens(0.2)
)
SCHEDULE = Schedule(first=1, min_tokens=1)
ODD = {"height": 144, "width": 112}  # 3 x 9 x 7 = 189 tokens
PIPES: dict[str, Callable[..., Any]] = {
    "wan": tiny.wan_pipe,
    "wan of two transformers": lambda: tiny.wan_pipe(two=True),
    "wan of three heads": lambda: tiny.wan_pipe(num_attention_heads=3),
    "hunyuan": tiny.hunyuan_pipe,
    "hunyuan of three heads": lambda: tiny.hunyuan_pipe(num_attention_heads=3),
    "cogvideox": tiny.cogvideox_pipe,
    "cogvideox with rotary embedding": lambda: tiny.cogvideox_pipe(use_rotary_positional_embeddings=True),
}
RUNS: dict[str, Callable[..., Tensor]] = {
    "wan": tiny.run_wan,
    "hunyuan": tiny.run_hunyuan,
    "cogvideox": tiny.run_cogvideox,
}


@dataclass(frozen=True)
class Comparison:
    """A video made on two ranks beside one made on a single rank.

    Attributes:
        error: Relative error of the latents.
        report: Of the handle, on two ranks.
        expected: Of the handle, on one rank.
    """

    error: float
    report: Report | None
    expected: Report | None


def make(name: str) -> tuple[Any, Callable[..., Tensor]]:
    """A pipeline and what runs it."""
    return PIPES[name](), RUNS[name.partition(" ")[0]]


def ulysses(**more: Any) -> ContextParallelConfig:
    return ContextParallelConfig(ulysses_degree=2, **more)


def by_diffusers(pipe: Any) -> None:
    pipe.transformer.enable_parallelism(config=ulysses())


def by_us(pipe: Any) -> None:
    parallelize(pipe, ulysses())


def compare(
    name: str,
    spread: Callable[[Any], None] = by_us,
    *,
    method: Any = METHOD,
    enable_first: bool = False,
    compile: bool = False,
    **more: Any,
) -> Comparison:
    """Make the same sparse video on one rank and on two, there compiled if wanted."""
    pipe, run = make(name)
    with enable(pipe, method, SCHEDULE) as handle:
        expected, counted = run(pipe, **more), handle.report()
    pipe, run = make(name)
    if not enable_first:
        spread(pipe)
    with patch.object(
        torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager")
    ):
        handle = enable(pipe, method, SCHEDULE, compile=compile)
    if enable_first:
        spread(pipe)
    return Comparison(error(run(pipe, **more), expected), handle.report(all_ranks=True), counted)


def compare_dense(name: str, **more: Any) -> Comparison:
    """Make the same stock video on one rank and on two, there after a handle came and went."""
    pipe, run = make(name)
    expected = run(pipe, **more)
    parallelize(pipe, ulysses())
    before = error(run(pipe, **more), expected)
    with enable(pipe, METHOD, SCHEDULE):
        run(pipe, **more)
    return Comparison(max(before, error(run(pipe, **more), expected)), None, None)


def error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


def refusal(*steps: Callable[[], Any]) -> str:
    """Take the steps; the message of the error that one of them raises."""
    try:
        for step in steps:
            step()
    except (ValueError, RuntimeError) as problem:
        return str(problem)
    return "nothing was refused"


def texts_of_one_length() -> Comparison:
    mask = (torch.arange(12) < 5).long().expand(2, -1).clone()
    return compare("hunyuan", prompt_attention_mask=mask)


def videos_one_after_another() -> bool:
    """Whether a video is the same after another one, and after one that was broken off on all ranks."""
    pipe, run = make("wan")
    parallelize(pipe, ulysses())

    def abort(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with enable(pipe, METHOD, SCHEDULE):
        first = run(pipe)
        try:
            run(pipe, seed=1, callback_on_step_end=abort)
        except KeyboardInterrupt:
            return torch.equal(run(pipe), first)
    return False


def agreements() -> list[int]:
    """How often ranks have agreed on a number by the end of each step of a video whose first step is dense."""
    pipe, run = make("wan")
    parallelize(pipe, ulysses())
    counts = []

    def count(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        counts.append(agree.call_count)
        return tensors

    with enable(pipe, METHOD, SCHEDULE), patch.object(dist, "all_reduce", wraps=dist.all_reduce) as agree:
        run(pipe, callback_on_step_end=count)
    return counts


def compiled(name: str) -> Comparison:
    """The same as uncompiled on one rank, though no call before told diffusers' hooks what they look up in their first."""
    pipe, run = make(name)
    with enable(pipe, METHOD, SCHEDULE) as handle:
        expected, counted = run(pipe), handle.report()
    pipe, run = make(name)
    parallelize(pipe, ulysses())
    with enable(pipe, METHOD, SCHEDULE) as handle:
        for block in pipe.transformer.modules():
            if type(block).__name__.endswith("Block") and "attn" in "".join(dict(block.named_children())):
                block.compile(fullgraph=True, backend="aot_eager")
        return Comparison(error(run(pipe), expected), handle.report(), counted)


def unequal_parts_by_diffusers() -> Comparison:
    """Wan with diffusers' own exchange of unequal parts, whose last step gloo cannot do."""

    def gathered(part: Tensor, dim: int, group: Any) -> Tensor:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, part, group=group)
        return torch.cat(parts, dim)

    with patch.object(context_parallel, "_all_gather_anything", gathered):
        config = ulysses(ulysses_anything=True)
        return compare(
            "wan of three heads", lambda pipe: pipe.transformer.enable_parallelism(config=config), **ODD
        )


def ring_refused() -> list[str]:
    """Ring attention of diffusers before and after ``enable``, and of ours."""
    ring = ContextParallelConfig(ring_degree=2)
    first, _ = make("wan")
    second, run = make("wan")
    third, _ = make("wan")
    return [
        refusal(lambda: first.transformer.enable_parallelism(config=ring), lambda: enable(first)),
        refusal(
            lambda: enable(second, METHOD, SCHEDULE),
            lambda: second.transformer.enable_parallelism(config=ring),
            lambda: run(second),
        ),
        refusal(lambda: parallelize(third, ring)),
    ]


def others_refused() -> dict[str, str]:
    """What cannot be spread, by what it is."""
    odd, run = make("wan")
    by_diffusers(odd)
    enable(odd, METHOD, SCHEDULE)
    foreign, _ = make("hunyuan")
    foreign.transformer.enable_parallelism(config=ulysses(), cp_plan={})
    replaced = tiny.hunyuan_pipe(image_condition_type="token_replace")
    narrow = tiny.wan_pipe(num_attention_heads=1)
    graded, _ = make("cogvideox")
    parallelize(graded, ulysses())
    inputs: dict[str, Any] = dict(
        hidden_states=torch.randn(1, 3, 4, 16, 20),
        encoder_hidden_states=torch.randn(1, 7, 16),
        timestep=torch.tensor([500]),
        image_rotary_emb=None,
    )
    cached, run_cached = make("wan")
    parallelize(cached, ulysses())
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return {
        "a cache that decides by content, dense": refusal(lambda: run_cached(cached)),
        "a cache that decides by content": refusal(lambda: enable(cached, METHOD, SCHEDULE)),
        "odd lengths under diffusers' config for even ones": refusal(lambda: run(odd, **ODD)),
        "diffusers' exchange for text and video": refusal(lambda: enable(foreign, METHOD, SCHEDULE)),
        "positions within the sequence": refusal(lambda: parallelize(replaced, ulysses())),
        "more ranks than heads": refusal(lambda: parallelize(narrow, ulysses())),
        "gradients": refusal(lambda: graded.transformer(**inputs)),
    }


def cases() -> dict[str, Callable[[], Any]]:
    """All of it, by name."""
    hard = replace(METHOD, max_key_clusters=16, hard_layers="dense")
    found: dict[str, Callable[[], Any]] = {}
    for name in PIPES:
        found[f"{name}: sparse"] = lambda name=name: compare(name)
        found[f"{name}: enabled first"] = lambda name=name: compare(name, enable_first=True)
        found[f"{name}: odd"] = lambda name=name: compare(name, **ODD)
        found[f"{name}: dense"] = lambda name=name: compare_dense(name)
        found[f"{name}: dense, odd"] = lambda name=name: compare_dense(name, **ODD)
    return found | {
        "wan by diffusers: sparse": lambda: compare("wan", by_diffusers),
        "wan by diffusers: enabled first": lambda: compare("wan", by_diffusers, enable_first=True),
        "wan by diffusers: odd": unequal_parts_by_diffusers,
        "texts of one length": texts_of_one_length,
        "dense method": lambda: compare("hunyuan", method=Dense()),
        "layers too hard": lambda: compare("wan", method=hard),
        "agreements": agreements,
        "one after another": videos_one_after_another,
        "ring": ring_refused,
        "others": others_refused,
        **{f"{name}: compiled": lambda name=name: compiled(name) for name in RUNS},
        "wan by diffusers: compiled": lambda: compare("wan", by_diffusers, compile=True),
    }


def run_cases(rank: int) -> dict[str, Any]:
    """Run all cases, which every rank does in the same order; an error is a case's result."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that is never written shows
    found = {}
    # diffusers numbers accelerators by dividing by how many there are.
    one: AbstractContextManager[Any] = patch.object(torch.accelerator, "device_count", lambda: 1)
    with one:
        for name, case in cases().items():
            try:
                found[name] = case()
            except Exception as problem:
                found[name] = f"{type(problem).__name__}: {problem}"
    return found
