"""adamac: sparse attention for video diffusion transformers, and Mixture-of-Experts that communicates less.

``import adamac`` is light: torch and diffusers are imported when something of theirs is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adamac._version import __version__

if TYPE_CHECKING:
    from adamac.attention import AdaCluster, Schedule, Tokens
    from adamac.integrations.diffusers import enable

_LAZY = {
    "enable": "adamac.integrations.diffusers",
    "AdaCluster": "adamac.attention",
    "Schedule": "adamac.attention",
    "Tokens": "adamac.attention",
}

__all__ = ["AdaCluster", "Schedule", "Tokens", "__version__", "enable"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            from adamac.extras import remedy

            if (line := remedy(error, "diffusers")) is None:
                raise
            raise ModuleNotFoundError(f"adamac.{name}: {line}", name=error.name) from None
    raise AttributeError(f"module 'adamac' has no attribute {name!r}")
