"""Mixture of experts, and what its communication costs: one layer for BigMac, its family and its baseline.

See :mod:`adamac.moe.layer` for the layer, :mod:`adamac.moe.presets` for its shapes, :mod:`adamac.moe.dispatch` for how rows travel and
:mod:`adamac.moe.traffic` for what that costs.
"""

from __future__ import annotations

from adamac.moe.layer import MoE
from adamac.moe.presets import PAPER_MODELS, PRESETS, MoEConfig, preset
from adamac.moe.routing import Router, Routing
from adamac.moe.traffic import Traffic

__all__ = ["PAPER_MODELS", "PRESETS", "MoE", "MoEConfig", "Router", "Routing", "Traffic", "preset"]
