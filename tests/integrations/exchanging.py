"""What the tests of the exchange run, on each of three ranks."""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist

from adamac.integrations.diffusers.exchange import Exchange, shares

HEADS, VIDEO, BATCH, HEAD_DIM = 7, 20, 2, 4


def run_there_and_back(rank: int) -> dict[str, bool]:
    """Whether each rank got whole sequences of its heads, and its own tokens of all heads back, by where the text stands."""
    ranks = dist.get_world_size()
    found = {}
    for place, text_tokens in (("none", 0), ("before", 3), ("after", 5)):
        exchange = Exchange(dist.group.WORLD, place)
        exchange.video_tokens = VIDEO
        generator = torch.Generator().manual_seed(0)
        shape = (3, BATCH, HEADS, VIDEO + text_tokens, HEAD_DIM)
        whole = torch.randn(*shape, generator=generator)
        text = slice(0, text_tokens) if place == "before" else slice(VIDEO, VIDEO + text_tokens)
        video = slice(text_tokens, None) if place == "before" else slice(0, VIDEO)
        mine, ours = part(VIDEO, rank, ranks), part(HEADS, rank, ranks)
        pieces = [whole[..., video, :][..., mine, :], whole[..., text, :]]
        local = torch.cat(pieces[::-1] if place == "before" else pieces, dim=-2)
        heads = exchange.to_heads(*local, text_tokens)
        found[f"{place}: heads"] = torch.equal(torch.stack(heads), whole[:, :, ours])
        back = exchange.to_tokens(heads[0], HEADS, text_tokens)
        found[f"{place}: tokens"] = torch.equal(back, local[0])
    return found


def part(amount: int, rank: int, ranks: int) -> slice:
    ends = [0, *accumulate(shares(amount, ranks))]
    return slice(ends[rank], ends[rank + 1])
