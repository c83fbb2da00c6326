"""The seam: a self-attention module runs as ever, but for its single call of ``scaled_dot_product_attention``.

A torch function mode, entered while the module runs, takes that call and leaves everything else as it is: projections with
LoRA or quantised weights, norms, position embeddings, the processor and its settings. No processor is replaced, so what
diffusers does to processors goes on working.

A module gets the seam by its class: it becomes an instance of a subclass that differs in ``forward``. A forward of its own,
which is what diffusers' hooks give a module, would make ``torch.compile`` compile each layer anew, because it compares the
objects. Hooks that are on the module already hold on to the ``forward`` of its class, and are given the other: the seam is
always innermost, so that a cache that skips attention skips the seam too.

While ``torch.compile`` traces, the call becomes the operator ``adamac::site_attention``, which the compiler passes by. When
it runs it looks up its module's site, and everything is as without compiling: schedule, plans of former steps, counting.
"""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adamac.ops.dense_attention import wants_gradient

if TYPE_CHECKING:
    from adamac.integrations.diffusers.exchange import Exchange

_SDPA = torch.nn.functional.scaled_dot_product_attention
_NO_GRADIENT = "gradients are wanted, which compiled attention does not give while adamac is enabled; use torch.no_grad(), or do not compile"
_PAST_US = "the attention back end does not call scaled_dot_product_attention; set it to 'native'"

# Sites by number, for compiled code. A number is a tensor: a plain one would be compiled in, and each layer compiled anew.
_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class AttentionCall:
    """A call of ``scaled_dot_product_attention`` by a self-attention module.

    Attributes:
        query: ``[batch, heads, tokens, head_dim]``.
        key: Like ``query``, as the model has it.
        value: Like ``key``.
        mask: What the model gave as ``attn_mask``.
        scale: Multiplier on the logits; ``None`` means ``head_dim ** -0.5``.
        video_tokens: How many of the tokens are video, as the module's arguments say.
        text_tokens: How many are text, padding included.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    video_tokens: int
    text_tokens: int


@dataclass(frozen=True)
class Attending:
    """What a handle is to one module whose attention it plans.

    Attributes:
        attend: Attends in place of ``scaled_dot_product_attention``, given the layer and the call.
        bypassed: Told the layer and the reason of a call that went past the seam.
        layer: Index of the module.
    """

    attend: Callable[[int, AttentionCall], Tensor]
    bypassed: Callable[[int, str], None]
    layer: int


class Site:
    """What has a say in the attention of one module, inside the seam.

    Attributes:
        attending: The handle that plans attention; ``None`` means that it stays dense.
        exchange: Makes whole sequences of some heads out of a part of the sequence; ``None`` if what arrives is whole, or is
            made whole by diffusers.
        number: By which compiled code finds the site.
    """

    def __init__(self) -> None:
        self.attending: Attending | None = None
        self.exchange: Exchange | None = None
        number = next(_numbers)
        _sites[number] = self
        self.number = torch.tensor(number, device="cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        return self  # a copied module belongs to the same handle

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend for this module, given what its rank holds of the sequence."""
        device, plain = call.query.device.type, nullcontext()
        query, key, value = _as_autocast(call.query, call.key, call.value)
        if torch.is_autocast_enabled(device):
            plain = torch.autocast(device, enabled=False)  # plans choose their own precision
        with plain:
            if self.exchange is None:
                return self._attend(replace(call, query=query, key=key, value=value))
            heads, text_tokens = query.shape[1], call.text_tokens
            query, key, value = self.exchange.to_heads(query, key, value, text_tokens)
            whole = query.shape[2] - text_tokens
            attended = self._attend(replace(call, query=query, key=key, value=value, video_tokens=whole))
            return self.exchange.to_tokens(attended, heads, text_tokens)

    def bypassed(self, problem: str) -> None:
        """Take down that this module attended past us.

        Raises:
            RuntimeError: If its sequence is spread over ranks, so that it attended to a part of it.
        """
        if self.exchange is not None:
            raise RuntimeError(f"under context parallelism: {problem}")
        if self.attending is not None:
            self.attending.bypassed(self.attending.layer, problem)

    def _attend(self, call: AttentionCall) -> Tensor:
        handle = self.attending
        if handle is None:
            return _SDPA(call.query, call.key, call.value, attn_mask=call.mask, scale=call.scale)
        return handle.attend(handle.layer, call)


def site_of(module: torch.nn.Module) -> Site:
    """The site of a module, which gets the seam if it has none."""
    site = vars(module).get("adamac_site")
    if site is None:
        site = vars(module)["adamac_site"] = Site()
        base = type(module)
        _change_class(module, base, _with_seam(base))
        own = vars(module).get("forward")
        if own is not None and not _captured(module, type(module).forward):
            vars(module)["forward"] = _Around(module, own)
    return site


def release(module: torch.nn.Module) -> None:
    """Take the handle off a module, and the seam too if nothing else needs it."""
    site = vars(module).get("adamac_site")
    if site is None:
        return
    site.attending = None
    if site.exchange is not None:
        return
    del vars(module)["adamac_site"]
    base = vars(type(module)).get("adamac_base")
    if base is not None:  # else another changed the class since, and without a site that class is as ever
        _change_class(module, type(module), base)
    own = vars(module).get("forward")
    if isinstance(own, _Around):  # else something was put around it, which goes on calling it
        vars(module)["forward"] = own.inner


