"""Prompts: read from a file, or chosen from those that ship with the package."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamac.bakeoff.errors import BadInput

_KEYS = ("prompt", "id", "category")
# What would change a video if it were read.
_CHANGES = (
    "seed",
    "seeds",
    "negative_prompt",
    "guidance",
    "guidance_scale",
    "steps",
    "height",
    "width",
    "frames",
)
# Categories in a default run: enough to see that they differ, few enough for a coffee break on a laptop.
DEFAULT_CATEGORIES = 4


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: Names its videos; unique within a run.
        category: What kind of scene it is; the report groups by it.
        text: What the model is given.
    """

    id: str
    category: str
    text: str

    @property
    def slug(self) -> str:
        """The id, fit for a file name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.id).strip("-.") or "prompt"


def choose_prompts(choice: str | None, model: str | None) -> tuple[Prompt, ...]:
    """Choose prompts.

    Args:
        choice: A file, ``"all"`` for every prompt that ships with the package, or ``None`` for the first prompt of each
            of the first few categories.
        model: The model that they are for; ``None``, the embedded one, has prompts of its own.

    Raises:
        BadInput: If the file is missing, empty or not what it should be.
    """
    if choice not in (None, "all"):
        return read_prompts(Path(choice))
    prompts = (
        _embedded_prompts() if model is None else read_prompts(Path(__file__).with_name("prompts.jsonl"))
    )
    return prompts if choice == "all" else _first_of_each(prompts, DEFAULT_CATEGORIES)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a file of prompts: JSON lines if its first line starts with a brace, plain lines otherwise.

    A JSON line has ``prompt``, and may have ``id`` and ``category``. Other keys are not read; one that looks like a slip of
    these, or that would change the video, is refused. Empty lines and plain lines that start with ``#`` are skipped.

    Raises:
        BadInput: If there is nothing to read, or a line is not a prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts: cannot read {path} ({_why(error)})") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if numbered and numbered[0][1].startswith("{"):
        prompts = tuple(_from_json(path, number, line) for number, line in numbered)
    else:
        plain = [line for _, line in numbered if not line.startswith("#")]
        prompts = tuple(Prompt(f"p{place:03}", "any", line) for place, line in enumerate(plain, 1))
    if not prompts:
        raise BadInput(f"prompts: {path} holds no prompt")
    _check_unique(path, prompts)
    return prompts


def _from_json(path: Path, number: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"prompts: {path}, line {number} is not JSON ({error.msg})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise BadInput(f'prompts: {path}, line {number} has no "prompt"')
    for key in entry.keys() - set(_KEYS):
        if meant := difflib.get_close_matches(key, _KEYS, 1, 0.75):
            raise BadInput(f"prompts: {path}, line {number} has a key {key!r}; did you mean {meant[0]}?")
        if key in _CHANGES:
            raise BadInput(
                f"prompts: {path}, line {number} has a {key}, which is not of a prompt here; remove it, "
                "all prompts are made alike"
            )
    return _prompt(entry, f"p{number:03}")


def _prompt(entry: dict[str, Any], default_id: str) -> Prompt:
    return Prompt(
        str(entry.get("id", default_id)), str(entry.get("category", "any")), entry["prompt"].strip()
    )


def _embedded_prompts() -> tuple[Prompt, ...]:
    from adamac import embedded

    return tuple(_prompt(entry, f"p{place:03}") for place, entry in enumerate(embedded.prompts(), 1))


def _first_of_each(prompts: tuple[Prompt, ...], categories: int) -> tuple[Prompt, ...]:
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.category, prompt)
    return tuple(first.values())[:categories]


def _check_unique(path: Path, prompts: tuple[Prompt, ...]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.slug in seen:
            raise BadInput(f"prompts: {path} has the id {prompt.id!r} twice")
        seen.add(prompt.slug)


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or "not UTF-8 text"
