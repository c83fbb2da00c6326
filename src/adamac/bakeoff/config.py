"""What a run was asked to do, and the directory that it fills."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from adamac.attention import Schedule
from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.prompts import Prompt
from adamac.bakeoff.setup import Setup

REFERENCE = "dense"
"""The arm that every other is compared with: the pipeline as it is."""

# The window of SSIM needs 11 pixels, and no video model makes sides below 16.
_LEAST = {"steps": 1, "height": 16, "width": 16, "frames": 1, "fps": 1}

# All that a run can leave of itself if it is killed before run.json is whole: nothing that is worth keeping.
_LOCK = ".lock"
_NOT_BEGUN = {_LOCK, "run.json.part"}


class Case(NamedTuple):
    """What every arm makes a video of."""

    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Config:
    """What a run was asked to do.

    Attributes:
        model: Directory or hub id of a diffusers pipeline; ``None`` is the embedded one.
        prompts: What to show.
        arms: Names of the arms, the reference among them.
        seeds: Each prompt is made once for each seed.
        steps: Denoising steps; ``None``, here and below, is the model's own default.
        height: Pixels.
        width: Pixels.
        frames: Frames of a video.
        guidance: Scale of classifier-free guidance.
        fps: Frames a second of the video files.
        keep: Share of video tokens that every sparse arm reads, in place of its own budget.
        schedule: Which steps and layers stay dense in every sparse arm.
        device: Torch's name of a device.
        dtype: ``"auto"`` (float32 on a CPU, bfloat16 elsewhere), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        compile: Compile the transformer's blocks for every arm; see :mod:`adamac.bakeoff.compiled`.
        setup: Makes the pipeline ready once it is loaded, and puts it where it runs.
        ranks: Over how many GPUs each video is spread.
        call: Further arguments of the pipeline call by name, see :mod:`adamac.bakeoff.call`.
    """

    model: str | None
    prompts: tuple[Prompt, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
    fps: int | None = None
    keep: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    device: str = "cpu"
    dtype: str = "auto"
    compile: bool = False
    setup: Setup | None = None
    ranks: int = 1
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            number = getattr(self, name)
            if number is not None and number < least:
                raise BadInput(f"{name} must be at least {least}, got {number}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise BadInput(f"guidance must be a finite number, got {self.guidance}")
        if not self.seeds:
            raise BadInput("seeds: at least one is needed")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise BadInput(f"seeds must differ and be 0 or more, got {' '.join(map(str, self.seeds))}")

    def cases(self) -> list[Case]:
        """Every prompt with every seed."""
        return [Case(prompt, seed) for seed in self.seeds for prompt in self.prompts]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without the schedule, which runs name apart."""
        asked = asdict(self, dict_factory=_without_contents)
        return json.loads(json.dumps({k: v for k, v in asked.items() if k != "schedule"}))


