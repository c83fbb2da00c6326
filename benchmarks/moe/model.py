"""Whole models with random weights: steps of training, prefill and decoding.

A *training step* is one optimiser step of AdamW in bfloat16 on 16,384 tokens of each rank, in four micro-batches, gradients added over
the ranks once: the paper's half a million tokens on 32 GPUs. Beside the dispatchers launched piece by piece stands one whose
micro-batches are replayed from a CUDA graph, as ``adamac moe train --capture`` does: ``local`` on one rank, ``static_gather`` on several.
It is timed captured or not at all; what it holds between steps is ``held_gib``, its gradients not counted. *Prefill* reads a prompt; a *decoding step* adds a token to
every text of a batch, keys and values kept. Steps are timed in two ways: ``growing`` reads what there is, launched piece by
piece; ``static`` is what ``generate`` does where all experts are on one rank, the same step for each token, captured in a CUDA
graph where ``captured`` says so. Rows of former runs, which do not say, are growing ones. Every rank has texts of its own. Routing is what random weights make of random
tokens, close to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from adamac.moe import PAPER_MODELS, preset
from adamac.moe.dispatch import choose
from adamac.moe.lm.cache import Cache
from adamac.moe.lm.decoding import Decoder
from adamac.moe.lm.micro_batch import MicroBatches
from adamac.moe.lm.model import GPT, GPTConfig
from adamac.moe.lm.sending import UNREAD
from adamac.moe.parallel import average_gradients, expert_mesh
from adamac.moe.presets import PaperModel

from .arms import dispatchers, name_of
from .cases import BASELINE, COPY_PER_EXPERT, PRESETS, ModelCase
from .crew import Crew, refused
from .rivals import AbsentError
from .turns import figures, turns

Row = dict[str, Any]

_TINY = PaperModel(64, 2, 4, context=64, vocabulary=256)
_TINY_EXPERTS, _EXPERTS = 8, 64
# Texts of a micro-batch and micro-batches of a step.
_TEXTS, _PIECES = 2, 4
_DECODE_STEPS = 64
# Texts that are decoded at once on each rank.
_BATCHES = (1, 16)
# What an arm's name ends with where micro-batches are replayed.
_CAPTURED = ", captured"


@dataclass(frozen=True)
class _Arm:
    preset: str
    dispatcher: str
    model: GPT
    crew: Crew
    captured: bool = False

    @property
    def name(self) -> str:
        return name_of(self.preset, self.dispatcher) + _CAPTURED * self.captured

    def take(self) -> GPT:
        """The model, sending its rows this arm's way."""
        for moe in self.model.moes:
            moe.dispatcher = choose(self.dispatcher, moe.config, self.crew.group).dispatcher
        return self.model


def run(case: ModelCase, crew: Crew) -> None:
    """Measure a case and hand out a row for each arm and kind of work."""
    common: Row = {"benchmark": "moe_model", "model": case.model, "top_k": case.top_k, "random_weights": True}
    common["dtype"] = str(crew.dtype).removeprefix("torch.")
    arms, problem = crew.attempt(lambda: _arms(case, crew))
    if problem is not None:
        crew.row(common | {"work": case.work, "arm": "all", "status": "error", "reason": problem})
        return
    (_train if case.work == "train" else _serve)(case, crew, common, arms)


def _paper(case: ModelCase) -> PaperModel:
    return _TINY if case.model == "tiny" else PAPER_MODELS[case.model]


def _arms(case: ModelCase, crew: Crew) -> list[_Arm]:
    paper = _paper(case)
    names = [name for name in dispatchers(crew.ranks) if name == "local" or name in case.dispatchers]
    arms = []
    for preset_name in PRESETS:
        experts = _TINY_EXPERTS if case.model == "tiny" else _EXPERTS
        config = GPTConfig(
            vocab=paper.vocabulary,
            layers=paper.layers,
            heads=paper.heads,
            hidden=paper.hidden,
            context=paper.context,
            moe=preset(preset_name, paper.hidden, experts, case.top_k),
        )
        torch.manual_seed(0)
        with crew.device, _default_dtype(crew.dtype):
            model = GPT(config, group=crew.group)
        arms += [_Arm(preset_name, name, model, crew) for name in names]
        if case.work == "train":
            unread = "local" if crew.ranks == 1 else UNREAD
            arms.append(_Arm(preset_name, unread, model, crew, captured=True))
    return arms


