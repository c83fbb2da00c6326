"""Several GPUs for one video: diffusers' context parallelism, for all families, under sparse attention.

Ulysses gives each rank the whole sequence for some of its heads within attention, so that clustering, selection and attention
are as on one GPU, and nothing but a few numbers of the first sparse step has to be agreed on (:mod:`adamac.attention.agree`).
Ring attention gives each rank some of the queries and passes keys on, piece by piece: every rank would select among a piece
of the keys by itself, which is another selection than the plan's, so it is refused.

For Wan diffusers does all there is to do. For HunyuanVideo and CogVideoX it does not know where to cut the sequence, and its
exchange cannot tell text from video. :func:`parallelize` brings both, for all families, and lets lengths be as they are: Wan too
gains by it where tokens or heads do not divide, because diffusers then asks all ranks for their lengths in every layer, and
waits.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, ModelHook
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from diffusers.models._modeling_parallel import ContextParallelConfig
from torch.distributed import ProcessGroup

from adamac.integrations.diffusers.exchange import Exchange
from adamac.integrations.diffusers.families import (
    Family,
    UnsupportedModelError,
    family_of,
    transformers_of,
)
from adamac.integrations.diffusers.hooks import arguments_by_name
from adamac.integrations.diffusers.seam import site_of

_HOOK = "adamac_parallel"


def parallelize(pipe: Any, config: ContextParallelConfig) -> None:
    """Spread every video of a pipeline over several GPUs, all of which call the pipeline with the same arguments.

    In place of diffusers' ``transformer.enable_parallelism(config=config)``, which does for Wan alone, where tokens and heads
    divide among the ranks; here they need not. It may come before or after :func:`adamac.enable`, and stays when the handle is
    disabled; without :func:`adamac.enable` attention is dense. Like diffusers' own, it cannot be taken off again.

    Args:
        pipe: A diffusers pipeline of a supported family, or its transformer.
        config: With ``ulysses_degree``.

    Raises:
        UnsupportedModelError: If the model's family is unknown or the installed diffusers is too old.
        ValueError: If the machine has no GPU, the config asks for ring attention, there are more ranks than heads, or this variant of the model
            cannot be cut.
        RuntimeError: If ``torch.distributed`` has not been initialised, or the transformer is parallel already.
    """
    if not isinstance(config, ContextParallelConfig):
        raise ValueError(
            f"config must be a ContextParallelConfig, as ContextParallelConfig(ulysses_degree=2), got {config!r}"
        )
    if torch.accelerator.device_count() == 0:
        raise ValueError(
            "context parallelism needs GPUs: diffusers numbers ranks by them, and this machine has none"
        )
    transformers: list[Any] = [*transformers_of(pipe)]
    families = [family_of(transformer) for transformer in transformers]
    # All are checked before the first is changed.
    for transformer, family in zip(transformers, families, strict=True):
        _check(transformer, family, config)
    for transformer, family in zip(transformers, families, strict=True):
        plan = family.split or transformer._cp_plan
        inputs = {name: parts for name, parts in plan.items() if isinstance(parts, dict)}
        # diffusers cuts as asked, into unequal parts if need be.
        transformer.enable_parallelism(config=replace(config, ulysses_anything=True), cp_plan=inputs)
        learn_arguments(transformer)
        _install_exchange(transformer, family, [name for name in plan if name not in inputs])


def learn_arguments(transformer: torch.nn.Module) -> None:
    """Have diffusers' hooks that cut the sequence look up where their modules take it, which they do in the first call.

    It is Python's own inspection of signatures, which code compiled in full graphs cannot hold.
    """
    for module in transformer.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook in hooks.values():
            known = getattr(hook, "module_forward_metadata", None)
            if isinstance(hook, ContextParallelSplitHook) and known is not None:
                names = list(inspect.signature(known._cls.forward).parameters)[1:]
                known.cached_parameter_indices = {name: place for place, name in enumerate(names)}


@dataclass(frozen=True)
class Ranks:
    """The ranks that share the sequences of a transformer.

    Attributes:
        group: The ranks.
        number: How many.
        heads: Heads of a layer, of all ranks together.
        uneven: Whether tokens and heads need not divide among them.
    """

    group: ProcessGroup
    number: int
    heads: int
    uneven: bool

    @property
    def most_heads(self) -> int:
        """The heads of the rank that has most."""
        return -(-self.heads // self.number)

    def gather(self, number: float) -> tuple[float, ...]:
        """Give every rank the numbers of all; all have to call it."""
        numbers = [0.0] * self.number
        dist.all_gather_object(numbers, number, group=self.group)
        return tuple(numbers)

    def check(self, video_tokens: int) -> None:
        """Refuse what diffusers would cut wrongly, or only refuse with an assertion.

        Raises:
            ValueError: Saying what does not divide, and what to do.
        """
        for amount, what in ((video_tokens, "video tokens"), (self.heads, "heads")):
            if amount % self.number and not self.uneven:
                raise ValueError(
                    f"context parallelism: {amount} {what} do not divide among {self.number} ranks; use "
                    "adamac.integrations.diffusers.parallelize(pipe, config) in place of enable_parallelism, or "
                    "ulysses_anything=True"
                )


def ranks_of(transformer: Any, family: Family) -> Ranks | None:
    """Find out which ranks share a transformer's sequences, if any.

    Raises:
        ValueError: If they do it in a way in which attention cannot be planned.
    """
    parallel = getattr(transformer, "_parallel_config", None)
    config = getattr(parallel, "context_parallel_config", None)
    if config is None:
        return None
    _check_ulysses(config)
    _check_cache(transformer)
    if family.text != "none" and not _has_exchange(transformer):
        raise ValueError(
            f"context parallelism of {family.name} was not set up by adamac, and diffusers' own would attend to wrong "
            "tokens; use adamac.integrations.diffusers.parallelize(pipe, config) in place of enable_parallelism"
        )
    group = config._ulysses_mesh.get_group()
    uneven = getattr(config, "ulysses_anything", False)
    return Ranks(group, dist.get_world_size(group), transformer.config.num_attention_heads, uneven)


def _check(transformer: Any, family: Family, config: ContextParallelConfig) -> None:
    if not hasattr(ContextParallelConfig, "ulysses_anything"):
        raise UnsupportedModelError(
            f"diffusers {diffusers.__version__} is too old to cut sequences into unequal parts; update it to 0.38 or newer"
        )
    _check_ulysses(config)
    heads = transformer.config.num_attention_heads
    if heads < (config.ulysses_degree or 1):
        raise ValueError(
            f"context parallelism: {config.ulysses_degree} ranks are more than the {heads} heads"
        )
    for entry, value in family.unsplit.items():
        if getattr(transformer.config, entry, None) == value:
            raise ValueError(
                f"context parallelism: a {family.name} of {entry} {value!r} reads positions in the sequence and cannot be cut"
            )


def _check_ulysses(config: ContextParallelConfig) -> None:
    if (config.ring_degree or 1) > 1:
        raise ValueError(
            f"context parallelism by ring attention (ring_degree={config.ring_degree}) shows each rank a part of the keys "
            "at a time, among which no plan can be made; use ulysses_degree"
        )


def _check_cache(transformer: Any) -> None:
    if isinstance(getattr(transformer, "_cache_config", None), FirstBlockCacheConfig):
        raise ValueError(
            "context parallelism with FirstBlockCache would hang: each rank decides by its own part of the sequence what to "
            "skip, and one may wait for another that skips; call transformer.disable_cache()"
        )


def _has_exchange(transformer: torch.nn.Module) -> bool:
    return HookRegistry.check_if_exists_or_initialize(transformer).get_hook(_HOOK) is not None


def _install_exchange(transformer: Any, family: Family, ends: list[str]) -> None:
    config = transformer._parallel_config.context_parallel_config
    exchange = Exchange(config._ulysses_mesh.get_group(), family.text)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.register_hook(_Lengths(exchange, family), _HOOK)
    for _, module in family.modules(transformer):
        site_of(module).exchange = exchange
    for name in ends:
        registry = HookRegistry.check_if_exists_or_initialize(transformer.get_submodule(name))
        registry.register_hook(_Join(exchange), _HOOK)
    # The exchange is ours, and the sequence of a text refiner is whole: diffusers has nothing to exchange.
    processors: Any = [getattr(module, "processor", None) for module in transformer.modules()]
    for processor in processors:
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = None


class _Lengths(ModelHook):
    """Tells the exchange how many video tokens all ranks have together, which a rank's part of them does not say."""

    def __init__(self, exchange: Exchange, family: Family) -> None:
        super().__init__()
        self._exchange = exchange
        self._family = family

    @torch.compiler.disable  # compiled code would set the number when it is done
    def pre_forward(
        self, module: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read the size of the latents; the arguments pass through."""
        _check_cache(module)
        latents = arguments_by_name(module, args, kwargs)["hidden_states"]
        self._exchange.video_tokens = math.prod(self._family.grid(module, latents) or (0,))
        return args, kwargs


class _Join(ModelHook):
    """Makes the whole sequence of every rank's part of it."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Join ``[batch, tokens, channels]``."""
        return self._exchange.join(output)
