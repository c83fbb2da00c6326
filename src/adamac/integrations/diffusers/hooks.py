"""The two hooks: one on the transformer that knows the step, one on each self-attention that changes how it attends.

The second enters a torch function mode while the module runs, which takes its single call of
``scaled_dot_product_attention`` and leaves everything else as it is: projections with LoRA or quantised weights, norms,
position embeddings, the processor and its settings. No processor is replaced, so what diffusers does to processors goes on
working.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adamac.integrations.diffusers.clock import UNNAMED

_SDPA = torch.nn.functional.scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]


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
        named = dict(zip(_positional(module), args, strict=False)) if args else {}
        self._on_call(self._branch(), named | kwargs)
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


def _positional(module: torch.nn.Module) -> list[str]:
    """Names of what a module's forward takes by position; of its class, since hooks wrap the instance's."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][1:]


class AttentionHook(ModelHook):
    """Runs one self-attention module with its attention call replaced."""

    def __init__(
        self,
        attention: Callable[[int, int, int, Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor],
        on_bypass: Callable[[int, str], None],
        layer: int,
    ) -> None:
        super().__init__()
        self._attention = attention
        self._on_bypass = on_bypass
        self._layer = layer

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module under the mode; says so if it attended in a way that the mode cannot see."""
        video = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        text = (
            kwargs["encoder_hidden_states"]
            if "encoder_hidden_states" in kwargs
            else (args[1:2] or (None,))[0]
        )
        text_tokens = 0 if text is None else text.shape[1]

        def attention(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
        ) -> Tensor:
            return self._attention(self._layer, video.shape[1], text_tokens, query, key, value, mask, scale)

        mode = _ReplaceAttention(attention)
        with mode:
            output = self.fn_ref.original_forward(*args, **kwargs)  # ty: ignore[not-callable]: set on registration
        if mode.problem is not None:
            self._on_bypass(self._layer, mode.problem)
        return output


class _ReplaceAttention(TorchFunctionMode):
    """Sends calls of ``scaled_dot_product_attention`` elsewhere."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = attention
        # Why attention went past us; stays if scaled_dot_product_attention is never called.
        self.problem: str | None = (
            "the attention back end does not call scaled_dot_product_attention; set it to 'native'"
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _SDPA:
            return func(*args, **kwargs)
        named = (
            dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
            | kwargs
        )
        odd = [name for name in ("dropout_p", "is_causal", "enable_gqa") if named.get(name)]
        if odd:
            self.problem = f"attention with {', '.join(odd)} is not supported"
            return func(*args, **kwargs)
        self.problem = None
        return self._attention(
            named["query"], named["key"], named["value"], named.get("attn_mask"), named.get("scale")
        )
