"""Claims about torch.compile: blocks compile in full graphs, once for all layers, and nothing is lost."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from diffusers import CogVideoXTransformer3DModel
from torch._dynamo.testing import CompileCounter

import adamac
from adamac.attention import AdaCluster, Schedule, Tokens

METHOD = AdaCluster(budget=Tokens(0.3), query_clusters=4, key_clusters=8)
SCHEDULE = Schedule(first=1, min_tokens=0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cogvideox(layers: int = 3):
    pipe = tiny.cogvideox_pipe()
    settings = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    pipe.transformer = CogVideoXTransformer3DModel(**settings | {"num_layers": layers}).eval()
    return pipe


def wan(layers: int = 4):
    pipe = tiny.wan_pipe()
    pipe.transformer = tiny.wan_transformer(num_layers=layers)
    return pipe


FAMILIES = {
    "wan": (wan, tiny.run_wan),
    "hunyuan": (tiny.hunyuan_pipe, tiny.run_hunyuan),
    "cogvideox": (cogvideox, tiny.run_cogvideox),
}


def blocks(pipe):
    found = [module for module in pipe.transformer.modules() if type(module).__name__.endswith("Block")]
    return [block for block in found if hasattr(block, "attn1") or hasattr(block, "attn")]


@pytest.mark.parametrize(("make", "run"), FAMILIES.values(), ids=FAMILIES.keys())
def test_compiled_blocks_attend_as_uncompiled_ones_and_are_counted(make, run):
    pipe = make()
    with adamac.enable(pipe, METHOD, SCHEDULE) as handle:
        plain, counted = run(pipe), handle.report()
        handle.clear()
        for block in blocks(pipe):
            block.compile(fullgraph=True, backend="aot_eager")
        compiled, again = run(pipe), handle.report()
    torch.testing.assert_close(compiled, plain)
    assert again.sparse_calls == counted.sparse_calls > 0
    assert again.dense_calls == counted.dense_calls


@pytest.mark.parametrize(("make", "run"), FAMILIES.values(), ids=FAMILIES.keys())
def test_under_autocast_compiled_blocks_attend_in_its_dtype(make, run, monkeypatch):
    # HunyuanVideo's norms leave queries and keys in float32 there, and values in bfloat16.
    pipe, seen = make(), set()
    with adamac.enable(pipe, METHOD, SCHEDULE) as handle, torch.autocast("cpu", torch.bfloat16):
        attend = handle._attend
        monkeypatch.setattr(
            handle, "_attend", lambda *args: (seen.update(part.dtype for part in args[2:5]), attend(*args))[1]
        )
        run(pipe)
        counted = handle.report()
        handle.clear()
        for block in blocks(pipe):
            block.compile(fullgraph=True, backend="aot_eager")
        run(pipe)
    assert seen == {torch.bfloat16}
    assert handle.report().sparse_calls == counted.sparse_calls > 0


def test_no_cuda_graph_may_hold_an_attention_call():
    operator = torch.ops.adamac.site_attention.default
    assert torch.Tag.cudagraph_unsafe in operator.tags


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_more_layers_compile_nothing_more_than_without_us(name):
    make, run = FAMILIES[name]

    def compiled(enabled: bool) -> int:
        torch._dynamo.reset()
        pipe, counter = make(layers=5), CompileCounter()
        if enabled:
            adamac.enable(pipe, METHOD, SCHEDULE)
        for block in blocks(pipe):
            block.compile(fullgraph=True, backend=counter)
        run(pipe)
        return counter.frame_count

    assert compiled(enabled=True) == compiled(enabled=False)


def test_diffusers_own_way_to_compile_works_before_and_after_enabling():
    plain = wan()
    with adamac.enable(plain, METHOD, SCHEDULE):
        expected = tiny.run_wan(plain)
    for before in (True, False):
        pipe = wan()
        if before:
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        handle = adamac.enable(pipe, METHOD, SCHEDULE)
        if not before:
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(tiny.run_wan(pipe), expected)
        assert handle.report().sparse_calls > 0


def test_the_switch_compiles_every_block_and_disable_takes_it_back(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    pipe = wan()
    dense = tiny.run_wan(pipe)
    handle = adamac.enable(pipe, METHOD, SCHEDULE, compile=True)
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    tiny.run_wan(pipe)
    assert handle.report().sparse_calls > 0
    handle.disable()
    assert all(block._compiled_call_impl is None for block in pipe.transformer.blocks)
    assert torch.equal(tiny.run_wan(pipe), dense)


def test_compiled_code_of_a_disabled_handle_attends_as_the_model_does():
    pipe = wan()
    dense = tiny.run_wan(pipe)
    handle = adamac.enable(pipe, METHOD, SCHEDULE)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    sparse = tiny.run_wan(pipe)
    handle.disable()
    assert not torch.allclose(sparse, dense)
    torch.testing.assert_close(tiny.run_wan(pipe), dense)


def test_attention_that_goes_past_us_cannot_be_compiled_unnoticed(monkeypatch):
    pipe = wan(layers=1)
    adamac.enable(pipe, METHOD, SCHEDULE)
    monkeypatch.setattr(
        "diffusers.models.transformers.transformer_wan.dispatch_attention_fn",
        lambda query, key, value, **more: query + 0 * value,
    )
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="does not call scaled_dot_product_attention"):
        tiny.run_wan(pipe)


def test_gradients_through_compiled_blocks_are_refused_or_dense_with_a_reason():
    inputs = dict(
        hidden_states=torch.randn(1, 4, 3, 16, 20),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 7, 16),
    )

    def gradient(transformer):
        weight = transformer.blocks[0].attn1.to_q.weight
        return torch.autograd.grad(transformer(**inputs).sample.square().sum(), weight)[0]

    stock = gradient(tiny.wan_transformer())
    transformer = tiny.wan_transformer()
    with adamac.enable(transformer, METHOD, Schedule(first=0, min_tokens=0), num_steps=2) as handle:
        for block in transformer.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            transformer(**inputs)
        assert handle.report().sparse_calls == 2
        with pytest.raises(Exception, match="gradients are wanted, which compiled attention does not give"):
            gradient(transformer)
        torch._dynamo.reset()
        for block in transformer.blocks:
            block.compile(backend="aot_eager")
        torch.testing.assert_close(gradient(transformer), stock)
        (reason,) = handle.report().dense_calls
    assert "gradients are wanted" in reason
