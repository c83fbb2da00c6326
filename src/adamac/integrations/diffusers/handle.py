"""``enable``: make a pipeline's self-attention sparse, reversibly, and say what happened."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor

from adamac.attention import AdaCluster, Layout, Method, Plan, Schedule, attend
from adamac.integrations.diffusers.clock import UNNAMED, Clock, Moment
from adamac.integrations.diffusers.families import family_of, transformers_by_name
from adamac.integrations.diffusers.hooks import Listener, TransformerHook
from adamac.integrations.diffusers.ledger import Call, Ledger, Report
from adamac.integrations.diffusers.padding import TextLengths
from adamac.integrations.diffusers.parallel import Ranks, learn_arguments, ranks_of
from adamac.integrations.diffusers.refusals import (
    check_arguments,
    check_back_end,
    check_free,
    check_layers,
    check_steps,
)
from adamac.integrations.diffusers.seam import Attending, AttentionCall, release, site_of
from adamac.ops import dense_attention
from adamac.ops.cluster_attention import Impl, refused, resolve
from adamac.ops.dense_attention.dispatch import wants_gradient

_TWO_THREADS = (
    "the transformer is called from two threads at once, but what adamac.enable keeps is of one video; use a pipeline with a "
    "transformer of its own for each thread, or let them take turns, a video each"
)
_NO_GRADIENT = "gradients are wanted, which sparse attention does not give; use torch.no_grad()"


def enable(
    pipe: Any,
    method: Method | None = None,
    schedule: Schedule | None = None,
    *,
    impl: Impl = "auto",
    num_steps: int | None = None,
    strict: bool = False,
    compile: bool = False,
) -> Handle:
    """Make the self-attention of a video pipeline sparse.

    Scheduler, LoRA, offload, quantisation, caches and processors stay as they are. Only self-attention changes:
    cross-attention and token refiners are never touched.

    Args:
        pipe: A diffusers pipeline of a supported family, or its transformer.
        method: Turns query and key into a plan; ``None`` means ``AdaCluster()``.
        schedule: Which steps and layers stay dense; ``None`` means ``Schedule()``.
        impl: How plans are carried out; see :func:`adamac.attention.attend`.
        num_steps: Steps of a video, needed only if a bare transformer is given and the schedule, as the default does, has
            shares of steps or dense last steps.
        strict: Raise instead of running densely where what arrives cannot be made sparse ("unsupported" in the report). What
            the schedule, the size or the method leaves dense stays so.
        compile: Compile the transformer's blocks in full graphs (``torch.compile``), which fuses what is not attention:
            norms, position embedding, modulation. On short models that is half of a step. Blocks that are compiled
            already stay as they are. The first step of each shape takes long, and output is no longer bit for bit that of
            an uncompiled transformer.

    Returns:
        A handle with ``report()`` and ``disable()``; also a context manager that disables at its end.

    Raises:
        UnsupportedModelError: If the model's family is unknown or the installed diffusers is too old.
        ValueError: If the pipeline is enabled already, its attention back end cannot be reached, the schedule names a layer that
            it has not or needs a number of steps that nobody tells, or an argument is of another kind.
    """
    method = AdaCluster() if method is None else method
    schedule = Schedule() if schedule is None else schedule
    check_arguments(method, schedule)
    return Handle(
        pipe,
        method,
        schedule,
        impl=impl,
        num_steps=num_steps,
        strict=strict,
        compile=compile,
    )


class Handle:
    """A pipeline whose self-attention is sparse. Made by :func:`enable`."""

    def __init__(
        self,
        pipe: Any,
        method: Method,
        schedule: Schedule,
        *,
        impl: Impl,
        num_steps: int | None,
        strict: bool,
        compile: bool,
    ) -> None:
        self.method = method
        self.schedule = schedule
        resolve(impl)  # an unknown name is refused now; what "auto" stands for is in the report
        self.impl: Impl = impl
        self._strict = strict
        self.pipe = pipe
        named = transformers_by_name(pipe)
        self._transformers = list(named.values())
        self._guiders = [name.replace("transformer", "guider") for name in named]
        self._families = [family_of(transformer) for transformer in self._transformers]
        self._ledger = Ledger()
        self._clock = Clock(lambda: getattr(pipe, "scheduler", None), num_steps)
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._held: dict[tuple[Any, ...], int] = {}  # bytes of each plan when it was kept
        self._now = Moment(num_steps=num_steps)
        self._grid: tuple[int, int, int] | None = None
        self._ranks: Ranks | None = None  # those that the sequence of the call in progress is spread over
        self._text_lengths = TextLengths()
        # Text tokens in front of the padding, and the shape of the mask that says so; None if padding stays.
        self._text: tuple[int, tuple[int, ...]] | None = None
        self._current = 0
        self._door = threading.Lock()
        self._caller: int | None = None  # the thread whose call of a transformer is in progress
        self._num_layers = [
            len(family.modules(transformer))
            for family, transformer in zip(self._families, self._transformers, strict=True)
        ]
        check_layers(schedule, max(self._num_layers))
        if num_steps is None and getattr(pipe, "scheduler", None) is None:
            check_steps(schedule)
        self._compiled: list[torch.nn.Module] = []
        self._install()
        if compile:
            self._compile()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        raise TypeError(
            "a transformer that adamac is enabled on cannot be copied; call disable() on its handle first, then enable both"
        )

    def report(self, *, all_ranks: bool = False) -> Report:
        """Say what happened since the handle was made or cleared. Waits for the device.

        Args:
            all_ranks: Under context parallelism, also ask how long the other ranks took: all of them have to make this call.
        """
        report = self._ledger.report()
        spread = self._ranks
        if spread is None:
            return report
        seconds = spread.gather(sum(report.seconds.values())) if all_ranks else ()
        return replace(report, ranks=spread.number, rank_seconds=seconds)

    def clear(self) -> None:
        """Forget what was counted so far; plans of a video in progress stay."""
        self._ledger.clear()

    def new_video(self) -> None:
        """Forget all plans and begin to count steps anew. A pipeline's videos are told apart without it."""
        self._forget_plans()
        self._clock.restart()
        self._caller = None

    def disable(self) -> None:
        """Take everything off again; the pipeline's output is bit-identical to before. May be called twice."""
        for transformer, family in zip(self._transformers, self._families, strict=True):
            for _, module in family.modules(transformer):
                release(module)
            TransformerHook.take_off(transformer)
            _forget_children(transformer)
        for block in self._compiled:
            block._compiled_call_impl = None
        self._compiled.clear()
        self._forget_plans()

    def _compile(self) -> None:
        for transformer, family in zip(self._transformers, self._families, strict=True):
            learn_arguments(transformer)
            for block in family.blocks(transformer):
                if block._compiled_call_impl is None:
                    block.compile(fullgraph=True)
                    self._compiled.append(block)

    def _install(self) -> None:
        parts = list(zip(self._transformers, self._families, strict=True))
        for transformer, family in parts:  # all are checked before the first is changed
            check_free(transformer)
            check_back_end(family, transformer)
            ranks_of(transformer, family)
        for index, (transformer, family) in enumerate(parts):
            listener = Listener(self._announce(index), self._call_ended, self.new_video)
            TransformerHook.put_on(transformer, listener)
            for layer, (_, module) in enumerate(family.modules(transformer)):
                site_of(module).attending = Attending(self._attention, self._bypassed, layer)
            _forget_children(transformer)

    def _announce(self, index: int) -> Any:
        """Make the callback that one transformer calls before it runs."""
        transformer, family = self._transformers[index], self._families[index]

        def on_call(branch: str, arguments: dict[str, Any]) -> None:
            with self._door:
                if self._caller not in (None, threading.get_ident()):
                    raise RuntimeError(_TWO_THREADS)
                self._caller = threading.get_ident()
            timestep = arguments.get("timestep")
            if self._clock.starts_video(timestep):
                self._forget_plans()
                self._ledger.begin_video()
            self._now = self._clock.tick(self._named(branch, index), timestep)
            self._grid = family.grid(transformer, arguments["hidden_states"])
            self._ranks = ranks_of(transformer, family)
            if self._ranks is not None and self._grid is not None:
                self._ranks.check(math.prod(self._grid))
            mask = None if family.text_mask is None else arguments.get(family.text_mask)
            length = self._text_lengths.of(mask)
            self._text = None if mask is None or length is None else (length, tuple(mask.shape))
            self._current = index

        return on_call

    def _named(self, branch: str, index: int) -> str:
        """Name the branch of a modular pipeline, whose guider prepares the transformer for each branch of a step in turn."""
        prepared = getattr(getattr(self.pipe, self._guiders[index], None), "_count_prepared", 0)
        return f"guidance {prepared}" if branch == UNNAMED and prepared else branch

    def _attention(self, layer: int, call: AttentionCall) -> Tensor:
        """Attend in place of ``scaled_dot_product_attention``."""
        layout, problem = self._layout(call)
        problem = problem or self._now.problem
        if problem is not None:
            return self._unsupported(layer, problem, call)
        assert layout is not None
        query, key, value = call.query, call.key, call.value
        kept = self._kept_text(layout, query)
        if kept is None:
            return self._attend(layer, layout, query, key, value, call.scale)
        layout = replace(layout, tokens=layout.video_tokens + kept, valid=None)
        parts = [tensor[:, :, : layout.tokens] for tensor in (query, key, value)]
        attended = self._attend(layer, layout, parts[0], parts[1], parts[2], call.scale)
        if layout.tokens == query.shape[2]:
            return attended
        # The model discards the rows of padding; zeros are as good as anything and never NaN.
        output = torch.empty_like(query)
        output[:, :, : layout.tokens] = attended
        output[:, :, layout.tokens :] = 0
        return output

    def _kept_text(self, layout: Layout, query: Tensor) -> int | None:
        """How many text tokens remain when the padding at the end is cut off; ``None`` if it has to be masked."""
        if layout.valid is None or layout.video_start != 0 or self._text is None:
            return None
        length, mask_shape = self._text
        # The transformer's mask has to be the one of this very sequence.
        return length if mask_shape == (query.shape[0], layout.text_tokens) else None

    def _attend(
        self, layer: int, layout: Layout, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Tensor:
        """Attend by the schedule and the method."""
        video_tokens = layout.video_tokens
        num_layers = self._num_layers[self._current]
        reason = self.schedule.dense_reason(self._now.step, self._now.num_steps, layer, num_layers)
        batch, heads, _, head_dim = query.shape
        if self._ranks is not None:  # the ranks have to agree, and one may have fewer heads than another
            heads = self._ranks.most_heads
        reason = reason or self.schedule.too_small(video_tokens, batch * heads, head_dim, query.device)
        if reason is None and wants_gradient(query, key, value):
            reason = f"unsupported: {_NO_GRADIENT}"
            if self._strict:
                raise ValueError(f"layer {layer}: {_NO_GRADIENT}")
        plan = self._plan(layer, layout, query, key) if reason is None else Plan.dense(layout, reason)
        if plan.is_dense:
            self._record(layer, plan.dense_reason, impl=_dense_impl(layout, query, key, value))
        else:
            self._record(layer, None, plan.density(), plan.cost(), impl=self._sparse_impl(query))
        stage = "dense" if plan.is_dense else "attend"
        return self._ledger.timed(
            stage, query.device, lambda: attend(query, key, value, plan, scale=scale, impl=self.impl)
        )

    def _plan(self, layer: int, layout: Layout, query: Tensor, key: Tensor) -> Plan:
        # The transformer counts too: Wan 2.2's two transformers have layers of the same index.
        place = (self._current, layer, self._now.branch, tuple(query.shape))
        former = self._plans.get(place)
        plan = self._ledger.timed(
            "plan", query.device, lambda: self.method(query, key, layout=layout, previous=former)
        )
        if not isinstance(plan, Plan):
            raise ValueError(
                f"the method must return a Plan, as AdaCluster() does, got {type(plan).__name__} from {self.method!r}"
            )
        kept = plan.carried()
        if kept is not None:
            self._plans[place] = kept
            self._held[place] = kept.state_bytes()
        self._ledger.held(sum(self._held.values()))
        return plan

    def _sparse_impl(self, query: Tensor) -> str:
        """Name what will carry out a sparse call, and why it is not the fastest there is; the first on a GPU checks."""
        name = resolve(self.impl, query)
        reasons = refused(query) if self.impl == "auto" and query.device.type == "cuda" else {}
        return "; ".join([name, *(f"not {other}: {reason}" for other, reason in reasons.items())])

    def _forget_plans(self) -> None:
        self._plans.clear()
        self._held.clear()

    def _call_ended(self) -> None:
        if self._caller == threading.get_ident():  # else it was refused, while another is in progress
            self._caller = None
            # What one call of the transformer was given says nothing of an attention module that is called by itself.
            self._text = None

    def _layout(self, call: AttentionCall) -> tuple[Layout | None, str | None]:
        """Find out where video, text and padding are, or why that cannot be told."""
        query, mask = call.query, call.mask
        tokens, video_tokens, text_tokens = query.shape[2], call.video_tokens, call.text_tokens
        ranks = self._ranks
        if ranks is not None:  # the module was given a part of the sequence, and here it is whole
            video_tokens = tokens - text_tokens
            if query.shape[1] == ranks.heads:
                return None, "the attention processor does not exchange heads between ranks"
        if tokens != video_tokens + text_tokens or call.key.shape != query.shape:
            return None, "sequence is not video and text of this module (grouped heads?)"
        valid = None
        if mask is not None:
            if (
                mask.dtype != torch.bool
                or mask.ndim != 4
                or mask.shape[1:3] != (1, 1)
                or mask.shape[3] != tokens
            ):
                return (
                    None,
                    f"attention mask of shape {tuple(mask.shape)} and {mask.dtype} is not one of padded keys",
                )
            valid = mask[:, 0, 0].expand(query.shape[0], -1)
        start = text_tokens if self._families[self._current].text == "before" else 0
        grid = self._grid
        if grid is not None and grid[0] * grid[1] * grid[2] != video_tokens:
            grid = None  # a model that adds tokens of its own, an image's for instance
        group = None if ranks is None else ranks.group
        return Layout(tokens, start, start + video_tokens, valid, grid, group), None

    def _unsupported(self, layer: int, problem: str, call: AttentionCall) -> Tensor:
        """Attend densely, as the model asked, and say why."""
        if self._strict:
            raise ValueError(f"layer {layer}: {problem}")
        self._record(layer, f"unsupported: {problem}", impl="native")
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return self._ledger.timed(
            "dense",
            call.query.device,
            lambda: sdpa(call.query, call.key, call.value, attn_mask=call.mask, scale=call.scale),
        )

    def _bypassed(self, layer: int, problem: str) -> None:
        """Take down a call that went past us."""
        if self._strict:
            raise ValueError(f"layer {layer}: {problem}")
        self._record(layer, f"unsupported: {problem}")

    def _record(self, layer: int, reason: str | None, *shares: Tensor, impl: str | None = None) -> None:
        now = self._now
        self._ledger.add(Call(now.step, layer, now.branch, reason, *shares, impl=impl))


def _dense_impl(layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> str:
    """Name what will carry out a dense call; the first one on a GPU measures."""
    if layout.valid is not None:
        return "native, padding masked" if query.device.type == "cuda" else "native, padding dropped"
    return dense_attention.resolve(query, key, value)


def _forget_children(transformer: torch.nn.Module) -> None:
    """Tell diffusers (0.41 and newer) that hooks came or went below this module."""
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    forget = getattr(registry, "invalidate_child_registries_cache", None)
    if forget is not None:
        forget()
