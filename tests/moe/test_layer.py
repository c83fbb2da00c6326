"""Claims about the layer."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adamac.moe import PRESETS, MoE, MoEConfig, Routing, preset
from adamac.moe.cost import machine_of
from adamac.moe.timing import STAGES, StageClock

SMALL = {"hidden": 16, "num_experts": 8, "top_k": 3, "ratio": 0.5}


def layer(name: str = "bigmac", **changes) -> MoE:
    made = MoE(preset(name, **SMALL, **changes), dtype=torch.float64)
    for parameter in made.parameters():  # large enough that every term shows
        nn.init.normal_(parameter, std=0.5)
    return made


def by_hand(made: MoE, x: torch.Tensor) -> torch.Tensor:
    """The paper's equations, token by token and expert by expert."""
    config, gelu = made.config, nn.functional.gelu
    routing, _ = made.router(x)
    rows = []
    for token, experts, weights in zip(x, routing.experts, routing.weights, strict=True):
        narrow = made.descend(token)
        answers = [gelu(narrow @ made.experts.up[e]) @ made.experts.down[e] for e in experts.tolist()]
        total = made.ascend(sum(w * answer for w, answer in zip(weights, answers, strict=True)))
        if config.shared_ffn:
            total = total + gelu(token @ made.shared.up.weight.T) @ made.shared.down.weight.T
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["vanilla", "fine_grained", "bigmac", "latent_eff", "latent_acc"])
@pytest.mark.parametrize("shared_ffn", [0, 5])
def test_the_layer_is_the_papers_equations(name, shared_ffn):
    made, x = layer(name, shared_ffn=shared_ffn), torch.randn(11, 16, dtype=torch.float64)
    torch.testing.assert_close(made(x), by_hand(made, x), rtol=1e-12, atol=1e-12)


def test_ratio_one_with_identity_projections_equals_the_baseline():
    baseline = layer("fine_grained")
    made = MoE(replace(baseline.config, latent=16), dtype=torch.float64)
    made.load_state_dict(
        {
            **baseline.state_dict(),
            **{f"{name}.weight": torch.eye(16).double() for name in ("descend", "ascend")},
        }
    )
    x = torch.randn(11, 16, dtype=torch.float64)
    torch.testing.assert_close(made(x), baseline(x), rtol=0, atol=0)


def test_ascending_once_equals_ascending_every_answer():
    made, x = layer(), torch.randn(11, 16, dtype=torch.float64)
    routing, _ = made.router(x)
    answers = [made.experts(row.expand(8, -1), torch.ones(8, dtype=torch.int64)) for row in made.descend(x)]
    each = made.ascend(torch.stack(answers))  # [tokens, experts, hidden]
    picked = each.gather(1, routing.experts.unsqueeze(2).expand(-1, -1, 16))
    expected = (picked * routing.weights.unsqueeze(2)).sum(1)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


def test_the_shared_expert_and_the_router_see_the_full_width():
    made = layer("bigmac", shared_ffn=4)
    seen = {}
    for name in ("router", "shared", "descend", "experts"):
        getattr(made, name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs[0].shape[-1]})
        )
    made(torch.randn(3, 16, dtype=torch.float64))
    assert seen == {"router": 16, "shared": 16, "descend": 16, "experts": 8}


@pytest.mark.parametrize("chunks", [2, 3, 20])
def test_sending_in_chunks_changes_nothing(chunks):
    made, x = layer(shared_ffn=4), torch.randn(11, 16, dtype=torch.float64)
    expected = made(x)
    made.chunks = chunks
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_learns(name):
    made = MoE(preset(name, 28, num_experts=8, top_k=4, ratio=0.5, z_weight=1e-3))
    (made(torch.randn(4, 50, 28)).square().sum() + made.auxiliary_loss()).backward()
    for path, parameter in made.named_parameters():
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.any(), path


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 3, 16)])
def test_any_shape_goes_in_and_comes_out(shape):
    made = layer("bigmac", capacity=1.2)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    output = made(x)
    assert output.shape == x.shape
    (output.sum() + made.auxiliary_loss()).backward()
    assert x.grad.shape == x.shape


def test_a_dropped_choice_adds_nothing():
    made, x = layer("fine_grained", capacity=0.5), torch.randn(30, 16, dtype=torch.float64)
    output, routing = made(x), made.routing
    assert routing.dropped.any()
    whole = layer("fine_grained")
    whole.load_state_dict(made.state_dict())
    undropped = whole(x)
    kept_all = ~routing.dropped.any(1)
    torch.testing.assert_close(output[kept_all], undropped[kept_all], rtol=1e-12, atol=1e-12)
    assert (output[routing.dropped.all(1)] == 0).all()


