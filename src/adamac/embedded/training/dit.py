"""The denoiser: a small Wan transformer and its text encoder, trained together by flow matching.

Most of the training goes over *sketches*: a few latent frames of a clip, each at its own place in time.
Attention over four frames of thirteen costs a tenth, so six times as many clips are seen in
the same time, and what is hard to learn (which word asks for what, and when) needs many clips more than
it needs every frame. The first and the last frame belong to every sketch: rotary embeddings tell
distances only, and against both ends a frame knows where it stands.

A noisy latent is ``(1 - sigma) * latent + sigma * noise`` and the network predicts the velocity
``noise - latent``. Noise levels are drawn logit-normally and shifted upwards as the sampler does:
thousands of tokens say the same thing, so the picture is decided at noise levels that look hopeless.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Iterator

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from adamac.embedded.training.muon import Muon
from adamac.ops.replay import Replayed

logger = logging.getLogger(__name__)

FLOW_SHIFT = 3.0
FULL_FRAMES = 13
"""Latent frames of a whole clip, for which :data:`FLOW_SHIFT` is meant."""
FIRST_LEVELS = (0.93, 1.0)
"""Noise levels at which words alone say what stands where: below them even noise that looks hopeless tells the
order of two scenes, so nothing else teaches the network to take it from the caption."""
FIRST_SHARE = 0.15
"""Share of the draws that are made to lie there; of the others one in fifteen does, fewer of sketches."""
SHIFT_EXPONENT = 0.27
"""How the shift grows with the number of frames: noise leaves less of one frame than of thirteen alike."""
CAPTION_DROPOUT = 0.1
TIMESTEPS = 1000
EMA_DECAY = 0.9985


Places = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Indices of frames, rows and columns in the whole clip."""


def everywhere(latents: torch.Tensor) -> Places:
    """The places of whole clips ``(batch, channels, frames, height, width)``."""
    frames, rows, columns = (torch.arange(n, device=latents.device) for n in latents.shape[2:])
    return frames, rows, columns


@dataclasses.dataclass(frozen=True)
class Batch:
    """Clips with their captions.

    Attributes:
        latents: ``(batch, channels, frames, height, width)``, normalised.
        tokens: ``(batch, MAX_TOKENS)`` token ids, padded with 0.
        places: Which frames, rows and columns of the clip these are, one ascending index tensor for each axis.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    places: Places


@contextlib.contextmanager
def standing_at(rope: WanRotaryPosEmbed, places: Places) -> Generator[None]:
    """Give a transformer's tokens these places instead of 0, 1, 2, ... along each axis.

    The stock embedding reads the first rows of two tables, some columns for each axis; here these rows are
    exchanged for a while.
    """
    widths = (rope.t_dim, rope.h_dim, rope.w_dim)
    stock = dict(rope.named_buffers())
    for name, table in stock.items():
        parts = [part.clone() for part in table.split(widths, dim=1)]
        for part, rows in zip(parts, places, strict=True):
            part[: len(rows)] = part[rows]
        setattr(rope, name, torch.cat(parts, dim=1))
    try:
        yield
    finally:
        for name, table in stock.items():
            setattr(rope, name, table)


class Denoiser(torch.nn.Module):
    """Text encoder and transformer in one module, called as the stock pipeline calls them."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def forward(
        self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor, places: Places
    ) -> torch.Tensor:
        """Predicted velocity, shaped like ``noisy``, at noise levels ``sigma`` ``(batch,)``."""
        mask = tokens.ne(0)
        text = self.text_encoder(tokens, mask.long()).last_hidden_state
        text = text * mask[..., None]  # the pipeline replaces what lies past the prompt by zeros
        with standing_at(self.transformer.rope, places):
            return self.transformer(noisy, sigma * TIMESTEPS, text, return_dict=False)[0]


def build(
    channels: int,
    vocabulary: int,
    layers: int = 6,
    heads: int = 4,
    head_dim: int = 64,
    feed_forward: int = 560,
    text_width: int = 128,
    text_layers: int = 3,
) -> Denoiser:
    """An untrained denoiser whose blocks begin as the identity (adaLN-zero).

    Args:
        channels: Channels of the latents.
        vocabulary: Number of tokens.
        layers: Transformer blocks.
        heads: Attention heads.
        head_dim: Width of a head.
        feed_forward: Hidden width of the feed-forward layers.
        text_width: Width of the text encoder.
        text_layers: Its layers.
    """
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=text_width,
            d_kv=32,
            d_ff=2 * text_width,
            num_layers=text_layers,
            num_heads=max(text_width // 32, 1),
            dropout_rate=0.0,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=text_width,
        freq_dim=128,
        ffn_dim=feed_forward,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=128,
    )
    _initialise(transformer)
    return Denoiser(transformer, text_encoder)


