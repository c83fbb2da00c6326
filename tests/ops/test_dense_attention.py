"""Claims about dense attention and about how its implementation is chosen."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

from adamac.ops import dense_attention as op
from adamac.ops.dense_attention import Choice, Place, choices, dense_attention, dispatch, flash4, resolve
from adamac.ops.dense_attention.candidate import Candidate
from adamac.ops.dense_attention.compiled import opaque_dense_attention
from adamac.ops.dense_attention.probe import Shape, check, choose
from adamac.ops.dense_attention.reference import reference
from adamac.ops.dense_attention.torch_kernels import native
from adamac.testing import assert_within_error_budget, attention_like

SMALL = Shape(1, 2, 70, 70)
SCALE = 0.2
FUSED = ("cudnn", "flash", "efficient", "flash4")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="measures on a GPU")


@pytest.fixture
def fresh(monkeypatch):
    """No choice was made in this process yet."""
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_verdicts", {})
    return monkeypatch


def tensors(device, dtype=torch.float32, q_tokens=63, k_tokens=100, head_dim=64):
    query = attention_like(2, 3, q_tokens, head_dim, dtype=dtype, device=device)[0]
    _, key, value = attention_like(2, 3, k_tokens, head_dim, dtype=dtype, device=device, seed=1)
    return query, key, value


def fits(query, key, value):
    return None


def offered(name, run=native, unfit=fits):
    return Candidate(name, unfit, run)


def timer(**time_ms):
    """A timer that says what it is told, so that no clock decides a test."""

    def measure(runs, device):
        for run in runs.values():
            run()
        return {name: time_ms[name] for name in runs}

    return measure


def pick(candidates, device, **time_ms):
    return choose(candidates, device, torch.bfloat16, 64, timed=SMALL, timer=timer(**time_ms))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["auto", "native", *(FUSED if torch.cuda.is_available() else ())])
@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(1, 1), (63, 100), (130, 1000)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_every_implementation_that_is_fit_keeps_the_error_budget(
    impl, dtype, q_tokens, k_tokens, head_dim, device
):
    query, key, value = tensors(device, dtype, q_tokens, k_tokens, head_dim)
    if impl in FUSED and q_tokens == 1:
        pytest.skip("some fused kernels have limits of their own at one token")
    try:
        resolve(query, key, value, impl)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    output = dense_attention(query, key, value, scale=SCALE, impl=impl)
    assert output.dtype == dtype
    wide = [tensor.double() for tensor in (query, key, value)]
    oracle, eager = reference(*wide, scale=SCALE), reference(query, key, value, scale=SCALE)
    assert_within_error_budget(output, oracle, eager)


def test_an_unknown_name_is_refused_with_those_that_there_are(device):
    with pytest.raises(ValueError, match=r"impl must be one of auto, native, cudnn, .*; got 'fast'"):
        dense_attention(*tensors(device), scale=1.0, impl="fast")


@pytest.mark.parametrize("impl", FUSED)
def test_a_fused_kernel_on_a_cpu_is_refused_in_one_line_that_says_what_to_do(impl):
    with pytest.raises(ValueError) as refusal:
        dense_attention(*tensors("cpu"), scale=1.0, impl=impl)
    assert f"impl='{impl}' is refused" in str(refusal.value)
    assert "got cpu; use impl='native'" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((8, 0), torch.bfloat16, 128, "needs Hopper or data-centre Blackwell .* got 8.0"),
        ((12, 0), torch.bfloat16, 128, "got 12.0"),
        ((9, 0), torch.float32, 128, "needs float16 or bfloat16, got torch.float32"),
        ((9, 0), torch.float16, 100, "divisible by 8, got 100"),
        ((9, 0), torch.float16, 264, "8 to 256 .* got 264"),
        ((10, 0), torch.float16, 192, "8 to 128, or 256, .* got 192"),
    ],
)
def test_flash4_is_refused_where_it_has_no_kernel_of_its_own(capability, dtype, head_dim, reason):
    with pytest.raises(ValueError, match=reason):
        raise ValueError(flash4.unfit_for(capability, dtype, head_dim))


@pytest.mark.parametrize(
    ("capability", "head_dim"), [((9, 0), 80), ((9, 0), 256), ((10, 0), 128), ((10, 3), 256)]
)
def test_flash4_is_fit_on_hopper_and_blackwell(capability, head_dim):
    assert flash4.unfit_for(capability, torch.bfloat16, head_dim) is None


def test_a_package_that_is_missing_or_broken_is_a_reason_and_no_crash(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")

    def broken(name):
        raise OSError("libcuda.so.1: no such file\nand more")

    for load, reason in (
        (missing, "pip install 'adamac[flash4]'"),
        (broken, "OSError: libcuda.so.1: no such file"),
    ):
        flash4._load.cache_clear()
        monkeypatch.setattr(flash4.importlib, "import_module", load)
        function, told = flash4._load()
        assert function is None
        assert reason in told
        assert "\n" not in told
    flash4._load.cache_clear()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": (2, 3, 100, 32)}, r"key must have shape \(2, 3, 100, 64\).* got \(2, 3, 100, 32\)"),
        ({"key": (2, 1, 100, 64)}, "repeat grouped heads first"),
        ({"value": (2, 3, 99, 64)}, r"value must have shape \(2, 3, 100, 64\).* got \(2, 3, 99, 64\)"),
        ({"query": (3, 63, 64)}, r"must be \[batch, heads, tokens, head_dim\], got shapes \(3, 63, 64\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed, message, device):
    shapes = {"query": (2, 3, 63, 64), "key": (2, 3, 100, 64), "value": (2, 3, 100, 64)} | changed
    named = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        dense_attention(**named, scale=1.0)
    query, key, value = tensors(device)
    with pytest.raises(ValueError, match=r"value is torch.float16 on .* but query is torch.float32"):
        dense_attention(query, key, value.half(), scale=1.0)


def test_the_fastest_that_agrees_is_chosen_and_all_can_be_read_back(device):
    def wrong(query, key, value, scale):
        return native(query, key, value, scale * 1.1)

    def broken(query, key, value, scale):
        raise RuntimeError("no plan for this graph\nat line 3")

    candidates = [
        offered("slow"),
        offered("quick"),
        offered("wrong", wrong),
        offered("broken", broken),
        offered("unfit", unfit=lambda query, key, value: "needs a card with wings"),
    ]
    choice = pick(candidates, device, slow=3.0, quick=1.0, wrong=0.1, broken=0.1, unfit=0.1)
    assert choice.impl == "quick"
    assert choice.time_ms == {"slow": 3.0, "quick": 1.0}
    assert choice.refused["unfit"] == "needs a card with wings"
    assert choice.refused["broken"] == "it raised RuntimeError: no plan for this graph"
    assert "disagrees with the reference at 333 x 1000 tokens" in choice.refused["wrong"]
    assert str(choice).splitlines()[:3] == ["quick", "  quick: 1.000 ms", "  slow: 3.000 ms"]
    assert len(str(choice).splitlines()) == 6


def test_of_two_that_are_alike_the_first_is_chosen(device):
    assert pick([offered("first"), offered("second")], device, first=1.0, second=1.0).impl == "first"


@pytest.mark.parametrize(
    "flaw", ["scale", "last tile", "last head", "second sample", "nan", "dtype", "shape", "device", "nothing"]
)
def test_a_candidate_with_a_flaw_is_refused(flaw, device):
    def run(query, key, value, scale):
        if flaw == "scale":  # ignored
            scale = query.shape[-1] ** -0.5
        if flaw == "last tile":
            key, value = (tensor[:, :, : tensor.shape[2] // 64 * 64] for tensor in (key, value))
        output = native(query, key, value, scale).clone()
        if flaw == "last head":
            output[:, -1] = output[:, 0].clone()
        if flaw == "second sample":
            output[1:] = output[:1].clone()
        if flaw == "nan":
            output[0, -1, 0, 0] = torch.nan
        if flaw == "dtype":
            output = output.double()
        if flaw == "device":
            output = output.to("meta")
        if flaw == "nothing":
            return None
        return output[:, :, 1:] if flaw == "shape" else output

    shapes = [Shape(2, 3, 333, 1000)]
    reason = check(offered("flawed", run), device, torch.bfloat16, 64, shapes)
    assert reason is not None
    assert "\n" not in reason
    assert check(offered("right"), device, torch.bfloat16, 64, shapes) is None


def test_a_machine_on_which_nothing_is_right_is_told_so(device):
    def wrong(query, key, value, scale):
        return torch.zeros_like(query)

    with pytest.raises(
        RuntimeError, match=r"no dense attention is right on .* a: it disagrees .* b: it disagrees"
    ):
        pick([offered("a", wrong), offered("b", wrong)], device)


def test_too_little_memory_says_nothing_about_a_candidate(device):
    def run(query, key, value, scale):
        raise torch.OutOfMemoryError("tried to allocate much")

    with pytest.raises(torch.OutOfMemoryError):
        pick([offered("large", run)], device, large=1.0)


def test_choosing_leaves_random_numbers_and_gradients_alone(device):
    torch.manual_seed(5)
    expected = torch.randn(3, device=device)
    torch.manual_seed(5)
    pick([offered("only")], device, only=1.0)
    assert torch.equal(torch.randn(3, device=device), expected)
    assert torch.is_grad_enabled()


def test_on_a_cpu_auto_is_native_and_nothing_is_measured(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("measured on a CPU")

    monkeypatch.setattr(dispatch, "choose", never)
    given = tensors("cpu")
    assert resolve(*given) == "native"
    assert torch.equal(dense_attention(*given, scale=SCALE), native(*given, SCALE))


def test_gradients_flow_through_auto(device):
    query, key, value = (tensor.requires_grad_() for tensor in tensors(device))
    assert resolve(query, key, value) == "native"
    dense_attention(query, key, value, scale=SCALE).sum().backward()
    assert all(tensor.grad is not None for tensor in (query, key, value))


@pytest.mark.parametrize("tokens_first", [True, False])
def test_in_compiled_code_it_is_one_operator_laid_out_like_the_query(tokens_first, device):
    given = tensors(device, torch.float32)
    if tokens_first:
        given = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in given]
    torch.library.opcheck(
        opaque_dense_attention, (*given, SCALE, "auto"), test_utils=("test_schema", "test_faketensor")
    )
    output = opaque_dense_attention(*given, SCALE, "auto")
    assert output.stride() == given[0].stride()
    assert torch.equal(output, dense_attention(*given, scale=SCALE))


@pytest.mark.parametrize("opaque", [True, False])
def test_compiled_code_attends_without_a_break(opaque, device):
    given = tensors(device, torch.bfloat16, 200, 300)

    def attend(query, key, value):
        if opaque:
            return opaque_dense_attention(query, key, value, SCALE, "auto") * 2
        return dense_attention(query, key, value, scale=SCALE) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), attend(*given))


@needs_gpu
def test_on_a_gpu_the_choice_is_measured_once_and_names_every_candidate(fresh, device):
    given = tensors(device, torch.bfloat16, 200, 300)
    dense_attention(*given, scale=SCALE)
    ((place, choice),) = choices().items()
    assert (place.dtype, place.head_dim) == (torch.bfloat16, 64)
    assert {*choice.time_ms, *choice.refused} == set(dispatch.CANDIDATES)
    assert choice.time_ms[choice.impl] == min(choice.time_ms.values()) > 0
    assert choice.final
    fresh.setattr(dispatch, "choose", None)  # would raise if called again
    assert resolve(*given) == choice.impl


@needs_gpu
def test_a_graph_captured_before_anything_was_measured_uses_native_and_says_so(fresh, device):
    given = tensors(device, torch.bfloat16, 200, 300)
    native(*given, SCALE)  # what torch sets up at its own first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dense_attention(*given, scale=SCALE)
    (choice,) = choices().values()
    assert choice.impl == "native"
    assert "CUDA graph was captured" in choice.note
    assert not choice.final
    graph.replay()
    assert torch.equal(captured, native(*given, SCALE))
    dense_attention(*given, scale=SCALE)  # outside of the capture it is measured after all
    (choice,) = choices().values()
    assert choice.final
    assert choice.time_ms
    assert "CUDA graph was captured" in choice.note


@needs_gpu
@pytest.mark.parametrize("impl", ["auto", *FUSED])
def test_a_choice_that_was_made_is_captured_in_a_graph(impl, device):
    given = tensors(device, torch.bfloat16, 200, 300)
    try:
        expected = dense_attention(*given, scale=SCALE, impl=impl)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dense_attention(*given, scale=SCALE, impl=impl)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


HALF = Place(0, torch.bfloat16, 64)
MEASURED = Choice("quick", {"quick": 1.0, "native": 2.0}, {"flash4": "not installed"})


def choosing(times, result=MEASURED):
    """Stands for the measurement: takes down that it was asked for."""

    def choose(candidates, device, dtype, head_dim):
        times.append((device, dtype, head_dim))
        if isinstance(result, Exception):
            raise result
        return result

    return choose


def test_a_choice_is_made_once_for_a_device_dtype_and_head_dim(fresh):
    asked = []
    fresh.setattr(dispatch, "choose", choosing(asked))
    for _ in range(2):
        for place in (HALF, HALF._replace(head_dim=128), HALF._replace(device_index=1)):
            assert dispatch._choice(place) == MEASURED
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert asked == [(first, torch.bfloat16, 64), (first, torch.bfloat16, 128), (second, torch.bfloat16, 64)]
    assert choices()[HALF].refused == {"flash4": "not installed"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_not_measured_and_says_so(fresh, dtype):
    fresh.setattr(dispatch, "choose", choosing([], AssertionError("measured")))
    choice = dispatch._choice(HALF._replace(dtype=dtype))
    assert choice.impl == "native"
    assert f"not measured for {dtype}" in str(choice)


def test_in_a_capture_nothing_is_measured_but_after_it(fresh):
    asked = []
    fresh.setattr(dispatch, "choose", choosing(asked))
    fresh.setattr(dispatch, "_capturing", lambda: True)
    assert dispatch._choice(HALF).impl == "native"
    assert "CUDA graph was captured" in choices()[HALF].note
    assert asked == []
    fresh.setattr(dispatch, "_capturing", lambda: False)
    assert dispatch._choice(HALF).impl == "quick"
    assert "CUDA graph was captured" in choices()[HALF].note  # for that graph goes on using it
    fresh.setattr(dispatch, "_capturing", lambda: True)
    assert dispatch._choice(HALF).impl == "quick"
    assert len(asked) == 1


def test_too_little_memory_to_measure_leaves_native_and_says_so(fresh):
    asked = []
    fresh.setattr(dispatch, "choose", choosing(asked, torch.OutOfMemoryError("tried to allocate much")))
    assert [dispatch._choice(HALF).impl for _ in range(2)] == ["native"] * 2
    assert "out of memory" in choices()[HALF].note
    assert len(asked) == 1


def test_a_named_implementation_that_disagrees_is_refused_whenever_it_is_named(fresh, device):
    ran = []

    def wrong(query, key, value, scale):
        ran.append(query.shape)
        return torch.zeros_like(query)

    fresh.setitem(dispatch.CANDIDATES, "flash4", offered("flash4", wrong))
    for _ in range(2):
        with pytest.raises(ValueError, match="impl='flash4' is refused: it disagrees with the reference"):
            dense_attention(*tensors(device, torch.bfloat16), scale=SCALE, impl="flash4")
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (lambda output: None, "AttributeError: 'NoneType' object has no attribute 'transpose'"),
        (lambda output: (output.to(torch.float32), None), r"it returned \(.*\) torch.float32 for"),
        (lambda output: (output * torch.nan, None), "it disagrees with the reference"),
        (lambda output: output[:, :1].expand_as(output), "it disagrees with the reference"),
        (lambda output: output, None),
        (lambda output: (output, None), None),
    ],
)
def test_a_flash4_that_returns_something_else_is_refused(returned, reason, monkeypatch):
    def attend(query, key, value, softmax_scale):
        parts = (part.transpose(1, 2) for part in (query, key, value))
        return returned(native(*parts, softmax_scale).transpose(1, 2))

    monkeypatch.setattr(flash4, "_load", lambda: (attend, None))
    monkeypatch.setattr(flash4.torch.cuda, "device", lambda device: contextlib.nullcontext())
    found = check(offered("flash4", flash4.FLASH4.run), torch.device("cpu"), torch.bfloat16, 64, [SMALL])
    assert found is None if reason is None else re.search(reason, found)


@pytest.fixture
def three_timed(fresh):
    """On any device: flash4 was found fastest, then cudnn, then native; what cudnn computes is native's."""
    measured = Choice("flash4", {"flash4": 1.0, "cudnn": 2.0, "native": 3.0}, {"efficient": "unfit"})
    fresh.setattr(dispatch, "choose", choosing([], measured))
    fresh.setattr(
        dispatch, "_fastest", lambda query, key, value: dispatch._choice(dispatch._place(query)).impl
    )
    fresh.setitem(dispatch.CANDIDATES, "cudnn", offered("cudnn"))
    return fresh


