"""Claims about what else may be on a pipeline: offload, caches, quantised weights, compilers, other pipelines, threads.

Each of them may come before or after ``enable``, and is still there, and does its work, when the handle is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.hooks import FasterCacheConfig, HookRegistry, ModelHook, PyramidAttentionBroadcastConfig
from tiny import cogvideox_pipe, quiet, run_cogvideox, run_wan, wan_pipe

from adamac.attention import AdaCluster, Schedule
from adamac.integrations.diffusers import enable

ALWAYS = Schedule(first=0, min_tokens=1)
SMALL = AdaCluster(query_clusters=8, key_clusters=16, outlier_factor=float("inf"))


def put_pyramid(pipe: Any) -> None:
    cache = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=["blocks"],
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    pipe.transformer.enable_cache(cache)


def put_faster_cache(pipe: Any) -> None:
    cache = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=["transformer_blocks"],
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 2000),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
        tensor_format="BFCHW",
    )
    pipe.transformer.enable_cache(cache)


def put_sequential_offload(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))


def put_model_offload(pipe: Any) -> None:
    accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))


def put_layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def put_quantised_weights(pipe: Any) -> None:
    torch.ao.quantization.quantize_dynamic(pipe.transformer.blocks, {torch.nn.Linear}, inplace=True)


COMPANY: dict[str, tuple[Callable[[], Any], Callable[..., torch.Tensor], Callable[[Any], None]]] = {
    "pyramid attention broadcast": (wan_pipe, run_wan, put_pyramid),
    "FasterCache": (cogvideox_pipe, run_cogvideox, put_faster_cache),
    "sequential offload": (wan_pipe, run_wan, put_sequential_offload),
    "model offload": (wan_pipe, run_wan, put_model_offload),
    "layerwise casting": (wan_pipe, run_wan, put_layerwise_casting),
    "quantised weights": (wan_pipe, run_wan, put_quantised_weights),
}


@pytest.mark.parametrize("name", COMPANY)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.ao is about to move to another package
def test_company_before_and_after_enabling_gives_one_video_and_outlives_the_handle(name):
    make, run, put = COMPANY[name]
    pipe = make()
    put(pipe)
    without = run(pipe, steps=6)
    with enable(pipe, SMALL, ALWAYS) as handle:
        before = run(pipe, steps=6)
        calls = handle.report().sparse_calls
        assert handle.report().calls == calls > 0
    assert torch.equal(run(pipe, steps=6), without)

    pipe = make()
    handle = enable(pipe, SMALL, ALWAYS)
    put(pipe)
    assert torch.equal(run(pipe, steps=6), before)
    assert handle.report().calls == handle.report().sparse_calls == calls
    handle.disable()
    assert torch.equal(run(pipe, steps=6), without)
    with enable(pipe, SMALL, ALWAYS) as handle:
        assert torch.equal(run(pipe, steps=6), before)
        assert handle.report().calls == handle.report().sparse_calls == calls
    assert torch.equal(run(pipe, steps=6), without)


@pytest.mark.parametrize("offload_first", [True, False])
def test_offload_that_a_pipeline_puts_on_anew_after_every_video_leaves_us_in_place(offload_first):
    schedule = Schedule(first=1, last=1, min_tokens=1)
    plain = wan_pipe()
    stock = run_wan(plain)
    with enable(plain, SMALL, schedule) as handle:
        expected, counted = run_wan(plain), handle.report().dense_calls
    assert counted == {"schedule: first steps": 4, "schedule: last steps": 4}

    pipe = wan_pipe()
    if offload_first:
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        with enable(pipe, SMALL, schedule) as handle:
            if not offload_first:
                pipe.enable_model_cpu_offload(device="cpu")
            for _ in range(3):
                handle.clear()
                assert torch.equal(run_wan(pipe), expected)
                assert handle.report().dense_calls == counted
            assert hasattr(pipe.transformer, "_hf_hook")
        assert torch.equal(run_wan(pipe), stock)
    with enable(pipe, SMALL, schedule):
        pipe.remove_all_hooks()
        assert torch.equal(run_wan(pipe), expected)
    assert torch.equal(run_wan(pipe), stock)


def test_attention_that_a_cache_skips_is_no_call_even_if_that_is_strictly_counted():
    pipe = wan_pipe()
    put_pyramid(pipe)
    with enable(pipe, SMALL, ALWAYS, strict=True) as handle:
        run_wan(pipe)
        assert 0 < handle.report().sparse_calls < 16
        assert handle.report().dense_calls == {}


class Counting(ModelHook):
    """A hook of diffusers with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("place", ["", "blocks.0.attn1"])
def test_hooks_around_ours_stay_when_it_goes(place):
    pipe, inner, outer = wan_pipe(), Counting(), Counting()
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer.get_submodule(place))
    registry.register_hook(inner, "inner")
    stock = run_wan(pipe, steps=1)
    handle = enable(pipe, SMALL, ALWAYS)
    registry.register_hook(outer, "outer")
    sparse = run_wan(pipe, steps=1)
    handle.disable()
    assert torch.equal(run_wan(pipe, steps=1), stock)
    assert (inner.calls, outer.calls) == (6, 4)
    with enable(pipe, SMALL, ALWAYS) as handle:
        assert torch.equal(run_wan(pipe, steps=1), sparse)
        assert handle.report().calls == handle.report().sparse_calls == 4
    registry.remove_hook("outer")
    registry.remove_hook("inner")
    assert torch.equal(run_wan(pipe, steps=1), stock)


