"""What ``enable`` refuses before it changes anything."""

from __future__ import annotations

import diffusers
import torch

from adamac.attention import Schedule
from adamac.integrations.diffusers.families import Family, UnsupportedModelError
from adamac.integrations.diffusers.hooks import TransformerHook

_OLDEST_DIFFUSERS = (0, 36)


def check_arguments(method: object, schedule: object) -> None:
    """Refuse an old diffusers, and arguments that are no method and no schedule.

    Raises:
        UnsupportedModelError: If diffusers is too old.
        ValueError: Saying which argument, and what was expected.
    """
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    if version < _OLDEST_DIFFUSERS:
        raise UnsupportedModelError(
            f"diffusers {diffusers.__version__} is too old: adamac needs {'.'.join(map(str, _OLDEST_DIFFUSERS))} or newer"
        )
    if not callable(method) or isinstance(method, type):
        raise ValueError(f"method must make plans, as AdaCluster() does, got {method!r}")
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be a Schedule, as Schedule(first=0.1), got {schedule!r}")


def check_layers(schedule: Schedule, num_layers: int) -> None:
    """Refuse a schedule that names a layer which the transformer has not.

    Raises:
        ValueError: Naming the layer.
    """
    if unknown := [layer for layer in schedule.layers if not -num_layers <= layer < num_layers]:
        raise ValueError(
            f"Schedule.layers names layer {unknown[0]}, but there are {num_layers} layers with self-attention "
            f"({-num_layers} to {num_layers - 1})"
        )


def check_steps(schedule: Schedule) -> None:
    """Refuse a schedule that needs the number of steps, where nothing tells it.

    Raises:
        ValueError: Saying what to give.
    """
    if isinstance(schedule.first, float) or schedule.last:
        raise ValueError(
            f"a transformer alone does not tell how many steps a video has, which {schedule!r} needs; give num_steps, or a "
            "schedule of a number of first steps, as Schedule(first=5)"
        )


def check_free(transformer: torch.nn.Module) -> None:
    """Refuse a transformer that another handle holds.

    Raises:
        ValueError: Saying what to do.
    """
    hook = TransformerHook.of(transformer)
    if hook is not None and not hook.resting:
        raise ValueError(
            "adamac is enabled on this pipeline already; call disable() on the former handle first (a copy made of an enabled "
            "transformer stays so: copy it before)"
        )


def check_back_end(family: Family, transformer: torch.nn.Module) -> None:
    """Refuse a back end under which attention would go past us.

    Raises:
        ValueError: Naming the module, the back end and the remedy.
    """
    for name, module in family.modules(transformer):
        back_end = getattr(getattr(module, "processor", None), "_attention_backend", None)
        back_end = getattr(back_end, "value", back_end)
        if back_end is not None and "native" not in back_end:
            raise ValueError(
                f"{name} uses the attention back end {back_end!r}, which adamac cannot reach; call "
                "transformer.set_attention_backend('native') first (dense steps then use torch's kernels)"
            )
