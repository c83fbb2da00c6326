"""Rows as tables in Markdown, the targets last.

Ratios hold within one run and fabric, and were taken there. A target is judged by the latest run that measured it; *copy per
expert* compares all-to-all with all-to-all, *best dispatcher* the best of either side.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from .cases import BASELINE, COPY_PER_EXPERT, FABRICS
from .rivals import RIVALS

Row = dict[str, Any]

_DIRECTIONS = {"forward": "forward", "forward_backward": "forward + backward"}
_TARGETS = {"nvlink": (1.8, 1.4), "shm": (3.0, 2.0), "sockets": (3.8, 2.5)}
_ONE_GPU, _TRAINING, _FORESEEN = 1.2, 2.5, 0.15
TARGETS_HEADER = [
    "targets, judged by the forward pass or the step",
    "target",
    "forward",
    "forward + backward",
    "",
]


def tables(rows: list[Row]) -> str:
    """Draw all tables that the rows have something for."""
    if not rows:
        return "no rows"
    parts = [_title(rows)]
    by_place = _grouped(rows, "fabric", "ranks")
    for draw in (launches, kernels, _costs, collectives, anatomy, models, layers):
        parts += [draw(fabric, own) for (fabric, _), own in by_place.items()]
    # The end is what is left where output is cut.
    parts += [rivals(rows), problems(rows), targets(rows)]
    return "\n\n".join(part for part in parts if part)


def _title(rows: list[Row]) -> str:
    row = rows[-1]
    versions = [f"{name} {row[name]}" for name in ("torch", "nccl", "triton") if row.get(name)]
    runs = ", ".join(dict.fromkeys(row["run"] for row in rows))
    return f"{row['device']}, {', '.join(versions)}, commit {row.get('commit') or 'unknown'}; runs {runs}"


def targets(rows: list[Row]) -> str:
    return _table(TARGETS_HEADER, target_lines(rows))


def target_lines(rows: list[Row]) -> list[list[str]]:
    """What is aimed at, the aim, what was found forward and in both passes, and the verdict."""
    lines: list[list[str]] = []

    def judged(what: str, target: float, found: tuple[float, float | None] | None) -> None:
        if found is None:
            lines.append([what, f"≥ {target:g} ×", "-", "-", "not measured"])
            return
        forward, both = found
        verdict = "met" if forward >= target else "missed"
        lines.append([what, f"≥ {target:g} ×", f"{forward:.2f}", _number(both), verdict])

    for experts in ("auto", "fused"):
        how = ", activation fused" if experts == "fused" else ""
        if experts == "fused" and not any(row.get("experts") == "fused" for row in rows):
            continue
        for fabric, (copies, best) in _TARGETS.items():
            case = _case(rows, fabric, experts)
            judged(f"layer, XL top-8{how}, copy per expert, {fabric}", copies, _copies(case))
            judged(f"layer, XL top-8{how}, best dispatcher, {fabric}", best, _best(case))
        alone = _best(_case(rows, "none", experts))
        judged(f"layer, XL top-8{how}, one GPU, no communication", _ONE_GPU, alone)
    trained = latest(
        row
        for row in ok(rows, "moe_model")
        if (row["model"], row["work"], row["fabric"]) == ("xl", "train", "shm") and row["preset"] != BASELINE
    )
    for what, name in (
        ("copy per expert", "over_copy_per_expert"),
        ("best dispatcher", "over_best_baseline"),
    ):
        picked = [
            row[name]
            for row in trained
            if row.get(name) and (row["dispatcher"] == COPY_PER_EXPERT or what == "best dispatcher")
        ]
        found = (max(picked), None) if picked else None
        judged(f"training step, XL-shaped model, shm, {what}", _TRAINING, found)
    for fabric in ("nvlink", "shm"):
        judged(f"baseline, XL top-8, best rival / best of ours, {fabric}", 1.0, _against_rivals(rows, fabric))
    points = predictions(rows)
    carried = [point for point in points if _carried(point[0])]
    own = [point for point in points if not _carried(point[0])]
    if carried:
        lines.append(cost_line("cost model by constants of other ranks, against measurement", carried))
    return [*lines, _bytes_line(rows), cost_line("cost model against measurement", own)]


def _against_rivals(rows: list[Row], fabric: str) -> tuple[float, float] | None:
    """How much longer the fastest rival takes than the baseline's fastest dispatcher: at XL top-8, the worst of its cases."""
    found = []
    xl = [
        row
        for row in ok(rows, "moe_layer")
        if (row["hidden"], row["top_k"], row["fabric"]) == (2048, 8, fabric)
    ]
    for case in _grouped(xl, "run", *_SHAPE).values():
        ours = [row for row in case if row["preset"] == BASELINE and row["arm"] not in RIVALS]
        theirs = [row for row in case if row["arm"] in RIVALS]
        if ours and theirs:
            found.append(
                [
                    min(row[name]["p50_ms"] for row in theirs) / min(row[name]["p50_ms"] for row in ours)
                    for name in _DIRECTIONS
                ]
            )
    return None if not found else (min(pair[0] for pair in found), min(pair[1] for pair in found))


