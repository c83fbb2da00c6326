"""What the embedded model is trained and judged on: painted clips and film, their captions, and batches of them."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from transformers import PreTrainedTokenizerFast

from adamac.embedded.training import dit, film, scenes, tokens
from adamac.embedded.training import vae as autoencoder
from adamac.embedded.training.latents import LatentSet, sketch, thinned
from adamac.embedded.training.rendering import Order, Renderer, mixed_orders

FILM_SHARE = 0.03
"""Share of the film among the transformer's training clips. Its loss is ten times that of painted clips and
its shots do not carry over, so at 12 % it was most of the gradient."""
SKETCH_EVERY = 2
"""Every so many steps on whole clips is one of sketches."""
HELD_OUT_SEED = 10**9
"""Seeds of held-out clips begin here; training seeds stay below."""


Pieces = Iterator[tuple[torch.Tensor, list[str]]]
"""Clips ``(n, frames, height, width, 3)`` uint8 on the device and their captions, piece after piece."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the clips, of the sets and of the networks."""

    height: int = 112
    width: int = 192
    full: int = 49
    sketch: int = 4
    vae_clips: int = 2400
    vae_batch: int = 3
    clips: int = 40_000
    plain_clips: int = 384
    captions: int = 5000
    held_out: int = 8
    sketch_batch: int = 80
    layout_batch: int = 96
    full_batch: int = 24
    encode_batch: int = 16
    vae: dict = dataclasses.field(default_factory=dict)
    denoiser: dict = dataclasses.field(default_factory=dict)


TINY = Size(
    height=32,
    width=48,
    full=13,
    sketch=3,
    vae_clips=8,
    vae_batch=2,
    clips=12,
    plain_clips=24,
    captions=40,
    held_out=1,
    sketch_batch=2,
    layout_batch=2,
    full_batch=2,
    encode_batch=4,
    vae={"encoder_width": 8, "decoder_width": 8},
    denoiser={"layers": 1, "heads": 1, "feed_forward": 64, "text_width": 32, "text_layers": 1},
)
"""Sizes with which every line runs in seconds on a processor."""


@dataclasses.dataclass
class Material:
    """Where clips come from.

    Attributes:
        size: Of clips and sets.
        device: Where they go.
        renderer: Paints.
        film: The film's shots.
        tokenizer: Of captions.
        rng: Chooses shots of the film and where cuts fall.
        first_seed: Of the painted clips that are trained on.
    """

    size: Size
    device: torch.device
    renderer: Renderer
    film: film.Film
    tokenizer: PreTrainedTokenizerFast
    rng: np.random.Generator
    first_seed: int

    def rendered(
        self,
        orders: list[Order],
        seconds: float = float("inf"),
    ) -> Pieces:
        """Painted clips on the device, in pieces small enough to encode; ends after ``seconds``."""
        step, began = self.size.encode_batch, time.monotonic()
        for frames, captions in self.renderer.clips(orders):
            if time.monotonic() - began > seconds:
                return
            for i in range(0, len(frames), step):
                piece = torch.from_numpy(frames[i : i + step]).to(self.device)
                yield piece, captions[i : i + step]

    def filmed(
        self,
        count: int,
        frames: int,
        held_out: bool = False,
    ) -> Pieces:
        """Film clips on the device, in the same form."""
        step = self.size.encode_batch
        for start in range(0, count, step):
            clips = self.film.clips(self.rng, min(step, count - start), frames, held_out=held_out)
            pictures = torch.from_numpy(np.stack([picture for picture, _ in clips]))
            yield pictures.to(self.device), [text for _, text in clips]

    def tokenise(self, captions: list[str]) -> torch.Tensor:
        """Token ids ``(n, MAX_TOKENS)`` on the device."""
        return self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=tokens.MAX_TOKENS, return_tensors="pt"
        ).input_ids.to(self.device)

    def encoded(self, vae: AutoencoderKLWan, source: Pieces) -> LatentSet:
        """Encode clips as they come."""
        latents, ids, texts = [], [], []
        for frames, captions in source:
            raw = autoencoder.encode(vae, frames)
            latents.append(autoencoder.normalise(vae, raw).bfloat16())
            ids.append(self.tokenise(captions))
            texts += captions
        return LatentSet(torch.cat(latents), torch.cat(ids), texts)

    def training_set(self, vae: AutoencoderKLWan, seconds: float) -> LatentSet:
        """As many procedural clips as are painted in time, and their share of film, encoded."""
        size = self.size
        orders = mixed_orders(size.clips, self.first_seed, size.full, size.height, size.width)
        painted = self.encoded(vae, self.rendered(orders, seconds))
        made = len(painted.tokens)
        of_film = self.filmed(max(int(made * FILM_SHARE / (1 - FILM_SHARE)), 1), size.full)
        of_film = self.encoded(vae, of_film)
        return LatentSet(
            torch.cat([painted.latents, of_film.latents]),
            torch.cat([painted.tokens, of_film.tokens]),
            painted.captions + of_film.captions,
        )

    def held_out_orders(self, category: str, frames: int, times: int = 1) -> list[Order]:
        """Orders of clips whose captions training never saw; ``times`` as many as are usual."""
        return [
            Order(category, HELD_OUT_SEED + i, frames, self.size.height, self.size.width, True)
            for i in range(times * self.size.held_out)
        ]

    def held_out(self, frames: int) -> Iterator[tuple[str, Iterator]]:
        """Each category's held-out clips, the film's last."""
        for category in scenes.CATEGORIES:
            yield category, self.rendered(self.held_out_orders(category, frames))
        yield "film", self.filmed(self.size.held_out, frames, held_out=True)

    def empty(self) -> torch.Tensor:
        """Token ids of the empty caption."""
        return self.tokenise([""])[0]

    def sketches(self, data: LatentSet) -> Iterator[dit.Batch]:
        """A few latent frames of each clip."""
        for clips in data.batches(self.size.sketch_batch):
            yield sketch(clips, self.size.sketch)

    def layouts(self, vae: AutoencoderKLWan, data: LatentSet) -> Iterator[dit.Batch]:
        """Thinned sketches, those of cuts spliced from plain clips in every second batch."""
        size = self.size
        first = self.first_seed + size.clips
        orders = [
            Order("plain", first + i, size.full, size.height, size.width) for i in range(size.plain_clips)
        ]
        plain = self.encoded(vae, self.rendered(orders))
        for clips in data.batches(size.layout_batch):
            yield thinned(sketch(clips, size.sketch))
            latents, captions = plain.spliced(size.layout_batch, self.rng, size.full)
            cuts = dit.Batch(latents.float(), self.tokenise(captions), clips.places)
            yield thinned(sketch(cuts, size.sketch))

    def whole_and_sketched(self, data: LatentSet) -> Iterator[dit.Batch]:
        """Whole clips, and every :data:`SKETCH_EVERY` batches one of sketches."""
        clips, sketches = data.batches(self.size.full_batch), self.sketches(data)
        for number in itertools.count(1):
            yield next(clips if number % SKETCH_EVERY else sketches)
