"""The video autoencoder: a small ``AutoencoderKLWan``, how it runs over whole clips, how it is trained.

The stock class feeds itself four frames at a time and carries the ends of every convolution over. As
the convolutions are causal, feeding the first frame and then *all* others gives the same result
in two calls, which is what makes training fast; a test holds the two against each other.
"""

from __future__ import annotations

import copy
import functools
import logging
import time
import types
from collections.abc import Callable

import torch
import torch.nn.functional as functional
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanCausalConv3d,
    WanRMS_norm,
    patchify,
    unpatchify,
)

from adamac.ops.replay import Replayed

logger = logging.getLogger(__name__)

KL_WEIGHT = 3e-4
GRADIENT_WEIGHT = 0.5
SQUARE_WEIGHT = 3.0
FIRST_FRAME_WEIGHT = 3.0
"""The first frame has a latent of its own, which one frame in 49 would hardly train."""
LOSSES = ("pixel", "gradient", "kl")


def build(encoder_width: int = 32, decoder_width: int = 28, channels: int = 12) -> AutoencoderKLWan:
    """An untrained autoencoder, 8x smaller in space and 4x in time.

    Half of the spatial reduction is a plain rearrangement of 2x2 pixels, so the widest layers work
    at half the resolution. Every change of resolution has a shortcut of plain averages or copies
    ("residual", as in Wan 2.2): without it a net this small spends its whole training on flat colours.

    Args:
        encoder_width: Channels of the encoder's first level; the deeper two have twice as many.
        decoder_width: The same for the decoder, which runs on a processor in use and so is narrower.
        channels: Channels of the latents.
    """
    return AutoencoderKLWan(
        base_dim=encoder_width,
        decoder_base_dim=decoder_width,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        in_channels=12,
        out_channels=12,
        patch_size=2,
    )


def _convolutions(module: torch.nn.Module) -> int:
    return sum(isinstance(m, WanCausalConv3d) for m in module.modules())


