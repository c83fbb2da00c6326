"""Other people's kernels are given the work that they are compared on, and are not timed when they do it wrong."""

import pytest
import torch

from adamac.attention import Layout
from adamac.bench import rivals
from adamac.bench.rivals import _disagreement, block_contenders, draw_blocks
from adamac.testing import attention_like


def by_mask(query, key, value, blocks):
    """Attention over the blocks by a mask, the slow way."""
    allowed = torch.zeros(query.shape[1], query.shape[2], key.shape[2], dtype=torch.bool)
    for head, rows in enumerate(blocks.chosen.tolist()):
        for row, chosen in enumerate(rows):
            for block in chosen:
                allowed[head, row * 128 : row * 128 + 128, block * 128 : block * 128 + 128] = True
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed[None])


@pytest.mark.parametrize("tokens", [128, 700, 1000])
def test_every_block_of_queries_reads_as_many_whole_blocks(tokens):
    query, key, _ = attention_like(1, 2, tokens, 64)
    blocks = draw_blocks(query, key, 0.3)
    assert blocks.chosen.shape[:2] == (2, -(-tokens // 128))
    assert (blocks.chosen.diff(dim=-1) > 0).all()  # none twice
    assert blocks.chosen.max() < tokens // 128  # whole ones
    assert abs(blocks.density - 0.3) <= 0.5 * 128 / tokens + 128 / tokens


def test_too_few_keys_for_a_block_are_refused():
    query, key, _ = attention_like(1, 2, 100, 64)
    with pytest.raises(ValueError, match="blocks of 128"):
        draw_blocks(query, key, 0.3)


def test_a_kernel_that_reads_other_blocks_is_found_out():
    query, key, value = attention_like(1, 2, 1000, 64)
    blocks = draw_blocks(query, key, 0.3)
    assert _disagreement(by_mask(query, key, value, blocks), query, key, value, blocks) is None
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert _disagreement(dense, query, key, value, blocks) is not None


def test_a_contender_that_cannot_run_says_why():
    query, key, value = attention_like(1, 2, 300, 64)
    found = block_contenders(query, key, value, 0.5)
    assert set(found) == {"flex blocks 50%", "flash4 blocks 50%"}
    assert all(isinstance(reason, str) and reason for reason in found.values())


def test_a_kernel_that_is_missing_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="flash_attn")

    monkeypatch.setattr(rivals.importlib, "import_module", missing)
    found = block_contenders(*attention_like(1, 2, 300, 64), 0.5)
    assert "is for GPUs, is not installed; pip install 'adamac[flash4]'" in found["flash4 blocks 50%"]


def test_a_k_means_that_is_missing_or_does_not_run_is_a_reason(monkeypatch, device):
    def missing(name):
        raise ImportError("no such")

    key = torch.randn(1, 2, 30, 8, device=device)
    options = (key[:, :, :4], Layout.video_only(30))
    monkeypatch.setattr(rivals.importlib, "import_module", missing)
    assert rivals.kmeans_contender(key, *options) == "flash-kmeans is not installed (no such)"
    monkeypatch.setattr(rivals.importlib, "import_module", lambda name: object())
    assert "does not run: AttributeError" in rivals.kmeans_contender(key, *options)
