"""Dense attention as a method: the plan in which everything reads everything."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adamac.attention.layout import Layout, check_attention_inputs
from adamac.attention.plan import Plan


@dataclass(frozen=True)
class Dense:
    """Attend to everything."""

    def __call__(
        self, query: Tensor, key: Tensor, *, layout: Layout | None = None, previous: Plan | None = None
    ) -> Plan:
        """Return the dense plan; see :meth:`adamac.attention.AdaCluster.__call__` for the arguments."""
        layout = layout or Layout.video_only(query.shape[-2])
        check_attention_inputs(query, key, layout)
        return Plan.dense(layout, "method: dense")
