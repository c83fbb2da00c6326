"""Claims about the family of layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from adamac.moe import PRESETS, MoEConfig, preset
from adamac.moe.traffic import bytes_sent

SHAPE = {"hidden": 64, "num_experts": 8, "top_k": 2, "ffn": 16}
BASE = preset("fine_grained", 64, num_experts=32, top_k=4)


def routed(config: MoEConfig) -> tuple[int, int, int]:
    """Parameters and FLOPs of the routed experts, and their hidden units for a token."""
    one = config.matrices * config.width * config.ffn
    return config.num_experts * one, 2 * config.top_k * one, config.top_k * config.ffn


@pytest.mark.parametrize(
    ("name", "params", "flops", "units", "sent"),
    [
        ("fine_grained", 1, 1, 1, 1),
        ("bigmac", 1, 1, 4, 1 / 4),
        ("bigmac_stable", 1, 1, 4, 1 / 4),
        ("latent_eff", 1, 1 / 4, 1, 1 / 4),
        ("latent_acc", 1, 1, 4, 1),
    ],
)
def test_presets_have_the_proportions_that_their_table_says(name, params, flops, units, sent):
    config = preset(name, 64, num_experts=32, top_k=4)
    found, base = routed(config), routed(BASE)
    assert [a / b for a, b in zip(found, base, strict=True)] == [params, flops, units]
    assert bytes_sent(config, 10, 4) / bytes_sent(BASE, 10, 4) == sent


def test_vanilla_has_the_parameters_of_the_fine_grained_experts():
    config = preset("vanilla", 64, num_experts=32, top_k=4)
    assert (config.num_experts, config.top_k, config.ffn) == (2, 1, 256)
    assert routed(config)[0] == routed(BASE)[0]


def test_k3_has_the_published_shape():
    config = preset("k3", 7168, num_experts=896, top_k=16, ratio=0.5)
    assert (config.latent, config.ffn, config.shared_ffn) == (3584, 3072, 6144)
    assert config.gated
    assert config.latent_norm


@pytest.mark.parametrize("hidden", [256, 512, 1024, 2048, 2560, 4096])
def test_k3_has_rows_that_the_grouped_product_takes_at_ordinary_widths(hidden):
    config = preset("k3", hidden)
    assert config.ffn % 8 == 0
    assert config.shared_ffn == 2 * config.ffn
    assert abs(config.ffn - hidden * 3 / 7) <= 4


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_changes(name):
    config = preset(name, 56, num_experts=16, top_k=4, capacity=1.2)
    assert config.capacity == 1.2
    assert config == replace(preset(name, 56, num_experts=16, top_k=4), capacity=1.2)


def test_a_change_is_of_the_layer_also_where_the_preset_has_a_parameter_of_that_name():
    config = preset("latent_acc", 64, 16, 2, changes={"top_k": 3, "num_experts": 5, "hidden": 32}, ffn=24)
    assert (config.top_k, config.num_experts, config.hidden, config.ffn) == (3, 5, 32, 24)
    assert config.latent == 16  # the share of the preset's own width


@pytest.mark.parametrize("kind", ["hidden", "num_experts", "top_k", "ffn", "shared_ffn"])
@pytest.mark.parametrize("value", [2.0, "2", True, None])
def test_a_number_of_things_is_a_whole_number(kind, value):
    with pytest.raises(ValueError, match=f"{kind} must be a whole number; got {value!r}"):
        MoEConfig(**{**SHAPE, kind: value})


@pytest.mark.parametrize("kind", ["gated", "normalise", "latent_norm", "sound_init"])
@pytest.mark.parametrize("value", ["false", "no", 0, None])
def test_a_switch_is_true_or_false_and_no_word_for_it(kind, value):
    with pytest.raises(ValueError, match=f"{kind} must be True or False; got {value!r}"):
        MoEConfig(**{**SHAPE, "latent": 32, kind: value})


@pytest.mark.parametrize("kind", ["balance_weight", "bias_rate", "z_weight", "capacity"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "abc", True])
def test_a_weight_is_a_finite_number(kind, value):
    with pytest.raises(ValueError, match=f"{kind} must be a finite number.*; got {value!r}"):
        MoEConfig(**{**SHAPE, kind: value})
    assert getattr(MoEConfig(**{**SHAPE, kind: 1}), kind) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 9}, "top_k is 9 but there are only 8 experts"),
        ({"latent": 65}, r"latent must lie in 1..hidden \(64\); got 65"),
        ({"latent": 0}, "latent must lie in"),
        ({"latent": 8.5}, "latent must be a whole number or None; got 8.5"),
        ({"latent_norm": True}, "latent_norm needs a latent width"),
        ({"ffn": 0}, "ffn must be at least 1; got 0"),
        ({"capacity": 0.0}, "capacity must be above 0"),
        ({"shared_ffn": -1}, "shared_ffn must be at least 0"),
        ({"activation": "tanh"}, "activation must be one of gelu, relu, silu, relu2; got 'tanh'"),
        ({"score": "cosine"}, "score must be one of softmax, sigmoid"),
        ({"balance": "prayer"}, "balance must be one of loss, bias, none"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as refusal:
        MoEConfig(**{**SHAPE, **wrong})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "huge"}, "preset must be one of vanilla, .*; got 'huge'"),
        ({"ratio": 0}, r"ratio must lie in \(0, 1\]; got 0"),
        ({"ratio": 0.3}, "must be a whole number; got 64 x 0.3"),
        ({"hiden": 3}, "MoEConfig has no field hiden"),
    ],
)
def test_a_preset_that_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(**{"name": "bigmac", "hidden": 64, **arguments})
