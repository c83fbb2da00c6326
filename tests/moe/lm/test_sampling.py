"""Sampling: a text depends on its prompt and seed alone."""

from __future__ import annotations

import pytest
import torch
from test_gpt import CONFIG, model

from adamac.moe.lm.generate import choose, generate

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [30, 31, 32]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_equals_one_by_one(temperature):
    gpt = model()
    together = generate(gpt, PROMPTS, tokens=12, temperature=temperature, seeds=[5, 6, 7])
    for prompt, seed, text in zip(PROMPTS, (5, 6, 7), together, strict=True):
        assert generate(gpt, [prompt], tokens=12, temperature=temperature, seeds=[seed]) == [text]


def test_cached_decoding_equals_reading_everything_anew():
    gpt = model()
    text = list(PROMPTS[0])
    for _ in range(12):
        text.append(int(gpt(torch.tensor([text]))[0, -1].argmax()))
    assert generate(gpt, [PROMPTS[0]], tokens=12, temperature=0) == [text[7:]]


def test_a_text_ends_before_its_end_token_and_others_go_on():
    gpt = model()
    texts = generate(gpt, PROMPTS, tokens=12, temperature=0)
    end = texts[0][3]
    ended = generate(gpt, PROMPTS, tokens=12, temperature=0, end=end)
    assert ended == [text[: text.index(end)] if end in text else text for text in texts]


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    draws = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    chosen = choose(logits.expand(len(draws), -1), draws, 0.7, None)
    shares = chosen.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(-1), atol=2e-4, rtol=0)
    assert set(choose(logits.expand(len(draws), -1), draws, 0.7, 2).tolist()) == {2, 3}


def test_a_model_in_bfloat16_samples_too():
    gpt = model().bfloat16()
    assert len(generate(gpt, PROMPTS, tokens=12)[0]) == 12


def test_seeds_differ_and_repeat():
    gpt = model()
    one = generate(gpt, [[1], [1]], tokens=12)
    assert one == generate(gpt, [[1], [1]], tokens=12)
    assert one[0] != one[1]


@pytest.mark.parametrize(
    ("prompts", "changes", "problem"),
    [
        ([], {}, "at least one prompt"),
        ([[]], {}, "at least one token"),
        ([[1]], {"tokens": 0}, "tokens must be at least 1"),
        ([[1]], {"tokens": CONFIG.context}, "exceed the model's context of 24; ask for at most 23"),
        ([[1] * 24], {"tokens": 1}, "exceed the model's context of 24; shorten it to at most 23"),
        ([[1]], {"temperature": float("nan")}, "temperature must be"),
        ([[1]], {"top_k": 0}, "top_k must be"),
        ([[1]], {"seeds": [1, 2]}, "a seed for each"),
        ([[1]], {"seeds": [2**64]}, "seeds must lie in .* got 18446744073709551616"),
        (
            [[1], [1, CONFIG.vocab]],
            {},
            f"token ids must be 0 to {CONFIG.vocab - 1}, got {CONFIG.vocab}; was another",
        ),
        ([[-1]], {}, "token ids must be 0 to .*, got -1"),
    ],
)
def test_what_cannot_be_sampled_is_refused(prompts, changes, problem):
    with pytest.raises(ValueError, match=problem):
        generate(model(), prompts, **({"tokens": 3} | changes))
