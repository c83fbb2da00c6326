"""The recipe runs from end to end and its parts do what the stock classes do."""

import itertools
import subprocess
import sys
import types
import zipfile

import cv2
import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from adamac.embedded.training import dit, muon
from adamac.embedded.training import vae as autoencoder
from adamac.embedded.training.latents import LatentSet, sketch, thinned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tick_once_a_look(monkeypatch, module):
    """A clock that moves by a second whenever it is read, so that a test takes a known number of steps."""
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=itertools.count().__next__))


def test_whole_clips_are_coded_as_the_stock_class_codes_them():
    torch.manual_seed(0)
    vae = autoencoder.build(encoder_width=8, decoder_width=8).eval()
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    with torch.no_grad():
        mean, _ = autoencoder.moments(vae, video)
        torch.testing.assert_close(mean, vae.encode(video).latent_dist.mean, atol=1e-5, rtol=1e-4)
        rebuilt = autoencoder.decode(vae, mean).clamp(-1, 1)
        torch.testing.assert_close(rebuilt, vae.decode(mean).sample, atol=1e-5, rtol=1e-4)


def test_quick_norms_change_nothing():
    torch.manual_seed(0)
    vae = autoencoder.build(encoder_width=8, decoder_width=8).eval()
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    with torch.no_grad():
        stock = autoencoder.moments(vae, video)[0]
        autoencoder.use_quick_norms(vae)
        torch.testing.assert_close(autoencoder.moments(vae, video)[0], stock, atol=1e-5, rtol=1e-4)


def test_a_sketch_has_both_ends_of_a_clip_and_frames_between_them_in_order():
    latents = torch.arange(7.0).view(1, 1, 7, 1, 1).expand(6, 2, 7, 3, 4)
    clips = dit.Batch(latents, torch.zeros(6, 4, dtype=torch.long), dit.everywhere(latents))
    seen = set()
    for _ in range(20):
        batch = sketch(clips, frames=4)
        assert batch.latents.shape == (6, 2, 4, 3, 4)
        places = batch.places[0]
        assert (batch.latents[:, 0, :, 0, 0] == places).all()
        assert places[0] == 0
        assert places[-1] == 6
        assert (places.diff() > 0).all()
        seen |= set(places.tolist())
    assert seen == set(range(7))


def test_a_thinned_clip_has_every_second_row_and_column_and_knows_which():
    latents = (torch.arange(6.0)[:, None] * 10 + torch.arange(9.0)).expand(2, 3, 4, 6, 9)
    batch = thinned(dit.Batch(latents, torch.zeros(2, 4, dtype=torch.long), dit.everywhere(latents)))
    frames, rows, columns = batch.places
    assert len(frames) == 4
    assert (rows.diff() == 2).all()
    assert (columns.diff() == 2).all()
    assert (batch.latents[0, 0, 0] == rows[:, None] * 10 + columns).all()


def test_a_spliced_cut_shows_each_scene_on_its_side_of_the_cut():
    captions = [
        "a red ball moving left on a beach",
        "a big blue star spinning on a meadow",
        "a small red ball moving up on a meadow",
        "in the dark, a red ball moving left on a beach, noisy low light",
        'the text "HI" in big red letters growing on a beach',
    ]
    latents = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, 2, 13, 3, 4)
    clips = LatentSet(latents, torch.zeros(5, 4, dtype=torch.long), captions)
    made, words = clips.spliced(12, np.random.default_rng(0), 49)
    for clip, caption in zip(made, words, strict=True):
        before, after = (captions.index(part) for part in caption.split(", then cut to "))
        assert {before, after} == {0, 1}
        shown = clip[0, :, 0, 0]
        cut = int((shown == before).sum())
        assert cut in (6, 7, 8)
        assert (shown[:cut] == before).all()
        assert (shown[cut:] == after).all()


