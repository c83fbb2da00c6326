"""Claims about which step of which video a call belongs to, where a pipeline says little about it."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXVideoToVideoPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from tiny import cogvideox_pipe, quiet, run_wan, wan_pipe, wan_transformer

from adamac.attention import AdaCluster, Schedule
from adamac.integrations.diffusers import enable, inspect

SMALL = AdaCluster(query_clusters=8, key_clusters=16)
ENDS = Schedule(first=0.2, last=0.2, min_tokens=1)


def sparse_steps(handle: Any) -> list[bool]:
    return [row[0] < 1 for row in handle.report().density_by_step_layer]


def video_to_video(family: str) -> tuple[Any, torch.Tensor]:
    nothing = dict(tokenizer=None, text_encoder=None, vae=None)
    if family == "wan":
        pipe = wan_pipe()
        made = WanVideoToVideoPipeline(**nothing, transformer=pipe.transformer, scheduler=pipe.scheduler)
        return quiet(made), torch.randn(1, 4, 3, 16, 20)
    transformer = cogvideox_pipe().transformer
    scheduler = CogVideoXDDIMScheduler()
    made = CogVideoXVideoToVideoPipeline(**nothing, transformer=transformer, scheduler=scheduler)
    return quiet(made), torch.randn(1, 3, 4, 16, 20)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_a_video_made_from_another_has_the_steps_that_are_left(family):
    pipe, latents = video_to_video(family)
    prompts = dict(prompt_embeds=torch.randn(1, 7, 16), negative_prompt_embeds=torch.randn(1, 7, 16))
    size = dict(height=128, width=160, num_inference_steps=10, output_type="latent")
    with enable(pipe, SMALL, ENDS) as handle:
        pipe(video=None, latents=latents, strength=0.5, **prompts, **size)
        assert sparse_steps(handle) == [False, True, True, True, False]


def denoise(
    transformer: Any, scheduler: Any, step_of: Any, steps: int = 4, names: Any = (None, None)
) -> None:
    """A loop as users write it: two calls a step, for both branches of guidance."""
    scheduler.set_timesteps(steps)
    latents, text = torch.randn(1, 4, 3, 16, 20), torch.randn(2, 1, 7, 16)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            for name, prompt in zip(names, text, strict=True):
                call = dict(hidden_states=latents, timestep=step_of(timestep), encoder_hidden_states=prompt)
                if name is None:
                    transformer(**call)
                else:
                    with transformer.cache_context(name):
                        transformer(**call)


def test_views_of_one_time_step_are_branches_of_one_step():
    pipe = wan_pipe()
    with enable(pipe, SMALL, Schedule(first=1, last=1, min_tokens=1)) as handle:
        denoise(pipe.transformer, pipe.scheduler, lambda step: step.expand(1))
        assert sparse_steps(handle) == [False, True, True, False]
    with enable(pipe.transformer, SMALL, Schedule(first=1, min_tokens=1), num_steps=4) as handle:
        denoise(pipe.transformer, pipe.scheduler, lambda step: step.expand(1))
        assert handle.report().dense_calls == {"schedule: first steps": 4}


def test_a_time_step_that_is_written_over_is_another_one():
    transformer, scheduler, place = wan_transformer(), wan_pipe().scheduler, torch.zeros(1)
    with enable(transformer, SMALL, Schedule(first=1, min_tokens=1), num_steps=8) as handle:
        denoise(transformer, scheduler, place.copy_)
        assert handle.report().dense_calls == {"schedule: first steps": 2}


def test_branches_that_cannot_be_told_apart_are_dense_with_the_remedy_once_that_is_seen():
    def copied(step: torch.Tensor) -> torch.Tensor:
        return step.expand(1).to(torch.float32)

    pipe, schedule = wan_pipe(), Schedule(first=1, min_tokens=1)
    with enable(pipe, SMALL, schedule) as handle:
        denoise(pipe.transformer, pipe.scheduler, copied)
        counts = handle.report().dense_calls
        (reason,) = counts.keys() - {"schedule: first steps"}
        assert "more often than the video has steps" in reason
        assert counts[reason] == 2 * 4  # the second half of 2 layers x 2 branches x 4 steps
        handle.clear()
        denoise(pipe.transformer, pipe.scheduler, copied, names=("cond", "uncond"))
        assert handle.report().dense_calls == {"schedule: first steps": 4}
    with enable(pipe, SMALL, schedule, strict=True), pytest.raises(ValueError, match="cache_context"):
        denoise(pipe.transformer, pipe.scheduler, copied)


def test_a_modular_pipeline_is_told_its_branches_by_the_guider():
    wan = pytest.importorskip("diffusers.modular_pipelines.wan")
    if not hasattr(wan, "WanModularPipeline"):
        pytest.skip("this diffusers has no modular pipeline of Wan")
    from diffusers.modular_pipelines import SequentialPipelineBlocks
    from diffusers.modular_pipelines.wan import before_denoise, denoise

    class Blocks(SequentialPipelineBlocks):
        model_name = "wan"
        block_classes: ClassVar = [
            before_denoise.WanTextInputStep,
            before_denoise.WanSetTimestepsStep,
            before_denoise.WanPrepareLatentsStep,
            denoise.WanDenoiseStep,
        ]
        block_names: ClassVar = ["input", "set_timesteps", "prepare_latents", "denoise"]

    pipe = quiet(Blocks().init_pipeline())
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe.update_components(transformer=wan_transformer(in_channels=16, out_channels=16), scheduler=scheduler)
    prompts = dict(prompt_embeds=torch.randn(1, 7, 16), negative_prompt_embeds=torch.randn(1, 7, 16))
    size = dict(height=128, width=160, num_frames=9, num_inference_steps=4)
    with enable(pipe, SMALL, Schedule(first=1, last=1, min_tokens=1)) as handle:
        pipe(**prompts, **size, output="latents")
        assert sparse_steps(handle) == [False, True, True, False]
        assert handle.report().calls == 4 * 2 * 2


def test_wan_with_the_second_transformer_alone_is_made_sparse():
    both = wan_pipe(two=True)
    pipe = quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=both.scheduler,
            transformer=None,
            transformer_2=both.transformer_2,
            boundary_ratio=1.0,
        )
    )
    assert {finding.module.partition(".")[0] for finding in inspect(pipe)} == {"transformer_2"}
    with enable(pipe, SMALL, Schedule(first=1, last=1, min_tokens=1)) as handle:
        run_wan(pipe)
        assert sparse_steps(handle) == [False, True, True, False]