def test_autocast_computes_in_its_dtype_and_returns_the_inputs():
    made = MoE(preset("bigmac", **SMALL, shared_ffn=4))
    x = torch.randn(5, 16)
    seen = []
    made.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = made(x)
    output.sum().backward()
    assert seen == [torch.bfloat16]
    assert output.dtype == torch.float32
    assert made.experts.up.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # Dynamo remarks on what it leaves to Python
def test_a_compiled_layer_equals_an_eager_one():
    made, x = MoE(preset("bigmac", **SMALL)), torch.randn(5, 16)
    output = torch.compile(made, backend="aot_eager")(x)
    output.sum().backward()
    torch.testing.assert_close(output, made(x))
    assert made.experts.up.grad.any()


def test_only_the_outermost_matrix_is_scaled_by_depth_if_initialised_soundly():
    def scales(name: str) -> dict[str, float]:
        made = MoE(preset(name, 256, num_experts=8, top_k=2))
        made.reset_parameters()
        before = {path: p.std().item() for path, p in made.named_parameters()}
        made.reset_parameters(residual_scale=0.1)
        return {
            path: p.std().item() / before[path] for path, p in made.named_parameters() if before[path] > 0
        }

    assert {path for path, ratio in scales("bigmac_stable").items() if ratio < 0.5} == {"ascend.weight"}
    assert {path for path, ratio in scales("bigmac").items() if ratio < 0.5} == {
        "ascend.weight",
        "experts.down",
    }


def test_a_sound_initialisation_keeps_the_size_of_rows():
    made = MoE(preset("bigmac_stable", 256, num_experts=8, top_k=2))
    x = torch.randn(200, 256)
    assert made.descend(x).std().item() == pytest.approx(1, rel=0.1)


def test_the_clock_sees_every_stage():
    made = MoE(preset("bigmac", **SMALL, shared_ffn=4))
    made.clock = StageClock()
    made(torch.randn(9, 16))
    times = made.clock.time_ms()
    assert set(times) == set(STAGES) - {"send"}  # nothing is sent on one rank
    assert list(times) == [stage for stage in STAGES if stage in times]
    made.clock.reset()
    assert made.clock.time_ms() == {}


