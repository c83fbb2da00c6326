"""Claims about time taken by events, on a pretended GPU whose work is done when the test says so."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from adamac.integrations.diffusers.stopwatch import Stopwatch

ONE, TWO = torch.device("cuda", 0), torch.device("cuda", 1)


class Gpu:
    """Events that are over up to a time, each a second after the one before."""

    def __init__(self):
        self.now, self.over, self.made = 0, 0, 0
        self.capturing = False

    def event(self, **flags):
        gpu = self
        gpu.made += 1

        class Event:
            device = at = None

            def record(self, stream):
                assert self.device in (None, stream.device), "an event was used on another device"
                self.device, gpu.now = stream.device, gpu.now + 1
                self.at = gpu.now

            def query(self):
                assert not gpu.capturing, "the capture is broken"
                return self.at <= gpu.over

            def synchronize(self):
                gpu.over = max(gpu.over, self.at)

            def elapsed_time(self, end):
                assert end.query()
                return 1000.0 * (end.at - self.at)

        return Event()


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    return gpu


def test_only_what_is_over_is_read_and_its_events_are_used_again(gpu):
    watch, seconds = Stopwatch(), defaultdict(float)
    assert watch.time(seconds, "plan", ONE, lambda: "result") == "result"
    watch.read()
    assert not seconds
    watch.time(seconds, "attend", ONE, lambda: None)
    gpu.over = 2  # the first stage's end
    watch.read()
    assert seconds == {"plan": 1.0}
    watch.time(seconds, "attend", ONE, lambda: None)
    assert gpu.made == 4
    watch.read(wait=True)
    assert seconds == {"plan": 1.0, "attend": 2.0}


def test_events_stay_with_their_device(gpu):
    watch, seconds = Stopwatch(), defaultdict(float)
    for device in (ONE, TWO, ONE, TWO):
        watch.time(seconds, "dense", device, lambda: None)
        watch.read(wait=True)
    assert gpu.made == 4
    assert seconds == {"dense": 4.0}


def test_seconds_go_where_they_went_when_the_stage_began(gpu):
    watch, former, latter = Stopwatch(), defaultdict(float), defaultdict(float)
    watch.time(former, "dense", ONE, lambda: None)
    watch.time(latter, "dense", ONE, lambda: None)
    watch.read(wait=True)
    assert former == latter == {"dense": 1.0}


def test_while_a_graph_is_captured_nothing_is_timed_and_nothing_asked(gpu):
    watch, seconds = Stopwatch(), defaultdict(float)
    watch.time(seconds, "plan", ONE, lambda: None)
    gpu.capturing = True
    assert watch.time(seconds, "attend", ONE, lambda: "result") == "result"
    watch.read()
    gpu.capturing = False
    watch.read(wait=True)
    assert seconds == {"plan": 1.0}


def test_a_stage_that_fails_leaves_nothing_behind(gpu):
    watch, seconds = Stopwatch(), defaultdict(float)
    with pytest.raises(ZeroDivisionError):
        watch.time(seconds, "plan", ONE, lambda: 1 / 0)
    watch.read(wait=True)
    assert not seconds
