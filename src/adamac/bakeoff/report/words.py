"""The words and numbers of the report: how figures are written, what the first lines say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adamac.bakeoff.rows import IDENTICAL_DB, Row

_NONE = "\N{EN DASH}"

TOO_FEW = "too few videos to tell"
"""What stands for an interval that cannot be given."""

# Of fewer videos the 99th percentile, and the 95th, are the largest by another name.
_LEAST_FOR_TAIL = 10


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A number with so many decimals and its unit, or a dash."""
    return _NONE if value is None else f"{value:.{digits}f}{unit}"


def seconds(value: float | None) -> str:
    """Seconds with three digits that matter."""
    if value is None:
        return _NONE
    return f"{value:.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def milliseconds(value: float | None) -> str:
    """Seconds written as milliseconds."""
    return _NONE if value is None else f"{value * 1e3:.0f} ms"


def times(value: float | None) -> str:
    """A factor."""
    return number(value, 2, "\N{MULTIPLICATION SIGN}")


def percent(value: float | None) -> str:
    """A share."""
    return _NONE if value is None else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def decibels(value: float | None) -> str:
    """A PSNR."""
    if value is None:
        return _NONE
    return f"\N{GREATER-THAN OR EQUAL TO} {value:.0f} dB" if value >= IDENTICAL_DB else f"{value:.1f} dB"


def interval(bounds: list[float] | None) -> str:
    """A 95 % interval, or nothing."""
    return "" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"


FILTERS: dict[str, Callable[..., str]] = {
    "number": number,
    "seconds": seconds,
    "milliseconds": milliseconds,
    "times": times,
    "percent": percent,
    "decibels": decibels,
    "interval": interval,
}


def verdict(summary: dict[str, Any]) -> list[str]:
    """A sentence for each sparse arm: what it gained and what it cost."""
    sentences = []
    for name, arm in summary["arms"].items():
        if arm["dense"] or arm["speedup"] is None:
            continue
        sentences.append(_gain(name, arm) + _distance(arm) + ".")
    floor = summary["noise_floor"]
    if floor and floor["psnr_db"] is not None:
        distance = decibels(floor["psnr_db"])
        sentences.append(f"Noise floor ({floor['arm']}, a dense kernel that rounds differently): {distance}.")
    return sentences


def _gain(name: str, arm: dict[str, Any]) -> str:
    if not arm["sparse_calls"]:
        return f"{name} ran dense throughout"
    sentence = f"{name} takes {seconds(arm['latency_p50_s'])} a video, {times(arm['speedup'])} the strongest dense arm's speed"
    bounds = arm["speedup_interval"]
    if bounds is None:
        return f"{sentence} ({TOO_FEW} how sure that is)"
    unsure = ", which is not to be told from 1" if bounds[0] <= 1 <= bounds[1] else ""
    return f"{sentence} (95 % interval {interval(bounds)}{unsure})"


def _distance(arm: dict[str, Any]) -> str:
    if arm["psnr_db"] is None or not arm["sparse_calls"]:
        return ""
    return f"; against dense it has {decibels(arm['psnr_db'])} PSNR and {arm['ssim']:.3f} SSIM"


def has_tail(summary: dict[str, Any]) -> bool:
    """Whether some arm made videos enough for a tail of their latencies; otherwise the largest is told."""
    timed = (arm["warm_calls"] or arm["videos"] for arm in summary["arms"].values())
    return max(timed, default=0) >= _LEAST_FOR_TAIL


def is_floor(summary: dict[str, Any], name: str) -> bool:
    """Whether an arm is there for the noise floor alone, so that its time plays no part."""
    return bool(summary["noise_floor"]) and summary["noise_floor"]["arm"] == name


def warnings(summary: dict[str, Any], rows: list[Row]) -> list[str]:
    """What a reader must know before believing a figure."""
    config = summary["run"]["config"]
    asked = len(config["prompts"]) * len(config["seeds"]) * len(config["arms"]) + bool(summary["noise_floor"])
    found = []
    if len(rows) < asked:
        found.append(f"The run is not complete: {len(rows)} of {asked} videos.")
    for name, arm in summary["arms"].items():
        if arm["errors"]:
            found.append(
                f"{name}: {arm['errors']} of {arm['errors'] + arm['videos']} videos failed: {_reasons(arm)}."
            )
        if arm["only_first_calls"] and not is_floor(summary, name):
            found.append(f"{name}: only first calls were timed, marked *; they include what happens once.")
        if not arm["dense"] and arm["videos"] and not arm["sparse_calls"]:
            why = "; ".join(f"{reason} ({count})" for reason, count in arm["dense_calls"].items())
            found.append(f"{name}: no call was sparse: {why}.")
    found += _other_sizes(config, rows)
    if summary["strongest_dense"] is None:
        found.append("No dense video was made, so nothing can be compared.")
    return found


def _other_sizes(config: dict[str, Any], rows: list[Row]) -> list[str]:
    """Pipelines round what they cannot make; say so."""
    shape = next((row.shape for row in rows if row.shape), None)
    if shape is None:
        return []
    made = dict(zip(("frames", "height", "width"), shape, strict=True))
    return [
        f"{name}: {config[name]} was asked for, the model made {size}."
        for name, size in made.items()
        if config.get(name) not in (None, size)
    ]


def _reasons(arm: dict[str, Any]) -> str:
    return "; ".join(arm["reasons"])
