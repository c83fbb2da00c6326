"""Fabric by fabric: the layer that the targets speak of, why they are missed, what the host has to do with it, and more ranks.

Part of `moe_page.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from adamac.advise import compare
from adamac.moe import preset

from .gpu_page import table
from .moe.cases import BASELINE, COPY_PER_EXPERT, FABRICS
from .moe.summary import ok
from .moe_foreseen import WORDS, machines_of
from .moe_profile import profiles

Row = dict[str, Any]

# Ranks of the projection, and a slower link: 400 Gbit/s a rank, as between nodes.
RANKS, SLOWER = (2, 4, 8), 45e9
SIDES = (BASELINE, "bigmac")


def case(rows: list[Row], fabric: str) -> dict[str, Row]:
    """By arm the layer that the targets speak of: XL top-8, balanced, no rivals."""
    wanted = {"fabric": fabric, "hidden": 2048, "top_k": 8, "tokens": FABRICS[fabric].tokens}
    wanted |= {"routing": "balanced", "experts": "auto", "rivals": []}
    found = ok(rows, "moe_layer")
    return {row["arm"]: row for row in found if all(row[name] == value for name, value in wanted.items())}


def forward(rows: list[Row], fabric: str, arm: str) -> float:
    """Milliseconds of an arm of that layer."""
    return case(rows, fabric)[arm]["forward"]["p50_ms"]


def ratios(rows: list[Row], fabric: str) -> tuple[float | None, float]:
    """Copies per expert, which one GPU has none of, and the best of both sides."""
    times = {arm: row["forward"]["p50_ms"] for arm, row in case(rows, fabric).items()}
    best = [min(ms for arm, ms in times.items() if arm.startswith(side)) for side in SIDES]
    copies = [times.get(f"{side}/{COPY_PER_EXPERT}") for side in SIDES]
    return None if None in copies else copies[0] / copies[1], best[0] / best[1]


def verdict_words(rows: list[Row]) -> str:
    """Does it pay, fabric by fabric."""
    found = {fabric: ratios(rows, fabric) for fabric in WORDS}
    lines = [
        f"{WORDS[fabric]} {best:.2f} between the best dispatchers" + (f" and {copies:.2f} by copies" if copies else "")
        for fabric, (copies, best) in found.items()
    ]  # fmt: skip
    pays = " and ".join(WORDS[fabric] for fabric, (_, best) in found.items() if best > 1.05)
    return (
        f"**Does it pay here?** Forward: {'; '.join(lines)}. So on two ranks this layer pays over {pays}; over the others only "
        "against a baseline that sends a copy per expert, which nobody need do, and on one GPU not at all. Over NVLink the baseline is "
        "no slower than the best rival, so that the ratios are not owed to a slow baseline."
    )


def nvlink_words(rows: list[Row]) -> str:
    """Why two ranks over NVLink are the hardest case for BigMac."""
    sent = {arm: row["bytes"]["forward"]["payload"] / 2**20 for arm, row in case(rows, "nvlink").items()}
    gathers, copies = ([f"{side}/{way}" for side in SIDES] for way in ("all_gather", COPY_PER_EXPERT))
    busy = {arm: row["device_ms"] for arm, row in profiles(rows, "nvlink", "forward").items()}
    gathered, copied = ([forward(rows, "nvlink", arm) for arm in arms] for arms in (gathers, copies))
    least = machines_of(rows)["nvlink"].least_ms
    by_copies, best = said(rows, 2, None, least_ms={})
    return (
        f"**NVLink** (targets 1.8 and 1.4). With 64 experts on two ranks nearly every token takes one on the other rank: a copy per rank sends "
        f"{sent[f'{BASELINE}/per_rank']:.1f} MiB where the gather sends {sent[gathers[0]]:.1f}, and the gather needs the least order, so it is the "
        f"fastest for both sides ({gathered[0]:.2f} and {gathered[1]:.2f} ms). Both are at the host's floor: a layer with nothing to do takes "
        f"{least['all_gather']:.2f} ms. By copies the baseline keeps the device busy ({busy[copies[0]]:.2f} of {copied[0]:.2f} ms) and BigMac no "
        f"longer does ({busy[copies[1]]:.2f} of {copied[1]:.2f} ms; its floor is {least[COPY_PER_EXPERT]:.2f}). A faster host alone would not do at "
        f"two ranks: the model says {by_copies:.2f} by copies and {best:.2f} between the best if it were never waited for. [Replayed](#replayed-from-a-cuda-graph) "
        "it is not waited for."
    )


def shm_words(rows: list[Row]) -> str:
    """Why shared memory misses its targets."""
    wide, narrow = (forward(rows, "shm", f"{side}/{COPY_PER_EXPERT}") for side in SIDES)
    gathers = [f"{side}/all_gather" for side in SIDES]
    times = [forward(rows, "shm", arm) for arm in gathers]
    sent = [case(rows, "shm")[arm]["bytes"]["forward"]["payload"] / 2**20 for arm in gathers]
    least = machines_of(rows)["shm"].least_ms
    return (
        f"**Shared memory** (targets 3 and 2). By copies BigMac would have to take {wide / 3:.2f} ms against the baseline's {wide:.2f}; it takes "
        f"{narrow:.2f}, and the host's floor is {least[COPY_PER_EXPERT]:.2f}. Between the best, {sent[0]:.0f} MiB become {sent[1]:.0f}, but both "
        f"gathers end at the host again ({times[0]:.2f} and {times[1]:.2f} ms; floor {least['all_gather']:.2f}). [Replayed](#replayed-from-a-cuda-graph) they do not."
    )


def host_words(rows: list[Row], former: list[Row]) -> str:
    """What the times of layers with nothing, little and much to do say about who waits for whom."""
    small, large = (timed_with_rivals(rows, tokens) for tokens in (1024, 16384))
    more = {arm: large[arm] / small[arm] - 1 for arm in small}
    most = max(more, key=lambda arm: more[arm])
    counts = [profiles(rows, "none", "forward")[f"{side}/local"]["launches"] for side in SIDES]
    old, new = (machines_of(each)["none"].least_ms["local"] for each in (former, rows))
    return (
        f"Fewer launches lowered the floor among ranks; on one GPU it is {new:.2f} ms after {old:.2f}, on another host. {counts[0]:.0f} to {counts[1]:.0f} "
        f"launches in {new:.2f} ms are {1e3 * new / counts[1]:.0f} to {1e3 * new / counts[0]:.0f} µs each, several times what a launch alone takes "
        "([below](#what-a-launch-costs-the-host)). Over NVLink sixteen times the tokens still take "
        f"only {min(more.values()):.0%} to {more[most]:.0%} more time (most for {most}, for whose messages the device waits; both cases came late in "
        "the run, when the host was slower than for the case of the targets). So there is now [a way without the read](#replayed-from-a-cuda-graph), "
        "which can be captured whole."
    )


def floor_table(rows: list[Row], former: list[Row]) -> str:
    """What a layer with next to nothing to do takes, then and now."""
    new, old = machines_of(rows), machines_of(former)
    lines = []
    for fabric, machine in new.items():
        for way, least in machine.least_ms.items():
            pairs = (
                (old[fabric].least_ms[way], least),
                (old[fabric].least_both_ms[way], machine.least_both_ms[way]),
            )
            lines.append([WORDS[fabric], way, *(f"{then:.2f} → {now:.2f}" for then, now in pairs)])
    return table(
        ["a layer of 8 tokens, ms, before → now", "dispatcher", "forward", "forward + backward"], lines
    )


def timed_with_rivals(rows: list[Row], tokens: int) -> dict[str, float]:
    """A forward pass over NVLink by arm, in the cases with rivals: those of few and of many tokens came one after another."""
    found = [row for row in ok(rows, "moe_layer") if row["fabric"] == "nvlink" and row["tokens"] == tokens]
    return {
        row["arm"]: row["forward"]["p50_ms"]
        for row in found
        if row["rivals"] and row["arm"] not in row["rivals"]
    }


def said(rows: list[Row], ranks: int, bytes_per_s: float | None, **changes: Any) -> tuple[float, float]:
    """Ratios by copies and between the best that the model says, with NVLink's constants or all collectives at a bandwidth."""
    machine = replace(machines_of(rows)["nvlink"], **changes)
    if bytes_per_s is not None:
        machine = machine.linked(bytes_per_s)
    found = compare(*(preset(name, 2048, 64, 8) for name in SIDES), 16384, ranks, machine)
    assert found.ratio_by_copies is not None, "several ranks send copies"
    return found.ratio_by_copies, found.ratio


def projected(rows: list[Row]) -> str:
    """By bandwidth and ranks, with the host as it is and as if it were never waited for."""
    lines = []
    for bytes_per_s in (None, SLOWER):
        where = "NVLink as measured" if bytes_per_s is None else f"{bytes_per_s / 1e9:.0f} GB/s a rank"
        for ranks in RANKS:
            found = *said(rows, ranks, bytes_per_s), *said(rows, ranks, bytes_per_s, least_ms={})
            lines.append([where, str(ranks), *(f"{ratio:.2f}" for ratio in found)])
    head = ["fabric", "ranks", "copy per expert", "best", "copy per expert, no host", "best, no host"]
    return table(head, lines)
