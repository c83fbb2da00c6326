"""Cost models: will it pay here?

:mod:`adamac.advise.moe` predicts what a mixture-of-experts layer takes, from the constants of a :class:`Machine` that are measured
(:mod:`adamac.advise.measure`), given or assumed; :mod:`adamac.advise.check` compares predictions with the layer itself.
"""

from __future__ import annotations

from adamac.advise.cost import Cost, Work
from adamac.advise.machine import Machine, machine_of
from adamac.advise.moe import Comparison, Network, Prediction, compare, predict, project
from adamac.advise.pick import fastest_dispatcher

__all__ = [
    "Comparison",
    "Cost",
    "Machine",
    "Network",
    "Prediction",
    "Work",
    "compare",
    "fastest_dispatcher",
    "machine_of",
    "predict",
    "project",
]
