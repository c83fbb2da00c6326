"""The hook on the transformer, which knows the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

from adamac.integrations.diffusers.clock import UNNAMED


class TransformerHook(ModelHook):
    """Learns the branch from diffusers' cache context and announces each call of the transformer and its end.

    It is stateful in diffusers' sense so that it is told the context, and that a pipeline is done.
    """

    _is_stateful = True

    def __init__(
        self,
        on_call: Callable[[str, dict[str, Any]], None],
        on_return: Callable[[], None],
        on_done: Callable[[], None],
    ) -> None:
        super().__init__()
        self._contexts = StateManager(BaseState)  # ty: ignore[invalid-argument-type]: it wants the class
        self._on_call = on_call
        self._on_return = on_return
        self._on_done = on_done

    def pre_forward(
        self, module: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Announce the call with its arguments by name; they pass through."""
        self._on_call(self._branch(), arguments_by_name(module, args, kwargs))
        return args, kwargs

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Announce the end of the call; the output passes through."""
        self._on_return()
        return output

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by diffusers when a pipeline is done."""
        self._contexts.reset()
        self._on_done()
        return module

    def _branch(self) -> str:
        # A CacheContext since diffusers 0.41, a bare name before; absent where a pipeline names no branches.
        for attribute in ("_context", "_current_context"):
            context = getattr(self._contexts, attribute, None)
            if context is not None:
                return getattr(context, "name", context)
        return UNNAMED


def arguments_by_name(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Name the arguments of a module's forward; of its class, since hooks wrap the instance's."""
    if not args:
        return kwargs
    parameters = inspect.signature(type(module).forward).parameters.values()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][1:]
    return dict(zip(names, args, strict=False)) | kwargs
