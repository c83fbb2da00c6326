"""Layers that are replayed from a CUDA graph: what a ratio is where neither side waits for the host. Part of `moe_page.py`.

Rows are stored as those of the grid are: ``python -m benchmarks.moe_grid ROWS.jsonl benchmarks/results/h200/moe_captured.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from adamac.moe import preset
from adamac.moe.cost import Machine, predict

from .gpu_page import table
from .moe.cases import BASELINE, COPY_PER_EXPERT, FABRICS, PRESETS
from .moe.summary import ok
from .moe_foreseen import WITHIN, WORDS, machines_of
from .moe_grid import PASSES, PAYS, Shape, extreme_words, fabric_table, share, where_words
from .moe_steps import best, by_best

Row = dict[str, Any]
# Of the layer of the targets, between the best of both sides, on two ranks and on one.
AIMS = {"nvlink": 1.4, "shm": 2.0, "sockets": 2.5, "none": 1.2}
_TRAINING = 2.5
_XL = (2048, 8, 0.25)
_REPLAYED = "captured"
_WHERE = (
    f"**Where it pays then** (more than {PAYS} between the fastest ways of both sides, of which replaying is one, in both passes, balanced routing, two ranks). As before a smaller r "
    "leaves less to send, and a slower fabric makes it dearer. Width helps no more: narrow layers need not wait for their host, and products grow with the square of the width "
    "where messages grow with the width."
)


def layers(rows: Iterable[Row], ranks: int | None = None) -> list[Shape]:
    """Layers whose replayed arms were timed on both sides; of so many ranks, or of all."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in ok(list(rows), "moe_captured"):
        if ranks in (None, row["ranks"]):
            key = tuple(row[name] for name in ("fabric", "routing", "hidden", "top_k", "ratio", "ranks"))
            arms = found.setdefault(key, {})
            # A shape of the grid that was timed at length too counts as it was then.
            if row["forward"]["n"] >= arms.get(row["arm"], row)["forward"]["n"]:
                arms[row["arm"]] = row
    whole = [Shape(*key[:5], arms) for key, arms in found.items()]
    return [s for s in whole if all(_times(s, side, "forward")[-1] is not None for side in PRESETS)]


def _xl(rows: list[Row], ranks: int) -> list[Shape]:
    """The layer of the targets, on each fabric where it was replayed."""
    return [s for s in layers(rows, ranks) if (s.routing, s.key) == ("balanced", _XL)]


def target_lines(rows: list[Row], training: list[Row]) -> list[list[str]]:
    """The targets between the best of both sides, by the runs in which replaying was one of the ways."""
    lines = []
    found = {shape.fabric: shape for ranks in (1, 2) for shape in _xl(rows, ranks)}
    for fabric, aim in AIMS.items():
        if fabric in found:
            forward, both = (found[fabric].best(name) for name in PASSES)
            where = "one GPU" if fabric == "none" else fabric
            verdict = "met" if forward >= aim else "missed"
            lines.append([f"layer, XL top-8, best way, replaying too, {where}", f"≥ {aim:g} ×", f"{forward:.2f}", f"{both:.2f}", verdict])  # fmt: skip
    if steps := steps_of(training, "xl", "shm", 2):
        ratio = by_best(_ways(steps, None))
        verdict = "met" if ratio >= _TRAINING else "missed"
        lines.append(["training step, XL-shaped model, shm, best way, replaying too", f"≥ {_TRAINING:g} ×", f"{ratio:.2f}", "-", verdict])  # fmt: skip
    return lines


def xl_ratios(rows: list[Row]) -> dict[str, float]:
    """Of the layer of the targets, forward, between the fastest ways of both sides, by fabric: on two ranks, or one where nothing is sent."""
    return {shape.fabric: shape.best("forward") for ranks in (1, 2) for shape in _xl(rows, ranks)}


def verdict_words(rows: list[Row], training: list[Row]) -> str:
    """One line beside the verdict of layers that are launched piece by piece."""
    told = []
    for ranks in (2, 4):
        if of := _xl(rows, ranks):
            told.append(f"On {'two' if ranks == 2 else 'four'} ranks: " + "; ".join(f"{WORDS[s.fabric]} {_pair(s)}" for s in of))  # fmt: skip
    return (
        f"**And if nobody waits for the host?** [Replayed from a CUDA graph](#replayed-from-a-cuda-graph), each side by its fastest way, of which replaying is one, forward / forward + backward. "
        f"{'. '.join(told)}. {_training_words(training)}"
    )


