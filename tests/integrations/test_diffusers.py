"""Claims about sparse attention in diffusers pipelines, on tiny random models of every family."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, apply_group_offloading
from peft import LoraConfig
from tiny import (
    cogvideox_pipe,
    hunyuan_pipe,
    run_cogvideox,
    run_hunyuan,
    run_wan,
    wan_pipe,
    wan_transformer,
)

import adamac
from adamac.attention import AdaCluster, BlockTopK, Dense, Layout, Plan, Schedule, Tokens
from adamac.integrations.diffusers import UnsupportedModelError, enable, inspect
from adamac.integrations.diffusers import handle as handle_module
from adamac.integrations.diffusers.padding import TextLengths, common_length

ALWAYS = Schedule(first=0, min_tokens=1)
SMALL = AdaCluster(query_clusters=8, key_clusters=16)
FAMILIES = {
    "wan": (wan_pipe, run_wan, 2 * 2),  # pipeline, run, self-attention calls a step (layers x branches)
    "hunyuan": (hunyuan_pipe, run_hunyuan, 2),
    "cogvideox": (cogvideox_pipe, run_cogvideox, 2),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, Any, int]:
    make, run, calls = FAMILIES[request.param]
    return make(), run, calls


def error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


@dataclass
class Spy:
    """A method that takes down what it was given."""

    seen: list[tuple[Layout, Plan | None]] = field(default_factory=list)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, *, layout: Layout, previous: Plan | None = None
    ) -> Plan:
        self.seen.append((layout, previous))
        return SMALL(query, key, layout=layout, previous=previous)


def test_disable_restores_bit_identical_output(family):
    pipe, run, _ = family
    stock = run(pipe)
    handle = enable(pipe, SMALL, ALWAYS)
    sparse = run(pipe)
    handle.disable()
    assert not torch.equal(sparse, stock)
    assert torch.equal(run(pipe), stock)


def test_a_full_budget_gives_the_dense_video(family):
    pipe, run, _ = family
    stock = run(pipe)
    full = AdaCluster(query_clusters=8, key_clusters=16, budget=Tokens(1.0))
    with enable(pipe, full, ALWAYS) as handle:
        assert error(run(pipe), stock) < 1e-5
        assert handle.report().density == pytest.approx(1)


def test_every_self_attention_call_is_counted_and_no_other(family):
    pipe, run, calls = family
    with enable(pipe, SMALL, ALWAYS) as handle:
        run(pipe, steps=3)
        report = handle.report()
    assert report.calls == report.sparse_calls == 3 * calls
    assert report.dense_calls == report.dense_impl == {}
    assert [len(row) for row in report.density_by_step_layer] == [2, 2, 2]
    assert 0.09 < report.density < 0.2
    assert report.state_bytes > 0
    assert report.seconds["plan"] > 0
    assert report.seconds["attend"] > 0
    assert f"{report.sparse_calls} of {report.calls}" in str(report)


def test_state_is_counted_once_a_layer_and_branch_and_does_not_grow_with_the_steps(family):
    pipe, run, _ = family
    held = []
    for steps in (1, 3):
        with enable(pipe, SMALL, ALWAYS) as handle:
            run(pipe, steps=steps)
            run(pipe, steps=steps)
            held.append(handle.report().state_bytes)
    assert held[0] == held[1] > 0


def test_the_same_seed_gives_the_same_video_after_another_and_after_an_aborted_one(family):
    pipe, run, _ = family

    def abort(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    with enable(pipe, SMALL, ALWAYS):
        first = run(pipe)
        run(pipe, seed=1)
        assert torch.equal(run(pipe), first)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, seed=2, callback_on_step_end=abort)
        assert torch.equal(run(pipe), first)


@pytest.mark.parametrize("stage", ["plan", "attend"])
def test_a_video_after_one_that_ran_out_of_memory_is_the_same_as_ever(family, stage, monkeypatch):
    pipe, run, calls = family
    left = [calls + 1]  # in the second step, so that there is a state to be spoiled

    def until_no_room(run):
        def limited(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                raise torch.OutOfMemoryError("out of memory")
            return run(*args, **options)

        return limited

    with enable(pipe, SMALL, ALWAYS) as handle:
        first = run(pipe)
        if stage == "plan":
            handle.method = until_no_room(SMALL)
        else:
            monkeypatch.setattr(handle_module, "attend", until_no_room(handle_module.attend))
        with pytest.raises(torch.OutOfMemoryError):
            run(pipe, seed=2)
        assert torch.equal(run(pipe), first)


def test_text_is_told_apart_from_video_and_padding_from_text():
    spy = Spy()
    with enable(hunyuan_pipe(), spy, ALWAYS) as handle:
        run_hunyuan(pipe_of(handle), steps=1)
    layout = spy.seen[0][0]
    assert (layout.tokens, layout.video_start, layout.video_stop) == (252, 0, 240)
    assert layout.grid == (3, 8, 10)
    assert layout.valid is not None
    assert layout.valid.sum(1).tolist() == [245, 251]

    spy = Spy()
    with enable(cogvideox_pipe(), spy, ALWAYS) as handle:
        run_cogvideox(pipe_of(handle), steps=1)
    layout = spy.seen[0][0]
    assert (layout.tokens, layout.video_start, layout.video_stop) == (247, 7, 247)
    assert layout.grid == (3, 8, 10)
    assert layout.valid is None


def pipe_of(handle: Any) -> Any:
    return handle.pipe


def test_samples_with_differently_padded_text_do_not_influence_each_other():
    pipe = hunyuan_pipe()
    with enable(pipe, SMALL, ALWAYS):
        both = run_hunyuan(pipe)
        other = torch.Generator().manual_seed(99)
        embeds = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
        embeds[1] = torch.randn(12, 16, generator=other)  # another prompt beside it
        embeds[0, 5:] = torch.randn(7, 16, generator=other)  # and other values in the padding
        changed = run_hunyuan(pipe, prompt_embeds=embeds)
    assert error(changed[0], both[0]) < 1e-5
    assert error(changed[1], both[1]) > 1e-4


def padded_to(length: int) -> torch.Tensor:
    """A mask of two samples whose texts are both so long, of 12 tokens."""
    return (torch.arange(12) < length).long().expand(2, -1).clone()


def masked(handle: Any) -> Any:
    """Make the handle mask padding as if it could not tell its length."""
    handle._text_lengths = TextLengths(lambda mask: None)
    return handle


@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("method", [SMALL, Dense()], ids=["sparse", "dense"])
def test_text_of_one_length_is_cut_off_and_the_video_is_as_if_it_were_masked(method, length):
    pipe, mask = hunyuan_pipe(), padded_to(length)
    with enable(pipe, method, ALWAYS) as handle:
        cut = run_hunyuan(pipe, prompt_attention_mask=mask)
        assert handle.report().dense_impl == ({"native": 8} if method == Dense() else {})
    with masked(enable(pipe, method, ALWAYS)) as handle:
        assert error(cut, run_hunyuan(pipe, prompt_attention_mask=mask)) < 1e-5
        expected = {"native, padding dropped": 8} if method == Dense() else {}
        assert handle.report().dense_impl == expected
    if method == Dense():
        assert error(cut, run_hunyuan(pipe, prompt_attention_mask=mask)) < 1e-5


def test_the_method_sees_no_padding_that_was_cut_off():
    pipe, spy = hunyuan_pipe(), Spy()
    with enable(pipe, spy, ALWAYS):
        run_hunyuan(pipe, steps=2, prompt_attention_mask=padded_to(5))
    for layout, _ in spy.seen:
        assert (layout.tokens, layout.video_start, layout.video_stop) == (245, 0, 240)
        assert layout.grid == (3, 8, 10)
        assert layout.valid is None
    assert [previous is None for _, previous in spy.seen] == [True] * 2 + [False] * 2


def test_the_length_of_the_text_is_read_once_a_video_and_prompt():
    pipe, read = hunyuan_pipe(), []

    def reader(mask: torch.Tensor) -> int | None:
        read.append(common_length(mask))
        return read[-1]

    negative = dict(
        negative_prompt_embeds=torch.randn(2, 12, 16),
        negative_pooled_prompt_embeds=torch.randn(2, 8),
        negative_prompt_attention_mask=padded_to(3),
        true_cfg_scale=2.0,
    )
    with enable(pipe, SMALL, ALWAYS) as handle:
        handle._text_lengths = TextLengths(reader)
        run_hunyuan(pipe, prompt_attention_mask=padded_to(5))
        assert read == [5]
        run_hunyuan(pipe, prompt_attention_mask=padded_to(7))  # a new prompt
        assert read == [5, 7]
        run_hunyuan(pipe, prompt_attention_mask=padded_to(7), **negative)
        assert read == [5, 7, 7, 3]


def test_a_longer_prompt_after_a_shorter_one_is_read_whole():
    def run(pipe: Any, length: int) -> torch.Tensor:
        return run_hunyuan(pipe, prompt_attention_mask=padded_to(length))

    pipe = hunyuan_pipe()
    with enable(pipe, SMALL, ALWAYS):
        run(pipe, 3)
        after = run(pipe, 9)
    with enable(pipe, SMALL, ALWAYS):
        assert torch.equal(run(pipe, 9), after)
        assert error(run(pipe, 3), after) > 1e-5


def test_texts_of_different_lengths_or_with_holes_stay_masked():
    pipe, holes = hunyuan_pipe(), padded_to(5)
    holes[:, 2] = 0
    for mask in (None, holes):
        more = {} if mask is None else {"prompt_attention_mask": mask}
        stock = run_hunyuan(pipe, **more)
        with enable(pipe, Dense(), ALWAYS) as handle:
            assert error(run_hunyuan(pipe, **more), stock) < 1e-5
            assert handle.report().dense_impl == {"native, padding dropped": 8}
            assert "dense calls by native, padding dropped: 8" in str(handle.report())


def test_an_attention_module_called_by_itself_is_not_cut_by_what_the_last_video_said():
    pipe = hunyuan_pipe()
    attention = pipe.transformer.transformer_blocks[0].attn
    mask = torch.ones(2, 1, 1, 252, dtype=torch.bool)
    states = torch.randn(2, 240, 32), torch.randn(2, 12, 32), mask
    with torch.no_grad():
        stock = attention(*states)
        with enable(pipe, Dense(), ALWAYS):
            run_hunyuan(pipe, steps=1, prompt_attention_mask=padded_to(5))
            for output, expected in zip(attention(*states), stock, strict=True):
                assert error(output, expected) < 1e-5


def test_arguments_given_by_position_are_understood():
    transformer, spy = hunyuan_pipe().transformer, Spy()
    inputs = (
        torch.randn(2, 4, 3, 16, 20),
        torch.full((2,), 500.0),
        torch.randn(2, 12, 16),
        padded_to(5),
        torch.randn(2, 8),
        torch.ones(2),
    )
    with torch.no_grad(), enable(transformer, spy, ALWAYS, num_steps=1):
        transformer(*inputs)
    assert [(layout.tokens, layout.grid) for layout, _ in spy.seen] == [(245, (3, 8, 10))] * 2


def test_guidance_branches_keep_apart():
    pipe, spy = wan_pipe(), Spy()
    with enable(pipe, spy, ALWAYS):
        run_wan(pipe, steps=2)
    first_step, second_step = spy.seen[:4], spy.seen[4:]
    assert [previous for _, previous in first_step] == [None] * 4  # 2 branches x 2 layers start afresh
    former = [previous for _, previous in second_step]
    assert len({id(plan) for plan in former}) == 4  # and each goes on from a plan of its own
    assert all(plan is not None for plan in former)


def test_schedule_leaves_the_first_and_last_steps_and_named_layers_dense():
    pipe = wan_pipe()
    schedule = Schedule(first=2, last=0.2, layers=(-1,), min_tokens=1)
    with enable(pipe, SMALL, schedule) as handle:
        run_wan(pipe, steps=5)
        report = handle.report()
    density = report.density_by_step_layer
    assert [row[0] < 1 for row in density] == [False, False, True, True, False]
    assert all(row[1] == 1 for row in density)
    assert report.dense_calls == {
        "schedule: first steps": 8,
        "schedule: last steps": 4,
        "schedule: layer": 4,
    }


def test_few_step_models_get_one_dense_step_by_default():
    pipe = wan_pipe()
    with enable(pipe, SMALL, Schedule(min_tokens=1)) as handle:
        run_wan(pipe, steps=4)
        density = handle.report().density_by_step_layer
    assert [row[0] < 1 for row in density] == [False, True, True, True]


def test_two_transformers_share_one_schedule():
    pipe = wan_pipe(two=True)
    pipe.register_to_config(boundary_ratio=0.8)
    with enable(pipe, SMALL, Schedule(first=1, last=1, min_tokens=1)) as handle:
        run_wan(pipe, steps=4)
        report = handle.report()
    # The second transformer takes over after two steps, in the middle of the schedule: no dense start of its own.
    assert [row[0] < 1 for row in report.density_by_step_layer] == [False, True, True, False]
    assert report.calls == 4 * 2 * 2


def test_a_scheduler_of_order_two_counts_two_evaluations_as_one_step():
    pipe = wan_pipe(scheduler=FlowMatchHeunDiscreteScheduler())
    with enable(pipe, SMALL, Schedule(first=1, last=1, min_tokens=1)) as handle:
        run_wan(pipe, steps=4, guidance=1.0)
        report = handle.report()
    assert report.calls == (2 * 4 - 1) * 2
    assert [row[0] < 1 for row in report.density_by_step_layer] == [False, True, True, False]
    assert report.dense_calls == {"schedule: first steps": 2 * 2, "schedule: last steps": 1 * 2}


def test_a_scheduler_replaced_after_enabling_is_followed():
    pipe = wan_pipe()
    with enable(pipe, SMALL, Schedule(first=1, last=1, min_tokens=1)) as handle:
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=1.0)
        run_wan(pipe, steps=4)
        density = handle.report().density_by_step_layer
    assert [row[0] < 1 for row in density] == [False, True, True, False]


def test_short_videos_stay_dense_with_a_reason():
    pipe = wan_pipe()
    stock = run_wan(pipe)
    with enable(pipe, SMALL, Schedule(first=0)) as handle:
        assert torch.equal(run_wan(pipe), stock)
        assert handle.report().dense_calls == {"too small: fewer than 1,024 video tokens": 16}
        assert handle.report().dense_impl == {"native": 16}


def test_a_layer_whose_keys_do_not_cluster_stays_dense_with_a_reason():
    pipe = wan_pipe()
    stubborn = AdaCluster(
        query_clusters=8, key_clusters=8, max_key_clusters=8, outlier_factor=0.5, hard_layers="dense"
    )
    stock = run_wan(pipe)
    with enable(pipe, stubborn, ALWAYS) as handle:
        assert error(run_wan(pipe), stock) < 1e-6
        assert handle.report().dense_calls == {"method: keys need more than 8 clusters": 16}


@pytest.mark.parametrize("order", ["lora first", "adamac first"])
def test_lora_works_whatever_was_put_on_first(order):
    def put_on_lora(transformer: Any) -> None:
        torch.manual_seed(3)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))

    outputs = []
    for first in (True, False):
        pipe = wan_pipe()
        if first == (order == "lora first"):
            put_on_lora(pipe.transformer)
        handle = enable(pipe, SMALL, ALWAYS)
        if first != (order == "lora first"):
            put_on_lora(pipe.transformer)
        outputs.append(run_wan(pipe))
        handle.disable()
    assert torch.equal(*outputs)


def test_fused_projections_go_on_working():
    pipe = wan_pipe()
    with enable(pipe, SMALL, ALWAYS) as handle:
        apart = run_wan(pipe)
        pipe.transformer.fuse_qkv_projections()
        fused = run_wan(pipe)
        assert handle.report().sparse_calls == 2 * 16
    assert error(fused, apart) < 1e-3


@pytest.mark.parametrize("cache_first", [True, False])
def test_first_block_cache_composes(cache_first):
    pipe = wan_pipe()
    cache = FirstBlockCacheConfig(threshold=0.0)  # never skips: the output must be as without the cache
    with enable(pipe, SMALL, ALWAYS):
        plain = run_wan(pipe)
    if cache_first:
        pipe.transformer.enable_cache(cache)
    with enable(pipe, SMALL, ALWAYS) as handle:
        if not cache_first:
            pipe.transformer.enable_cache(cache)
        assert torch.equal(run_wan(pipe), plain)
        assert handle.report().sparse_calls == 16


def test_a_cache_that_skips_attention_leaves_fewer_calls():
    pipe = wan_pipe()
    cache = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=["blocks"],
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    pipe.transformer.enable_cache(cache)
    with enable(pipe, SMALL, ALWAYS) as handle:
        output = run_wan(pipe)
        assert 0 < handle.report().sparse_calls < 16
    assert torch.isfinite(output).all()


def test_group_offload_composes():
    pipe = wan_pipe()
    with enable(pipe, SMALL, ALWAYS):
        plain = run_wan(pipe)
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )
    with enable(pipe, SMALL, ALWAYS):
        assert torch.equal(run_wan(pipe), plain)


def test_state_dict_and_processors_are_untouched(family):
    pipe, _, _ = family
    names = list(pipe.transformer.state_dict())
    processors = {name: id(processor) for name, processor in pipe.transformer.attn_processors.items()}
    with enable(pipe, SMALL, ALWAYS):
        assert list(pipe.transformer.state_dict()) == names
        assert {name: id(p) for name, p in pipe.transformer.attn_processors.items()} == processors


@pytest.mark.parametrize("method", [BlockTopK(tile=32), BlockTopK(tile=(1, 4, 5)), Dense()])
def test_other_methods_run_in_the_same_seam(family, method):
    pipe, run, calls = family
    with enable(pipe, method, ALWAYS) as handle:
        assert torch.isfinite(run(pipe, steps=1)).all()
        report = handle.report()
    assert report.dense_calls == ({"method: dense": calls} if isinstance(method, Dense) else {})


def test_image_to_video_transformer_of_wan_keeps_its_image_attention_dense():
    transformer = wan_transformer(in_channels=12, image_dim=8, added_kv_proj_dim=32)
    inputs: dict[str, Any] = dict(
        hidden_states=torch.randn(1, 12, 3, 16, 20),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 7, 16),
        encoder_hidden_states_image=torch.randn(1, 5, 8),
    )
    with torch.no_grad(), enable(transformer, SMALL, ALWAYS, num_steps=2) as handle:
        transformer(**inputs)
        assert handle.report().sparse_calls == 2


def test_a_bare_transformer_counts_videos_by_the_number_of_steps():
    transformer = wan_transformer()
    inputs: dict[str, Any] = dict(
        hidden_states=torch.randn(1, 4, 3, 16, 20), encoder_hidden_states=torch.randn(1, 7, 16)
    )
    schedule = Schedule(first=1, min_tokens=1)
    with torch.no_grad(), enable(transformer, SMALL, schedule, num_steps=2) as handle:
        for step in range(4):
            transformer(timestep=torch.tensor([900.0 - step]), **inputs)
        assert handle.report().dense_calls == {"schedule: first steps": 2 * 2}


def test_branches_without_names_are_told_apart_by_the_time_step():
    transformer, spy = wan_transformer(), Spy()
    with torch.no_grad(), enable(transformer, spy, ALWAYS, num_steps=2) as handle:
        for step in range(2):
            timestep = torch.tensor([900.0 - step])
            for _ in range(2):
                transformer(
                    hidden_states=torch.randn(1, 4, 3, 16, 20),
                    timestep=timestep,
                    encoder_hidden_states=torch.randn(1, 7, 16),
                )
        assert len(handle.report().density_by_step_layer) == 2
    former = [previous for _, previous in spy.seen]
    assert former[:4] == [None] * 4
    assert len({id(plan) for plan in former[4:]}) == 4


def test_an_unsupported_model_is_told_what_is_supported():
    with pytest.raises(UnsupportedModelError, match=r"Linear is not supported.*Wan.*HunyuanVideo.*CogVideoX"):
        enable(torch.nn.Linear(2, 2), SMALL)
    with pytest.raises(UnsupportedModelError, match="no transformer"):
        adamac.enable(object(), SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "adacluster"}, "method must make plans, as AdaCluster"),
        ({"method": AdaCluster}, "method must make plans, as AdaCluster"),
        ({"method": Schedule()}, "method must make plans, as AdaCluster"),
        ({"schedule": 0.1}, "schedule must be a Schedule"),
        ({"schedule": Schedule(layers=(99,))}, "names layer 99, but there are 2 layers"),
    ],
)
def test_arguments_of_another_kind_are_refused_before_anything_is_changed(arguments, message):
    pipe = wan_pipe()
    with pytest.raises(ValueError, match=message):
        adamac.enable(pipe, **arguments)
    enable(pipe, SMALL, ALWAYS).disable()


@pytest.mark.parametrize("schedule", [None, Schedule(first=0.5), Schedule(first=1, last=1)])
def test_a_schedule_that_needs_a_number_of_steps_is_refused_where_nobody_tells_it(schedule):
    transformer = wan_transformer()
    with pytest.raises(ValueError, match="give num_steps, or a schedule of a number of first steps"):
        enable(transformer, SMALL, schedule)
    enable(transformer, SMALL, schedule, num_steps=4).disable()
    enable(transformer, SMALL, Schedule(first=1)).disable()


def test_a_method_that_makes_no_plan_is_named():
    def thoughtless(query, key, *, layout, previous=None):
        return None

    with (
        enable(wan_pipe(), thoughtless, ALWAYS) as handle,
        pytest.raises(ValueError, match=r"must return a Plan.*got NoneType from .*thoughtless"),
    ):
        run_wan(handle.pipe)


def test_enabling_twice_is_refused_and_changes_nothing():
    pipe = wan_pipe()
    with enable(pipe, SMALL, ALWAYS) as handle:
        with pytest.raises(ValueError, match="already"):
            enable(pipe, SMALL, ALWAYS)
        run_wan(pipe, steps=1)
        assert handle.report().sparse_calls == 4


def test_copying_what_is_enabled_is_refused_and_what_was_disabled_is_copied(family):
    pipe = family[0]
    with enable(pipe, SMALL, ALWAYS), pytest.raises(TypeError, match=r"cannot be copied; call disable\(\)"):
        copy.deepcopy(pipe.transformer)
    with enable(copy.deepcopy(pipe.transformer), SMALL, ALWAYS, num_steps=4):
        pass


def test_a_back_end_that_cannot_be_reached_is_refused():
    pipe = wan_pipe()
    pipe.transformer.blocks[0].attn1.processor._attention_backend = "sage"
    with pytest.raises(ValueError, match=r"'sage'.*set_attention_backend"):
        enable(pipe, SMALL, ALWAYS)
    stock = wan_pipe()
    assert torch.equal(run_wan(pipe_with_native(pipe)), run_wan(stock))


def pipe_with_native(pipe: Any) -> Any:
    pipe.transformer.blocks[0].attn1.processor._attention_backend = None
    return pipe


def test_attention_that_goes_past_us_is_counted_or_raised(monkeypatch):
    pipe = wan_pipe()
    from diffusers.models.transformers import transformer_wan

    def other_back_end(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(query.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", other_back_end)
    with enable(pipe, SMALL, ALWAYS) as handle:
        run_wan(pipe, steps=1)
        (reason,) = handle.report().dense_calls
    assert "does not call scaled_dot_product_attention" in reason
    with (
        enable(pipe, SMALL, ALWAYS, strict=True),
        pytest.raises(ValueError, match="does not call scaled_dot_product_attention"),
    ):
        run_wan(pipe, steps=1)


def test_causal_attention_is_left_alone_and_counted(monkeypatch):
    pipe = wan_pipe()
    from diffusers.models.transformers import transformer_wan

    def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        parts = (part.transpose(1, 2) for part in (query, key, value))
        same = query.shape[1] == key.shape[1]  # cross-attention is not causal
        output = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=same)
        return output.transpose(1, 2)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", causal)
    stock = run_wan(pipe, steps=1)
    with enable(pipe, SMALL, ALWAYS) as handle:
        assert torch.equal(run_wan(pipe, steps=1), stock)
        assert handle.report().dense_calls == {"unsupported: attention with is_causal is not supported": 4}


def test_a_mask_that_cannot_be_honoured_runs_dense_with_a_reason_or_raises():
    transformer = wan_transformer()
    attention = transformer.blocks[0].attn1
    states = torch.randn(1, 240, 32)
    mask = torch.zeros(1, 1, 240, 240)

    def run() -> torch.Tensor:
        return attention(states, None, mask, None)

    with torch.no_grad():
        stock = run()
        with enable(transformer, SMALL, ALWAYS, num_steps=1) as handle:
            assert torch.equal(run(), stock)
            (reason,) = handle.report().dense_calls
            assert "attention mask of shape (1, 1, 240, 240)" in reason
        with (
            enable(transformer, SMALL, ALWAYS, num_steps=1, strict=True),
            pytest.raises(ValueError, match="mask"),
        ):
            run()


def test_where_gradients_are_wanted_attention_stays_dense_with_a_reason_or_raises():
    transformer = wan_transformer()
    projections = [transformer.blocks[0].attn1.to_q.weight, transformer.blocks[0].attn1.to_v.weight]
    inputs: dict[str, Any] = dict(
        hidden_states=torch.randn(1, 4, 3, 16, 20),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 7, 16),
    )

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(transformer(**inputs).sample.square().sum(), projections)

    stock = gradients()
    with enable(transformer, SMALL, ALWAYS, num_steps=1) as handle:
        for gradient, expected in zip(gradients(), stock, strict=True):
            assert error(gradient, expected) < 1e-5
        (reason,) = handle.report().dense_calls
        assert "gradients are wanted" in reason
    with (
        enable(transformer, SMALL, ALWAYS, num_steps=1, strict=True),
        pytest.raises(ValueError, match="gradients are wanted"),
    ):
        gradients()


def test_inspect_says_what_would_be_sparse_and_why_not():
    findings = {finding.module: finding for finding in inspect(hunyuan_pipe())}
    assert findings["transformer.transformer_blocks.0.attn"].sparse
    assert findings["transformer.single_transformer_blocks.0.attn"].sparse
    refiner = next(f for name, f in findings.items() if "refiner" in name)
    assert not refiner.sparse
    assert "refiner" in refiner.reason
    wan = inspect(wan_pipe(two=True))
    assert [f.sparse for f in wan if f.module.endswith("attn2")] == [False] * 4
    assert sum(f.sparse for f in wan) == 4


def test_sparse_calls_are_counted_by_what_carried_them_out():
    with enable(wan_pipe(), SMALL, ALWAYS) as handle:
        run_wan(handle.pipe)
        report = handle.report()
    assert sum(report.sparse_impl.values()) == report.sparse_calls > 0
    assert all(name.startswith("gather") for name in report.sparse_impl)
    assert "sparse calls by gather" in str(report)


def test_state_that_grows_while_it_is_used_is_counted_once_and_given_back():
    method = dataclasses.replace(SMALL, recluster_every=2)
    with enable(wan_pipe(), method, ALWAYS) as handle:
        run_wan(handle.pipe, steps=6)
        assert handle.report().state_bytes > 0
        assert sum(handle._held.values()) <= handle.report().state_bytes


def test_under_autocast_attention_runs_in_its_dtype():
    pipe = cogvideox_pipe()
    with torch.autocast("cpu", torch.bfloat16):
        stock = run_cogvideox(pipe)
        with enable(pipe, Dense(), ALWAYS) as handle:
            ours = run_cogvideox(pipe)
    assert handle.report().calls > 0
    assert error(ours, stock) < 0.05


def test_autocast_does_not_reach_into_a_plan():
    seen = []

    def method(query, key, **options):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return SMALL(query, key, **options)

    pipe = cogvideox_pipe()
    with torch.autocast("cpu", torch.bfloat16), enable(pipe, method, ALWAYS):
        run_cogvideox(pipe)
    assert set(seen) == {(torch.bfloat16, False)}


def test_modules_are_of_their_own_class_again_when_disabled():
    pipe = wan_pipe()
    before = [type(module) for module in pipe.transformer.modules()]
    handle = enable(pipe, SMALL, ALWAYS)
    assert [type(module) for module in pipe.transformer.modules()] != before
    assert all(isinstance(m, t) for m, t in zip(pipe.transformer.modules(), before, strict=True))
    handle.disable()
    assert [type(module) for module in pipe.transformer.modules()] == before
