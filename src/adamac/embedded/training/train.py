"""Train the embedded pipeline: ``python -m adamac.embedded.training.train --film FILE --output FOLDER``.

Four things happen in turn, each for a given number of minutes: the text encoder learns to read captions
(:mod:`adamac.embedded.training.reading`); the autoencoder learns to compress clips; clips are painted, encoded and
kept on the device; the transformer and its text encoder learn to denoise them, first what the first steps of
sampling decide (what comes when and where), then sketches of a few latent frames (:mod:`adamac.embedded.training.dit`;
many, quick), then whole clips with sketches in between, and at last what the network itself says under guidance,
so that one forward a step is enough in use. A run can start from the weights of an earlier one (``--resume``); it
then trains what it is given minutes for.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from rich.logging import RichHandler
from transformers import PreTrainedTokenizerFast

from adamac import embedded
from adamac.embedded.training import assembly, dit, film, reading, scenes, tokens
from adamac.embedded.training import vae as autoencoder
from adamac.embedded.training.latents import sketch
from adamac.embedded.training.material import HELD_OUT_SEED, TINY, Material, Size
from adamac.embedded.training.rendering import Renderer, mixed_orders

logger = logging.getLogger("adamac.embedded.training.train")

CROPPED_SHARE = 0.75
"""The autoencoder sees quarters of many clips for this share of its time, then whole frames."""


class Run:
    """One training run: its data sources, networks and report."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.size = TINY if options.tiny else Size()
        size = self.size
        # The painters are forked before the device is touched.
        renderer = Renderer(options.workers, size.full * size.height * size.width * 3)
        shots = film.load(options.film or film.fetch(options.cache), size.height, size.width)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(options.seed)
        random.seed(options.seed)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        self.rng = np.random.default_rng(options.seed)
        self.output: Path = options.output
        self.output.mkdir(parents=True, exist_ok=True)
        self.report: dict = {
            "arguments": {k: str(v) for k, v in vars(options).items()},
            "device": _device_name(self.device),
            "film": film.CREDIT,
        }
        self.vae, self.denoiser, self.tokenizer = self._networks()
        self.averaged = dit.copy_of(self.denoiser)
        self.material = Material(
            size, self.device, renderer, shots, self.tokenizer, self.rng, options.first_seed
        )

    def _networks(self) -> tuple[AutoencoderKLWan, dit.Denoiser, PreTrainedTokenizerFast]:
        if self.options.resume:
            vae, denoiser, tokenizer = assembly.restore(self.options.resume)
        else:
            tokenizer = tokens.build()
            vae = autoencoder.build(**self.size.vae)
            denoiser = dit.build(vae.config.z_dim, len(tokenizer), **self.size.denoiser)
        for name, module in (
            ("vae", vae),
            ("transformer", denoiser.transformer),
            ("text_encoder", denoiser.text_encoder),
        ):
            self.report[f"{name}_parameters"] = sum(p.numel() for p in module.parameters())
        return vae, denoiser.to(self.device), tokenizer

    def teach_reading(self) -> None:
        """Teach the text encoder the order of words, on captions without pictures."""
        size = self.size

        def captions(first: int, each: int, held_out: bool) -> torch.Tensor:
            asked = [*scenes.CATEGORIES, "cut", "cut", "text"]  # the two in which order matters most
            texts = [scenes.caption(c, first + i, size.full) for i, c in enumerate(asked * each)]
            return self.material.tokenise([t for t in texts if scenes.is_held_out(t) == held_out])

        learned = captions(self.options.first_seed, size.captions, False)
        judged = captions(HELD_OUT_SEED, size.captions // 10, True)
        longest = int(max(ids.ne(0).sum(1).max() for ids in (learned, judged)))
        self.report["reading"] = reading.teach(
            self.denoiser.text_encoder,
            learned[:, :longest],
            judged[:, :longest],
            self.tokenizer.convert_tokens_to_ids("cut"),
            self.options.reading_minutes * 60,
        )
        logger.info("reading, share of right answers: %s", self.report["reading"])
        self.averaged.load_state_dict(self.denoiser.state_dict())

    def train_vae(self) -> None:
        """Train the autoencoder on painted clips and film, write its statistics and its ceiling.

        The clips have the full length: one trained on short clips loses the colours after them.
        """
        size = self.size
        painted = torch.cat(
            [
                piece
                for piece, _ in self.material.rendered(
                    mixed_orders(size.vae_clips, self.options.first_seed, size.full, size.height, size.width)
                )
            ]
        )
        kept = [
            torch.from_numpy(self.material.film.frames[s.start : s.end])
            for s in self.material.film.shots
            if not s.held_out and s.end - s.start >= size.full
        ]
        reel, lengths = torch.cat(kept).to(self.device), [len(k) for k in kept]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        share = np.array(lengths) / sum(lengths)
        steps = torch.arange(size.full, device=self.device)

        def clips(count: int) -> torch.Tensor:
            of_film = max(count // 3, 1)
            index = torch.randint(len(painted), (count - of_film,), device=self.device)
            shots = self.rng.choice(len(lengths), of_film, p=share)
            begin = [starts[s] + self.rng.integers(lengths[s] - size.full + 1) for s in shots]
            rows = torch.tensor(np.array(begin), device=self.device)[:, None] + steps
            return torch.cat([painted[index], reel[rows]])

        def batch(progress: float) -> torch.Tensor:
            if progress > CROPPED_SHARE:
                return clips(size.vae_batch)
            top = int(self.rng.integers(size.height // 2 + 1))
            left = int(self.rng.integers(size.width // 2 + 1))
            quarter = (slice(top, top + size.height // 2), slice(left, left + size.width // 2))
            return clips(4 * size.vae_batch)[:, :, *quarter]

        self.vae = autoencoder.train(
            self.vae, batch, self.options.vae_minutes * 60, self.options.vae_rate, self.device
        )
        some = torch.cat([autoencoder.encode(self.vae, clips(size.vae_batch)) for _ in range(64)])
        autoencoder.set_statistics(self.vae, some)
        self.measure_ceiling()

    def measure_ceiling(self) -> None:
        """PSNR of the autoencoder alone, by category, on held-out clips of full length."""
        ceiling = {}
        for category, source in self.material.held_out(self.size.full):
            values = [
                (autoencoder.reconstruction_psnr(self.vae, frames), len(frames)) for frames, _ in source
            ]
            ceiling[category] = round(float(np.mean([v for v, _ in values])), 2)
        self.report["vae_psnr_db"] = ceiling
        logger.info("vae ceiling, dB: %s", ceiling)

    def train_denoiser(
        self,
        batches: Iterator[dit.Batch],
        schedule: dit.Schedule,
        name: str,
        target: dit.Target = dit.data_velocity,
    ) -> None:
        """One stage of the transformer's training."""
        torch.manual_seed(self.options.seed + len(self.report))
        steps = dit.train(
            self.denoiser,
            self.averaged,
            batches,
            self.material.empty(),
            schedule,
            target,
            compiled=self.device.type == "cuda",
            every_minute=self.checkpoint,
        )
        self.report[f"{name}_steps"] = steps
        # The next stage goes on from the average, which is the better network.
        self.denoiser.load_state_dict(self.averaged.state_dict())
        self.checkpoint()

    def measure_loss(self, name: str) -> None:
        """Held-out flow-matching loss by category at full length."""
        losses = {}
        for category, source in self.material.held_out(self.size.full):
            losses[category] = round(
                dit.held_out_loss(self.averaged, self.material.encoded(self.vae, source).all()), 4
            )
        losses["mean"] = round(float(np.mean(list(losses.values()))), 4)
        self.report[f"held_out_loss_{name}"] = losses
        logger.info("held-out loss, %s: %s", name, losses)

    def measure_order(self, name: str) -> None:
        """Share of held-out cuts whose order is taken from the caption."""
        size = self.size
        clips = self.material.encoded(
            self.vae, self.material.rendered(self.material.held_out_orders("cut", size.full, times=8))
        ).all()
        self.report[f"right_order_{name}"] = round(
            dit.right_order(self.averaged, sketch(clips, size.sketch)), 3
        )
        logger.info("cuts in the right order, %s: %s", name, self.report[f"right_order_{name}"])

    def checkpoint(self, name: str = "weights") -> None:
        """Write the averaged weights as one archive, and the report."""
        folder = self.output / name
        assembly.save(self.vae, self.averaged, self.tokenizer, folder)
        shutil.make_archive(str(folder), "zip", folder)
        shutil.rmtree(folder)
        text = json.dumps(self.report, indent=1)
        (self.output / "report.json").write_text(text, encoding="utf-8")

    def sheets(self, name: str, guidance: float) -> None:
        """Contact sheets of the held-out prompts and of two film captions."""
        generation = dict(embedded.GENERATION)
        generation |= {"height": self.size.height, "width": self.size.width, "num_frames": self.size.full}
        entries = embedded.prompts()[: 2 if self.options.tiny else None]
        wanted = [e["prompt"] for e in entries]
        wanted += [
            "an animated film, a gray rabbit in a meadow, some motion",
            "an animated film, a brown squirrel on a branch in a blue sky, some motion",
        ]
        parts = assembly.pipeline(self.vae, self.averaged, self.tokenizer)
        parts.set_progress_bar_config(disable=True)
        videos = assembly.sample(parts, wanted, generation, guidance)
        assembly.contact_sheet(videos, wanted, 7, self.output / f"{name}.png")

    def everything(self) -> None:
        """All stages that were given time."""
        options, size = self.options, self.size
        if options.reading_minutes > 0:
            self.teach_reading()
        if options.vae_minutes > 0:
            self.train_vae()
            self.checkpoint()
        self.vae = autoencoder.to_device(self.vae, self.device).eval()
        if (
            options.sketch_minutes + options.full_minutes + options.distil_minutes + options.layout_minutes
            > 0
        ):
            began = time.monotonic()
            data = self.material.training_set(self.vae, options.encode_minutes * 60)
            self.report["clips"] = len(data.tokens)
            logger.info("%d clips in %.0f s", len(data.tokens), time.monotonic() - began)
        if options.layout_minutes > 0:
            self.measure_order("before")
            self.train_denoiser(
                self.material.layouts(self.vae, data),
                dit.Schedule(
                    options.layout_minutes * 60, options.rate, 0.3, final=options.handover, first_share=1.0
                ),
                "layout",
            )
            self.measure_order("layout")
        if options.sketch_minutes > 0:
            self.train_denoiser(
                self.material.sketches(data),
                dit.Schedule(options.sketch_minutes * 60, options.rate, 0.3, final=options.handover),
                "sketch",
            )
        if options.full_minutes > 0:
            self.train_denoiser(
                self.material.whole_and_sketched(data),
                dit.Schedule(options.full_minutes * 60, options.rate * options.handover, 0.8),
                "full",
            )
            self.measure_loss("full")
            self.measure_order("full")
            self.sheets(f"plain_guidance{options.guidance:g}", options.guidance)
        if options.distil_minutes > 0:
            self.checkpoint("weights_before_distillation")
            teacher = dit.copy_of(self.averaged)
            self.train_denoiser(
                data.batches(size.full_batch),
                dit.Schedule(options.distil_minutes * 60, options.rate * 0.4, 0.8),
                "distil",
                dit.guided_velocity(teacher, self.material.empty(), options.guidance),
            )
            self.measure_order("distil")
            self.sheets("distilled", 1.0)
        self.checkpoint()
        self.material.renderer.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for weights.zip, report.json and sheets")
    add("--film", type=Path, help="Big Buck Bunny as a file; fetched if not given")
    add("--cache", type=Path, default=Path.home() / ".cache" / "adamac", help="for the fetched film")
    add("--resume", type=Path, help="weights folder of an earlier run")
    add("--reading-minutes", type=float, default=0.7, help="text encoder, captions alone")
    add("--vae-minutes", type=float, default=3.0)
    add("--vae-rate", type=float, default=5e-4, help="peak learning rate of the autoencoder")
    add("--sketch-minutes", type=float, default=10.0, help="transformer, a few latent frames of each clip")
    add("--full-minutes", type=float, default=10.0, help="transformer, whole clips of 49 frames")
    add("--distil-minutes", type=float, default=2.0, help="guidance distillation, 49 frames")
    add("--layout-minutes", type=float, default=0.0, help="the first noise levels alone, thinned sketches")
    add("--encode-minutes", type=float, default=2.0, help="at most, for each set of clips")
    add("--guidance", type=float, default=3.0, help="guidance scale that is distilled")
    add("--rate", type=float, default=2e-3, help="peak learning rate of Muon; AdamW has half")
    add("--handover", type=float, default=0.5, help="share of the rate kept for full length")
    add("--first-seed", type=int, default=0, help="of the painted clips; a later run takes another")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=max((os.cpu_count() or 2) - 1, 1))
    add("--tiny", action="store_true", help="sizes for a quick test of every line")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])
    began = time.monotonic()
    run = Run(parse(arguments))
    run.everything()
    logger.info("done in %.0f s", time.monotonic() - began)


if __name__ == "__main__":
    main()
