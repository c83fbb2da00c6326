"""The hook on the transformer, which knows the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch.utils.hooks import RemovableHandle

from adamac.integrations.diffusers.clock import UNNAMED

_HOOK = "adamac"


@dataclass(frozen=True)
class Listener:
    """What a handle wants to know of a transformer.

    Attributes:
        on_call: Told the guidance branch and the arguments by name when a call begins.
        on_return: Told when it has ended, well or by an exception.
        on_done: Told when a pipeline is done.
    """

    on_call: Callable[[str, dict[str, Any]], None]
    on_return: Callable[[], None]
    on_done: Callable[[], None]


class TransformerHook(ModelHook):
    """Learns the branch from diffusers' cache context and announces each call of the transformer and its end.

    It is stateful in diffusers' sense so that it is told the context, and that a pipeline is done. Calls it learns of by torch's
    own hooks, not by a ``forward`` in front of the transformer's: a pipeline with ``enable_model_cpu_offload`` puts offload on
    anew after every video, and accelerate then gives the transformer back the ``forward`` that it had before offload. A hook
    that others were put around cannot be removed without taking theirs along: it stays, :meth:`resting`, until it is wanted
    again.
    """

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self._contexts = StateManager(BaseState)  # ty: ignore[invalid-argument-type]: it wants the class
        self._listener: Listener | None = None
        self._installed: Any = None
        self._watched: list[RemovableHandle] = []

    @classmethod
    def of(cls, transformer: torch.nn.Module) -> TransformerHook | None:
        """The hook on a transformer, if it has one, resting or not."""
        hook = HookRegistry.check_if_exists_or_initialize(transformer).get_hook(_HOOK)
        assert hook is None or isinstance(hook, cls)
        return hook

    @classmethod
    def put_on(cls, transformer: torch.nn.Module, listener: Listener) -> None:
        """Tell a listener of the transformer's calls from now on."""
        hook = cls.of(transformer)
        if hook is None:
            hook = cls()
            HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, _HOOK)
            hook._installed = vars(transformer)["forward"]
            hook._watched = [
                transformer.register_forward_pre_hook(hook._call_begins, with_kwargs=True),
                transformer.register_forward_hook(hook._call_ended, always_call=True),
            ]
        hook._listener = listener

    @classmethod
    def take_off(cls, transformer: torch.nn.Module) -> None:
        """Tell nobody any more."""
        hook = cls.of(transformer)
        if hook is None:
            return
        hook._listener = None
        if vars(transformer).get("forward") is hook._installed:
            HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(_HOOK, recurse=False)
            for watched in hook._watched:
                watched.remove()

    @property
    def resting(self) -> bool:
        """Whether nobody listens."""
        return self._listener is None

    # Where the whole transformer is compiled, the compiler would take what changes from call to call for constant.
    @torch.compiler.disable
    def _call_begins(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._listener is not None:
            self._listener.on_call(self._branch(), arguments_by_name(module, args, kwargs))

    @torch.compiler.disable
    def _call_ended(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._listener is not None:
            self._listener.on_return()

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by diffusers when a pipeline is done."""
        self._contexts.reset()
        if self._listener is not None:
            self._listener.on_done()
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