def _train(case: ModelCase, crew: Crew, common: Row, arms: list[_Arm]) -> None:
    paper = _paper(case)
    tokens = _PIECES * _TEXTS * paper.context
    generator = torch.Generator(crew.device).manual_seed(crew.rank)
    shape = (_PIECES, _TEXTS, paper.context + 1)
    ids = torch.randint(paper.vocabulary, shape, generator=generator, device=crew.device)
    mesh = expert_mesh(crew.ranks, crew.device.type) if crew.ranks > 1 else None
    fused = crew.device.type == "cuda"
    optimisers = {arm.preset: torch.optim.AdamW(arm.model.parameters(), lr=1e-5, fused=fused) for arm in arms}
    batches = [(piece[:, :-1].contiguous(), piece[:, 1:].contiguous()) for piece in ids]
    steps = {arm.name: _Steps(arm, optimisers[arm.preset], batches, mesh) for arm in arms}
    common |= {"work": "train", "context": paper.context, "tokens": tokens, "layers": paper.layers}
    good, rows = _warm(steps, crew)
    for name in rows:
        rows[name] |= steps[name].capture()
    times = turns(good, crew, case.budget_s, inner=1, untimed=0)
    _hand_out(crew, common, arms, rows, times, tokens * crew.ranks)


class _Steps:
    """Optimiser steps of one arm."""

    def __init__(
        self,
        arm: _Arm,
        optimiser: torch.optim.Optimizer,
        batches: list[tuple[Tensor, Tensor]],
        mesh: DeviceMesh | None,
    ) -> None:
        self.arm, self.optimiser, self.batches, self.mesh = arm, optimiser, batches, mesh
        model = arm.take()  # whether it can be captured depends on how it sends
        self.micro_batches = MicroBatches(
            model,
            model.parameters(),
            pieces=len(batches),
            capture=arm.captured,
            agree=partial(_agreed, arm.crew),
        )

    def __call__(self) -> float:
        """One step; returns its loss, which waits for the device."""
        model, micro_batches = self.arm.take(), self.micro_batches
        if problem := self._problem():
            raise AbsentError(problem)
        losses = micro_batches.add_up(self.batches).losses
        if self.arm.captured and not micro_batches.captured:
            raise RuntimeError(micro_batches.reason)
        if self.mesh is not None:
            average_gradients(model, self.mesh)
        self.optimiser.step()
        return losses[0].item()

    def capture(self) -> Row:
        """Whether steps were captured; what they allocate on top of what is held says nothing then."""
        if not self.micro_batches.captured:
            return {"captured": False}
        return {"captured": True, "peak_gib": None, "held_gib": self.micro_batches.held_bytes / 2**30}

    def _problem(self) -> str:
        """What is in the way of capturing on any rank."""
        new = self.arm.captured and not self.micro_batches.captured
        return _agreed(self.arm.crew, self.micro_batches.reason) if new else ""


def _agreed(crew: Crew, reason: str) -> str:
    """A reason that any rank has, on all of them."""
    return next((word for word in crew.agree(reason) if word), "")


