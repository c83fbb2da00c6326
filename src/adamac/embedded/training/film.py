"""Big Buck Bunny as training data: natural motion beside the procedural scenes.

The film is (c) Blender Foundation, www.bigbuckbunny.org, licensed CC BY 3.0. It is not shipped; it
is fetched once from the source archive of a package on the Python package index, or given as a file.
Shots are found where successive frames differ much more than their neighbours do, clips never cross
a cut, and every tenth shot is held out.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import io
import itertools
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np

CREDIT = "Big Buck Bunny (c) Blender Foundation, www.bigbuckbunny.org, CC BY 3.0"
PACKAGE = "moviepy==2.2.1"
ARCHIVE = "docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
MEMBER = "resources/bbb.mp4"
STORY_SECONDS = 490.0
"""The closing credits begin here."""

CUT_DIFFERENCE = 12.0
"""Least mean difference of 8-bit values between the frames on both sides of a cut."""
CUT_RATIO = 3.0
"""Least ratio of that difference to the median difference around it (fast motion is no cut)."""
HELD_OUT_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Shot:
    """Frames ``start`` (included) to ``end`` (excluded) between two cuts, and what they show."""

    start: int
    end: int
    caption: str
    held_out: bool


@dataclasses.dataclass(frozen=True)
class Film:
    """The story's frames ``(frames, height, width, 3)``, uint8 RGB, with its shots."""

    frames: np.ndarray
    shots: tuple[Shot, ...]

    def clips(
        self, rng: np.random.Generator, count: int, frames: int, stride: int = 2, held_out: bool = False
    ) -> list[tuple[np.ndarray, str]]:
        """Draw clips, each inside one shot, longer shots more often.

        Args:
            rng: Source of the draw.
            count: Number of clips.
            frames: Frames of a clip.
            stride: Source frames between two frames of a clip; 1 where a shot is too short for it.
            held_out: Draw from the held-out shots instead of the others.

        Returns:
            Pairs of frames ``(frames, height, width, 3)`` and caption.

        Raises:
            ValueError: If no shot is long enough.
        """
        usable = [s for s in self.shots if s.held_out == held_out and s.end - s.start >= frames]
        if not usable:
            raise ValueError(
                f"film: expected a shot of at least {frames} frames, found none; "
                "ask for shorter clips or lower CUT_DIFFERENCE"
            )
        lengths = np.array([s.end - s.start for s in usable], float)
        drawn = []
        for index in rng.choice(len(usable), count, p=lengths / lengths.sum()):
            shot = usable[index]
            step = stride if (frames - 1) * stride < shot.end - shot.start else 1
            start = rng.integers(shot.start, shot.end - (frames - 1) * step)
            picture = self.frames[start : start + (frames - 1) * step + 1 : step]
            drawn.append((picture, describe(picture, shot.caption)))
        return drawn


def describe(frames: np.ndarray, what: str) -> str:
    """A caption: what the shot shows, by hand, and how much moves, as measured."""
    change = np.abs(np.diff(frames[:, ::4, ::4].astype(np.int16), axis=0)).mean()
    amount = "little" if change < 2.5 else "some" if change < 7 else "much"
    return f"an animated film, {what}, {amount} motion"


def find_cuts(frames: np.ndarray) -> list[int]:
    """Indices of the first frame after each cut, from frame differences alone."""
    small = frames[:, ::4, ::4].astype(np.int16)
    change = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3))
    cuts = []
    for index, value in enumerate(change):
        around = np.median(change[max(0, index - 6) : index + 7])
        if value > CUT_DIFFERENCE and value > CUT_RATIO * around:
            cuts.append(index + 1)
    return cuts


def split_into_shots(count: int, cuts: list[int], captions: list[tuple[int, str]]) -> tuple[Shot, ...]:
    """Cut ``count`` frames at ``cuts``.

    A shot takes the caption whose frame lies in it, or "a scene" if none does.
    """
    borders = [0, *sorted(set(cuts)), count]
    shots = []
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        words = next((text for frame, text in captions if start <= frame < end), "a scene")
        shots.append(Shot(start, end, words, number % HELD_OUT_EVERY == HELD_OUT_EVERY // 2))
    return tuple(shots)


def shot_captions() -> list[tuple[float, str]]:
    """Our own captions of the film's shots: a second inside the shot, and what it shows."""
    source = importlib.resources.files("adamac.embedded.training").joinpath("film_shots.json")
    return [(entry["second"], entry["caption"]) for entry in json.loads(source.read_text("utf-8"))]


def load(path: Path, height: int, width: int) -> Film:
    """Read a film, scaled and cropped in the middle to ``height`` by ``width`` pixels.

    Raises:
        ValueError: If no frame can be read from ``path``.
    """
    capture = cv2.VideoCapture(str(path))
    rate = capture.get(cv2.CAP_PROP_FPS) or 24.0
    frames: list[np.ndarray] = []
    while len(frames) < STORY_SECONDS * rate:
        there, frame = capture.read()
        if not there:
            break
        frames.append(_fit(frame, height, width)[..., ::-1])
    capture.release()
    if not frames:
        raise ValueError(f"film: expected a video file that OpenCV reads, got {path}")
    story = np.stack(frames)
    captions = [(int(second * rate), text) for second, text in shot_captions()]
    return Film(story, split_into_shots(len(story), find_cuts(story), captions))


def _fit(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale so that the frame covers the size, then crop the middle."""
    scale = max(height / frame.shape[0], width / frame.shape[1])
    tall, wide = round(frame.shape[0] * scale), round(frame.shape[1] * scale)
    resized = cv2.resize(frame, (wide, tall), interpolation=cv2.INTER_AREA)
    top, left = (tall - height) // 2, (wide - width) // 2
    return resized[top : top + height, left : left + width]


def fetch(folder: Path) -> Path:
    """Download the film into ``folder`` (about 60 MB) unless it is there; returns its path."""
    target = folder / "big_buck_bunny.mp4"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary=moviepy",
            "--dest",
            str(folder),
            PACKAGE,
        ],
        check=True,
    )
    source = next(folder.glob("moviepy-*.tar.gz"))
    with tarfile.open(source) as tar:
        packed = tar.extractfile(next(n for n in tar.getnames() if n.endswith(ARCHIVE)))
        if packed is None:
            raise ValueError(
                f"{source.name} holds {ARCHIVE} as a link, expected a file; give the film with --film"
            )
        inner = io.BytesIO(packed.read())
    with zipfile.ZipFile(inner) as archive:
        member = next(n for n in archive.namelist() if n.endswith(MEMBER))
        target.write_bytes(archive.read(member))
    return target
