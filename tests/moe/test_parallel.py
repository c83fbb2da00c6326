"""Claims about experts on a grid of ranks, and about the files that such models are saved in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from on_ranks import (
    Stack,
    accumulated_casts_error,
    drawn_in_shares,
    gradient_errors,
    loads_under_ddp,
    read_weights,
    write_weights,
)

from adamac.moe import MoE, preset
from adamac.moe.weights import load_weights, save_weights
from adamac.testing import run_ranks

CONFIG = preset("bigmac_stable", 16, num_experts=8, top_k=3, ratio=0.5, shared_ffn=4)


@pytest.mark.parametrize(("ranks", "per_row"), [(4, [2, 4]), (2, [2, 1])])
def test_gradients_on_a_grid_equal_those_of_one_rank(ranks, per_row):
    """Replicated or sharded, whether rows or columns of the grid are one rank long or longer."""
    for errors in run_ranks(gradient_errors, ranks, CONFIG, per_row):
        assert max(errors.values()) < 1e-12, errors


def test_experts_that_are_gathered_for_each_pass_keep_no_casts():
    assert run_ranks(accumulated_casts_error, 2, CONFIG) == [0.0, 0.0]


def test_each_rank_counts_its_own_load_under_data_parallelism():
    """Whose buffers are the first rank's before every pass."""
    for counted, expected in run_ranks(loads_under_ddp, 2, CONFIG):
        assert counted.tolist() == expected.tolist()


@pytest.mark.parametrize("expert_ranks", [1, 2, 4])
def test_a_layer_in_shares_is_drawn_like_a_whole_one(expert_ranks):
    assert run_ranks(drawn_in_shares, 4, CONFIG, expert_ranks) == [0.0] * 4


def test_weights_of_four_ranks_are_read_by_two_and_by_one(tmp_path):
    four, two = str(tmp_path / "four.safetensors"), str(tmp_path / "two.safetensors")
    run_ranks(write_weights, 4, CONFIG, 4, four, False)
    assert run_ranks(read_weights, 2, CONFIG, 2, four, False) == [0.0, 0.0]
    assert run_ranks(read_weights, 4, CONFIG, 2, four, True) == [0.0] * 4
    run_ranks(write_weights, 4, CONFIG, 2, two, True)
    torch.manual_seed(5)
    original = Stack(CONFIG, None, torch.float32)
    for path in (four, two):
        model = Stack(CONFIG, None, torch.float32)
        load_weights(model, path)
        for name, tensor in original.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name


def test_weights_are_on_the_disk_before_the_former_file_is_replaced(tmp_path, monkeypatch):
    path, layer, forced = tmp_path / "layer.safetensors", MoE(CONFIG), []
    save_weights(layer, path)
    former, sync = path.read_bytes(), os.fsync

    def seen(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        forced.append((name, path.read_bytes() == former))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    with torch.no_grad():
        layer.router.weight.zero_()
    save_weights(layer, path)
    assert forced == [("layer.safetensors.part", True), (tmp_path.name, False)]


def test_a_damaged_or_foreign_file_is_refused_and_changes_nothing(tmp_path):
    path, layer = tmp_path / "layer.safetensors", MoE(CONFIG)
    save_weights(layer, path)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated or no safetensors"):
            load_weights(layer, path)
    with pytest.raises(ValueError, match="no file"):
        load_weights(layer, tmp_path / "nowhere")
    path.write_bytes(whole)
    more = preset("bigmac_stable", 16, num_experts=16, top_k=3, ratio=0.5, shared_ffn=4)
    with pytest.raises(ValueError, match=r"another model.*\(8, .* there, \(16"):
        load_weights(MoE(more), path)
    with pytest.raises(ValueError, match="it lacks"):
        load_weights(Stack(CONFIG, None, torch.float32), path)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(before[name], tensor), name
