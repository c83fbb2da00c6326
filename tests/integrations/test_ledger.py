"""Claims about what is taken down of every call."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from adamac.integrations.diffusers.ledger import Call, Ledger


def sparse(step, layer, density, branch="cond"):
    share = torch.tensor(density)
    return Call(step, layer, branch, None, share, share + 0.1, impl="gather")


def dense(step, layer):
    return Call(step, layer, "cond", "schedule: first steps", impl="native")


def test_a_report_is_what_the_calls_say():
    ledger = Ledger()
    for call in (
        dense(0, 0),
        dense(0, 1),
        sparse(1, 0, [[0.1, 0.3]]),
        dense(1, 1),
        sparse(1, 1, [[0.5, 0.5]], "uncond"),
        # Another number of samples, and a layer with another number of heads.
        sparse(2, 0, [[0.2, 0.4], [0.4, 0.6]]),
        sparse(2, 2, [[0.7]]),
    ):
        ledger.add(call)
    report = ledger.report()
    assert (report.calls, report.sparse_calls) == (7, 4)
    assert report.dense_calls == {"schedule: first steps": 3}
    assert report.dense_impl == {"native": 3}
    assert report.sparse_impl == {"gather": 4}
    assert report.density == pytest.approx((3 + 0.2 + 0.5 + 0.4 + 0.7) / 7)
    assert report.sparse_density == pytest.approx((0.2 + 0.5 + 0.4 + 0.7) / 4)
    assert "4 of 7 self-attention calls were sparse and read 45.0% of the pairs; density of all" in str(
        report
    )
    assert report.cost == pytest.approx((3 + 0.3 + 0.6 + 0.5 + 0.8) / 7)
    approx = pytest.approx
    assert report.density_by_step_layer == [
        [1, 1, None],
        [approx(0.2), 0.75, None],
        [approx(0.4), None, approx(0.7)],
    ]
    assert report.density_by_layer_head == [approx([0.2, 0.4]), approx([0.5, 0.5]), approx([0.7])]


def test_layers_of_one_step_may_lie_on_several_devices():
    ledger = Ledger()
    far = Call(0, 1, "cond", None, *(torch.empty(1, 2, device="meta") for _ in range(2)), impl="gather")
    for call in (sparse(0, 0, [[0.2, 0.2]]), far, sparse(1, 0, [[0.2, 0.2]])):
        ledger.add(call)
    assert [len(each.layers) for each in ledger._videos[-1].calls] == [1, 1]


def test_a_thread_that_asks_for_reports_loses_no_call():
    ledger, done = Ledger(), threading.Event()
    seen = []

    def ask():
        while not done.is_set():
            seen.append(ledger.report().calls)

    asking = threading.Thread(target=ask)
    asking.start()
    for step in range(100):
        for layer in range(20):
            ledger.add(sparse(step, layer, [[0.2, 0.2]]))
            ledger.timed("attend", torch.device("cpu"), lambda: None)
    done.set()
    asking.join()
    assert ledger.report().calls == 2000
    assert seen == sorted(seen)


def test_calls_that_make_no_steps_are_folded_all_the_same():
    ledger = Ledger()
    for _ in range(10_000):
        ledger.add(sparse(0, 0, [[0.2, 0.2]]))
    assert len(ledger._step) <= 4096
    assert ledger.report().calls == 10_000


def test_asking_for_a_report_changes_nothing_and_clearing_forgets_everything():
    ledger = Ledger()
    ledger.add(sparse(0, 0, [[0.2]]))
    ledger.held(7)
    assert ledger.report() == ledger.report()
    ledger.add(sparse(0, 1, [[0.4]]))  # of the step that was reported in between
    assert ledger.report().density_by_step_layer == [pytest.approx([0.2, 0.4])]
    ledger.clear()
    assert ledger.report() == Ledger().report()


def test_older_videos_are_forgotten_with_their_times():
    ledger = Ledger()
    for _ in range(40):
        ledger.begin_video()
        ledger.add(dense(0, 0))
        ledger.timed("dense", torch.device("cpu"), lambda: None)
    report = ledger.report()
    assert report.calls == 32
    assert 0 < report.seconds["dense"] < 1


def test_stages_on_a_gpu_are_timed_without_waiting_and_events_are_used_again(device):
    if device.type == "cpu":
        pytest.skip("needs a GPU")
    ledger, work = Ledger(), torch.randn(2048, 2048, device=device)
    for step in range(5):
        ledger.add(dense(step, 0))
        assert ledger.timed("dense", device, lambda: work @ work).shape == work.shape
        torch.cuda.synchronize()
    assert len(ledger._stopwatch._running) <= 2
    assert 0 < ledger.report().seconds["dense"] < 60
    assert sum(map(len, ledger._stopwatch._spare.values())) <= 4


def test_what_is_held_does_not_grow_with_the_calls_of_a_step():
    # Python collects its garbage by how many objects there are more: a full collection stops a step for a quarter of a second.
    ledger = Ledger()

    def steps(first):
        for step in range(first, first + 20):
            for layer in range(60):
                ledger.add(sparse(step, layer, [[0.1, 0.2]]))
                ledger.timed("attend", torch.device("cpu"), lambda: None)
        gc.collect()
        return len(gc.get_objects())

    assert steps(20) - steps(0) < 20 * 10
