"""Which optional packages belong to which extra, and what to say when one is missing.

Packages are imported where they are used. Who meets the user, the command line and ``adamac.enable``, says what
:func:`remedy` makes of a ``ModuleNotFoundError``.
"""

from __future__ import annotations

_DIFFUSERS = {"accelerate", "diffusers", "ftfy", "safetensors", "transformers"}

EXTRAS: dict[str, set[str]] = {
    "diffusers": _DIFFUSERS,
    "moe": {"numpy", "safetensors", "tokenizers"},
    "bakeoff": _DIFFUSERS | {"PIL", "av", "cv2", "filelock", "jinja2", "matplotlib", "numpy", "skimage"},
}
"""The modules that each extra brings, by the names they are imported by."""


def remedy(error: ModuleNotFoundError, extra: str) -> str | None:
    """Say in a line which extra brings a module that is missing.

    Args:
        error: What the import raised.
        extra: The one that what is being done needs; another is named only if this one does not bring the module.

    Returns:
        The line, or ``None`` if no extra brings the module: then something else is wrong.
    """
    module = (error.name or "").partition(".")[0]
    bringing = next((name for name in (extra, *EXTRAS) if module in EXTRAS[name]), None)
    if bringing is None:
        return None
    return f"{module} is not installed; install it with pip install 'adamac[{bringing}]'"
