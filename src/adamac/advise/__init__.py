"""Cost models: will it pay here?

:mod:`adamac.advise.moe` compares two mixture-of-experts layers by what :mod:`adamac.moe.cost` predicts of each; the constants of a
:class:`Machine` are measured (:mod:`adamac.advise.measure`), given or assumed; :mod:`adamac.advise.check` compares predictions with
the layer itself.
"""

from __future__ import annotations

from adamac.advise.moe import Comparison, compare, project
from adamac.moe.cost import Cost, Machine, Network, Prediction, Work, fastest_dispatcher, machine_of, predict

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
