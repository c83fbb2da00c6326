"""The text encoder is asked the right things, and learns from being asked."""

import itertools
import types

import torch
from transformers import UMT5Config, UMT5EncoderModel

from adamac.embedded.training import reading

CUT = 9


def test_neighbours_places_and_sides_are_those_of_the_caption():
    tokens = torch.tensor([[4, CUT, 5, 1, 0], [4, 5, 1, 0, 0]])
    asked = reading.questions(tokens, CUT)
    assert asked.before[0, :4].tolist() == [0, 4, CUT, 5]
    assert asked.after[0, :4].tolist() == [CUT, 5, 1, 0]
    assert asked.place[1, :3].tolist() == [0, 1, 2]
    assert asked.side[0, :4].tolist() == [0, 1, 1, 1]
    assert asked.known.sum(1).tolist() == [4, 3]
    assert asked.has_side.sum(1).tolist() == [4, 0]  # the second caption has no cut


def test_an_encoder_learns_order_and_stays_near_what_it_was(monkeypatch):
    monkeypatch.setattr(reading, "time", types.SimpleNamespace(monotonic=itertools.count().__next__))
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=12, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    tokens = torch.randint(2, 9, (400, 8))
    tokens[:, 3] = CUT

    def taught(steps):
        torch.manual_seed(0)
        return reading.teach(UMT5EncoderModel(config), tokens[:300], tokens[300:], CUT, steps)

    untaught, learned = taught(1), taught(150)
    assert learned["steps"] > 100 > untaught["steps"]
    assert learned["before"] > untaught["before"] + 0.2
    assert learned["side"] > 0.9
    assert learned["moved"] < 1
