"""Say, before anything runs, what would be sparse in a model and what would not, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adamac.integrations.diffusers.families import family_of, transformers_by_name

# Classes that attend, by the end of their names.
_ATTENTION = ("Attention", "Attention2_0")


@dataclass(frozen=True)
class Finding:
    """What becomes of one attention module.

    Attributes:
        module: Its name, with the transformer's in front.
        sparse: Whether :func:`adamac.enable` makes it sparse.
        reason: Why, or why not.
    """

    module: str
    sparse: bool
    reason: str


def inspect(pipe: Any) -> list[Finding]:
    """List every attention module of a pipeline's transformers.

    Raises:
        UnsupportedModelError: If the model's family is unknown.
    """
    findings = []
    for prefix, transformer in transformers_by_name(pipe).items():
        family = family_of(transformer)
        sparse = {name for name, _ in family.modules(transformer)}
        for name, module in transformer.named_modules():
            if name in sparse:
                findings.append(Finding(f"{prefix}.{name}", True, f"self-attention of {family.name}"))
            elif type(module).__name__.endswith(_ATTENTION):
                findings.append(Finding(f"{prefix}.{name}", False, _why_not(name)))
    return findings


def _why_not(name: str) -> str:
    if "refiner" in name:
        return "token refiner: attends within the text"
    if name.endswith("attn2"):
        return "cross-attention: few keys"
    return "not a self-attention over video tokens"