def _training_words(training: list[Row]) -> str:
    """Ratios and gains of training steps, in a sentence."""
    found = [(fabric, ranks) for fabric, ranks, model in _trainings(training) if model == "xl"]
    told = [
        f"{WORDS[fabric]}{f', {ranks} ranks' if ranks > 1 else ''}, {by_best(_ways(steps_of(training, 'xl', fabric, ranks), None)):.2f}"
        for fabric, ranks in found
    ]
    rest = "" if ("nvlink", 4) in found else "; over NVLink on four ranks none was replayed"
    return f"A training step of XL then: {'; '.join(told)}{rest}."


def section(rows: list[Row], fitted: list[Row]) -> str:
    """Tables and words; ``fitted`` are rows of an earlier run, which have the machine's constants."""
    grid = [s for s in layers(rows, 2) if s.routing == "balanced"]
    parts = [
        f"{rows[0]['device']} at {_commits(rows)} (`h200/moe_captured.jsonl`), ranks and tokens as above. `static_gather` sends what the gather "
        "sends, in shapes that are known beforehand: the host reads nothing and the layer can be recorded, on one rank too (`local`). All ways were "
        "timed in turns in one run, beside other work on the machine: over sockets, whose messages the processors carry, beside the test suite, so that those times are rough. "
        "*Plain* is the best of the other dispatchers, launched piece by piece.",
        layer_table(rows),
        gain_words(rows),
        memory_words(rows),
        foreseen_words(rows, fitted),
        where_words(grid, _WHERE),
        extreme_words(grid),
    ]
    for fabric in dict.fromkeys(shape.fabric for shape in grid):
        own = [shape for shape in grid if shape.fabric == fabric]
        if len(own) > 3:
            parts += [f"**{WORDS[fabric]}**, forward / forward + backward; **bold** where it pays in both.", fabric_table(own)]  # fmt: skip
    return "\n\n".join(parts)


def layer_table(rows: list[Row]) -> str:
    """Each way's times on both sides, and what comes of them."""
    lines = []
    for ranks in sorted({row["ranks"] for row in rows}, key=lambda number: (number == 1, number)):
        for shape in layers(rows, ranks):
            if shape.top_k != 8 or shape.r != 0.25:
                continue
            times = [
                " / ".join(_ms(_times(shape, side, name)[way]) for name in PASSES)
                for side in PRESETS
                for way in range(3)
            ]
            plain = " / ".join(f"{_times(shape, BASELINE, n)[0] / _times(shape, PRESETS[1], n)[0]:.2f}" for n in PASSES)  # fmt: skip
            what = f"h {shape.hidden:,}{'' if shape.routing == 'balanced' else ', uneven'}"
            lines.append([WORDS[shape.fabric], str(ranks), what, *times, plain, _pair(shape)])
    ways = [f"{side}: {way}" for side in ("baseline", "BigMac") for way in ("plain", "static", "replayed")]
    return table(["fabric", "ranks", "top-8, r 1/4", *ways, "ratio, plain", "ratio, best"], lines)


def gain_words(rows: list[Row]) -> str:
    """What replaying gains over the best plain way, by width."""
    told = []
    for hidden in sorted({s.hidden for s in layers(rows)}):
        own = [s for s in layers(rows) if s.hidden == hidden and s.fabric in ("nvlink", "shm")]
        if gains := _gains(own):
            told.append(
                f"at h {hidden:,} {median(gains):.2f} times as fast in the median ({min(gains):.2f} to {max(gains):.2f})"
            )
    return (
        f"Over NVLink and through shared memory a replay is, beside the best plain way of the same side, {'; '.join(told)}: narrow layers are launches, wide ones products and messages. "
        "Most of what is below 1 is the baseline on four ranks through shared memory, where a copy for each rank sends less than any gather."
        f"{_over_sockets(layers(rows))}"
    )


def _over_sockets(shapes: list[Shape]) -> str:
    """The same where the processors carry messages, if that was measured."""
    gains = _gains([shape for shape in shapes if shape.fabric == "sockets"])
    if not gains:
        return ""
    return (
        f" Over sockets it gains nothing, {median(gains):.2f} in the median ({min(gains):.2f} to {max(gains):.2f}): messages set the time there, and the fastest way of a side is "
        "mostly one that is launched."
    )


def _gains(shapes: list[Shape]) -> list[float]:
    """How many times as fast a replay is as the best plain way of its side."""
    return [_times(s, side, n)[0] / _times(s, side, n)[2] for s in shapes for side in PRESETS for n in PASSES]


