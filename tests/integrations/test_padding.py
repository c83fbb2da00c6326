"""Claims about reading the lengths of padded texts."""

from __future__ import annotations

import gc

import pytest
import torch

from adamac.integrations.diffusers.padding import TextLengths, common_length


def mask_of(*rows: list[int], dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype)


class Reader:
    """Counts how often the device had to be waited for."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, mask: torch.Tensor) -> int | None:
        self.reads += 1
        return common_length(mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([[1, 1, 0, 0]], 2),
        ([[1, 1, 0, 0], [1, 1, 0, 0]], 2),
        ([[1, 1, 1, 1]], 4),
        ([[0, 0, 0, 0]], 0),
        ([[1, 1, 0, 0], [1, 1, 1, 0]], None),  # samples differ
        ([[1, 0, 1, 0]], None),  # a hole
        ([[0, 0, 1, 1]], None),  # padding comes first
    ],
)
def test_the_length_is_that_of_the_ones_in_front_if_samples_agree(rows, length, dtype, device):
    assert common_length(mask_of(*rows, dtype=dtype).to(device)) == length


def test_weights_that_are_neither_one_nor_zero_have_no_length():
    assert common_length(torch.tensor([[2.0, 1.0, 0.0]])) is None


def test_a_mask_is_read_once_however_often_it_is_asked_for(device):
    read, mask = Reader(), mask_of([1, 1, 0]).to(device)
    lengths = TextLengths(read)
    assert [lengths.of(mask) for _ in range(5)] == [2] * 5
    assert read.reads == 1


def test_that_a_mask_has_no_common_length_is_remembered_too():
    read, mask = Reader(), mask_of([1, 0, 1])
    lengths = TextLengths(read)
    assert [lengths.of(mask) for _ in range(3)] == [None] * 3
    assert read.reads == 1


def test_masks_of_two_branches_are_both_remembered():
    read, masks = Reader(), [mask_of([1, 1, 0]), mask_of([1, 0, 0])]
    lengths = TextLengths(read)
    assert [lengths.of(mask) for _ in range(3) for mask in masks] == [2, 1] * 3
    assert read.reads == 2


def test_a_mask_that_was_changed_in_place_is_read_anew():
    read, mask = Reader(), mask_of([1, 1, 0])
    lengths = TextLengths(read)
    assert lengths.of(mask) == 2
    mask[0, 1] = 0
    assert lengths.of(mask) == 1
    assert read.reads == 2


def test_changes_in_inference_mode_are_not_missed():
    lengths = TextLengths()
    with torch.inference_mode():
        mask = mask_of([1, 1, 0])
        assert lengths.of(mask) == 2
        mask[0, 1] = 0
        assert lengths.of(mask) == 1


def test_masks_are_not_kept_alive():
    lengths, mask = TextLengths(), mask_of([1, 1, 0])
    lengths.of(mask)
    assert len(lengths._known) == 1
    del mask
    gc.collect()
    assert len(lengths._known) == 0


@pytest.mark.parametrize(
    "mask", [None, torch.ones(3), torch.ones(1, 1, 3), torch.ones(0, 3), torch.ones(2, 0)]
)
def test_what_is_not_a_mask_of_samples_and_tokens_has_no_length(mask):
    assert TextLengths().of(mask) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_nothing_is_read_while_a_graph_is_captured(device):
    read, known, new = Reader(), mask_of([1, 1, 0]).to(device), mask_of([1, 0, 0]).to(device)
    lengths = TextLengths(read)
    lengths.of(known)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ones(1, device=device)
        assert (lengths.of(known), lengths.of(new)) == (2, None)
    assert lengths.of(new) == 1
    assert read.reads == 2
