"""Claims about cluster attention, of every implementation, against float64 and the eager computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamac.ops import cluster_attention as op
from adamac.ops import launch
from adamac.ops.cluster_attention import cluster_attention, fitness, refused, resolve
from adamac.ops.cluster_attention import gather as gather_module
from adamac.ops.cluster_attention import triton as triton_module
from adamac.ops.cluster_attention.triton import tiles
from adamac.ops.segment import Segments
from adamac.testing import assert_within_error_budget, attention_like, eager_cluster_attention

IMPLS = ("reference", "gather", "triton")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
NEEDS_HOPPER = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")

SHAPES = [
    # batch, heads, tokens, head_dim, q_clusters, k_clusters
    pytest.param((1, 2, 63, 40, 3, 5), id="63-tokens-dim-40"),
    pytest.param((2, 1, 100, 64, 7, 11), id="100-tokens-dim-64"),
    pytest.param((1, 2, 1000, 80, 6, 9), id="1000-tokens-dim-80"),
    pytest.param((2, 2, 130, 128, 5, 40), id="dim-128-more-clusters-than-some-have-tokens"),
    pytest.param((1, 1, 1, 64, 1, 1), id="one-token"),
    pytest.param((1, 1, 90, 64, 1, 1), id="one-cluster"),
    pytest.param((1, 1, 90, 64, 1, 12), id="one-query-cluster"),
    pytest.param((1, 1, 9, 8, 20, 30), id="mostly-empty-clusters"),
]


def case(
    batch, heads, tokens, head_dim, q_clusters, k_clusters, *, dtype=torch.float32, device="cpu", padding=0.1
):
    """Draw inputs of the operation with padding on both sides, empty clusters and ragged reads."""
    query, key, value = attention_like(batch, heads, tokens, head_dim, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(tokens)

    def labels(clusters):
        drawn = torch.randint(max(1, clusters - 1), (batch, heads, tokens), generator=generator)
        padded = torch.rand(batch, heads, tokens, generator=generator) < padding
        return drawn.masked_fill(padded & (tokens > 1), -1).to(device)

    queries, keys = Segments(labels(q_clusters), q_clusters), Segments(labels(k_clusters), k_clusters)
    share = torch.rand(batch, heads, q_clusters, k_clusters, generator=generator) * 3 - 1
    reads = (share.clamp(0, 1).to(device) * keys.counts.unsqueeze(-2)).round().long()
    return query, key, value, queries, keys, reads


def assert_right(inputs, impl, **options):
    """Hold output and log-sum-exp of an implementation to the error budget."""
    options = {"scale": inputs[0].shape[-1] ** -0.5} | options
    wide = [tensor.double() for tensor in inputs[:3]]
    output, lse = cluster_attention(*inputs, impl=impl, **options)
    oracle, oracle_lse = eager_cluster_attention(*wide, *inputs[3:], **options)
    eager, eager_lse = eager_cluster_attention(*inputs, **options)
    assert output.dtype == inputs[0].dtype
    assert lse.dtype == (torch.float64 if output.dtype == torch.float64 else torch.float32)
    assert_within_error_budget(output, oracle, eager)
    assert_within_error_budget(lse, oracle_lse, eager_lse)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_implementations_keep_the_error_budget_on_odd_shapes(shape, compensate, impl, device):
    assert_right(case(*shape, device=device), impl, compensate=compensate)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("head_dim", [40, 128])
def test_implementations_keep_the_error_budget_in_every_dtype(head_dim, dtype, compensate, impl, device):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the kernel takes no float64, which a test of its own claims")
    assert_right(case(1, 2, 150, head_dim, 4, 9, dtype=dtype, device=device), impl, compensate=compensate)


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_and_keys_may_differ_in_number(impl, device):
    query, key, value, queries, keys, reads = case(1, 2, 120, 64, 4, 9, device=device)
    fewer = Segments(queries.labels[:, :, :50], queries.number)
    assert_right((query[:, :, :50], key, value, fewer, keys, reads), impl, compensate=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_need_not_be_contiguous(impl, device):
    inputs = [
        tensor.transpose(1, 2).contiguous().transpose(1, 2)
        for tensor in case(2, 3, 70, 64, 4, 9, device=device)[:3]
    ]
    assert not inputs[0].is_contiguous()
    assert_right((*inputs, *case(2, 3, 70, 64, 4, 9, device=device)[3:]), impl, compensate=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_another_scale_is_used(impl, device):
    assert_right(case(1, 1, 80, 64, 4, 9, device=device), impl, compensate=True, scale=0.3)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl, device):
    query, key, *rest = case(1, 1, 80, 64, 4, 9, device=device)
    assert_right((100 * query, key, *rest), impl, compensate=True)


def test_the_products_that_run_anywhere_keep_the_error_budget_too(device, monkeypatch):
    monkeypatch.setattr(gather_module, "_fused", gather_module._eager)
    assert_right(case(2, 2, 100, 64, 5, 9, device=device), "gather", compensate=True)


@pytest.mark.parametrize("elements", [1, 20_000, 1 << 30])
def test_how_query_clusters_are_batched_does_not_matter(elements, device, monkeypatch):
    monkeypatch.setattr(gather_module, "_BATCH_ELEMENTS", elements)
    assert_right(case(1, 2, 200, 64, 7, 9, device=device), "gather", compensate=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("compensate", [True, False])
def test_padding_reads_nothing_and_is_read_by_nothing(compensate, impl, device):
    query, key, value, queries, keys, reads = case(1, 2, 100, 64, 4, 9, device=device, padding=0.3)
    padded, unread = queries.labels < 0, keys.labels < 0
    options = {"compensate": compensate, "scale": 0.125, "impl": impl}
    output, lse = cluster_attention(query, key, value, queries, keys, reads, **options)
    assert (output[padded] == 0).all()
    assert torch.isneginf(lse[padded]).all()
    key[unread], value[unread], query[padded] = 1e4, -1e4, 1e4
    again = cluster_attention(query, key, value, queries, keys, reads, **options)
    assert torch.equal(again[0], output)
    assert torch.equal(again[1], lse)


@pytest.mark.parametrize("impl", [*IMPLS, pytest.param("hopper", marks=NEEDS_HOPPER)])
def test_what_stands_in_padding_never_counts_even_if_all_is_read(impl, device):
    dtype = torch.bfloat16 if impl == "hopper" else torch.float32
    query, key, value, queries, keys, reads = case(
        1, 2, 300, 64, 4, 9, device=device, padding=0.3, dtype=dtype
    )
    key[keys.labels < 0], value[keys.labels < 0] = torch.nan, torch.nan
    reads[:, :, 0] = keys.counts
    output, lse = cluster_attention(
        query, key, value, queries, keys, reads, compensate=True, scale=0.125, impl=impl
    )
    assert output.isfinite().all()
    assert lse[queries.labels >= 0].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_reads_nothing_is_zero(impl, device):
    query, key, value, queries, keys, reads = case(1, 1, 60, 64, 3, 5, device=device)
    reads[:, :, 0] = 0
    output, lse = cluster_attention(
        query, key, value, queries, keys, reads, compensate=False, scale=0.1, impl=impl
    )
    assert (output[queries.labels == 0] == 0).all()
    assert torch.isneginf(lse[queries.labels == 0]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_reading_everything_is_dense_attention(impl, device):
    query, key, value, queries, keys, _ = case(1, 2, 100, 64, 4, 9, device=device, padding=0)
    reads = keys.counts.unsqueeze(-2).expand(1, 2, 4, 9)
    dense = torch.nn.functional.scaled_dot_product_attention
    for compensate in (True, False):
        output, _ = cluster_attention(
            query, key, value, queries, keys, reads, compensate=compensate, scale=0.125, impl=impl
        )
        oracle = dense(query.double(), key.double(), value.double())
        assert_within_error_budget(output, oracle, dense(query, key, value))


@pytest.mark.parametrize("impl", IMPLS)
def test_halves_merged_by_their_log_sum_exp_are_the_whole(impl, device):
    query, key, value, queries, keys, _ = case(1, 2, 100, 64, 4, 9, device=device, padding=0)
    first = torch.arange(100, device=device) < 37
    halves = []
    for outside in (~first, first):
        half = Segments(keys.labels.masked_fill(outside, -1), 9)
        reads = half.counts.unsqueeze(-2).expand(1, 2, 4, 9)
        halves.append(
            cluster_attention(
                query, key, value, queries, half, reads, compensate=False, scale=0.125, impl=impl
            )
        )
    outputs, sums = (torch.stack(parts) for parts in zip(*halves, strict=True))
    merged = (sums.softmax(0).unsqueeze(-1) * outputs).sum(0)
    dense = torch.nn.functional.scaled_dot_product_attention
    oracle = dense(query.double(), key.double(), value.double())
    assert_within_error_budget(merged, oracle, dense(query, key, value))


@pytest.mark.parametrize("impl", IMPLS)
def test_skipped_clusters_of_identical_members_are_compensated_exactly(impl, device):
    query, key, value = attention_like(1, 2, 120, 64, noise=0.0, device=device)
    labels = torch.stack([torch.unique(head, dim=0, return_inverse=True)[1] for head in key[0]]).unsqueeze(0)
    queries = Segments(torch.randint(3, (1, 2, 120), device=device), 3)
    keys = Segments(labels, int(labels.max()) + 1)
    reads = torch.zeros(1, 2, 3, keys.number, dtype=torch.long, device=device)
    output, _ = cluster_attention(
        query, key, value, queries, keys, reads, compensate=True, scale=0.125, impl=impl
    )
    dense = torch.nn.functional.scaled_dot_product_attention
    oracle = dense(query.double(), key.double(), value.double())
    assert_within_error_budget(output, oracle, dense(query, key, value))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_call_gives_the_same_bits(impl, device):
    inputs = case(1, 2, 300, 64, 5, 9, device=device)
    first, second = (cluster_attention(*inputs, compensate=True, scale=0.125, impl=impl) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_known_max_reads_changes_nothing(impl, device):
    query, key, value, queries, keys, reads = case(1, 2, 300, 64, 5, 9, device=device)
    reads[:, :, 1] = keys.counts  # a cluster that reads everything is not bound by it
    reads[:, :, [0, 2, 3, 4], 3:] = 0
    max_reads = int(reads[:, :, [0, 2, 3, 4]].sum(-1).max())
    options = {"compensate": True, "scale": 0.125, "impl": impl}
    free, bound = (
        cluster_attention(query, key, value, queries, keys, reads, max_reads=m, **options)
        for m in (None, max_reads)
    )
    assert torch.equal(free[0], bound[0])


def test_heads_done_in_rounds_are_the_same_bits(device, monkeypatch):
    inputs = case(2, 3, 130, 64, 5, 9, device=device)
    options = {"compensate": True, "scale": 0.125, "impl": "triton"}
    at_once = cluster_attention(*inputs, **options)
    monkeypatch.setattr("adamac.ops.cluster_attention.triton._WORKSPACE_BYTES", 300_000)
    assert torch.equal(cluster_attention(*inputs, **options)[0], at_once[0])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 30), st.integers(1, 17))
def test_tiles_cover_every_row_once(device, sizes, padding, rows):
    starts = torch.tensor([0, *sizes], device=device).cumsum(0).int()[None, None]
    tokens = sum(sizes) + padding
    if tokens == 0:
        return
    cluster, first = (table[0, 0].tolist() for table in tiles(starts, tokens, rows))
    bounds = [*starts[0, 0].tolist(), tokens]
    covered = [
        (each, place)
        for each, begin in zip(cluster, first, strict=True)
        if each <= len(sizes)
        for place in range(begin, min(begin + rows, bounds[each + 1]))
    ]
    assert covered == [
        (each, p) for each in range(len(sizes) + 1) for p in range(bounds[each], bounds[each + 1])
    ]


@pytest.mark.parametrize("clusters", range(3, 8))
def test_tables_of_tiles_begin_where_kernels_need_not_be_compiled_anew(clusters, device):
    starts = torch.arange(clusters + 1, device=device).int().expand(1, 1, -1)
    assert all(table.data_ptr() % 16 == 0 for table in tiles(starts, clusters, 64))


def test_the_operator_describes_itself_truly(device):
    query, key, value, queries, keys, reads = case(1, 2, 60, 64, 4, 6, device=device)
    lists = (queries.order, queries.starts, keys.order, keys.starts, reads.int())
    for laid_out in (query, query.transpose(2, 3).contiguous().transpose(2, 3)):
        arguments = (laid_out, key, value, *lists, 60, True, 0.125, "triton")
        torch.library.opcheck(torch.ops.adamac.cluster_attention.default, arguments)


def test_the_kernel_refuses_float64_by_name(device):
    inputs = case(1, 1, 20, 64, 2, 3, dtype=torch.float64, device=device)
    with pytest.raises(
        ValueError, match=r"the kernels take float16, bfloat16 and float32, not torch.float64"
    ):
        cluster_attention(*inputs, compensate=False, scale=1.0, impl="triton")


def test_an_unknown_implementation_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"impl must be one of auto, reference, gather, triton, hopper; got 'grater'"
    ):
        resolve("grater")


def test_auto_stands_for_an_implementation_and_says_what_it_is_not(device):
    query = torch.zeros(1, 1, 1, 64, device=device)
    assert resolve("auto", query) == ("triton" if device.type == "cuda" else "gather")
    assert "hopper" in refused(query)
    assert resolve("auto") == "auto"


def test_the_hopper_kernel_is_refused_with_a_reason_where_it_cannot_run(device):
    inputs = case(1, 1, 20, 64, 2, 3, device=device)  # float32, which it does not take
    with pytest.raises(ValueError, match=r'impl="hopper" cannot run: .*; use impl="auto"'):
        cluster_attention(*inputs, compensate=False, scale=1.0, impl="hopper")


@NEEDS_HOPPER
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_hopper_kernel_is_found_fit_and_keeps_the_error_budget(head_dim, dtype, compensate, device):
    for shape in ((1, 2, 63, head_dim, 3, 5), (2, 2, 1000, head_dim, 6, 200), (1, 1, 1, head_dim, 1, 1)):
        inputs = case(*shape, dtype=dtype, device=device)
        assert resolve("auto", inputs[0]) == "hopper"
        assert_right(inputs, "hopper", compensate=compensate)


@pytest.fixture
def fresh(monkeypatch):
    """A process in which no kernel was checked, and in which "auto" takes the Triton kernel on any device."""
    monkeypatch.setattr(fitness, "_verdicts", {})
    monkeypatch.setattr(op, "interpreted", lambda: False)
    monkeypatch.setattr(op, "KERNELS", ("triton",))
    return monkeypatch


def failing(error, times):
    """Stands for the kernels: takes down that it was asked, and fails."""

    def attend(query, *rest, **options):
        times.append(query.shape)
        raise error

    return attend


def test_a_kernel_that_fails_as_it_runs_gives_way_for_good_and_says_why(fresh, device):
    inputs = case(1, 2, 60, 64, 3, 5, device=device)
    options = {"compensate": True, "scale": 0.125}
    assert resolve("auto", inputs[0]) == "triton"
    asked = []
    error = RuntimeError("while compiling\nout of resource: shared memory, Required: 300000")
    fresh.setattr(triton_module, "triton_cluster_attention", failing(error, asked))
    for _ in range(2):
        output, _ = cluster_attention(*inputs, **options)
        assert torch.equal(output, cluster_attention(*inputs, impl="gather", **options)[0])
    assert len(asked) == 1
    assert refused(inputs[0]) == {
        "triton": "it failed as it ran: RuntimeError: out of resource: shared memory, Required: 300000"
    }


def test_a_named_kernel_that_fails_as_it_runs_says_so_in_one_line(fresh, device):
    inputs = case(1, 1, 20, 64, 2, 3, device=device)
    assert resolve("triton", inputs[0]) == "triton"  # found fit before it fails
    fresh.setattr(triton_module, "triton_cluster_attention", failing(RuntimeError("here\nno kernel"), []))
    with pytest.raises(RuntimeError) as failure:
        cluster_attention(*inputs, compensate=False, scale=1.0, impl="triton")
    assert str(failure.value) == 'impl="triton" failed as it ran: RuntimeError: no kernel; use impl="auto"'


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: out of memory")],
)
def test_too_little_memory_is_told_and_says_nothing_about_a_kernel(error, fresh, device):
    inputs = case(1, 2, 60, 64, 3, 5, device=device)
    assert resolve("auto", inputs[0]) == "triton"  # found fit before it fails
    with fresh.context() as patch:
        patch.setattr(triton_module, "triton_cluster_attention", failing(error, []))
        with pytest.raises(type(error), match="out of memory"):
            cluster_attention(*inputs, compensate=True, scale=0.125)
    assert resolve("auto", inputs[0]) == "triton"
    assert_right(inputs, "auto", compensate=True)


def room_for(heads, monkeypatch):
    """Let memory for a round be had for so many heads at most."""
    new_empty = torch.Tensor.new_empty

    def limited(tensor, *size, **options):
        if len(size) == 3 and size[0] > heads:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much\nand more")
        return new_empty(tensor, *size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", limited)


def test_where_there_is_no_room_for_all_heads_fewer_are_done_at_once_to_the_same_bits(device, monkeypatch):
    inputs = case(1, 3, 40, 16, 3, 5, device=device)
    options = {"compensate": True, "scale": 0.125, "impl": "triton"}
    at_once = cluster_attention(*inputs, **options)
    room_for(2, monkeypatch)
    assert torch.equal(cluster_attention(*inputs, **options)[0], at_once[0])


def test_where_there_is_no_room_for_one_head_one_line_says_what_is_needed_and_what_to_do(device, monkeypatch):
    inputs = case(2, 3, 130, 64, 5, 9, device=device)
    assert resolve("triton", inputs[0]) == "triton"  # found fit while there was room
    room_for(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError) as refusal:
        cluster_attention(*inputs, compensate=True, scale=0.125, impl="triton")
    assert "needs 0 MiB of its own to do one head of 130 tokens" in str(refusal.value)
    assert "fewer query clusters or a smaller budget" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("key", lambda key: key.half(), "key is torch.float16 on .* but query is torch.float32"),
        ("value", lambda value: value.to("meta"), "value is torch.float32 on meta but query is"),
        ("value", lambda value: value[:, :, 1:], r"value must have shape \(1, 2, 60, 64\)"),
        ("key", lambda key: key[..., :32], r"key must have shape \(1, 2, 60, 64\).* got \(1, 2, 60, 32\)"),
        (
            "queries",
            lambda queries: Segments(queries.labels[:, :, 1:], 3),
            r"queries must have shape \(1, 2, 60\)",
        ),
        ("keys", lambda keys: Segments(keys.labels.to("meta"), 5), "keys is on meta, the rest is on"),
        (
            "keys",
            lambda keys: Segments.listed(keys.order.to("meta"), keys.starts),
            "keys is on meta, the rest is on",
        ),
        ("reads", lambda reads: reads[..., 1:], r"reads must have shape \(1, 2, 3, 5\) .* \(1, 2, 3, 4\)"),
        (
            "reads",
            lambda reads: reads.to("meta"),
            "reads is on meta, the rest is on .*; move all to one device",
        ),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused_by_name(name, change, message, impl, device):
    names = ("query", "key", "value", "queries", "keys", "reads")
    inputs = dict(zip(names, case(1, 2, 60, 64, 3, 5, device=device), strict=True))
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        cluster_attention(*inputs.values(), compensate=True, scale=0.125, impl=impl)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((8, 0), torch.bfloat16, 128, "compute capability 8.0, the kernel is for 9.0"),
        ((12, 0), torch.bfloat16, 128, "compute capability 12.0, the kernel is for 9.0"),
        ((9, 0), torch.float32, 128, "takes float16 and bfloat16, not torch.float32"),
        ((9, 0), torch.bfloat16, 80, "takes head_dim 64 and 128, not 80"),
        ((9, 0), torch.bfloat16, 64, "rows that begin at multiples of 16 bytes"),
    ],
)
def test_the_hopper_kernel_is_refused_where_it_was_not_made_for(
    capability, dtype, head_dim, reason, monkeypatch
):
    monkeypatch.setattr(fitness, "interpreted", lambda: False)
    monkeypatch.setattr(fitness, "capability", lambda index: capability)
    apart = head_dim + (1 if "rows" in reason else 8)
    query = torch.zeros(1, 2, 30, apart, dtype=dtype)[..., :head_dim]
    assert reason in str(fitness._unfit_for_hopper(query))


@pytest.mark.parametrize(
    ("device_type", "capability", "hip", "reason"),
    [
        ("cuda", (7, 5), None, "compute capability 7.5, the kernels need 8.0"),
        ("cuda", (9, 4), "6.2", "the kernels are for NVIDIA GPUs"),
        ("cpu", None, None, "on cpu, not on a GPU"),
        ("cuda", (8, 6), None, None),
    ],
)
def test_kernels_are_refused_on_devices_that_they_were_not_made_for(
    device_type, capability, hip, reason, monkeypatch
):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = launch.triton_problem(torch.device(device_type, 0), torch.bfloat16)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "triton is not installed"),
        (
            OSError("libtriton.so: undefined symbol\nmore"),
            "reinstall it: OSError: libtriton.so: undefined symbol",
        ),
    ],
)
def test_a_triton_that_is_missing_or_broken_is_a_reason_and_no_crash(error, reason, monkeypatch):
    def load(name):
        raise error

    launch._triton_missing.cache_clear()
    monkeypatch.setattr(launch.importlib, "import_module", load)
    try:
        assert launch._triton_missing().endswith(reason)
    finally:
        launch._triton_missing.cache_clear()


@pytest.mark.parametrize(
    ("flaw", "verdict"),
    [
        ("nan", "it disagrees with the reference"),
        ("everything is read", "it disagrees with the reference"),
        ("lse", "it disagrees with the reference: the log-sum-exp is off"),
        ("does not compile", "it does not run with the installed Triton: ValueError: unknown layout"),
        ("no room", "out of memory when it was to be checked"),
        (None, None),
    ],
)
def test_a_kernel_is_checked_before_its_first_use_and_refused_if_it_errs(flaw, verdict, monkeypatch):
    from adamac.ops.cluster_attention.reference import reference

    def kernel(query, key, value, queries, keys, reads, *, max_reads, impl, **options):
        if flaw == "does not compile":
            raise ValueError("at 12:3:\nunknown layout")
        if flaw == "no room":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if flaw == "everything is read":
            reads = keys.counts.unsqueeze(-2).expand_as(reads)
        output, lse = reference(query, key, value, queries, keys, reads, **options)
        if flaw == "nan":
            output[0, -1, -1, -1] = torch.nan
        return output, lse + (flaw == "lse")

    monkeypatch.setattr(fitness, "_verdicts", {})
    monkeypatch.setattr(fitness, "interpreted", lambda: False)
    monkeypatch.setattr(fitness, "triton_problem", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_module, "triton_cluster_attention", kernel)
    query = torch.zeros(1, 1, 4, 8)
    found = fitness.problem("triton", query)
    assert found is None if verdict is None else found.startswith(verdict)
    # Another time there may be room; all else is found out once.
    assert len(fitness._verdicts) == (flaw != "no room")
