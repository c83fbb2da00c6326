"""Arguments of the pipeline call: settings of a run, and further ones for what only some pipelines have: ``true_cfg_scale``, ``guidance_scale_2``, ``strength``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from adamac.bakeoff.errors import BadInput

SETTINGS = {
    "steps": "num_inference_steps",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "guidance": "guidance_scale",
}
"""Settings of a run that are arguments of the call, and how pipelines name them."""

# Arguments that a bake-off sets itself, and what sets them.
_TAKEN = {
    **{argument: f"--{name}" for name, argument in SETTINGS.items()},
    "prompt": "--prompts",
    "negative_prompt": "--negative-prompt or the prompts' own",
    "image": "the prompts",
    "generator": "--seeds",
    **dict.fromkeys(
        ("latents", "output_type", "return_dict", "callback_on_step_end", "num_videos_per_prompt"),
        "the bake-off itself, alike for all arms",
    ),
}


def parse(words: Iterable[str]) -> dict[str, Any]:
    """Read words of the form ``NAME=VALUE``; a value that is not JSON is a text.

    Raises:
        BadInput: If a word is of another form, or a name is there twice or set elsewhere.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise BadInput(f"call: expected NAME=VALUE, as true_cfg_scale=6, got {word!r}")
        if name in found:
            raise BadInput(f"call: {name} is given twice")
        if name in _TAKEN:
            raise BadInput(f"call: {name} is set by {_TAKEN[name]}")
        found[name] = _value(text)
    return found


def check(given: Mapping[str, Any], accepted: Iterable[str], kind: str) -> None:
    """Refuse what a pipeline does not take.

    Args:
        given: Arguments by name.
        accepted: Names that its call has.
        kind: What the pipeline is called.

    Raises:
        BadInput: If there is such an argument.
    """
    for name in given:
        if name not in accepted:
            near = difflib.get_close_matches(name, [other for other in accepted if other not in _TAKEN], n=1)
            raise BadInput(f"call: {kind} has no {name}" + (f"; did you mean {near[0]}?" if near else ""))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
