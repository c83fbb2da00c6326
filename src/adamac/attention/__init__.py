"""What is attended: plans, the methods that make them, and the executor that carries them out."""

from typing import Protocol

from torch import Tensor

from adamac.attention.adacluster import AdaCluster
from adamac.attention.attend import attend
from adamac.attention.block_topk import BlockTopK
from adamac.attention.dense import Dense
from adamac.attention.layout import Layout
from adamac.attention.oracle import Oracle
from adamac.attention.plan import Clusters, Plan
from adamac.attention.schedule import Schedule
from adamac.attention.select import Tokens, TopK, TopP
from adamac.attention.sparsed import SparseD
from adamac.attention.svg2 import SVG2


class Method(Protocol):
    """Anything that turns query and key into a plan; a function will do."""

    def __call__(
        self, query: Tensor, key: Tensor, *, layout: Layout | None = None, previous: Plan | None = None
    ) -> Plan:
        """Plan one attention call; see :meth:`AdaCluster.__call__`."""
        ...


__all__ = [
    "SVG2",
    "AdaCluster",
    "BlockTopK",
    "Clusters",
    "Dense",
    "Layout",
    "Method",
    "Oracle",
    "Plan",
    "Schedule",
    "SparseD",
    "Tokens",
    "TopK",
    "TopP",
    "attend",
]
