"""Encoded clips, and what the transformer is shown of them: whole clips, sketches, thinned ones, spliced cuts."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from adamac.embedded.training import dit, scenes


@dataclasses.dataclass
class LatentSet:
    """Encoded clips on the device: latents ``(n, c, t, h, w)`` in bf16, tokens ``(n, MAX_TOKENS)``, captions."""

    latents: torch.Tensor
    tokens: torch.Tensor
    captions: list[str]

    def batches(self, size: int) -> Iterator[dit.Batch]:
        """Random batches of whole clips without end."""
        places = dit.everywhere(self.latents)
        while True:
            index = torch.randint(len(self.tokens), (size,), device=self.tokens.device)
            yield dit.Batch(self.latents[index].float(), self.tokens[index], places)

    def all(self) -> dit.Batch:
        """Everything as one batch."""
        return dit.Batch(self.latents.float(), self.tokens, dit.everywhere(self.latents))

    def spliced(self, count: int, rng: np.random.Generator, frames: int) -> tuple[torch.Tensor, list[str]]:
        """Clips of ``frames`` frames with a cut, each made of two plain ones, and their captions.

        A cut falls between two latents, so it can be made there: some hundred plain clips give ten thousand.
        """
        latents, captions = [], []
        while len(captions) < count:
            one, other = (int(i) for i in rng.integers(len(self.captions), size=2))
            before, after = self.captions[one], self.captions[other]
            caption = scenes.cut_caption(before, after)
            if not scenes.can_follow(before, after) or scenes.is_held_out(caption):
                continue
            cut = 1 + (scenes.cut_frame(rng, frames) - 1) // scenes.TEMPORAL_STRIDE
            latents.append(torch.cat([self.latents[one, :, :cut], self.latents[other, :, cut:]], dim=1))
            captions.append(caption)
        return torch.stack(latents), captions


def sketch(clips: dit.Batch, frames: int) -> dit.Batch:
    """``frames`` latent frames of whole clips: both ends and others between them."""
    last, device = clips.latents.shape[2] - 1, clips.latents.device
    between = 1 + torch.randperm(last - 1, device=device)[: frames - 2].sort().values
    places = functional.pad(functional.pad(between, (1, 0)), (0, 1), value=last)
    return dit.Batch(clips.latents[:, :, places], clips.tokens, (places, *clips.places[1:]))


def thinned(clips: dit.Batch) -> dit.Batch:
    """Every second row and column of clips: where noise hides all else, what is large is seen as well."""
    frames, rows, columns = clips.places
    rows, columns = rows[random.randrange(2) :: 2], columns[random.randrange(2) :: 2]
    return dit.Batch(clips.latents[:, :, :, rows][..., columns], clips.tokens, (frames, rows, columns))
