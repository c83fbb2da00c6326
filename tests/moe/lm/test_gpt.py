"""The small GPT: what reaches what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adamac.moe import preset
from adamac.moe.lm.cache import Cache
from adamac.moe.lm.model import GPT, GPTConfig, rotate, rotations

CONFIG = GPTConfig(vocab=50, layers=2, heads=2, hidden=16, context=24, moe=preset("bigmac", 16, 8, 2))
PRESETS = ("vanilla", "fine_grained", "bigmac", "bigmac_stable", "latent_eff", "latent_acc", "k3")


def model(config: GPTConfig = CONFIG) -> GPT:
    """A model in float64 whose experts matter."""
    gpt = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    return gpt


def test_a_token_reaches_no_earlier_logits():
    gpt, ids = model(), torch.randint(50, (2, 9))
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % 50
    before, after = gpt(ids), gpt(other)
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-12, rtol=0)
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


@pytest.mark.parametrize("name", PRESETS)
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(name):
    gpt = model(replace(CONFIG, moe=preset(name, 16, 8, 4, ratio=0.5)))
    ids = torch.randint(50, (3, 12))
    cache = Cache(gpt.config, [0, 0, 0], 12, torch.device("cpu"), torch.float64)
    pieces = [gpt(part, cache.advance(part.shape[1])) for part in ids.split([5, 1, 4, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), gpt(ids), atol=1e-12, rtol=1e-12)


def test_padding_on_the_left_changes_nothing():
    gpt, ids = model(), torch.randint(50, (2, 12))
    ids[1, :5] = 7
    cache = Cache(gpt.config, [0, 5], 12, torch.device("cpu"), torch.float64)
    first = gpt(ids[:, :9], cache.advance(9))
    second = gpt(ids[:, 9:], cache.advance(3))
    padded = torch.cat((first, second), 1)
    torch.testing.assert_close(padded[0], gpt(ids[:1])[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(padded[1, 5:], gpt(ids[1:, 5:])[0], atol=1e-12, rtol=1e-12)
    assert first.isfinite().all()


def test_no_expert_sees_padding():
    gpt, ids = model(), torch.randint(50, (2, 9))
    cache = Cache(gpt.config, [0, 5], 9, torch.device("cpu"), torch.float64)
    gpt(ids, cache.advance(9))
    assert [moe.routing.tokens for moe in gpt.moes] == [13, 13]


def test_rotations_know_distances_only():
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(at: int, other: int) -> torch.Tensor:
        turned = (
            rotate(x, rotations(torch.tensor([[p]]), 8, 1e4, x.dtype)) for x, p in ((query, at), (key, other))
        )
        return (next(turned) * next(turned)).sum()

    torch.testing.assert_close(product(3, 1), product(103, 101), atol=1e-12, rtol=0)
    assert product(3, 1) != product(3, 2)


def test_a_tied_model_has_one_matrix_for_both_ends():
    tied, apart = GPT(CONFIG), GPT(replace(CONFIG, tied=False))
    assert tied.output_matrix is tied.embedding.weight
    count = [sum(parameter.numel() for parameter in gpt.parameters()) for gpt in (tied, apart)]
    assert count[1] - count[0] == 50 * 16


def test_a_new_model_knows_nothing():
    config = replace(CONFIG, hidden=64, layers=8, moe=preset("bigmac_stable", 64, 8, 2))
    gpt, ids = GPT(config).double(), torch.randint(50, (4, 24))
    logits = gpt(ids)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(50, (4 * 24,)))
    # Logits of variance one cost half a nat more than the logarithm of the vocabulary.
    assert 0.8 < logits.std() < 1.3
    assert loss.item() == pytest.approx(torch.tensor(50.0).log().item() + 0.5, abs=0.3)


def test_a_configuration_survives_json():
    assert GPTConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match="not a model configuration"):
        GPTConfig.from_dict({"vocab": 3})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"heads": 3}, "multiple of twice the heads"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"hidden": 32}, "experts are for hidden 16"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        replace(CONFIG, **changes)