def test_a_network_that_draws_what_the_caption_says_has_the_right_order():
    latents = torch.randn(4, 3, 5, 6, 8)
    batch = dit.Batch(latents, torch.zeros(4, 2, dtype=torch.long), dit.everywhere(latents))

    def says(expected):
        return lambda noise, sigma, tokens, places: noise - expected

    assert dit.right_order(says(latents), batch) == 1
    assert dit.right_order(says(latents.flip(2)), batch) == 0


def test_frames_of_a_sketch_are_embedded_where_they_stand_in_the_clip():
    rope = dit.build(4, 16, layers=1, heads=1, text_width=32, text_layers=1).transformer.rope
    whole = [table.unflatten(1, (7, 6)) for table in rope(torch.empty(1, 4, 7, 2, 3))]
    frames, rows, columns = torch.tensor([0, 2, 6]), torch.tensor([1]), torch.tensor([0, 2])
    with dit.standing_at(rope, (frames, rows, columns)):
        some = [table.unflatten(1, (3, 1, 2)) for table in rope(torch.empty(1, 4, 3, 1, 2))]
    for table, part in zip(whole, some, strict=True):
        table = table.unflatten(2, (2, 3))
        assert torch.equal(table[:, frames][:, :, rows][:, :, :, columns], part)
    again = [table.unflatten(1, (7, 6)) for table in rope(torch.empty(1, 4, 7, 2, 3))]
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_the_autoencoder_trains_on_clips_of_two_sizes(monkeypatch):
    tick_once_a_look(monkeypatch, autoencoder)
    sizes = itertools.cycle([(2, 5, 16, 24, 3), (1, 5, 32, 48, 3)])
    vae = autoencoder.train(
        autoencoder.build(encoder_width=8, decoder_width=8),
        lambda _: torch.randint(256, next(sizes), dtype=torch.uint8, device=DEVICE),
        8,
        1e-3,
        DEVICE,
    )
    assert all(p.isfinite().all() and p.grad_fn is None for p in vae.parameters())


@pytest.mark.filterwarnings("ignore")
def test_the_denoiser_trains_on_clips_and_sketches_in_turn(monkeypatch):
    tick_once_a_look(monkeypatch, dit)
    network = dit.build(4, 16, layers=2, heads=1, feed_forward=64, text_width=32, text_layers=1).to(DEVICE)
    averaged = dit.copy_of(network)
    ids = torch.ones(2, 8, dtype=torch.long, device=DEVICE)
    clips = torch.randn(2, 4, 4, 4, 6, device=DEVICE)
    whole = dit.Batch(clips, ids, dit.everywhere(clips))
    batches = itertools.cycle([whole, whole, sketch(whole, 3), thinned(sketch(whole, 3))])
    compiled = DEVICE.type == "cuda"
    teacher = dit.copy_of(averaged)
    for target in (dit.data_velocity, dit.guided_velocity(teacher, ids[0], 2.0)):
        assert dit.train(network, averaged, batches, ids[0], dit.Schedule(12), target, compiled) > 6
    assert all(p.isfinite().all() and p.grad_fn is None for p in averaged.parameters())


def test_muon_updates_have_singular_values_near_one():
    values = torch.linalg.svdvals(muon.orthogonalise(torch.randn(3, 24, 16)))
    assert values.min() > 0.3
    assert values.max() < 1.5


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_run_ends_with_weights_that_load(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 24, (96, 56))
    for t in range(330):
        writer.write(np.full((56, 96, 3), 60 + 120 * (t // 30 % 2), np.uint8))
    writer.release()
    # A process of its own: the painters are forked, which must come before any thread is started.
    command = [sys.executable, "-m", "adamac.embedded.training.train", "--tiny", "--workers", "1"]
    command += ["--film", str(tmp_path / "film.avi"), "--output", str(tmp_path)]
    command += [
        f"--{stage}-minutes=0.0001" for stage in ("reading", "vae", "sketch", "full", "distil", "layout")
    ]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    with zipfile.ZipFile(tmp_path / "weights.zip") as archive:
        archive.extractall(tmp_path / "weights")
    loaded = WanPipeline.from_pretrained(str(tmp_path / "weights"))
    assert not any(p.isnan().any() for p in loaded.transformer.parameters())
