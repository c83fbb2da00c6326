"""How well a model predicts held-out documents, in bits per byte.

Bits per byte is the length of the held-out text, ends of documents included, as the model would compress it, over its
length in bytes. It does not depend on the tokenizer's vocabulary, unlike loss per token. Text is read in windows of the
model's context that do not overlap; each window begins without knowledge of what was before it. Experts take all tokens that
choose them, whatever capacity they are trained with: else a token's logits would depend on later ones, and on how many windows are
read at once.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

from adamac.moe.dispatch import NotFiniteError
from adamac.moe.lm.corpus import Corpus
from adamac.moe.lm.model import GPT
from adamac.moe.lm.world import World


@torch.no_grad()
def bits_per_byte(
    model: GPT,
    corpus: Corpus,
    *,
    tokens: int,
    batch: int,
    world: World | None = None,
) -> float:
    """Measure a model on held-out documents.

    Args:
        model: The model; its mode is left as it was.
        corpus: Whose held-out side is read, from its beginning.
        tokens: How many tokens at most.
        batch: Windows at once on a rank.
        world: The ranks that share the work; they all get the result.

    Returns:
        Bits per byte; NaN if the model's numbers are not finite.

    Raises:
        ValueError: If the held-out side does not fill a window.
    """
    world = world or World()
    stream, context = corpus.held_out_tokens, model.config.context
    windows = len(predicted(corpus, context, tokens)) // context
    sizes = corpus.tokenizer.bytes_per_token()
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    # All ranks run the model equally often, as experts on other ranks demand; what is too much counts nothing.
    rounds = math.ceil(windows / (batch * world.size))
    for turn in range(rounds):
        first = (turn * world.size + world.rank) * batch
        numbers = [min(number, windows - 1) for number in range(first, first + batch)]
        rows = np.stack([stream[n * context : n * context + context + 1] for n in numbers]).astype(np.int64)
        ids, real = torch.from_numpy(rows), max(0, min(batch, windows - first))
        try:
            with model.without_capacity():
                logits = model(ids[:, :-1].to(world.device))
        except NotFiniteError:
            totals += math.nan  # ranks that have other copies of the experts learn of it so
            break
        targets = ids[:, 1:]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses = functional.cross_entropy(
            wide.flatten(0, 1), targets.flatten().to(world.device), reduction="none"
        )
        totals[0] += losses.view(targets.shape)[:real].double().sum()
        totals[1] += sizes[targets[:real]].sum()
    model.train(was_training)
    nats, size = world.add(totals).tolist()
    return nats / math.log(2) / size


def predicted(corpus: Corpus, context: int, tokens: int) -> np.ndarray:
    """The held-out tokens that an evaluation predicts: those of all windows that are whole.

    Args:
        corpus: Whose held-out side is read, from its beginning.
        context: Tokens of a window.
        tokens: How many tokens at most.

    Raises:
        ValueError: If there is no window.
    """
    stream = corpus.held_out_tokens
    windows = min(tokens, len(stream) - 1) // context
    if windows < 1:
        raise ValueError(
            f"too little text: {len(stream)} held-out tokens do not fill a context of {context}; "
            "give more text, a larger share held out or a smaller context"
        )
    return stream[1 : windows * context + 1]
