"""Prompts: read from a file, or chosen from those that ship with the package."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adamac.bakeoff.errors import BadInput
from adamac.bakeoff.picture import Picture

_KEYS = ("prompt", "id", "category", "negative_prompt", "image")
_KINDS = {
    "id": str | int | None,
    "category": str | int | None,
    "negative_prompt": str | None,
    "image": str | None,
}
# Names that others give to some of them, too far from ours to be taken for a slip.
_OTHER_NAMES = {"negative": "negative_prompt", "image_path": "image", "first_frame": "image"}
# What would change a video if it were read.
_CHANGES = (
    "seed",
    "seeds",
    "guidance",
    "guidance_scale",
    "steps",
    "height",
    "width",
    "frames",
)
# Bytes of an id in the name of a video file, which most systems allow 255 in all.
_LONGEST_SLUG = 150
# Categories in a default run: enough to see that they differ, few enough for a coffee break on a laptop.
DEFAULT_CATEGORIES = 4


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: Names its videos; unique within a run.
        category: What kind of scene it is; the report groups by it.
        text: What the model is given.
        negative: What it is to keep away from; ``None`` leaves that to the pipeline.
        image: What the video begins with.
    """

    id: str
    category: str
    text: str
    negative: str | None = None
    image: Picture | None = None

    @property
    def slug(self) -> str:
        """The id, fit for a file name."""
        return re.sub(r"[^\w.-]+", "-", self.id).strip("-.") or "prompt"  # \w: letters of any script

    def arguments(self) -> dict[str, Any]:
        """What a pipeline is called with."""
        found = {"prompt": self.text, "negative_prompt": self.negative}
        if self.image is not None:
            found["image"] = self.image.load()
        return {name: value for name, value in found.items() if value is not None}


def choose_prompts(choice: str | None, model: str | None, negative: str | None = None) -> tuple[Prompt, ...]:
    """Choose prompts.

    Args:
        choice: A file, ``"all"`` for every prompt that ships with the package, or ``None`` for the first prompt of each
            of the first few categories.
        model: The model that they are for; ``None``, the embedded one, has prompts of its own.
        negative: Negative prompt of all that have none of their own.

    Raises:
        BadInput: If the file is missing, empty or not what it should be.
    """
    chosen = read_prompts(Path(choice)) if choice not in (None, "all") else _shipped(choice, model)
    return tuple(replace(p, negative=negative) if p.negative is None else p for p in chosen)


def _shipped(choice: str | None, model: str | None) -> tuple[Prompt, ...]:
    prompts = (
        _embedded_prompts() if model is None else read_prompts(Path(__file__).with_name("prompts.jsonl"))
    )
    return prompts if choice == "all" else _first_of_each(prompts, DEFAULT_CATEGORIES)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a file of prompts: JSON lines if its first line starts with a brace, plain lines otherwise.

    A JSON line has ``prompt``, and may have ``id``, ``category``, ``negative_prompt`` and ``image``, a file beside this one
    or elsewhere. Other keys are not read; one that looks like a slip of these, or that would change the video, is refused.
    Empty lines and lines that start with ``#`` are skipped.

    Raises:
        BadInput: If there is nothing to read, or a line is not a prompt.
    """
    try:
        # Some editors put a mark in front, which is no part of a prompt.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts: cannot read {path} ({_why(error)})") from None
    # Not splitlines(), which would cut a prompt at a line separator within it.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if lines and lines[0][1].startswith("{"):
        prompts = tuple(_from_json(path, number, line) for number, line in lines)
    elif _is_json_list(text):
        raise BadInput(f"prompts: {path} is one JSON document; expected a JSON object a line, or plain lines")
    else:
        prompts = tuple(Prompt(f"p{place:03}", "any", line) for place, (_, line) in enumerate(lines, 1))
    if not prompts:
        raise BadInput(f"prompts: {path} holds no prompt")
    _check_ids(path, prompts)
    return prompts


def _from_json(path: Path, number: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"prompts: {path}, line {number} is not JSON ({error.msg})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise BadInput(f'prompts: {path}, line {number} has no "prompt"')
    for key in entry.keys() - set(_KEYS):
        meant = _OTHER_NAMES.get(key) or next(iter(difflib.get_close_matches(key, _KEYS, 1, 0.75)), None)
        if meant:
            raise BadInput(f"prompts: {path}, line {number} has a key {key!r}; did you mean {meant}?")
        if key in _CHANGES:
            raise BadInput(
                f"prompts: {path}, line {number} has a {key}, which is not of a prompt here; remove it, "
                "all prompts are made alike"
            )
    for key, kinds in _KINDS.items():
        if not isinstance(entry.get(key), kinds):
            raise BadInput(
                f"prompts: {path}, line {number}: {key} must be a text, got {json.dumps(entry[key])}"
            )
    try:
        return _prompt(entry, f"p{number:03}", path.parent)
    except BadInput as error:
        raise BadInput(f"prompts: {path}, line {number}: {error}") from None


def _is_json_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except json.JSONDecodeError:
        return False


def _prompt(entry: dict[str, Any], default_id: str, folder: Path) -> Prompt:
    name, category = (entry.get(key) for key in ("id", "category"))
    return Prompt(
        id=default_id if name is None else str(name),
        category="any" if category is None else str(category),
        text=entry["prompt"].strip(),
        negative=entry.get("negative_prompt"),
        image=None if entry.get("image") is None else Picture.find(folder / entry["image"]),
    )


def _embedded_prompts() -> tuple[Prompt, ...]:
    from adamac import embedded

    return tuple(_prompt(entry, f"p{place:03}", Path()) for place, entry in enumerate(embedded.prompts(), 1))


def _first_of_each(prompts: tuple[Prompt, ...], categories: int) -> tuple[Prompt, ...]:
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.category, prompt)
    return tuple(first.values())[:categories]


def _check_ids(path: Path, prompts: tuple[Prompt, ...]) -> None:
    """Refuse ids by which the files of two prompts, or of one, could not be named."""
    seen: dict[str, str] = {}
    for prompt in prompts:
        if len(prompt.slug.encode()) > _LONGEST_SLUG:
            raise BadInput(
                f"prompts: {path} has an id too long to name files by, {prompt.id[:20]!r}...; expected at most "
                f"{_LONGEST_SLUG} bytes"
            )
        if (former := seen.get(prompt.slug)) == prompt.id:
            raise BadInput(f"prompts: {path} has the id {prompt.id!r} twice")
        if former is not None:
            raise BadInput(
                f"prompts: {path} has the ids {former!r} and {prompt.id!r}, whose files would have one name; change either"
            )
        seen[prompt.slug] = prompt.id


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or "not UTF-8 text"
