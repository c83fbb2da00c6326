"""What a layer takes: milliseconds by stage, from its shape and the constants of a machine.

- :mod:`adamac.moe.cost.work` takes a layer to pieces: how much of each operation it does;
- :mod:`adamac.moe.cost.constants` says what an operation costs, and fits that to measured times;
- :class:`Machine` holds these constants, each with its source, and is saved as a file;
- :func:`predict` puts them together, and :func:`fastest_dispatcher` picks by it, as ``MoE(..., "auto", machine=...)`` does.

It lies here and not beside what measures and compares (:mod:`adamac.advise`), as the layer itself goes by it.
"""

from __future__ import annotations

from adamac.moe.cost.constants import Cost, Work
from adamac.moe.cost.machine import Machine, machine_of
from adamac.moe.cost.pick import fastest_dispatcher
from adamac.moe.cost.predict import Network, Prediction, predict

__all__ = [
    "Cost",
    "Machine",
    "Network",
    "Prediction",
    "Work",
    "fastest_dispatcher",
    "machine_of",
    "predict",
]
