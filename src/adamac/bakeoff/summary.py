"""Figures for each arm, from rows alone.

Latency percentiles are over warm calls: an arm's first call in a process pays for compilation, tuning and cold caches, and
stands apart. If an arm has no warm call its first ones are used, and marked. Speed-up is against the *strongest* dense
arm, the one with the least median latency, not against the one that happens to be the default; its interval is a bootstrap
over cases, paired. PSNR and SSIM are means over videos, ratios to dense are medians.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from adamac.bakeoff.config import REFERENCE, RunDirectory
from adamac.bakeoff.rows import Row
from adamac.bakeoff.stats import mean, median, percentile, ratio_interval

Figures = dict[str, Any]

# How each judgement of a video is averaged over videos.
_JUDGED: dict[str, Callable[[Sequence[float]], float | None]] = {
    "psnr_db": mean,
    "ssim": mean,
    "flicker_ratio": median,
    "motion_ratio": median,
    "motion_correlation": median,
    "sharpness_ratio": median,
}


def summarise(run: Figures, rows: list[Row], directory: RunDirectory) -> Figures:
    """Draw up the figures of a run.

    Args:
        run: What ``run.json`` holds.
        rows: Every row.
        directory: Where the rows' detail files are.

    Returns:
        JSON-ready: ``arms``, ``categories``, ``noise_floor``, ``strongest_dense`` and ``run``.
    """
    by_arm = _group(rows, lambda row: row.arm)
    asked = run["config"]["arms"]
    unasked = [arm for arm in by_arm if arm not in asked and arm not in run["methods"] and arm != REFERENCE]
    floor = unasked[0] if unasked else None
    # The noise floor's time plays no part: it made one video, and was not warmed up.
    dense = {
        arm: _warm(of_arm) for arm, of_arm in by_arm.items() if arm not in run["methods"] and arm != floor
    }
    medians = {arm: figure for arm, warm in dense.items() if (figure := median(_latencies(warm))) is not None}
    strongest = min(medians, key=medians.__getitem__) if medians else None
    rivals = dense[strongest] if strongest else []
    return {
        "run": run,
        "strongest_dense": strongest,
        "noise_floor": _noise_floor(floor, by_arm[floor]) if floor else None,
        "arms": {arm: _arm(arm, run, of_arm, rivals, directory) for arm, of_arm in by_arm.items()},
        "categories": {
            category: {
                arm: _in_category(of_arm, [row for row in rivals if row.category == category])
                for arm in by_arm
                if (of_arm := [row for row in of_category if row.arm == arm])
            }
            for category, of_category in _group(rows, lambda row: row.category).items()
        },
    }


def _arm(arm: str, run: Figures, rows: list[Row], rivals: list[Row], directory: RunDirectory) -> Figures:
    made = [row for row in rows if row.ok]
    warm = _warm(rows)
    figures: Figures = {
        "note": run["notes"].get(arm, ""),
        "dense": arm not in run["methods"],
        "videos": len(made),
        "errors": len(rows) - len(made),
        "reasons": dict(Counter(row.reason for row in rows if not row.ok)),
        "warm_calls": sum(not row.first_call for row in made),
        "only_first_calls": bool(made) and all(row.first_call for row in made),
    }
    for name, values in (
        ("latency", _latencies(warm)),
        ("step", [step for row in warm for step in row.step_s]),
    ):
        for share in (50, 95, 99):
            figures[f"{name}_p{share}_s"] = percentile(values, share / 100)
    figures["latency_max_s"] = max(_latencies(warm), default=None)
    figures |= _speedup(warm, rivals)
    figures |= _first_call(run["first_calls"].get(arm), warm)
    figures |= {
        "peak_gib": max((row.peak_gib for row in made if row.peak_gib is not None), default=None),
        "peak_kind": made[0].peak_kind if made else "",
        "stages_s": _stages(warm, run.get("dense_attention_share") if arm == REFERENCE else None),
    }
    return figures | _attention(made, directory) | _judgement(made)


def _in_category(rows: list[Row], rivals: list[Row]) -> Figures:
    made = [row for row in rows if row.ok]
    warm = _warm(rows)
    figures = {"videos": len(made), "errors": len(rows) - len(made)}
    return figures | {"latency_p50_s": median(_latencies(warm))} | _speedup(warm, rivals) | _judgement(made)


def _noise_floor(arm: str, rows: list[Row]) -> Figures:
    return {"arm": arm, "videos": sum(row.ok for row in rows)} | _judgement([row for row in rows if row.ok])


def _warm(rows: list[Row]) -> list[Row]:
    """Rows that latency is taken from: the warm ones, or, for want of any, the first calls."""
    made = [row for row in rows if row.ok]
    return [row for row in made if not row.first_call] or made


def _latencies(rows: list[Row]) -> list[float]:
    return [row.latency_s for row in rows if row.latency_s is not None]


def _speedup(warm: list[Row], rivals: list[Row]) -> Figures:
    """Median latency of the strongest dense arm over this arm's, and how sure that is."""
    ours, theirs = median(_latencies(warm)), median(_latencies(rivals))
    figures: Figures = {"speedup": theirs / ours if ours and theirs else None, "speedup_interval": None}
    rival = {(row.prompt_id, row.seed): row.latency_s for row in rivals}
    pairs = [(rival[case], row.latency_s) for row in warm if (case := (row.prompt_id, row.seed)) in rival]
    if pairs and warm and rivals and warm[0].arm != rivals[0].arm:
        figures["speedup_interval"] = ratio_interval(*zip(*pairs, strict=True))
    ours, theirs = (median([row.denoise_s for row in some if row.denoise_s]) for some in (warm, rivals))
    return figures | {"speedup_denoise": theirs / ours if ours and theirs else None}