@torch.no_grad()
def _initialise(transformer: WanTransformer3DModel) -> None:
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    silent = [
        transformer.proj_out,
        transformer.condition_embedder.time_proj,
        *(block.attn2.to_out[0] for block in transformer.blocks),
    ]
    for layer in silent:
        torch.nn.init.zeros_(layer.weight)
    for table in (transformer.scale_shift_table, *(block.scale_shift_table for block in transformer.blocks)):
        torch.nn.init.zeros_(table)


def shifted(uniform: torch.Tensor, shift: float = FLOW_SHIFT) -> torch.Tensor:
    """Move noise levels towards 1 as the schedulers' ``flow_shift`` does."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def draw_sigma(latents: torch.Tensor, first_share: float = FIRST_SHARE) -> torch.Tensor:
    """Noise levels ``(batch,)`` in 0..1: logit-normal and shifted, a share of them among the first levels."""
    shift = FLOW_SHIFT * (latents.shape[2] / FULL_FRAMES) ** SHIFT_EXPONENT
    usual = shifted(torch.sigmoid(torch.randn(len(latents), device=latents.device)), shift)
    lowest, highest = FIRST_LEVELS
    first = lowest + (highest - lowest) * torch.rand_like(usual)
    return torch.where(torch.rand_like(usual) < first_share, first, usual)


def noised(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The noisy latents at ``sigma`` ``(batch,)``."""
    level = sigma.view(-1, 1, 1, 1, 1)
    return (1 - level) * latents + level * noise