def moments(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the latents of whole clips.

    Args:
        vae: The autoencoder.
        video: ``(batch, 3, frames, height, width)`` in -1..1; ``frames`` is 4k + 1 with k >= 1.

    Returns:
        Two tensors ``(batch, channels, 1 + frames // 4, height / 8, width / 8)``.
    """
    patches = patchify(video, vae.config.patch_size)
    carried = [None] * _convolutions(vae.encoder)
    first = vae.encoder(patches[:, :, :1], feat_cache=carried, feat_idx=[0])
    rest = vae.encoder(patches[:, :, 1:], feat_cache=carried, feat_idx=[0])
    mean, log_variance = vae.quant_conv(torch.cat([first, rest], dim=2)).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Video of whole clips of raw (not normalised) latents; the inverse of :func:`moments`."""
    hidden = vae.post_quant_conv(latents)
    carried = [None] * _convolutions(vae.decoder)
    first = vae.decoder(hidden[:, :, :1], feat_cache=carried, feat_idx=[0], first_chunk=True)
    rest = vae.decoder(hidden[:, :, 1:], feat_cache=carried, feat_idx=[0])
    return unpatchify(torch.cat([first, rest], dim=2), vae.config.patch_size)


def to_device(vae: AutoencoderKLWan, device: torch.device) -> AutoencoderKLWan:
    """Move to a device with channels last, the layout in which convolutions are fast."""
    for module in vae.to(device).modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae


def use_quick_norms(vae: AutoencoderKLWan) -> None:
    """Normalise in one kernel in the input's type, instead of six in float32; for training only."""

    def forward(self: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
        weight = self.gamma.flatten().to(x.dtype)
        return functional.rms_norm(x.movedim(1, -1), weight.shape, weight, 1e-8).movedim(-1, 1)

    for module in vae.modules():
        if isinstance(module, WanRMS_norm):
            module.forward = types.MethodType(forward, module)


def to_video(frames: torch.Tensor) -> torch.Tensor:
    """uint8 ``(batch, frames, height, width, 3)`` to float ``(batch, 3, frames, h, w)`` in -1..1."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def loss(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L1 of pixels and of their differences in space and time, squares, and a light pull to N(0, 1).

    Differences count because a thin rod or a letter's edge is few pixels: without them the mean
    over all pixels hardly sees it vanish. Squares count because a purple ball shown gray is a few
    large errors, which L1 alone takes for as bad as slight noise everywhere.
    """
    mean, log_variance = moments(vae, video)
    sample = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    error = decode(vae, sample).float() - video
    counted = torch.cat([FIRST_FRAME_WEIGHT * error[:, :, :1], error[:, :, 1:]], dim=2)
    pixel = counted.abs().mean()
    gradient = torch.stack([error.diff(dim=d).abs().mean() for d in (2, 3, 4)]).mean()
    mean, log_variance = mean.float(), log_variance.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    large = (counted * error).mean()
    total = pixel + SQUARE_WEIGHT * large + GRADIENT_WEIGHT * gradient + KL_WEIGHT * divergence
    return total, {"pixel": pixel.detach(), "gradient": gradient.detach(), "kl": divergence.detach()}


def _losses_and_gradients(
    vae: AutoencoderKLWan, parameters: list[torch.nn.Parameter], frames: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The parts of the loss, :data:`LOSSES`, as one tensor; then the gradients of the parameters."""
    with torch.autocast(frames.device.type, torch.bfloat16):
        total, parts = loss(vae, to_video(frames))
    return torch.stack([parts[name] for name in LOSSES]), *torch.autograd.grad(total, parameters)


def train(
    vae: AutoencoderKLWan,
    batches: Callable[[float], torch.Tensor],
    seconds: float,
    rate: float,
    device: torch.device,
) -> AutoencoderKLWan:
    """Train for a given time.

    Args:
        vae: Where to start from; moved to ``device``.
        batches: Returns uint8 clips ``(batch, frames, height, width, 3)`` on ``device``, given the
            share of the time that has passed.
        seconds: Wall-clock time; the learning rate reaches zero at its end.
        rate: Peak learning rate of AdamW.
        device: Where to train.

    Returns:
        The average of the weights over the last steps (exponential, 0.998).
    """
    vae = to_device(vae, device).train()
    averaged = copy.deepcopy(vae).requires_grad_(False)
    use_quick_norms(vae)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    work = Replayed(functools.partial(_losses_and_gradients, vae, parameters))
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / max(seconds, 1e-9)) < 1 or step == 0:
        warmup = min((step + 1) / 50, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * warmup * min(1.0, max(1.0 - progress, 0.0) / 0.6)
        parts, *gradients = work(batches(progress))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        keep = min(0.998, step / (step + 10))
        with torch.no_grad():  # else the average becomes part of an ever longer graph
            torch._foreach_lerp_(list(averaged.parameters()), parameters, 1 - keep)
        if step % 100 == 0:
            values = dict(zip(LOSSES, (round(v, 4) for v in parts.tolist()), strict=True))
            logger.info("vae step %d %.0f s %s", step, time.monotonic() - start, values)
        step += 1
    logger.info("vae trained %d steps", step)
    return averaged.eval()


@torch.no_grad()
def encode(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    """Raw latent means of uint8 clips ``(batch, frames, height, width, 3)``, in the clips' order."""
    with torch.autocast(frames.device.type, torch.bfloat16):
        return moments(vae, to_video(frames))[0]


def set_statistics(vae: AutoencoderKLWan, latents: torch.Tensor) -> None:
    """Write each channel's mean and deviation into the config, where the pipeline looks for them."""
    by_channel = latents.float().transpose(0, 1).flatten(1)
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in by_channel.mean(dim=1).tolist()],
        latents_std=[round(v, 5) for v in by_channel.std(dim=1).tolist()],
    )


def normalise(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Raw latents to the zero-mean, unit-deviation ones that the transformer sees."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=latents.device).view(shape)
    deviation = torch.tensor(vae.config.latents_std, device=latents.device).view(shape)
    return (latents.float() - mean) / deviation


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, frames: torch.Tensor) -> float:
    """Mean over clips of the PSNR in dB of encode-then-decode (the ceiling of any generation)."""
    video = to_video(frames)
    with torch.autocast(frames.device.type, torch.bfloat16):
        rebuilt = decode(vae, moments(vae, video)[0]).float().clamp(-1, 1)
    error = functional.mse_loss(rebuilt, video, reduction="none").mean(dim=(1, 2, 3, 4)) / 4
    return float((-10 * torch.log10(error.clamp_min(1e-10))).mean())