def memory_words(rows: list[Row]) -> str:
    """What static shapes and recordings take, by the number of ranks."""
    told = []
    for ranks in (2, 4):
        told += [
            f"on {'two' if ranks == 2 else 'four'} ranks {_memory(shape)}"
            for shape in _xl(rows, ranks)
            if shape.fabric == "nvlink"
        ]
    if not told:
        return ""
    return (
        "Its price is memory, which grows with the ranks: room for all rows that may come, on two ranks twice those that do at an even load, on four four times. Forward and backward of "
        f"this layer over NVLink take, gather, static and what both recordings keep between replays, {'; '.join(told)}. All ranks need equally many tokens."
    )


def _memory(shape: Shape) -> str:
    ways = (
        ("all_gather", "peak_gib"),
        ("static_gather", "peak_gib"),
        ("static_gather, captured", "pool_gib"),
    )
    sides = [[f"{shape.arms[f'{side}/{way}'][what]:.2f}" for way, what in ways] for side in PRESETS]
    return " and ".join(
        f"{', '.join(found)} GiB ({side})" for side, found in zip(PRESETS, sides, strict=True)
    )


def unmeasured(rows: list[Row]) -> list[Row]:
    """Rows that are not ok, without layers that another run measured; those that were stopped say which they are."""
    measured = {_case(row) for row in ok(rows, "moe_captured")}
    bad = [row for row in rows if row["status"] != "ok" and _case(row) not in measured]
    return [row | ({"arm": f"h {row['hidden']:,}, top-{row['top_k']}, r {share(row['ratio'])}"} if row.get("arm") == "all" else {}) for row in bad]  # fmt: skip


def _case(row: Row) -> tuple[Any, ...]:
    names = ("benchmark", "fabric", "ranks", "routing", "tokens", "hidden", "top_k", "ratio")
    return tuple(row.get(name) for name in names)


def steps_of(rows: list[Row], model: str, fabric: str, ranks: int) -> list[Row]:
    """Training steps of a model, of all arms; none unless both sides were replayed."""
    wanted = {"work": "train", "model": model, "fabric": fabric, "ranks": ranks}
    found = [
        row for row in ok(rows, "moe_model") if all(row[name] == value for name, value in wanted.items())
    ]
    return found if {row["preset"] for row in found if row.get(_REPLAYED)} == set(PRESETS) else []


def training_section(rows: list[Row]) -> str:
    """What a training step takes if its micro-batches are replayed."""
    return "\n\n".join(
        [
            f"The same models at {_commits(rows)} (`h200/moe_training.jsonl`), all arms in turns in one run: a step whose four micro-batches are replayed, as by "
            "`adamac moe train --capture`, beside the best other dispatcher, launched piece by piece (on several ranks `static_gather` launched was not timed, so that some of the gain may be its own). Averaging gradients and "
            "the optimiser are launched as before. Gradients come on top of both figures of memory.",
            training_table(rows),
            training_words(rows),
        ]
    )


def training_table(rows: list[Row]) -> str:
    """Both sides, plain and replayed."""
    lines = []
    for fabric, ranks, model in _trainings(rows):
        steps = steps_of(rows, model, fabric, ranks)
        plain, replayed = ([best(_ways(steps, way), side) for side in PRESETS] for way in (False, True))
        gains = [a["p50_ms"] / b["p50_ms"] for a, b in zip(plain, replayed, strict=True)]
        cells = [f"{row['p50_ms']:,.0f} ({row['dispatcher']})" for row in plain]
        cells += [f"{row['p50_ms']:,.0f}" for row in replayed]
        cells += [f"{by_best(_ways(steps, way)):.2f}" for way in (False, None)]
        cells += [" / ".join(f"{gain:.2f}" for gain in gains)]
        cells += [
            f"{max(row['peak_gib'] for row in plain):.1f}, {max(row['held_gib'] for row in replayed):.1f}"
        ]
        lines.append([WORDS[fabric], str(ranks), model, *cells])
    head = ["fabric", "ranks", "model", "baseline plain, ms", "BigMac plain", "baseline replayed", "BigMac replayed", "ratio, plain", "ratio, best", "gain of replaying", "GiB: plain's peak, held for replays"]  # fmt: skip
    return table(head, lines)