def test_nothing_is_sent_on_one_rank():
    made = layer()
    made(torch.randn(9, 16, dtype=torch.float64)).sum().backward()
    assert made.traffic.bytes_sent() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dispatcher": "local", "machine": machine_of()},
            'a machine is what "auto" goes by; leave it out, or dispatcher "local"',
        ),
        ({"machine": "node.json"}, "machine must be a Machine, as Machine.load reads .*; got 'node.json'"),
        ({"tokens": 0}, "tokens must be a whole number, at least 1; got 0"),
        ({"dispatcher": "pigeon"}, "dispatcher must be one of auto, local, .*; got 'pigeon'"),
        ({"dispatcher": "per_rank"}, 'dispatcher "per_rank" needs a group of ranks'),
        ({"chunks": 0}, "chunks must be a whole number, at least 1; got 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(MoEConfig(hidden=16, num_experts=8, top_k=2, ffn=4), **options)


def test_rows_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"hidden width 16; got \(3, 8\)"):
        layer()(torch.randn(3, 8, dtype=torch.float64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    x = torch.randn(3, 16, dtype=torch.float64)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="logits on rank 0 are NaN or infinite") as refusal:
        layer()(x)
    assert "\n" not in str(refusal.value)


def test_the_layer_needs_torch_alone():
    names = (
        "adamac.attention",
        "diffusers",
        "transformers",
        "triton",
        "rich",
        "tyro",
        "safetensors",
        "tokenizers",
    )
    probe = f"import adamac.moe, sys; print(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_layer_that_was_trained_can_be_copied_and_pickled():
    made, x = layer("bigmac", z_weight=1e-3), torch.randn(5, 16, dtype=torch.float64)
    output = made(x)
    made.auxiliary_loss().backward()
    copied, file = copy.deepcopy(made), io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert (other.losses, other.routing) == ({}, None)
        assert torch.equal(other(x), output)
    assert made.losses


@pytest.mark.parametrize(
    ("name", "shared_ffn", "shape"),
    [
        ("fine_grained", 4, (2, 3, 16)),
        ("bigmac", 0, (2, 3, 16)),
        ("bigmac", 0, (6, 16)),
        ("bigmac_stable", 0, (6, 16)),
    ],
)
def test_what_the_layer_returns_is_no_view(name, shared_ffn, shape):
    output = layer(name, shared_ffn=shared_ffn)(torch.randn(*shape, dtype=torch.float64))
    assert output.shape == shape
    assert output._base is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_can_be_built_on_no_device_and_drawn_later(name):
    config = preset(name, 56, num_experts=8, top_k=4, ratio=0.5)
    with torch.device("meta"):
        made = MoE(config)
    assert all(parameter.device.type == "meta" for parameter in made.parameters())
    made, usual = made.to_empty(device="cpu"), MoE(config)
    for tensor in made.state_dict().values():  # what memory may hold
        tensor.fill_(7)
    for each in (made, usual):
        torch.manual_seed(3)
        each.reset_parameters()
    for path, tensor in usual.state_dict().items():
        assert torch.equal(made.state_dict()[path], tensor), path


@pytest.mark.parametrize("hidden", [256, 1024, 4096])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_through_the_grouped_product_at_ordinary_widths(name, hidden):
    made = MoE(preset(name, hidden), device="meta")
    assert [made.experts.runs(dtype) for dtype in (None, torch.bfloat16)] == ["torch", "torch"]
    assert "grouped products by torch" in repr(made)


def test_a_layer_says_that_it_falls_back_to_the_reference():
    config = MoEConfig(hidden=64, num_experts=8, top_k=2, ffn=20)
    made = MoE(config)
    assert made.experts.runs() == "torch"
    assert made.experts.runs(torch.bfloat16) == "reference"  # 40 bytes are no multiple of 16
    assert MoE(config, impl="reference").experts.runs() == "reference"
    with pytest.raises(ValueError, match=r"a row of 20 .* no multiple of 16 bytes"):
        MoE(config, impl="torch", dtype=torch.bfloat16)


def test_a_given_routing_is_used():
    made, x = layer(), torch.randn(11, 16, dtype=torch.float64)
    output, routing = made(x), made.routing
    made.router.weight.data.zero_()
    torch.testing.assert_close(made(x, routing), output, rtol=0, atol=0)
    assert made.losses == {}
    with pytest.raises(ValueError, match="a routing of 5 tokens to 8 experts; got one of 11 to 8"):
        made(x[:5], routing)


def test_a_layer_says_why_a_pass_waits_for_the_device():
    bigmac = preset("bigmac", 64, 8, 2)
    assert MoE(bigmac, dtype=torch.bfloat16).waits() is None
    assert "in torch.float32 PyTorch loops over the experts" in MoE(bigmac).waits()
    assert MoE(bigmac).waits(torch.bfloat16) is None  # what counts under autocast is what is computed in
    assert "in torch.float32" in MoE(bigmac, dtype=torch.bfloat16).waits(torch.float32)
    assert "run in a loop that waits" in MoE(preset("bigmac", 64, 8, 2, ffn=36)).waits(torch.bfloat16)
    limited = MoE(preset("bigmac", 64, 8, 2, capacity=1.0), dtype=torch.bfloat16)
    assert "experts have a capacity" in limited.waits()
    limited.dispatcher = SimpleNamespace(reads=False)  # whose buffers are as long as the capacity allows
    assert limited.waits() is None
    limited.dispatcher = SimpleNamespace(reads=True)
    assert "which reads how many there are" in limited.waits()
    timed = MoE(bigmac, dtype=torch.bfloat16)
    timed.clock = StageClock()
    assert "stages are timed (StageClock)" in timed.waits()


@pytest.mark.parametrize(
    ("x", "line"),
    [
        (torch.ones(3, 64, dtype=torch.int64), "expected rows of floating point values; got torch.int64"),
        (
            torch.ones(3, 64, dtype=torch.bfloat16),
            "rows are torch.bfloat16 but weights are torch.float32; cast one",
        ),
        (torch.tensor(1.0), r"expected rows of hidden width 64; got \(\)"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(x, line):
    with pytest.raises(ValueError, match=line):
        MoE(preset("bigmac", 64, 8, 2))(x)


@pytest.mark.parametrize("wrong", [-1, 8])
def test_a_routing_to_experts_that_do_not_exist_is_refused(wrong):
    routing = Routing(torch.tensor([[0, wrong], [1, 2]]), torch.ones(2, 2), 8)
    with pytest.raises(ValueError, match=f"a routing names experts 0 to 7; got {wrong}"):
        MoE(preset("bigmac", 64, 8, 2))(torch.randn(2, 64), routing)


def test_a_routing_that_buffers_would_be_too_short_for_is_refused():
    made, x = MoE(preset("bigmac", 64, 8, 2, capacity=0.5)), torch.randn(12, 64)
    made(x)
    dropping = made.routing
    assert dropping.room == 2
    made(x, dropping)  # keeps what it says
    with pytest.raises(ValueError, match=r"no expert takes more than 2 tokens \(room\); got \d+ for one"):
        made(x, replace(dropping, dropped=None))
    made(x, replace(dropping, dropped=None, room=None))
    twice = Routing(torch.tensor([[0, 1], [3, 3]]), torch.ones(2, 2), 8)
    with pytest.raises(ValueError, match="different experts for a token; got one of them twice"):
        made(x[:2], twice)