def _change_class(module: torch.nn.Module, old: type[torch.nn.Module], new: type[torch.nn.Module]) -> None:
    """Make the module an instance of another class, for hooks around it too, which hold on to its former ``forward``."""
    for holder, name in _captured(module, old.forward):
        setattr(holder, name, types.MethodType(new.forward, module))
    module.__class__ = new


def _captured(module: torch.nn.Module, forward: Callable[..., Any]) -> list[tuple[Any, str]]:
    """Where a module's hooks, diffusers' or accelerate's, hold the ``forward`` of its class."""
    registry = vars(module).get("_diffusers_hook")
    holders = [module, *getattr(registry, "_fn_refs", ())]
    names = ("forward", "original_forward", "_old_forward")
    places = itertools.product(holders, names)
    return [
        (holder, name)
        for holder, name in places
        if getattr(vars(holder).get(name), "__func__", None) is forward
    ]


class _Around:
    """The seam around a ``forward`` of the module's own, under which it cannot get."""

    def __init__(self, module: torch.nn.Module, inner: Callable[..., Any]) -> None:
        self._module = module
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self._module, self.inner, args, kwargs)


@functools.cache
def _with_seam(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Derive the class of modules with the seam."""
    original = base.forward

    @functools.wraps(original)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, functools.partial(original, self), args, kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), names | {"forward": forward, "adamac_base": base})


def _run(
    module: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a module's forward with its attention call replaced."""
    site = getattr(module, "adamac_site", None)
    if site is None:
        return forward(*args, **kwargs)
    video = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else (args[1:2] or (None,))[0]
    text_tokens = 0 if text is None else text.shape[1]
    if torch.compiler.is_compiling():
        _traced.place, _traced.seen = (site.number, video.shape[1], text_tokens), False
        with _traced:
            output = forward(*args, **kwargs)
        if not _traced.seen:  # compiled code could not count it
            raise RuntimeError(_PAST_US)
        return output
    mode = _ReplaceAttention(site, video.shape[1], text_tokens)
    with mode:
        output = forward(*args, **kwargs)
    if mode.problem is not None:
        site.bypassed(mode.problem)
    return output


class _ReplaceAttention(TorchFunctionMode):
    """Sends calls of ``scaled_dot_product_attention`` to a module's site."""

    def __init__(self, site: Site, video_tokens: int, text_tokens: int) -> None:
        super().__init__()
        self._site, self._tokens = site, (video_tokens, text_tokens)
        # Why attention went past us; stays if scaled_dot_product_attention is never called.
        self.problem: str | None = _PAST_US

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _SDPA:
            return func(*args, **kwargs)
        named = _named(args, kwargs)
        self.problem = _problem({flag: named.get(flag) for flag in _FLAGS})
        if self.problem is not None:
            return func(*args, **kwargs)
        parts = (named["query"], named["key"], named["value"], named.get("attn_mask"), named.get("scale"))
        return self._site.attend(AttentionCall(*parts, *self._tokens))


class _TracedAttention(TorchFunctionMode):
    """The same while the compiler traces; made once, because traced code may not make modes."""

    place: tuple[Tensor, int, int]
    seen: bool = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:  # whose call of super() the compiler cannot trace under a mode
            return _unflatten(*args, **kwargs)
        if func is not _SDPA:
            return func(*args, **kwargs)
        self.seen = True
        named = _named(args, kwargs)
        query, key, value = _as_autocast(named["query"], named["key"], named["value"])
        # The operator has none, and below it nothing tells that one is wanted.
        if wants_gradient(query, key, value):
            raise RuntimeError(_NO_GRADIENT)
        parts = (query, key, value, named.get("attn_mask"), named.get("scale"))
        flags = (named.get("dropout_p") or 0.0, bool(named.get("is_causal")), bool(named.get("enable_gqa")))
        return torch.ops.adamac.site_attention(*parts, *flags, *self.place)


_traced = _TracedAttention()
_FLAGS = ("dropout_p", "is_causal", "enable_gqa")


def _as_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast would make of them, which does not see a call that is taken before."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return dict(zip(names, args, strict=False)) | kwargs


def _problem(flags: dict[str, Any]) -> str | None:
    """Say what is asked of attention that a plan cannot do."""
    odd = [name for name, value in flags.items() if value]
    return f"attention with {', '.join(odd)} is not supported" if odd else None


def _unflatten(tensor: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    dim = dim % tensor.ndim
    return tensor.reshape(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])


# A CUDA graph would replay one call's kernels for ever, with its schedule, plan and layer, and count nothing.
@torch.library.custom_op("adamac::site_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def site_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
    causal: bool,
    grouped: bool,
    number: Tensor,
    video_tokens: int,
    text_tokens: int,
) -> Tensor:
    """Attend as the site of a module says, densely if it is gone; laid out like the query, as the compiler was told."""
    site = _sites.get(int(number))
    flags: dict[str, Any] = dict(zip(_FLAGS, (dropout, causal, grouped), strict=True))
    problem = _problem(flags)
    if site is not None and problem is None:
        output = site.attend(AttentionCall(query, key, value, mask, scale, video_tokens, text_tokens))
    else:
        if site is not None and problem is not None:
            site.bypassed(problem)
        output = _SDPA(query, key, value, attn_mask=mask, scale=scale, **flags)
    promised = torch.empty_like(query)
    return output if output.stride() == promised.stride() else promised.copy_(output)


@site_attention.register_fake
def _(query: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(query)
