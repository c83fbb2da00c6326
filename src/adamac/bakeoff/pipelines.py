"""Which pipeline a run uses, and what it is called with."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adamac.bakeoff import call
from adamac.bakeoff.config import Config
from adamac.bakeoff.device import find_device, find_dtype
from adamac.bakeoff.errors import BadInput, one_line
from adamac.bakeoff.prompts import Prompt

Pipeline = Any
"""A diffusers pipeline; what is asked of it here is what all of them have, not what their base class declares."""

_DEFAULT_FPS = 16


def load_pipeline(model: str | None, device: str, dtype: str = "auto", *, place: bool = True) -> Pipeline:
    """Load a diffusers pipeline and put it on a device.

    Args:
        model: Directory or hub id; ``None`` is the embedded pipeline.
        device: Torch's name of a device.
        dtype: As :func:`adamac.bakeoff.device.find_dtype` takes it.
        place: Whether to put it there; else it stays on the processor.

    Raises:
        BadInput: If the device is not there or too small, or the model is not a pipeline that can be loaded.
    """
    target = find_device(device)
    weights = find_dtype(dtype, target)
    with warnings.catch_warnings():
        # torch_dtype, which all supported versions of diffusers know, is called dtype in the newest.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        where = target if place else torch.device("cpu")
        try:
            pipe = _embedded(where, weights) if model is None else _from_pretrained(model, weights).to(where)
        except torch.OutOfMemoryError as error:
            raise BadInput(
                f"model: {model or 'the embedded one'} does not fit into the memory of {where} ({one_line(error)}); offload it in "
                "a function for --setup of a bake-off, or give a narrower dtype"
            ) from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(pipe: Pipeline, config: Config) -> dict[str, Any]:
    """Arguments of the pipeline call that are the same for every video.

    Raises:
        BadInput: If the pipeline has no such setting or argument.
    """
    arguments: dict[str, Any] = {}
    if config.model is None:
        from adamac import embedded

        arguments |= embedded.GENERATION
    accepted = inspect.signature(pipe.__call__).parameters
    for name, argument in call.SETTINGS.items():
        value = getattr(config, name)
        if value is None:
            continue
        if argument not in accepted:
            raise BadInput(f"{name}: {type(pipe).__name__} has no {argument}")
        arguments[argument] = value
    call.check(config.call, accepted, type(pipe).__name__)
    return arguments | config.call


def check_prompts(pipe: Pipeline, prompts: tuple[Prompt, ...], arguments: dict[str, Any]) -> None:
    """Make sure that the pipeline reads all that the prompts say, and that they say all that it needs.

    Args:
        pipe: The pipeline.
        prompts: Of the run.
        arguments: Of all its calls.

    Raises:
        BadInput: If something of a prompt would be passed over, or an image is missing.
    """
    accepted, kind = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
    needs_image = "image" in accepted and accepted["image"].default is inspect.Parameter.empty
    why_unread = _negative_unread(accepted, arguments)
    for prompt in prompts:
        if prompt.negative and why_unread:
            raise BadInput(f"negative_prompt: {kind} {why_unread}; remove it from prompt {prompt.id!r}")
        if prompt.image is not None and "image" not in accepted:
            raise BadInput(
                f"image: {kind} takes none; remove it from prompt {prompt.id!r}, or give a pipeline of image to video"
            )
        if prompt.image is None and needs_image:
            raise BadInput(
                f"image: {kind} needs one, and prompt {prompt.id!r} has none; give --prompts FILE with JSON lines that "
                'have "prompt" and "image"'
            )


def _negative_unread(accepted: Mapping[str, inspect.Parameter], arguments: dict[str, Any]) -> str:
    """Why a call would pass over a negative prompt; empty if it reads it."""
    if "negative_prompt" not in accepted:
        return "has no negative prompt"
    # Where a model's own guidance is distilled into it, the classifier-free kind is the true one.
    scale = next((name for name in ("true_cfg_scale", "guidance_scale") if name in accepted), None)
    if scale is None:
        return ""
    value = arguments.get(scale, accepted[scale].default)
    return f"reads it at {scale} above 1 alone, which is {value:g} here" if value <= 1 else ""


def frames_per_second(config: Config) -> int:
    """Frames a second of the video files."""
    if config.fps is not None:
        return config.fps
    if config.model is None:
        from adamac import embedded

        return embedded.FPS
    return _DEFAULT_FPS


def _embedded(device: torch.device, dtype: torch.dtype) -> Pipeline:
    from adamac import embedded

    if not (embedded.path() / "model_index.json").exists():
        raise BadInput("the embedded pipeline's weights are not installed; give --model DIR_OR_HUB_ID")
    return embedded.load(device, dtype)


def _from_pretrained(model: str, dtype: torch.dtype) -> Pipeline:
    from diffusers import DiffusionPipeline

    directory = Path(model)
    if directory.exists() and not (directory / "model_index.json").is_file():
        raise BadInput(f"model: {model} is not a diffusers pipeline (it has no model_index.json)")
    if not directory.exists() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise BadInput(f"model: {model} is neither a directory nor a hub id (owner/name)")
    try:
        return DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except OSError as error:
        # Diffusers, when it asked the hub in vain and then found nothing in the cache.
        if directory.exists() or "not fully cached locally" not in str(error):
            raise BadInput(f"model: {model} cannot be loaded ({one_line(error)})") from None
        raise BadInput(
            f"model: {model} is not in the local cache and {_hub_failed(error.__cause__)}"
        ) from None
    except Exception as error:  # whatever a broken or missing model makes the loaders raise
        raise BadInput(f"model: {model} cannot be loaded ({one_line(error)})") from None


def _hub_failed(cause: BaseException | None) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403, 404):
        return f"the hub refuses it ({one_line(cause)}); check the name and your access to it, or give a directory"
    return "the hub cannot be reached; download it first, or give a directory"