def _serve(case: ModelCase, crew: Crew, common: Row, arms: list[_Arm]) -> None:
    paper = _paper(case)
    for arm in arms:
        arm.model.eval().requires_grad_(False)
    prompt = paper.context // 2
    steps = min(_DECODE_STEPS, prompt // 2)
    common |= {"prompt": prompt, "layers": paper.layers}
    for batch in _BATCHES:
        generator = torch.Generator(crew.device).manual_seed(crew.rank)
        ids = torch.randint(paper.vocabulary, (batch, prompt), generator=generator, device=crew.device)
        texts = {arm.name: _Texts(arm, ids, prompt + steps + 2) for arm in arms}
        # Experts on several ranks cannot be captured: there a static step has nothing to show.
        works = ("prefill", "growing", "static") if crew.ranks == 1 else ("prefill", "growing")
        budget_s = case.budget_s / len(_BATCHES) / len(works)
        for work in works:
            static = work == "static"
            begins = {name: text.begin if static else text.prefill for name, text in texts.items()}
            adds = {name: text.step if static else text.grow for name, text in texts.items()}
            # Warm-up reads the prompt and adds a token, whichever of the two is timed.
            warm = {name: partial(_one_token, begins[name], adds[name]) for name in texts}
            good, rows = _warm(warm, crew)
            begins, adds = ({name: each[name] for name in good} for each in (begins, adds))
            entries = common | {"work": "prefill" if work == "prefill" else "decode", "batch": batch}
            if work == "prefill":
                times, tokens = turns(begins, crew, budget_s), prompt
            else:
                times, tokens = turns(adds, crew, budget_s, inner=steps, untimed=2, prepare=begins), 1
                entries |= {"step": work, "captured": False}
            for name in good if static else ():
                rows[name] |= texts[name].capture()
            _hand_out(crew, entries, arms, rows, times, tokens * batch * crew.ranks)


def _one_token(begin: Callable[[], Any], add: Callable[[], float]) -> float:
    begin()
    return add()


class _Texts:
    """A batch of texts that one arm continues, always with the likeliest token."""

    def __init__(self, arm: _Arm, prompt: Tensor, room: int) -> None:
        self.arm, self.prompt, self.room = arm, prompt, room
        self.cache: Cache | None = None
        self.decoder: Decoder | None = None
        self.last, self.best = prompt[:, -1:], torch.zeros(len(prompt), device=prompt.device)

    @torch.no_grad()
    def prefill(self) -> float:
        weight = self.arm.model.embedding.weight
        self.cache = self.decoder = None  # their memory is free before the next is allocated
        padding = [0] * len(self.prompt)
        self.cache = Cache(self.arm.model.config, padding, self.room, weight.device, weight.dtype)
        return self._read(self.prompt)

    @torch.no_grad()
    def grow(self) -> float:
        """Add a token by a step that reads as much as there is."""
        return self._read(self.last)

    def begin(self) -> None:
        """Read the prompt and hand it to a decoder, whose first step captures."""
        self.prefill()
        assert self.cache is not None, "just read"
        best = self.best  # not self: a decoder that hangs in a cycle is freed late

        def likeliest(logits: Tensor, read: Tensor) -> Tensor:
            found, ids = logits.max(-1)
            best.copy_(found)
            return ids

        model, left = self.arm.take(), self.room - self.cache.length
        self.decoder = Decoder(model, self.cache, self.last[:, 0], likeliest, tokens=left)

    def step(self) -> float:
        """Add a token by the decoder's step."""
        assert self.decoder is not None, "a decoder begins before it adds a token"
        self.decoder.step()
        return float(self.best.sum())  # waits like the other way

    def capture(self) -> Row:
        """Whether the decoder's steps were captured, and why not."""
        assert self.decoder is not None, "a decoder begins before it captures"
        reason = {} if self.decoder.captured else {"not_captured": self.decoder.reason}
        return {"captured": self.decoder.captured, **reason}

    def _read(self, ids: Tensor) -> float:
        assert self.cache is not None, "a prompt is read before a token is added"
        model = self.arm.take()
        features = model.features(ids, self.cache.advance(ids.shape[1]))
        best, self.last = model.logits(features[:, -1]).max(-1, keepdim=True)
        return float(best.sum())  # waits, as somebody who reads the text does; NaN shows in it


def _warm(
    steps: dict[str, Callable[[], float]], crew: Crew
) -> tuple[dict[str, Callable[[], float]], dict[str, Row]]:
    """Run each arm twice; leave those that work and give numbers."""
    good, rows = {}, {}
    for name, step in steps.items():
        problem = crew.refused.get(name)
        value = peak = None
        if problem is None:
            (value, peak), problem = _tried(step, crew)
        if problem is None:
            good[name] = step
            rows[name] = {"status": "ok", "peak_gib": peak, "value": value}
        else:
            rows[name] = refused(problem)
    return good, rows


def _tried(step: Callable[[], float], crew: Crew) -> tuple[tuple[float | None, float | None], str | None]:
    """Run a step twice; give its value, what the second allocated on top of what is held between steps, and what is wrong."""
    cuda = crew.device.type == "cuda"
    _, problem = crew.attempt(step)
    if problem is not None:
        return (None, None), problem
    if cuda:
        torch.cuda.reset_peak_memory_stats(crew.device)
    before = torch.cuda.memory_allocated(crew.device) if cuda else 0
    value, problem = crew.attempt(step)
    if problem is None and not all(crew.agree(math.isfinite(value))):
        problem = "wrong: not finite"
    peak = (torch.cuda.max_memory_allocated(crew.device) - before) / 2**30 if cuda else None
    return (value, peak), problem


def _hand_out(
    crew: Crew,
    common: Row,
    arms: list[_Arm],
    rows: dict[str, Row],
    times: dict[str, list[float]],
    tokens: float,
) -> None:
    for arm in arms:
        row = rows[arm.name]
        row |= {"preset": arm.preset, "dispatcher": arm.dispatcher}
        value = row.pop("value", None)
        if common["work"] == "train":
            row["loss"] = value
        if arm.name in times:
            found = figures(times[arm.name])
            row |= found | {"tokens_per_s": 1e3 * tokens / found["p50_ms"]}
    timed = [row for row in rows.values() if "p50_ms" in row]
    baseline = {
        row["dispatcher"] + _CAPTURED * (common["work"] == "train" and row["captured"]): row["p50_ms"]
        for row in timed
        if row["preset"] == BASELINE
    }
    for row in timed:
        copies = baseline.get(COPY_PER_EXPERT, baseline.get("local"))
        if baseline:
            row["over_best_baseline"] = min(baseline.values()) / row["p50_ms"]
        row["over_copy_per_expert"] = None if copies is None else copies / row["p50_ms"]
    for arm in arms:
        crew.row(common | {"arm": arm.name} | rows[arm.name])


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)