def test_a_kernel_that_fails_as_it_runs_gives_way_to_the_next_fastest_for_good(three_timed, device):
    ran = []

    def failing(query, key, value, scale):
        ran.append(query.shape)
        raise RuntimeError("cannot take this stride\nat line 3")

    three_timed.setitem(dispatch.CANDIDATES, "flash4", offered("flash4", failing))
    given = tensors(device, torch.bfloat16)
    for _ in range(2):
        assert torch.equal(dispatch.run(*given, SCALE, "auto"), native(*given, SCALE))
    assert len(ran) == 1
    (choice,) = choices().values()
    assert choice.impl == "cudnn"
    assert choice.time_ms == {"cudnn": 2.0, "native": 3.0}
    assert choice.refused == {
        "efficient": "unfit",
        "flash4": "it failed as it ran: RuntimeError: cannot take this stride",
    }
    with pytest.raises(ValueError, match="impl='flash4' is refused: it failed as it ran"):
        resolve(*given, "flash4")


def test_too_little_memory_as_it_runs_is_told_and_dismisses_nobody(three_timed, device):
    def no_room(query, key, value, scale):
        raise torch.OutOfMemoryError("tried to allocate much")

    three_timed.setitem(dispatch.CANDIDATES, "flash4", offered("flash4", no_room))
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.run(*tensors(device, torch.bfloat16), SCALE, "auto")
    assert next(iter(choices().values())).impl == "flash4"


def test_a_named_implementation_that_fails_as_it_runs_says_so_in_one_line(fresh, device):
    def failing(query, key, value, scale):
        raise RuntimeError("no plan\nand more")

    fresh.setitem(dispatch.CANDIDATES, "cudnn", offered("cudnn", failing))
    fresh.setattr(dispatch, "_verdict", lambda impl, query: None)
    with pytest.raises(RuntimeError) as failure:
        dense_attention(*tensors(device), scale=SCALE, impl="cudnn")
    assert (
        str(failure.value)
        == "dense attention impl='cudnn' failed as it ran: RuntimeError: no plan; use impl='auto'"
    )


def test_a_named_implementation_that_was_never_checked_is_refused_in_a_capture(fresh, device):
    fresh.setitem(dispatch.CANDIDATES, "flash4", offered("flash4"))
    fresh.setattr(dispatch, "_capturing", lambda: True)
    with pytest.raises(ValueError, match="while a CUDA graph is captured; call it once before"):
        resolve(*tensors(device, torch.bfloat16), "flash4")


def test_the_contract_names_every_candidate():
    assert set(op.Impl.__args__) == {"auto", *dispatch.CANDIDATES}
    assert isinstance(Choice("native").refused, dict)