def training_words(rows: list[Row]) -> str:
    """What replaying gains, and against the baseline of the paper."""
    gains = [
        best(_ways(steps, False), side)["p50_ms"] / best(_ways(steps, True), side)["p50_ms"]
        for fabric, ranks, model in _trainings(rows)
        for steps in [steps_of(rows, model, fabric, ranks)]
        for side in PRESETS
    ]
    xl = steps_of(rows, "xl", "shm", 2)
    copied = next(row["p50_ms"] for row in xl if row["arm"] == f"{BASELINE}/{COPY_PER_EXPERT}")
    own = best(_ways(xl, None), PRESETS[1])["p50_ms"]
    few = sorted({row["n"] for row in ok(rows, "moe_model")})
    return (
        f"Replayed steps are {min(gains):.2f} to {max(gains):.2f} times as fast as the best plain ones (median {median(gains):.2f}), of either side: most where layers are narrow, and on "
        f"one GPU too, where nothing is read but hundreds of small pieces are launched. Through shared memory BigMac's best step of XL takes {own:,.0f} ms and the baseline's, a copy per expert launched piece by piece, "
        f"{copied:,.0f}: {copied / own:.2f} times, of which {copied / own / by_best(_ways(xl, None)):.2f} are the baseline's way and not BigMac's shape. {few[0]} to {few[-1]} steps of each."
    )


def _commits(rows: list[Row]) -> str:
    named = [f"`{commit}`" for commit in dict.fromkeys(row["commit"] for row in rows)]
    return f"commit{'s' if len(named) > 1 else ''} {' and '.join(named)}"


def _trainings(rows: list[Row]) -> list[tuple[str, int, str]]:
    found = dict.fromkeys(
        (r["fabric"], r["ranks"], r["model"]) for r in ok(rows, "moe_model") if r["work"] == "train"
    )
    return [(fabric, ranks, model) for fabric, ranks, model in found if steps_of(rows, model, fabric, ranks)]


def _ways(steps: list[Row], replayed: bool | None) -> dict[str, Row]:
    """Steps by arm: plain, replayed, or of either kind."""
    return {row["arm"]: row for row in steps if replayed in (None, row.get(_REPLAYED, False))}


def foreseen_words(rows: list[Row], fitted: list[Row]) -> str:
    """How near the cost model comes to replays, by an earlier run's constants without its host."""
    told = []
    for fabric, machine in machines_of(fitted).items():
        times, ratios = [], []
        for shape in (s for s in layers(rows, 2) if (s.fabric, s.routing) == (fabric, "balanced")):
            for name in PASSES:
                said, took = _said_and_took(shape, name, machine)
                times += [a / b - 1 for a, b in zip(said, took, strict=True)]
                ratios.append(said[0] / said[1] / (took[0] / took[1]) - 1)
        if fabric in ("nvlink", "shm"):
            told.append(
                f"{WORDS[fabric]}: times {median(times):+.0%} in the median ({median(map(abs, times)):.0%} without sign), ratios {median(ratios):+.0%} "
                f"({median(map(abs, ratios)):.0%}), of which {sum(abs(error) <= WITHIN for error in ratios)} of {len(ratios)} are within 15 %"
            )
    return (
        f"**Said and measured.** The cost model knows replays as layers without a host. By the constants of the grid's run (`{fitted[-1]['commit']}`), which were fitted before: {'; '.join(told)}. "
        "Through shared memory all is said too slow, and BigMac more so. Why was not measured; perhaps a message in a graph takes less than one launched alone, by which the constants are fitted."
    )


def _said_and_took(shape: Shape, name: str, machine: Machine) -> tuple[list[float], list[float]]:
    """Milliseconds of both sides, predicted and measured."""
    said = [
        predict(
            preset(side, shape.hidden, 64, shape.top_k, shape.r),
            FABRICS[shape.fabric].tokens,
            2,
            "static_gather",
            machine.unwaited(),
            backward=name != "forward",
        ).time_ms
        for side in PRESETS
    ]
    return said, [_times(shape, side, name)[2] for side in PRESETS]


def _times(shape: Shape, side: str, name: str) -> tuple[Any, Any, Any]:
    """Milliseconds of the best plain way, of static shapes launched piece by piece, and of the replay; ``None`` where there is none."""
    own = [row for row in shape.arms.values() if row["preset"] == side]
    replayed = [row[name]["p50_ms"] for row in own if row.get(_REPLAYED)]
    static = [r[name]["p50_ms"] for r in own if r["dispatcher"] == "static_gather" and not r.get(_REPLAYED)]
    plain = [r[name]["p50_ms"] for r in own if r["dispatcher"] != "static_gather" and not r.get(_REPLAYED)]
    return tuple(min(times, default=None) for times in (plain, static, replayed))  # ty: ignore[invalid-return-type]


def _pair(shape: Shape) -> str:
    return " / ".join(f"{shape.best(name):.2f}" for name in PASSES)


def _ms(time: float | None) -> str:
    return "-" if time is None else f"{time:.2f}"
