"""Claims about the reductions over clusters, against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamac.ops.segment import Segments, segment_mean, segment_min_max, segment_sum, segment_variance


@st.composite
def labelled(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Values, labels with padding and empty segments, and the number of segments."""
    batch, heads, tokens, dim = (draw(st.integers(1, high)) for high in (2, 3, 40, 5))
    segments = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.randint(-1, segments, (batch, heads, tokens), generator=generator)
    values = torch.randint(-50, 50, (batch, heads, tokens, dim), generator=generator).float()
    return values, labels, segments


def by_loop(values, labels, segments, reduce):
    """Reduce the rows of each segment; zeros where there are none."""
    out = torch.zeros(*labels.shape[:2], segments, values.shape[-1])
    for sample, head, segment in (
        torch.cartesian_prod(*map(torch.arange, out.shape[:3])).reshape(-1, 3).tolist()
    ):
        rows = values[sample, head][labels[sample, head] == segment]
        if len(rows):
            out[sample, head, segment] = reduce(rows)
    return out


@given(labelled())
def test_counts_are_those_of_a_loop(case):
    values, labels, segments = case
    counted = by_loop(torch.ones_like(values), labels, segments, lambda rows: rows.sum(0))
    assert torch.equal(Segments(labels, segments).counts, counted[..., 0].long())


@given(labelled())
def test_lists_and_labels_say_the_same(case):
    _, labels, segments = case
    by_label = Segments(labels, segments)
    for head in torch.cartesian_prod(*map(torch.arange, labels.shape[:2])).reshape(-1, 2).tolist():
        at = tuple(head)
        expected = [
            token for s in [*range(segments), -1] for token in (labels[at] == s).nonzero().flatten().tolist()
        ]
        assert by_label.order[at].tolist() == expected
        assert by_label.starts[at].diff().tolist() == by_label.counts[at].tolist()
    by_list = Segments.listed(by_label.order, by_label.starts)
    assert by_list.number == segments
    assert torch.equal(by_list.labels, labels)
    assert torch.equal(by_list.counts, by_label.counts)


@given(labelled())
def test_sum_and_mean_are_those_of_a_loop(case):
    values, labels, segments = case  # small integers, so that sums are exact
    sums = by_loop(values, labels, segments, lambda rows: rows.sum(0))
    assert torch.equal(segment_sum(values, Segments(labels, segments)), sums)
    assert torch.equal(
        segment_mean(values, Segments(labels, segments)),
        by_loop(values, labels, segments, lambda r: r.sum(0) / len(r)),
    )


@given(labelled())
def test_minimum_and_maximum_are_those_of_a_loop_and_zero_for_empty_segments(case):
    values, labels, segments = case
    low, high = segment_min_max(values, Segments(labels, segments))
    assert torch.equal(low, by_loop(values, labels, segments, lambda rows: rows.amin(0)))
    assert torch.equal(high, by_loop(values, labels, segments, lambda rows: rows.amax(0)))


@given(labelled())
def test_variance_is_that_of_a_loop(case):
    values, labels, segments = case
    mean = segment_mean(values, Segments(labels, segments))
    variance = segment_variance(values, Segments(labels, segments), mean)
    torch.testing.assert_close(
        variance, by_loop(values, labels, segments, lambda rows: rows.var(0, correction=0))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 8, 1), (2, 3, 63, 40, 5), (1, 2, 300, 64, 4), (1, 2, 100, 128, 150)]
)
def test_the_kernel_reduces_as_plain_torch_does(shape, dtype, device):
    batch, heads, tokens, dim, number = shape
    values = torch.randn(batch, tokens, heads, dim, device=device).to(dtype).transpose(1, 2)  # not contiguous
    segments = Segments(torch.randint(-1, number, (batch, heads, tokens), device=device), number)
    means = segment_mean(values, segments, impl="torch")
    spread = [segment_variance(values, segments, means, impl=impl) for impl in ("triton", "torch")]
    torch.testing.assert_close(*spread)
    for reduce in (segment_sum, segment_mean, segment_min_max):
        ours, plain = (reduce(values, segments, impl=impl) for impl in ("triton", "torch"))
        torch.testing.assert_close(ours, plain)
    unit = [segment_sum(values, segments, normalise=True, impl=impl) for impl in ("triton", "torch")]
    torch.testing.assert_close(*unit)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_single(device, dtype, impl):
    values = torch.ones(1, 1, 4096, 1, dtype=dtype, device=device)  # in bfloat16 the sum would stop at 256
    labels = torch.zeros(1, 1, 4096, dtype=torch.long, device=device)
    total = segment_sum(values, Segments(labels, 1), impl=impl)
    assert total.dtype == torch.float32
    assert total.item() == 4096


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_sums_are_the_same_bits_every_time(device, impl):
    values = torch.randn(2, 3, 1000, 16, device=device)
    labels = torch.randint(-1, 40, (2, 3, 1000), device=device)
    first = segment_sum(values, Segments(labels, 40), impl=impl)
    assert all(torch.equal(segment_sum(values, Segments(labels, 40), impl=impl), first) for _ in range(3))


def test_padding_belongs_to_no_segment(device):
    values = torch.full((1, 1, 3, 2), torch.nan, device=device)
    labels = torch.full((1, 1, 3), -1, device=device)
    assert torch.equal(segment_sum(values, Segments(labels, 2)), torch.zeros(1, 1, 2, 2, device=device))
    assert torch.equal(Segments(labels, 2).counts, torch.zeros(1, 1, 2, dtype=torch.long, device=device))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("reduce", [segment_sum, segment_mean, segment_min_max])
def test_segments_of_other_tokens_are_refused(reduce, impl, device):
    labels = torch.zeros(1, 2, 30, dtype=torch.long, device=device)
    values = torch.zeros(1, 2, 31, 8, device=device)
    with pytest.raises(ValueError, match=r"segments must have shape \(1, 2, 31\).* got \(1, 2, 30\)"):
        reduce(values, Segments(labels, 3), impl=impl)
    with pytest.raises(ValueError, match="segments is on meta, the rest is on"):
        reduce(values[:, :, 1:], Segments(labels.to("meta"), 3), impl=impl)
