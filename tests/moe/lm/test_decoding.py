"""Decoding: one step for every column, on a GPU replayed, and what it adds is what reading on would have added."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_gpt import CONFIG, model
from test_sampling import PROMPTS
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional

from adamac.moe import preset
from adamac.moe.dispatch import Local
from adamac.moe.lm import decoding
from adamac.moe.lm.cache import Cache
from adamac.moe.lm.decoding import FEWEST, Decoder, obstacle
from adamac.moe.lm.generate import choose as choose_one
from adamac.moe.lm.generate import generate
from adamac.moe.lm.model import GPT, GPTConfig
from adamac.moe.timing import StageClock
from adamac.ops.replay import Replayed

EXPERTS = {
    name: preset(name, 16, 8, 4, ratio=0.5) for name in ("fine_grained", "bigmac", "bigmac_stable", "k3")
}
EXPERTS["fine_grained, gated"] = replace(EXPERTS["fine_grained"], gated=True, activation="silu")


def likeliest(logits, read):
    return logits.argmax(-1)


@torch.no_grad()
def begun(gpt: GPT, prompts: list[list[int]], tokens: int) -> tuple[Cache, torch.Tensor]:
    """Prompts in a cache with room for so many more, and the last token of each, which is not in it yet."""
    device, longest = gpt.embedding.weight.device, max(map(len, prompts)) - 1
    padding = [longest + 1 - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + ids for pad, ids in zip(padding, prompts, strict=True)], device=device)
    cache = Cache(gpt.config, padding, longest + tokens, device, gpt.embedding.weight.dtype)
    if longest:
        gpt(ids[:, :longest], cache.advance(longest))
    return cache, ids[:, longest]


@pytest.fixture
def one_shape(monkeypatch):
    """Steps as they are recorded on a GPU, here as they are."""
    monkeypatch.setattr(decoding, "obstacle", lambda *given: "")


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7]], [[1, 2]] * 4 + [[3, 4]]], ids=["ragged", "1", "5"])
@pytest.mark.parametrize("experts", EXPERTS.values(), ids=EXPERTS)
def test_steps_of_one_shape_equal_steps_that_grow(experts, prompts, device):
    gpt = model(replace(CONFIG, moe=experts)).to(device)
    logits = []

    def choose(found, read):
        logits.append(found)
        return found.argmax(-1)

    # A text of one token has nothing in the cache, and padding reads itself there.
    decoder = Decoder(gpt, *begun(gpt, prompts, 9), choose, tokens=9)
    cache, last = begun(gpt, prompts, 9)
    for _ in range(9):
        expected = gpt(last[:, None], cache.advance(1))[:, -1]
        last = expected.argmax(-1)
        assert torch.equal(decoder.step(), last)
        # Not by number: before a recording, which float64 on a GPU is refused, a step is done several times.
        torch.testing.assert_close(logits[-1], expected, atol=1e-12, rtol=1e-12)
    assert decoder.cache.length == cache.length


def test_a_step_that_is_not_recorded_attends_to_what_was_read_alone(device):
    gpt = model().to(device)
    decoder, widths = Decoder(gpt, *begun(gpt, PROMPTS, 30), likeliest, tokens=1), []
    attention = functional.scaled_dot_product_attention

    def watched(query, key, *given, **more):
        widths.append(key.shape[2])
        return attention(query, key, *given, **more)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(functional, "scaled_dot_product_attention", watched)
        decoder.step(), decoder.step()
    assert widths == [7] * CONFIG.layers + [8] * CONFIG.layers


def test_a_step_that_failed_can_be_tried_again():
    gpt, broken = model(), []

    def breaks_once(logits, read):
        if int(read) == 10 and not broken:
            broken.append(True)
            raise MemoryError
        return logits.argmax(-1)

    decoder = Decoder(gpt, *begun(gpt, PROMPTS, 9), breaks_once, tokens=9)
    added = []
    while len(added) < 9:
        try:
            added.append(decoder.step())
        except MemoryError:
            continue
    whole = Decoder(gpt, *begun(gpt, PROMPTS, 9), likeliest, tokens=9)
    assert torch.equal(torch.stack(added), torch.stack([whole.step() for _ in range(9)]))
    assert broken


def test_a_text_in_half_precision_begins_alike_by_steps_that_are_not_recorded_however_many_are_asked_for():
    experts = preset("bigmac", 64, 8, 2)
    gpt = model(GPTConfig(vocab=500, layers=2, heads=2, hidden=64, context=300, moe=experts)).bfloat16()
    for first in range(4):
        few, many = (generate(gpt, [[first, 6, 7]], tokens=tokens, temperature=1) for tokens in (40, 200))
        assert many[0][:40] == few[0]


@pytest.mark.usefixtures("one_shape")
def test_a_step_done_several_times_before_it_counts_leaves_nothing_behind(monkeypatch):
    gpt, step = model(), decoding._step
    expected = generate(gpt, PROMPTS, tokens=12, temperature=1)
    monkeypatch.setattr(decoding, "_step", lambda *given: [step(*given) for _ in range(4)][-1])
    assert generate(gpt, PROMPTS, tokens=12, temperature=1) == expected


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("experts", EXPERTS.values(), ids=EXPERTS)
def test_a_step_reads_nothing_back(experts, temperature, monkeypatch):
    steps = fake_steps(GPT(replace(CONFIG, moe=experts)).bfloat16().eval(), temperature, monkeypatch)
    assert steps == [(3,), (3,)]


@pytest.mark.usefixtures("one_shape")
def test_a_step_with_experts_of_a_capacity_does_read_something_back(monkeypatch):
    gpt = GPT(replace(CONFIG, moe=preset("bigmac", 16, 8, 2, 0.5, capacity=1.0)))
    with pytest.raises(DataDependentOutputException):
        fake_steps(gpt.bfloat16().eval(), 0.7, monkeypatch)


def fake_steps(gpt: GPT, temperature: float, monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of two steps without values: whoever reads one, raises."""
    send = Local.send

    def sends_as_on_a_gpu(self, rows, routing, *given, **more):
        # A processor's logits are looked at, as that costs no wait.
        return send(self, rows, replace(routing, finite=None), *given, **more)

    monkeypatch.setattr(Local, "send", sends_as_on_a_gpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache = Cache(CONFIG, [0, 6, 4], 20, torch.device("cpu"), torch.bfloat16)
        cache.length = 7
        draws = torch.rand(3, 20, dtype=torch.float64)

        def choose(logits, read):
            return choose_one(logits, draws.index_select(1, read)[:, 0], temperature, 5)

        decoder = Decoder(gpt, cache, torch.zeros(3, dtype=torch.int64), choose, tokens=2)
        return [tuple(decoder.step().shape) for _ in range(2)]


def test_what_does_not_fit_the_cache_is_refused_and_the_last_column_is_used():
    gpt = model()
    decoder = Decoder(gpt, *begun(gpt, PROMPTS, 2), likeliest, tokens=5)
    decoder.step(), decoder.step()
    assert decoder.cache.length == decoder.cache.room == 8
    with pytest.raises(ValueError, match="room for 8 columns and all are written; give it more room"):
        decoder.step()
    assert decoder.cache.length == 8


def test_who_generates_is_told_why_nothing_was_captured_here():
    told = []
    generate(model(), PROMPTS, tokens=12, watcher=told.append)
    (decoder,) = told
    assert "the model is on cpu" in decoder.reason
    assert not decoder.captured


@pytest.mark.parametrize(
    ("dtype", "changes", "tokens", "reason"),
    [
        (torch.bfloat16, {}, FEWEST, ""),
        (torch.bfloat16, {}, FEWEST - 1, "fewer than the 8"),
        (torch.float32, {}, 99, "in torch.float32 PyTorch loops over the experts"),
        (torch.float64, {}, 99, "run in a loop that waits"),
        (torch.bfloat16, {"capacity": 1.0}, 99, "experts have a capacity"),
    ],
)
def test_what_cannot_be_captured_on_a_gpu_has_a_reason(dtype, changes, tokens, reason):
    gpt = on_a_gpu(preset("bigmac", 64, 8, 2, **changes), dtype)
    found = obstacle(gpt, tokens)
    assert reason in found
    assert bool(found) == bool(reason)


def test_other_ranks_and_clocks_are_reasons_too_and_lifting_a_capacity_lifts_its_reason():
    gpt = on_a_gpu(preset("bigmac", 64, 8, 2, capacity=1.0), torch.bfloat16)
    with gpt.whole.without_capacity():
        assert obstacle(gpt, 99) == ""
        gpt.moes[1].clock = StageClock()
        assert "stages are timed (StageClock)" in obstacle(gpt, 99)
        gpt.moes[0].dispatcher = SimpleNamespace(reads=True)
        assert "sent to other ranks (SimpleNamespace)" in obstacle(gpt, 99)


def test_inference_mode_and_hooks_are_reasons():
    gpt = on_a_gpu(preset("bigmac", 64, 8, 2), torch.bfloat16)
    with torch.inference_mode():
        assert "inference mode is on" in obstacle(gpt, 99)
    gpt.whole.blocks[1].register_forward_hook(lambda *given: None)
    assert "forward hooks" in obstacle(gpt, 99)


def test_who_generates_in_inference_mode_gets_the_same_and_is_not_in_the_way_of_recording(monkeypatch):
    gpt, asked = model(), []
    monkeypatch.setattr(
        decoding, "obstacle", lambda *given: asked.append(torch.is_inference_mode_enabled()) or ""
    )
    expected = generate(gpt, PROMPTS, tokens=12)
    with torch.inference_mode():
        assert generate(gpt, PROMPTS, tokens=12) == expected
    assert asked == [False, False]


def on_a_gpu(experts, dtype) -> SimpleNamespace:
    """What an obstacle is looked for in, as if it were on a GPU."""
    gpt = GPT(GPTConfig(vocab=50, layers=2, heads=2, hidden=64, context=24, moe=experts)).to(dtype)
    weight = SimpleNamespace(device=torch.device("cuda"))
    return SimpleNamespace(
        embedding=SimpleNamespace(weight=weight),
        parameters=gpt.parameters,
        modules=gpt.modules,
        moes=gpt.moes,
        whole=gpt,
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_model_trains_on_after_it_was_sampled_from_even_if_that_failed(training, monkeypatch):
    gpt = model().train(training)
    generate(gpt, PROMPTS, tokens=3)
    assert gpt.training == training
    monkeypatch.setattr(Decoder, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(gpt, PROMPTS, tokens=3)
    assert gpt.training == training


# On a GPU whose experts do not wait.
GROUPED = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)
captures = pytest.mark.skipif(not GROUPED, reason="needs a Hopper or Blackwell GPU")
TEXTS = [[1, 2, 3, 4, 5, 6, 7], [9], [30, 31, 32], [400]]


@pytest.fixture
def usual_kernels():
    """Deterministic indexing, which tests ask for elsewhere, is other kernels than users have."""
    torch.use_deterministic_algorithms(False)


def large(name: str = "bigmac", **changes) -> GPT:
    experts = preset(name, 256, 16, 4, **changes)
    gpt = model(GPTConfig(vocab=500, layers=2, heads=2, hidden=256, context=96, moe=experts))
    return gpt.bfloat16().cuda()


class Plain(Replayed):
    """The same calls, none of them recorded."""

    def __call__(self, *inputs):
        return self._function(*inputs)


@contextmanager
def nothing_captured(monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr(decoding, "Replayed", Plain)
        yield


def eagerly(monkeypatch, *given, **more) -> list[list[int]]:
    """Generate with the same steps, not captured."""
    told = []
    with nothing_captured(monkeypatch):
        texts = generate(*given, **more, watcher=told.append)
    assert not told[0].captured
    return texts


def stepped(gpt: GPT, choose, steps: int) -> tuple[Decoder, list[list[int]]]:
    decoder = Decoder(gpt, *begun(gpt, TEXTS, steps), choose, tokens=steps)
    return decoder, torch.stack([decoder.step() for _ in range(steps)], 1).tolist()


@captures
@pytest.mark.usefixtures("usual_kernels")
@pytest.mark.parametrize("name", ["fine_grained", "bigmac", "bigmac_stable", "k3"])
def test_captured_generation_equals_eager_generation(name, monkeypatch):
    gpt, told = large(name), []
    for options in (
        {"temperature": 0},
        {"temperature": 1, "seeds": [3, 4, 5, 6]},
        {"temperature": 1, "top_k": None},
    ):
        texts = generate(gpt, TEXTS, tokens=40, **options, watcher=told.append)
        assert texts == eagerly(monkeypatch, gpt, TEXTS, tokens=40, **options)
        assert len({tuple(text) for text in texts}) == len(TEXTS)
    assert [decoder.reason for decoder in told] == [""] * 3
    assert all(decoder.captured for decoder in told)


@captures
@pytest.mark.usefixtures("usual_kernels")
def test_captured_texts_end_as_eager_ones_do(monkeypatch):
    gpt = large()
    whole = eagerly(monkeypatch, gpt, [[3]] * 16, tokens=40)
    end = whole[0][20]
    texts = generate(gpt, [[3]] * 16, tokens=40, end=end)
    assert texts == [text[: text.index(end)] if end in text else text for text in whole]


@captures
@pytest.mark.usefixtures("usual_kernels")
def test_replays_never_wait_for_the_device(monkeypatch):
    gpt = large()
    with nothing_captured(monkeypatch):
        expected = stepped(gpt, likeliest, 20)[1]
    decoder = Decoder(gpt, *begun(gpt, TEXTS, 20), likeliest, tokens=20)
    decoder.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(19):
            last = decoder.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert decoder.captured, decoder.reason
    assert last.tolist() == [text[19] for text in expected]


@captures
@pytest.mark.usefixtures("usual_kernels")
def test_a_choice_that_waits_is_not_captured_says_so_and_adds_the_same_tokens(monkeypatch):
    gpt = large()

    def waits(logits, read):
        assert int(read) > 0
        return logits.argmax(-1)

    with nothing_captured(monkeypatch):
        expected = stepped(gpt, likeliest, 20)[1]
    decoder, added = stepped(gpt, waits, 20)
    assert decoder.reason.startswith("recording failed: ")
    assert not decoder.captured
    assert added == expected
    other, added = stepped(gpt, likeliest, 20)  # can still be captured
    assert other.captured, other.reason
    assert added == expected


@captures
@pytest.mark.usefixtures("usual_kernels")
def test_a_capacity_decodes_eagerly_with_the_reason():
    gpt, told = large(capacity=8.0), []
    assert len(generate(gpt, TEXTS, tokens=10, watcher=told.append)[0]) == 10
    assert "capacity" in told[0].reason


@captures
@pytest.mark.usefixtures("usual_kernels")
def test_captured_generations_leave_no_memory_behind():
    gpt, held = large(), []
    for _ in range(4):
        generate(gpt, TEXTS, tokens=40)
        gc.collect()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[3] == held[2]
