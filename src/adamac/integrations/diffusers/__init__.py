"""Sparse attention in diffusers pipelines of Wan 2.1 and 2.2, HunyuanVideo and CogVideoX."""

from adamac.integrations.diffusers.families import FAMILIES, Family, UnsupportedModelError
from adamac.integrations.diffusers.handle import Handle, enable
from adamac.integrations.diffusers.inspect import Finding, inspect
from adamac.integrations.diffusers.ledger import Report
from adamac.integrations.diffusers.parallel import parallelize

__all__ = [
    "FAMILIES",
    "Family",
    "Finding",
    "Handle",
    "Report",
    "UnsupportedModelError",
    "enable",
    "inspect",
    "parallelize",
]