def _first_call(first: Figures | None, warm: list[Row]) -> Figures:
    """How long the short first call took, and how much of that a warm call of the same length would not have taken."""
    if not first:
        return {"first_call_s": None, "first_call_steps": None, "first_call_extra_s": None}
    steps = len(first["step_s"])
    usual = median([(row.text_s or 0) + (row.decode_s or 0) + sum(row.step_s[:steps]) for row in warm])
    return {
        "first_call_s": first["latency_s"],
        "first_call_steps": steps,
        "first_call_extra_s": None if usual is None else max(0.0, first["latency_s"] - usual),
    }


def _stages(rows: list[Row], dense_attention_share: float | None) -> dict[str, float]:
    """Mean seconds of a video by stage; the stages add up to the mean latency."""
    timed = [row for row in rows if row.denoise_s is not None]
    if not timed:
        return {}
    average = {
        name: float(np.mean([getattr(row, name) for row in timed]))
        for name in ("text_s", "denoise_s", "decode_s")
    }
    if timed[0].attention_s:
        attention = {
            stage: float(np.mean([row.attention_s.get(stage, 0.0) for row in timed]))
            for stage in timed[0].attention_s
        }
    elif dense_attention_share is not None:
        attention = {"dense": dense_attention_share * average["denoise_s"]}
    else:  # nothing tells attention from the rest
        return {"text": average["text_s"], "denoise": average["denoise_s"], "decode": average["decode_s"]}
    rest = average["denoise_s"] - sum(attention.values())
    return {"text": average["text_s"], **attention, "rest": rest, "decode": average["decode_s"]}


def _attention(made: list[Row], directory: RunDirectory) -> Figures:
    counted = [row for row in made if row.calls is not None]  # none where nothing is installed
    return {
        "density": mean([row.density for row in counted if row.density is not None]),
        "cost": mean([row.cost for row in counted if row.cost is not None]),
        "calls": sum(row.calls or 0 for row in counted),
        "sparse_calls": sum(row.sparse_calls or 0 for row in counted),
        "dense_calls": dict(sum((Counter(row.dense_calls) for row in counted), Counter())),
        "state_mib": max(
            (row.state_bytes / 2**20 for row in counted if row.state_bytes is not None), default=None
        ),
        "density_by_step_layer": _density_by_step_layer(counted, directory),
    }


def _density_by_step_layer(rows: list[Row], directory: RunDirectory) -> list[list[float | None]] | None:
    """Mean over videos; ``None`` if detail files are gone or damaged, or videos differ in their steps."""
    tables = []
    for row in rows:
        try:
            details = json.loads((directory.path / (row.details or "")).read_text(encoding="utf-8"))
            table = np.array(details["density_by_step_layer"], dtype=np.float64)  # None becomes NaN
        except (OSError, ValueError, KeyError, TypeError):  # gone or damaged
            continue
        if table.ndim == 2:
            tables.append(table)
    if not tables or len({table.shape for table in tables}) > 1:
        return None
    average = np.mean(tables, axis=0)
    return [[None if np.isnan(cell) else round(float(cell), 4) for cell in line] for line in average]


def _judgement(made: list[Row]) -> Figures:
    figures: Figures = {"judged": sum(row.psnr_db is not None for row in made)}
    for name, average in _JUDGED.items():
        figures[name] = average([value for row in made if (value := getattr(row, name)) is not None])
    for name in ("psnr_worst_db", "ssim_worst"):
        figures[name] = min(
            (value for row in made if (value := getattr(row, name)) is not None), default=None
        )
    return figures


def _group(rows: Iterable[Row], label: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return groups