def _without_contents(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Leave out what a file held, whose digest is there."""
    return {name: value for name, value in pairs if not isinstance(value, bytes)}


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run."""

    path: Path

    @property
    def run(self) -> Path:
        """What was asked, and of which machine."""
        return self.path / "run.json"

    @property
    def rows(self) -> Path:
        """One line a video."""
        return self.path / "rows.jsonl"

    @property
    def summary(self) -> Path:
        """Figures for each arm."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report" / "index.html"

    @property
    def frames(self) -> Path:
        """Float frames of the case in progress; gone when it is finished."""
        return self.path / "frames"

    def name(self, case: Case, arm: str) -> str:
        """Stem of the files of one video."""
        return f"{case.prompt.slug}-s{case.seed}-{arm}"

    def read_run(self) -> dict[str, Any]:
        """Read what was asked.

        Raises:
            BadInput: If there is no run here, or its file lacks what a report or a run that goes on needs.
        """
        try:
            run = json.loads(self.run.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # bytes that are no text are a ValueError, too
            raise BadInput(f"{self.path} holds no run of adamac bakeoff (no readable run.json)") from None
        if isinstance(run, dict) and "recipe" in run:
            raise BadInput(
                f"{self.path} holds a training run of adamac moe train, none of adamac bakeoff; choose another directory"
            )
        if damage := _damage(run):
            raise BadInput(
                f"{self.run} is damaged: {damage}; restore the file, or make the run again in another directory"
            )
        _say_what_was_not_asked(run["config"])
        return run

    def check(self, identity: dict[str, Any], resume: bool) -> None:
        """Make sure that the directory can take this run, and change nothing in it.

        Args:
            identity: What makes a run this run and not another; see :func:`adamac.bakeoff.run.identity`.
            resume: Whether to go on with a run that is here already.

        Raises:
            BadInput: If it cannot be written, another run is writing into it, it holds another run or other files, or it
                holds this one and ``resume`` is off.
        """
        nearest = next(parent for parent in (self.path, *self.path.absolute().parents) if parent.exists())
        try:
            tempfile.TemporaryDirectory(dir=nearest).cleanup()
        except OSError as error:
            raise BadInput(f"out: {self.path} cannot be written ({nearest}: {error.strerror})") from None
        if not self.path.exists():
            return
        if (self.path / _LOCK).exists():
            with self._locked():  # said now, not when the model was loaded
                pass
        if all(file.name in _NOT_BEGUN for file in self.path.iterdir()):
            return
        if not self.run.exists():
            raise BadInput(f"out: {self.path} is not empty and holds no run; choose another directory")
        if other := _differences(self.read_run(), identity):
            raise BadInput(f"out: {self.path} holds another run ({other}); choose another directory")
        if not resume:
            raise BadInput(
                f"out: {self.path} holds this run already; go on with --resume or choose another directory"
            )

    @contextmanager
    def held(self) -> Generator[None]:
        """Make the directory and keep every other run out of it for a while.

        Raises:
            BadInput: If it cannot be made, or another run is writing into it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"out: {self.path} cannot be made ({error.strerror})") from None
        with self._locked():
            yield

    @contextmanager
    def _locked(self) -> Generator[None]:
        try:
            with FileLock(self.path / _LOCK, blocking=False):
                yield
        except Timeout:
            raise BadInput(
                f"out: another run is writing into {self.path}; wait for it or choose another directory"
            ) from None


# What run.json holds at least, an object before its entries.
_PARTS: dict[str, type] = {
    "config": dict,
    "config.prompts": list,
    "config.arms": list,
    "config.seeds": list,
    "methods": dict,
    "schedule": str,
    "machine": dict,
    "machine.device": str,
    "machine.torch": str,
    "machine.adamac": str,
    "started": str,
    "notes": dict,
    "first_calls": dict,
}
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}


def _damage(run: Any) -> str:
    """What is wrong with the contents of a ``run.json``; nothing if they are those of a run."""
    if not isinstance(run, dict):
        return f"expected an object with {', '.join(name for name in _PARTS if '.' not in name)}, got {_brief(run)}"
    for name, kind in _PARTS.items():
        *above, last = name.split(".")
        holder: dict[str, Any] = run[above[0]] if above else run
        if last not in holder:
            return f"expected {_KINDS[kind]} named {name}, found none"
        if not isinstance(holder[last], kind):
            return f"expected {name} to be {_KINDS[kind]}, got {_brief(holder[last])}"
    for prompt in run["config"]["prompts"]:
        if not isinstance(prompt, dict) or not isinstance(prompt.get("id"), str):
            return f"expected config.prompts to be objects with an id, got {_brief(prompt)}"
    return ""


def _say_what_was_not_asked(config: dict[str, Any]) -> None:
    """Fill in what a version that wrote this could not be asked for."""
    for name, value in (("compile", False), ("setup", None), ("ranks", 1), ("call", {})):
        config.setdefault(name, value)
    for prompt in config["prompts"]:
        for name in ("negative", "image"):
            prompt.setdefault(name, None)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name the settings that differ, each in a few words."""
    pairs = {name: (old.get(name), value) for name, value in new.items() if old.get(name) != value}
    if "config" in pairs:
        before, now = pairs.pop("config")
        before = before or {}
        pairs |= {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    return "; ".join(f"{name}: {_two(there, here)}" for name, (there, here) in pairs.items())


def _two(there: Any, here: Any) -> str:
    """A setting of either run; of as many prompts in both, which are not the same."""
    first, second = _short(there), _short(here)
    if first == second and isinstance(here, list):
        other = [new for old, new in zip(there, here, strict=True) if old != new]
        return f"{len(other)} of {first} are not the same, the first is {other[0].get('id')!r} here"
    return f"{first} there, {second} here"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "other settings"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} prompts"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
