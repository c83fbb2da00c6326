"""Segments of a sequence (the members of each cluster) and what is reduced over them: sum, mean, variance, minimum, maximum.

Every token carries a label, the segment it belongs to; a token labelled ``-1`` belongs to none and is left out. Segments may
be ragged and empty. Sums are deterministic: rows are added in a fixed order, never by atomic additions.

``torch`` is plain torch on any device and says what is meant; ``triton`` gives a program to each segment, which reads its
rows where they are.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from adamac.ops.inputs import check_shape
from adamac.ops.launch import Impl, chosen


class Segments:
    """Which tokens of every head make up each segment: as labels, or as lists; one is made from the other if asked for.

    Attributes:
        number: How many segments there are, empty ones included.
    """

    def __init__(self, labels: Tensor, number: int) -> None:
        """Take labels: ``[batch, heads, tokens]`` integers from -1 to ``number - 1``; -1 belongs to none."""
        self.number = number
        self.labels = labels

    @classmethod
    def listed(cls, order: Tensor, starts: Tensor) -> Segments:
        """Take lists (see ``order`` and ``starts``) that are known already, so that nothing is sorted."""
        segments = cls.__new__(cls)
        segments.number, segments.order, segments.starts = starts.shape[-1] - 1, order, starts
        return segments

    @property
    def shape(self) -> torch.Size:
        """``(batch, heads, tokens)``."""
        return self._held.shape

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._held.device

    @property
    def _held(self) -> Tensor:
        return self.labels if "labels" in self.__dict__ else self.order

    @cached_property
    def labels(self) -> Tensor:
        """The segment of each token: ``[batch, heads, tokens]`` integers, -1 for none."""
        place = torch.arange(self.order.shape[-1], device=self.order.device, dtype=self.starts.dtype)
        ends = self.starts[..., 1:].contiguous()
        found = torch.searchsorted(ends, place.expand(self.order.shape).contiguous(), right=True)
        found = found.masked_fill_(found == self.number, -1)
        return torch.empty_like(found).scatter_(-1, self.order.long(), found)

    @cached_property
    def counts(self) -> Tensor:
        """Tokens of each segment: ``[batch, heads, number]`` int64."""
        if "starts" in self.__dict__ or self._on_gpu:
            return self.starts.diff().long()
        # Tokens of no segment are counted in one more, which is cut off. Integer additions commute: any order will do.
        slots = torch.where(self.labels < 0, self.number, self.labels).long()
        counts = slots.new_zeros(*slots.shape[:-1], self.number + 1)
        return counts.scatter_add_(-1, slots, torch.ones_like(slots))[..., : self.number]

    @cached_property
    def starts(self) -> Tensor:
        """Where each segment begins in ``order``: ``[batch, heads, number + 1]`` int32; the last is where none begins."""
        if self._on_gpu:
            # It will need the order too, and finds bounds in sorted labels sooner than it counts.
            labels, self.order = self._sort()
            wanted = torch.arange(self.number + 1, device=labels.device, dtype=labels.dtype)
            wanted = wanted.expand(*labels.shape[:-1], -1).contiguous()
            return torch.searchsorted(labels, wanted, out_int32=True)
        return torch.nn.functional.pad(self.counts.cumsum(-1), (1, 0)).int()

    @cached_property
    def order(self) -> Tensor:
        """Tokens, segment after segment and in the order of the sequence within, none's last: like ``labels``, int32."""
        return self._sort()[1]

    def _sort(self) -> tuple[Tensor, Tensor]:
        slots = torch.where(self.labels < 0, self.number, self.labels)
        # Labels of 16 bits take half the passes of a radix sort.
        narrow = slots.to(torch.int16) if self.number < 2**15 else slots
        labels, order = narrow.sort(dim=-1, stable=True)
        return labels, order.int()

    @property
    def _on_gpu(self) -> bool:
        return "labels" in self.__dict__ and self.labels.device.type == "cuda"

    def nbytes(self) -> int:
        """Bytes of what is held now."""
        return sum(
            held.numel() * held.element_size() for held in self.__dict__.values() if isinstance(held, Tensor)
        )


def segment_sum(
    values: Tensor, segments: Segments, *, normalise: bool = False, impl: Impl = "auto"
) -> Tensor:
    """Add up the rows of each segment in float32 (float64 stays float64).

    Args:
        values: ``[batch, heads, tokens, dim]``.
        segments: Of the tokens.
        normalise: Scale each row to length 1 first (a row of zeros stays).
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``[batch, heads, number, dim]``; zeros for an empty segment.
    """
    check_shape("segments", segments, tuple(values.shape[:3]), like=values)
    if chosen(impl, values) == "triton":
        from adamac.ops.segment import triton as kernels

        return kernels.segment_moments(values, segments, "sum", normalise)[0]
    from adamac.ops.segment import reference

    return reference.segment_sum(values, segments, normalise)


def segment_mean(values: Tensor, segments: Segments, *, impl: Impl = "auto") -> Tensor:
    """Average the rows of each segment; see :func:`segment_sum`. An empty segment gives zeros."""
    check_shape("segments", segments, tuple(values.shape[:3]), like=values)
    if chosen(impl, values) == "triton":
        from adamac.ops.segment import triton as kernels

        return kernels.segment_moments(values, segments, "mean", False)[0]
    from adamac.ops.segment import reference

    return reference.segment_mean(values, segments)


def segment_variance(values: Tensor, segments: Segments, means: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Average the squared deviations of the rows of each segment from its mean, coordinate by coordinate.

    From the deviations, not as E[x^2] - E[x]^2, which cancels badly.

    Args:
        values: ``[batch, heads, tokens, dim]``.
        segments: Of the tokens.
        means: ``[batch, heads, number, dim]``, as :func:`segment_mean` gives them.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``[batch, heads, number, dim]`` float32 (float64 stays); zeros for an empty segment.
    """
    check_shape("segments", segments, tuple(values.shape[:3]), like=values)
    if chosen(impl, values) == "triton":
        from adamac.ops.segment import triton as kernels

        return kernels.segment_moments(values, segments, "variance", False, means)[0]
    from adamac.ops.segment import reference

    return reference.segment_variance(values, segments, means)


def segment_min_max(values: Tensor, segments: Segments, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Take the elementwise minimum and maximum over the rows of each segment.

    Args:
        values: ``[batch, heads, tokens, dim]``.
        segments: Of the tokens.
        impl: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        Minimum and maximum, each ``[batch, heads, number, dim]`` in float32 (float64 stays). An empty segment gives zeros
        in both, so that products with it stay finite; mask it by its count.
    """
    check_shape("segments", segments, tuple(values.shape[:3]), like=values)
    if chosen(impl, values) == "triton":
        from adamac.ops.segment import triton as kernels

        return kernels.segment_moments(values, segments, "extremes", False)
    from adamac.ops.segment import reference

    return reference.segment_min_max(values, segments)