def _bytes_line(rows: list[Row]) -> list[str]:
    flags = [entry["equal"] for row in ok(rows, "moe_layer") for entry in row.get("bytes", {}).values()]
    verdict = "not measured" if not flags else "met" if all(flags) else "missed"
    return ["bytes counted = formula", "exactly", f"{sum(flags)} of {len(flags)} passes", "", verdict]


def predictions(rows: list[Row]) -> list[tuple[Row, str, float, float]]:
    """What the cost model said and what was measured: the row, the pass, and milliseconds of both."""
    found = [
        (row, row["pass"], row["predicted_ms"], row["measured_ms"]) for row in ok(rows, "moe_prediction")
    ]
    return found + [
        (row, name, row[name]["predicted_ms"], row[name]["p50_ms"])
        for row in ok(rows, "moe_layer")
        for name in _DIRECTIONS
        if "predicted_ms" in row.get(name, {})
    ]


def _carried(row: Row) -> bool:
    """Whether constants were fitted on another number of ranks; rows of former runs were predicted by their own."""
    return (row.get("predicted_from_ranks", row["ranks"]) or 1) != row["ranks"]


def cost_line(what: str, points: list[tuple[Row, str, float, float]]) -> list[str]:
    """The cost model's line of the table of targets, of some points."""
    errors = [abs(predicted / measured - 1) for _, _, predicted, measured in points]
    if not errors:
        return [what, "within 15 %", "", "", "not measured"]
    within = sum(error <= _FORESEEN for error in errors)
    worst = f"worst {max(errors):.0%}, median {median(errors):.0%}"
    verdict = "met" if within == len(errors) else "missed"
    return [
        what,
        "within 15 %",
        f"{within} of {len(errors)} points",
        worst,
        verdict,
    ]