@pytest.mark.parametrize("place", ["", "blocks.0.attn1"])
def test_a_hook_of_accelerate_around_ours_stays_when_it_goes(place):
    calls = []

    class Noting(AccelerateHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    pipe = wan_pipe()
    stock = run_wan(pipe, steps=1)
    handle = enable(pipe, SMALL, ALWAYS)
    sparse = run_wan(pipe, steps=1)
    add_hook_to_module(pipe.transformer.get_submodule(place), Noting())
    assert torch.equal(run_wan(pipe, steps=1), sparse)
    handle.disable()
    assert torch.equal(run_wan(pipe, steps=1), stock)
    assert len(calls) == 4
    with enable(pipe, SMALL, ALWAYS) as handle:
        assert torch.equal(run_wan(pipe, steps=1), sparse)
        assert handle.report().calls == handle.report().sparse_calls == 4


def test_a_forward_of_the_modules_own_is_gone_around_and_left_as_it_was():
    pipe = wan_pipe()
    attention, calls = pipe.transformer.blocks[0].attn1, []
    original = type(attention).forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(attention, *args, **kwargs)

    attention.forward = own
    stock = run_wan(pipe, steps=1)
    with enable(pipe, SMALL, ALWAYS) as handle:
        run_wan(pipe, steps=1)
        assert handle.report().sparse_calls == 4
    assert attention.forward is own
    assert torch.equal(run_wan(pipe, steps=1), stock)
    assert len(calls) == 6


def test_a_compiled_transformer_knows_step_and_branch_of_every_call():
    torch._dynamo.reset()
    pipe = wan_pipe()
    with enable(pipe, SMALL, Schedule(first=1, min_tokens=1)) as handle:
        plain, counted = run_wan(pipe), handle.report()
    for in_place in (True, False):
        pipe = wan_pipe()
        if in_place:
            pipe.transformer.compile(backend="eager")
        else:
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        with enable(pipe, SMALL, Schedule(first=1, min_tokens=1)) as handle:
            for _ in range(2):
                assert torch.equal(run_wan(pipe), plain)
                assert handle.report().density_by_step_layer == counted.density_by_step_layer
    torch._dynamo.reset()


def test_a_pipeline_that_shares_the_transformer_begins_its_videos_anew():
    first, second = wan_pipe(), wan_pipe()
    second.transformer = first.transformer  # with a scheduler of its own, which the handle does not know
    with enable(first, SMALL, Schedule(first=1, min_tokens=1)) as handle:
        run_wan(first)
        video = run_wan(second)
        run_wan(first, seed=1)
        assert torch.equal(run_wan(second), video)
        assert handle.report().dense_calls == {"schedule: first steps": 4 * 4}


def test_an_error_within_a_block_leaves_the_next_video_as_it_would_be():
    pipe = wan_pipe()
    block = pipe.transformer.blocks[1]
    with enable(pipe, SMALL, ALWAYS) as handle:
        video = run_wan(pipe)
        handle.clear()
        broken = block.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_wan(pipe, seed=1)
        broken.remove()
        assert torch.equal(run_wan(pipe), video)


def test_two_pipelines_in_two_threads_do_not_disturb_each_other():
    pipes = [wan_pipe(), cogvideox_pipe()]
    runs = [run_wan, run_cogvideox]
    for pipe in pipes:
        enable(pipe, SMALL, ALWAYS)
    expected = [run(pipe) for pipe, run in zip(pipes, runs, strict=True)]
    found: dict[int, list[torch.Tensor]] = {}

    def work(index: int) -> None:
        found[index] = [runs[index](pipes[index]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, video in enumerate(expected):
        assert len(found[index]) == 4
        assert all(torch.equal(each, video) for each in found[index])


def test_two_threads_in_one_transformer_are_refused_and_the_first_goes_on_undisturbed():
    pipe = wan_pipe()
    other = quiet(
        WanPipeline.from_pipe(pipe, scheduler=UniPCMultistepScheduler.from_config(pipe.scheduler.config))
    )
    begun: list[bool] = []
    errors: list[Exception] = []

    def from_another_thread(*_: Any) -> None:
        def run() -> None:
            try:
                run_wan(other, seed=1)
            except RuntimeError as error:
                errors.append(error)

        if not begun:
            begun.append(True)
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    with enable(pipe, SMALL, Schedule(first=1, last=1, min_tokens=1)) as handle:
        video = run_wan(pipe)
        watch = pipe.transformer.blocks[1].register_forward_pre_hook(from_another_thread)
        assert torch.equal(run_wan(pipe), video)
        watch.remove()
        (error,) = errors
        assert "from two threads at once" in str(error)
        handle.clear()
        thread = threading.Thread(target=lambda: run_wan(other, seed=1))  # one after the other is no trouble
        thread.start()
        thread.join()
        assert handle.report().calls == 16
        assert torch.equal(run_wan(pipe), video)


def test_a_thread_whose_video_failed_leaves_the_transformer_to_others():
    pipe = wan_pipe()
    failures = []

    def fail() -> None:
        try:
            run_wan(pipe)
        except ZeroDivisionError as error:
            failures.append(error)

    with enable(pipe, SMALL, ALWAYS):
        video = run_wan(pipe)
        broken = pipe.transformer.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        failed = threading.Thread(target=fail)
        failed.start()
        failed.join()
        broken.remove()
        assert len(failures) == 1
        assert torch.equal(run_wan(pipe), video)