def drop_captions(tokens: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """Replace a share :data:`CAPTION_DROPOUT` of the captions by the empty one."""
    dropped = torch.rand(len(tokens), 1, device=tokens.device) < CAPTION_DROPOUT
    return torch.where(dropped, empty, tokens)


Target = Callable[[Batch, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Velocity to be learned, from batch, noisy latents, noise and noise levels."""


def data_velocity(
    batch: Batch, noisy: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The plain flow-matching target."""
    return noise - batch.latents


def guided_velocity(teacher: Denoiser, empty: torch.Tensor, scale: float) -> Target:
    """The target of guidance distillation: what ``teacher`` says under guidance.

    A student that learns it gives in one forward what guidance at ``scale`` gives in two
    (Meng et al., "On distillation of guided diffusion models", arXiv 2210.03142).
    """
    if scale <= 1:
        raise ValueError(f"guidance scale: expected more than 1 to distil, got {scale}")

    @torch.no_grad()
    def target(batch: Batch, noisy: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        asked = teacher(noisy, sigma, batch.tokens, batch.places).float()
        unasked = teacher(noisy, sigma, empty.expand_as(batch.tokens), batch.places).float()
        return unasked + scale * (asked - unasked)

    return target


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long to train, how fast and at which noise; the learning rate falls linearly over the last part."""

    seconds: float
    rate: float = 2e-3
    cooldown: float = 0.5
    final: float = 0.02
    warmup_steps: int = 100
    first_share: float = FIRST_SHARE

    def factor(self, progress: float, step: int) -> float:
        """Learning rate relative to its peak, after a share ``progress`` of the time."""
        left = min(1.0, max(1.0 - progress, 0.0) / max(self.cooldown, 1e-9))
        return min((step + 1) / self.warmup_steps, 1.0) * max(left, self.final)


def _optimizers(denoiser: Denoiser, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW at half the rate for everything else."""
    matrices = [
        p for n, p in denoiser.transformer.blocks.named_parameters() if p.ndim == 2 and p.requires_grad
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in denoiser.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=rate),
        torch.optim.AdamW(others, lr=rate / 2, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def train(
    denoiser: Denoiser,
    averaged: Denoiser,
    batches: Iterator[Batch],
    empty: torch.Tensor,
    schedule: Schedule,
    target: Target = data_velocity,
    compiled: bool = True,
    every_minute: Callable[[], None] | None = None,
) -> int:
    """Train in place for a given time.

    Args:
        denoiser: The network; on its device.
        averaged: A copy that follows as exponential moving average; what is shipped.
        batches: Endless clips on the same device.
        empty: Token ids of the empty caption, ``(MAX_TOKENS,)``.
        schedule: Time and learning rate.
        target: Velocity to be learned.
        compiled: Use ``torch.compile``.
        every_minute: Called about once a minute (checkpoints).

    Returns:
        Number of steps taken.
    """
    device = empty.device
    if compiled:  # one compilation serves all blocks, which are most of the work
        denoiser.transformer.compile_repeated_blocks(dynamic=False)
    optimizers = _optimizers(denoiser, schedule.rate)
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    parameters = list(denoiser.parameters())

    def losses_and_gradients(
        latents: torch.Tensor, tokens: torch.Tensor, *places: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        frames, rows, columns = places
        batch = Batch(latents, drop_captions(tokens, empty), (frames, rows, columns))
        sigma, noise = draw_sigma(latents, schedule.first_share), torch.randn_like(latents)
        noisy = noised(latents, noise, sigma)
        with torch.autocast(device.type, torch.bfloat16):
            wanted = target(batch, noisy, noise, sigma)
            error = (denoiser(noisy, sigma, batch.tokens, batch.places).float() - wanted).square().mean()
        return error.detach(), *torch.autograd.grad(error, parameters, materialize_grads=True)

    work = Replayed(losses_and_gradients)
    start, step, recent, saved = time.monotonic(), 0, [], time.monotonic()
    while (progress := (time.monotonic() - start) / max(schedule.seconds, 1e-9)) < 1 or step == 0:
        batch = next(batches)
        error, *gradients = work(batch.latents, batch.tokens, *batch.places)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule.factor(progress, step)
            optimizer.step()
        follow(averaged, denoiser, min(EMA_DECAY, (step + 1) / (step + 20)))
        recent.append(error.clone())  # the next step writes over it
        step += 1
        if step % 200 == 0 or step == 1:
            logger.info(
                "dit step %d %.0f s loss %.4f",
                step,
                time.monotonic() - start,
                torch.stack(recent).mean().item(),
            )
            recent.clear()
            if every_minute and time.monotonic() - saved > 60:
                every_minute()
                saved = time.monotonic()
    return step


@torch.no_grad()
def follow(averaged: torch.nn.Module, model: torch.nn.Module, keep: float) -> None:
    """Move the average a step towards the model's weights."""
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - keep)


def copy_of(denoiser: Denoiser) -> Denoiser:
    """A frozen copy, for averages and teachers."""
    return copy.deepcopy(denoiser).requires_grad_(False).eval()


@torch.no_grad()
def right_order(denoiser: Denoiser, batch: Batch) -> float:
    """Share of clips with a cut whose scenes come in the right order when there is nothing but noise to go by.

    What the network expects at noise level 1 is held against the clip and against the clip backwards, by the
    mean colour of every frame.
    """
    device = batch.latents.device
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(batch.latents.shape, device=device, generator=generator)
    with torch.autocast(device.type, torch.bfloat16):
        velocity = denoiser(noise, torch.ones(len(noise), device=device), batch.tokens, batch.places)
    expected, clip = ((x.float().mean((3, 4))) for x in (noise - velocity, batch.latents))
    right, swapped = ((expected - x).square().mean((1, 2)) for x in (clip, clip.flip(2)))
    return (right < swapped).float().mean().item()


@torch.no_grad()
def held_out_loss(denoiser: Denoiser, batch: Batch) -> float:
    """Flow-matching loss on held-out clips at eight fixed noise levels, with fixed noise."""
    device = batch.latents.device
    generator = torch.Generator(device).manual_seed(0)
    levels = shifted((torch.arange(8, device=device) + 0.5) / 8)
    total = 0.0
    for level in levels:
        noise = torch.randn(batch.latents.shape, device=device, generator=generator)
        sigma = level.expand(len(batch.latents))
        with torch.autocast(device.type, torch.bfloat16):
            got = denoiser(noised(batch.latents, noise, sigma), sigma, batch.tokens, batch.places)
        total += (got.float() - (noise - batch.latents)).square().mean().item()
    return total / len(levels)