def _costs(fabric: str, rows: list[Row]) -> str:
    """Constants of the cost model, and what it said of layers."""
    constants = [
        [
            kind,
            f"{1e3 * cost['overhead_ms']:.1f}",
            _rate(cost["flops_per_s"], 1e12),
            _rate(cost["bytes_per_s"], 1e9),
        ]
        for row in latest(ok(rows, "moe_cost"))
        for kind, cost in row["machine"]["costs"].items()
    ]
    lines = [
        [
            f"h {row['hidden']}, top-{row['top_k']}, {row['tokens']} tokens",
            f"{row['preset']}/{row['dispatcher']}",
            _DIRECTIONS[name],
            f"{predicted:.3f}",
            f"{measured:.3f}",
            f"{predicted / measured - 1:+.0%}",
        ]
        for row, name, predicted, measured in predictions(rows)
    ]
    header = ["operation", "overhead, µs", "TFLOP/s", "GB/s"]
    parts = [
        _headed(f"Cost model on {fabric}, {_ranks(rows)}: constants", header, constants),
        _headed(
            f"Cost model on {fabric}, {_ranks(rows)}: said before it was measured, ms",
            ["layer", "arm", "pass", "said", "measured", "error"],
            lines,
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _rate(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.1f}"


def launches(fabric: str, rows: list[Row]) -> str:
    """The kernels that take longest, by arm and pass."""
    parts = []
    for row in latest(ok(rows, "moe_launches")):
        title = (
            f"Kernels of {row['arm']}{', fused' if row['experts'] == 'fused' else ''} on {fabric}, "
            f"{_DIRECTIONS[row['pass']]}: {row['launches']:.0f} launches, "
            f"{row['device_ms']:.3f} ms"
        )
        if "host_ms" in row:  # rows of former runs have none
            title += f"; host done after {row['host_ms']:.3f} ms, device after {row['whole_ms']:.3f}"
        lines = [[kernel["name"], f"{kernel['calls']:g}", f"{kernel['ms']:.4f}"] for kernel in row["kernels"]]
        parts.append(_headed(title, ["kernel", "calls", "ms"], lines))
    return "\n\n".join(parts)


def _case(rows: list[Row], fabric: str, experts: str) -> list[Row]:
    """The latest rows of the shape that targets speak of, by arm."""
    shape = {
        "hidden": 2048,
        "top_k": 8,
        "ratio": 0.25,
        "num_experts": 64,
        "routing": "balanced",
        "fabric": fabric,
        "experts": experts,
        "tokens": FABRICS[fabric].tokens,
    }
    return latest(
        row
        for row in ok(rows, "moe_layer")
        if not row["rivals"] and all(row[name] == value for name, value in shape.items())
    )


def latest(rows: Iterable[Row]) -> list[Row]:
    found = list(rows)
    return [row for row in found if row["run"] == found[-1]["run"]]


def ok(rows: list[Row], benchmark: str) -> list[Row]:
    return [row for row in rows if row.get("benchmark") == benchmark and row["status"] == "ok"]


def _bigmac(case: list[Row]) -> list[Row]:
    return [row for row in case if row["preset"] != BASELINE and "over_best_baseline" in row["forward"]]


def _copies(case: list[Row]) -> tuple[float, float] | None:
    for row in _bigmac(case):
        if row["dispatcher"] == COPY_PER_EXPERT and row["forward"]["over_copy_per_expert"]:
            return row["forward"]["over_copy_per_expert"], row["forward_backward"]["over_copy_per_expert"]
    return None


def _best(case: list[Row]) -> tuple[float, float] | None:
    found = _bigmac(case)
    if not found:
        return None
    forward, both = (max(row[name]["over_best_baseline"] for row in found) for name in _DIRECTIONS)
    return forward, both


def rivals(rows: list[Row]) -> str:
    """The baseline's best dispatcher next to other packages, in milliseconds."""
    lines = []
    for key, case in _grouped(ok(rows, "moe_layer"), "run", "fabric", *_SHAPE).items():
        others = {row["arm"]: row for row in case if row["arm"] in RIVALS}
        ours = [row for row in case if row["preset"] == BASELINE and row["arm"] not in RIVALS]
        if not others or not ours:
            continue
        for name, title in _DIRECTIONS.items():
            best = min(row[name]["p50_ms"] for row in ours)
            theirs = {arm: row[name]["p50_ms"] for arm, row in others.items()}
            cells = [f"{theirs[arm]:.3f}" if arm in theirs else "-" for arm in RIVALS]
            slower = (
                "no slower"
                if best <= min(theirs.values())
                else f"slower by {best / min(theirs.values()):.2f} ×"
            )
            lines.append([key[1], _shape(case[0]), title, f"{best:.3f}", *cells, slower])
    return _table(["fabric", "layer", "pass", "our baseline, ms", *RIVALS, ""], lines)


_SHAPE = ("hidden", "top_k", "ratio", "tokens", "routing", "experts", "rivals")


def _shape(row: Row) -> str:
    return (
        f"h {row['hidden']}, top-{row['top_k']} of {row['num_experts']}, r {row['ratio']:g}, {row['tokens']} tokens, "
        f"{row['routing']}{', fused' if row['experts'] == 'fused' else ''}{', with rivals' if row['rivals'] else ''}"
    )


def layers(fabric: str, rows: list[Row]) -> str:
    """Medians by arm, a line for each case and direction."""
    found = [row for row in ok(rows, "moe_layer") if row["arm"] not in RIVALS]
    arms = list(dict.fromkeys(row["arm"] for row in found))
    lines = []
    for case in _grouped(found, "run", *_SHAPE).values():
        by_arm = {row["arm"]: row for row in case}
        for name, title in _DIRECTIONS.items():
            index = list(_DIRECTIONS).index(name)
            ratios = [pair[index] if (pair := ratio(case)) else None for ratio in (_copies, _best)]
            times = [f"{by_arm[arm][name]['p50_ms']:.3f}" if arm in by_arm else "-" for arm in arms]
            n = min(row[name]["n"] for row in case)
            cells = [_number(ratio) for ratio in ratios]
            lines.append([_shape(case[0]), title, *times, *cells, str(n)])
    transports = ", ".join(sorted({way for row in found for way in row["transports"]}))
    header = ["layer", "pass", *arms, "copy per expert", "best dispatcher", "n"]
    return _headed(
        f"Layer on {fabric}, {_ranks(found)}{f' ({transports})' if transports else ''}, ms", header, lines
    )


def anatomy(fabric: str, rows: list[Row]) -> str:
    """Where the time of a forward pass goes, for the first case of the fabric."""
    found = [row for row in ok(rows, "moe_layer") if "stage_ms" in row]
    if not found:
        return ""
    case = next(iter(_grouped(found, "run", *_SHAPE).values()))
    stages = list(dict.fromkeys(stage for row in case for stage in row["stage_ms"]))
    lines = []
    for row in case:
        sent = row["bytes"]["forward"]
        lines.append(
            [
                row["arm"],
                *(_number(row["stage_ms"].get(stage), ".3f") for stage in stages),
                f"{sent['payload'] / 2**20:.1f}",
                f"{sent['metadata'] / 2**20:.2f}",
                "yes" if sent["equal"] else "NO",
                _number(row["peak_gib"]),
                _number(row["weights_gib"]),
            ]
        )
    header = ["arm", *stages, "rows MiB", "aside MiB", "= formula", "peak GiB", "weights GiB"]
    return _headed(
        f"Stages on {fabric}, {_ranks(rows)}, forward, first rank, ms: {_shape(case[0])}", header, lines
    )


def collectives(fabric: str, rows: list[Row]) -> str:
    found = latest(ok(rows, "moe_collectives"))
    names = list(dict.fromkeys(row["collective"] for row in found))
    lines = []
    for (size,), group in _grouped(found, "bytes_held").items():
        by_name = {row["collective"]: row for row in group}
        cells = [f"{by_name[name]['p50_ms']:.3f} ({by_name[name]['gb_per_s']:.1f})" for name in names]
        lines.append([f"{size / 2**20:g}", *cells])
    return _headed(f"Collectives on {fabric}, ms (GB/s out of a rank)", ["MiB held", *names], lines)


def kernels(fabric: str, rows: list[Row]) -> str:
    lines = [
        [
            f"h {row['hidden']}, top-{row['top_k']} of {row['num_experts']}, r {row['ratio']:g}, {row['tokens']} tokens",
            row["preset"],
            row["kernel"],
            f"{row['p50_ms']:.4f}",
            f"{row['tflop_per_s']:.1f}",
            f"{row['gb_per_s']:.0f}",
        ]
        for row in latest(ok(rows, "moe_kernels"))
    ]
    header = ["layer", "preset", "kernel", "ms", "TFLOP/s", "GB/s"]
    return _headed(f"Pieces of a layer, one rank, {fabric}", header, lines)


def models(fabric: str, rows: list[Row]) -> str:
    lines = []
    for row in ok(rows, "moe_model"):
        what = row["work"] + _step(row)
        what += f", batch {row['batch']}, prompt {row['prompt']}" if "batch" in row else ""
        times = [f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms", "p99_ms")]
        ratios = [_number(row.get(name)) for name in ("over_copy_per_expert", "over_best_baseline")]
        model = f"{row['model']} top-{row['top_k']}"
        peak = _number(row.get("peak_gib"), ".1f")
        lines.append(
            [model, what, row["arm"], *times, str(row["n"]), f"{row['tokens_per_s']:,.0f}", *ratios, peak]
        )
    header = [
        "model",
        "work",
        "arm",
        "p50 ms",
        "p95",
        "p99",
        "n",
        "tokens/s",
        "× copy per expert",
        "× best",
        "peak GiB",
    ]
    return _headed(f"Models with random weights on {fabric}, {_ranks(rows)}", header, lines)


def _step(row: Row) -> str:
    """What kind of decoding step it was, of one that does not grow; rows of former runs have no others."""
    if row.get("step", "growing") == "growing":
        return ""
    return (
        ", captured" if row["captured"] else f", static, not captured ({row.get('not_captured', 'failed')})"
    )


def problems(rows: list[Row]) -> str:
    lines = [
        f"- {row['fabric']}: {row.get('benchmark', '')} {row.get('arm', '')} {row['status']}: "
        f"{row.get('reason', row.get('relative_error', ''))}"
        for row in rows
        if row["status"] != "ok"
    ]
    return "\n".join(["Not measured:", "", *dict.fromkeys(lines)]) if lines else ""


def _grouped(rows: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in names)
        groups.setdefault(key, []).append(row)
    return groups


def _ranks(rows: list[Row]) -> str:
    ranks = rows[-1]["ranks"] if rows else 0
    return f"{ranks} rank{'s' if ranks > 1 else ''}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _headed(title: str, header: list[str], lines: list[list[str]]) -> str:
    return f"**{title}**\n\n{_table(header, lines)}" if lines else ""


def _table(header: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return ""

    def draw(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return "\n".join([draw(header), "| --- " * len(header) + "|", *map(draw, lines)])
