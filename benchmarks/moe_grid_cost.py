"""What the cost model said of the grid's layers before they were timed, and what that is worth. Part of `moe_page.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from adamac.advise import Machine, Prediction, predict
from adamac.moe import preset

from .gpu_page import table
from .moe.cases import COPY_PER_EXPERT, PRESETS
from .moe.summary import ok
from .moe_foreseen import HOSTS, WITHIN, WORDS, Point, error_line, errors, groups_of, machines_of, points
from .moe_grid import PASSES, PAYS, Shape, shapes, share

Row = dict[str, Any]
WAYS = (COPY_PER_EXPERT, "all_gather", "per_rank")


@dataclass(frozen=True)
class Verdict:
    """Baseline's time divided by BigMac's, each by its best dispatcher, of a shape and pass.

    Attributes:
        shape: Which.
        name: Of the pass.
        said: By the model, before.
        measured: After.
    """

    shape: Shape
    name: str
    said: float
    measured: float

    @property
    def agrees(self) -> bool:
        """Whether both say that it pays, or both that it does not."""
        return (self.said > PAYS) == (self.measured > PAYS)


def layer_points(rows: list[Row]) -> list[Point]:
    """What was said of the grid's layers; layers that constants are compared with are left out."""
    return [point for point in points(rows) if point.row["benchmark"] == "moe_layer"]


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Of all shapes and passes."""
    return [
        Verdict(shape, name, shape.best(name, "predicted_ms"), shape.best(name))
        for shape in shapes(rows)
        for name in PASSES
    ]


def section(rows: list[Row], uneven: list[Row]) -> str:
    """All that the page says of the cost model and the grid; ``uneven`` are rows of a later run of its unevenly routed shapes."""
    found = layer_points(rows)
    near = sum(point.near for point in found)
    parts = [
        f"**Other shapes.** In the run of [the grid](#other-widths-ratios-and-numbers-of-experts-a-token) the model spoke first of {len(found):,} layers and "
        f"passes; {near} came within 15 %. Its constants are those of single operations, at r = 1/4 alone; of layers, one took part in the fit: the "
        "one that the factor below is taken from (h 4,096, top-8, r 1/4).",
        table(
            ["said of the grid before it was timed", "points", "within 15 %", "median error", "worst"],
            lines(found),
        ),
        uneven_words(uneven),
        "Does its verdict hold? What users ask is whether BigMac pays (more than "
        f"{PAYS} between the best dispatchers), and of that the host's pace cancels in part:",
        verdict_table(rows),
        answer_words(rows),
        "What is off in the grid, and why:",
        "\n".join(f"- {line}" for line in causes(rows, found)),
    ]
    return "\n\n".join(parts)


def uneven_words(rows: list[Row]) -> str:
    """How near it came where routing is uneven, with constants of the same run."""
    found = errors(layer_points(rows))
    flags = [entry["equal"] for row in ok(rows, "moe_layer") for entry in row["bytes"].values()]
    return (
        f"In the later runs of uneven shapes (`h200/moe_grid_uneven.jsonl`, each with constants of its own) {sum(abs(error) <= WITHIN for error in found)} of {len(found)} were within 15 %, "
        f"{median(map(abs, found)):.0%} off in the median; bytes were the formula's in {sum(flags)} of {len(flags)} passes."
    )


def lines(found: list[Point]) -> list[list[str]]:
    """Errors of all, and of what might explain them."""
    return [
        error_line("**all**", errors(found)),
        *(error_line(what, some) for what, wanted in _groups(found) if (some := errors(found, wanted))),
    ]


def _groups(found: list[Point]) -> Iterable[tuple[str, Callable[[Point], bool]]]:
    yield from groups_of(found)
    for name, what in (("balanced", "balanced routing"), ("trained_like", "uneven routing")):
        yield what, lambda p, name=name: p.row["routing"] == name
    for width in sorted({point.row["hidden"] for point in found}):
        yield f"h {width:,}", lambda p, width=width: p.row["hidden"] == width
    for way in WAYS:
        yield f"`{way}`", lambda p, way=way: p.row["dispatcher"] == way


def verdict_table(rows: list[Row]) -> str:
    """How often what was said of paying was found, by fabric."""
    found = verdicts(rows)
    groups = [(WORDS[fabric], [v for v in found if v.shape.fabric == fabric]) for fabric in _fabrics(found)]
    cells = [verdict_line(what, some) for what, some in [*groups, ("**all**", found)]]
    head = ["", "shapes and passes", "right",
        "if the commoner answer were always given", "said to pay, does not", "pays, said not to", "ratio within 15 %", "median error"]  # fmt: skip
    return table(head, cells)


def verdict_line(what: str, found: list[Verdict]) -> list[str]:
    """Right and wrong verdicts, and how far ratios were off."""
    counts = Counter((v.said > PAYS, v.measured > PAYS) for v in found)
    off = [abs(v.said / v.measured - 1) for v in found]
    right, pay = sum(v.agrees for v in found), sum(v.measured > PAYS for v in found)
    return [
        what,
        str(len(found)),
        f"{right} ({right / len(found):.0%})",
        str(max(pay, len(found) - pay)),
        str(counts[True, False]),
        str(counts[False, True]),
        str(sum(error <= 0.15 for error in off)),
        f"{median(off):.1%}",
    ]


def answer_words(rows: list[Row]) -> str:
    """What `adamac advise moe` would have answered: nothing, where a ratio is within its own error of 1."""
    machines, counts = machines_of(rows), Counter()
    found = verdicts(rows)
    for verdict in found:
        error = machines[verdict.shape.fabric].ratio_error
        assert error is not None, "a machine of a run was compared with layers"
        unsaid = abs(verdict.said - 1) <= error
        answer = "within" if unsaid else "pays" if verdict.said > 1 else "not"
        counts[answer, verdict.measured > 1] += 1
    yes, no, open_ = (counts[a, True] + counts[a, False] for a in ("pays", "not", "within"))
    wrong = [v for v in found if not v.agrees]
    close = sum(abs(v.measured / PAYS - 1) <= 0.1 for v in wrong)
    idle = sum(_at_floor(v, machines[v.shape.fabric]) for v in wrong)
    return (
        f"`adamac advise moe` itself, which answers nothing where a ratio is within the error that it found of itself, would have said *pays* {yes} times "
        f"(BigMac was faster in {counts['pays', True]}), *does not pay* {no} times and nothing {open_} times. Of the {len(wrong)} wrong verdicts, "
        f"{close} are of layers that came within a tenth of {PAYS}; in {idle} the model had BigMac's best end at the host's floor."
    )


def _at_floor(verdict: Verdict, machine: Machine) -> bool:
    """Whether the host sets the time of BigMac's best, by the model's word."""
    sides = [row for row in verdict.shape.arms.values() if row["preset"] == "bigmac"]
    best = min(sides, key=lambda row: row[verdict.name]["predicted_ms"])
    least = machine.least_ms if verdict.name == "forward" else machine.least_both_ms
    return least[best["dispatcher"]] >= HOSTS * best[verdict.name]["predicted_ms"]


def said_of(row: Row, name: str, machine: Machine) -> Prediction:
    """What a machine says of a layer of the grid."""
    config = preset(row["preset"], row["hidden"], row["num_experts"], row["top_k"], row["ratio"])
    both = name == "forward_backward"
    return predict(config, row["tokens"], row["ranks"], row["dispatcher"], machine, backward=both)


def causes(rows: list[Row], found: list[Point]) -> Iterable[str]:
    """Where the errors come from."""
    # Without the factor, which is one of the causes, it is plainer which layers keep the device busy.
    machines = {fabric: replace(machine, whole=1.0) for fabric, machine in machines_of(rows).items()}
    busy = [p for p in found if said_of(p.row, p.name, machines[p.row["fabric"]]).host_ms == 0]
    yield _pace_words(rows, found)
    yield _factor_words(rows, busy, machines)
    yield _stage_words(busy, machines)
    yield _skew_words(rows, busy)


def _pace_words(rows: list[Row], found: list[Point]) -> str:
    machines, told = machines_of(rows), []
    for fabric in _fabrics(found):
        times = [p.measured_ms for p in found if p.row["fabric"] == fabric and _idle(p)]
        floor = machines[fabric].least_ms["all_gather"]
        told.append(f"{WORDS[fabric]} {min(times):.2f} to {max(times):.2f} ms (floor {floor:.2f})")
    host = [p for p in found if p.host]
    return (
        f"**The host's pace**, again. The floor of a layer is measured once, before the others. The same launches, bigmac/all_gather at h 1,024 and top-4 "
        f"forward, where there is next to nothing to do, then took: {'; '.join(told)}. Of {sum(not p.near for p in found)} points that are off, "
        f"{sum(not p.near for p in host)} are of the {len(host)} where the model had the host set the time: it says too much where the host was slow when the "
        "floor was taken (NVLink), too little where it was quick (shared memory). Next: as above, the floor in the same turns as the layers."
    )


def _idle(point: Point) -> bool:
    row = point.row
    return (row["hidden"], row["top_k"], row["arm"], point.name) == (1024, 4, "bigmac/all_gather", "forward")


def _factor_words(rows: list[Row], busy: list[Point], machines: dict[str, Machine]) -> str:
    told = []
    for fabric, machine in machines_of(rows).items():
        own = [p for p in busy if p.row["fabric"] == fabric]
        after = [said_of(p.row, p.name, machines[fabric]).time_ms / p.measured_ms - 1 for p in own]
        near = sum(abs(error) <= 0.15 for error in after)
        told.append(
            f"{WORDS[fabric]} {machine.whole:.2f}: {sum(p.near for p in own)} of {len(own)}, and {near} after the fact with 1"
        )
    after = sum(verdict.agrees for verdict in _said_again(rows, machines))
    return (
        "**The factor between a layer and its parts**, again, is the host's pace or noise of the link: it is taken from layers of 4,096 tokens, as what is left of "
        "their time after messages. Points within 15 % of layers that keep the device busy, by the factor that was fitted: "
        f"{'; '.join(told)}. By itself that does not mend the verdicts, of which {after} would be right: where the floor is too low, the factor made up for some of it. "
        "Next: both together, the factor from one rank and 16,384 tokens, where nothing is sent and the host is ahead."
    )


def _said_again(rows: list[Row], machines: dict[str, Machine]) -> Iterable[Verdict]:
    """Verdicts of other machines, after the fact."""
    for shape in shapes(rows):
        for name in PASSES:
            times = {
                side: min(
                    said_of(row, name, machines[shape.fabric]).time_ms
                    for row in shape.arms.values()
                    if row["preset"] == side
                )
                for side in PRESETS
            }
            yield Verdict(shape, name, times[PRESETS[0]] / times[PRESETS[1]], shape.best(name))


def _stage_words(busy: list[Point], machines: dict[str, Machine]) -> str:
    here = [p for p in busy if p.row["routing"] == "balanced" and p.name == "forward"]
    wide = [p for p in here if p.row["fabric"] == "nvlink"]
    said = {id(p): said_of(p.row, p.name, machines[p.row["fabric"]]) for p in here}
    off = ", ".join(
        f"`{way}` {median(said[id(p)].time_ms / p.measured_ms - 1 for p in wide if p.row['dispatcher'] == way):+.0%}"
        for way in WAYS
    )
    ordered = [
        f"{_ordering(here, said, 'nvlink', way):.2f} and {_ordering(here, said, 'shm', way):.2f} (`{way}`)"
        for way in WAYS
    ]
    slow = [(said[id(p)].stages_ms["experts"], p.row["stage_ms"]["experts"], p) for p in wide]
    short = median(measured / ms for ms, measured, _ in slow if ms <= 3)
    ms, measured, worst = max(slow, key=lambda each: each[1] / each[0])
    return (
        f"**Over NVLink what the device sets is said too low** ({off}, forward, balanced, factor 1). By the events of its stages, two things. *Permute*, in "
        f"which the host reads how many rows go where, takes {', '.join(ordered)} ms more than was said, in the median over NVLink with 16,384 tokens and "
        "through shared memory with 4,096: about as much with few rows as with many, as if the device were empty behind a read until the host has launched again. The "
        "model takes the longer of the device's and the host's time and has no such gap. "
        f"*Experts* take {short:.2f} times what was said where that is at most 3 ms, but {measured:.1f} ms for {ms:.1f} in "
        f"{worst.row['arm']} at h {worst.row['hidden']:,}, top-{worst.row['top_k']}, r {share(worst.row['ratio'])}: their products were timed one at a time with pauses. "
        "A card that lowers its clocks under long load would look like this; clocks were not recorded. Next: a gap for each read, measured; products timed in a row."
    )


def _ordering(found: list[Point], said: dict[int, Prediction], fabric: str, way: str) -> float:
    """Milliseconds by which ordering rows took longer than was said, in the median."""
    own = [p for p in found if (p.row["fabric"], p.row["dispatcher"]) == (fabric, way)]
    return median(p.row["stage_ms"]["permute"] - said[id(p)].stages_ms["permute"] for p in own)


def _skew_words(rows: list[Row], busy: list[Point]) -> str:
    even = {(s.fabric, s.key): s for s in shapes(rows, "balanced")}
    told = []
    changes = [
        s.best(name) / even[s.fabric, s.key].best(name)
        for s in shapes(rows, "trained_like")
        if (s.fabric, s.key) in even
        for name in PASSES
    ]
    for fabric in _fabrics(busy):
        own = [p for p in busy if p.row["fabric"] == fabric and p.row["routing"] != "balanced"]
        pairs = [(p, even.get((fabric, (p.row["hidden"], p.row["top_k"], p.row["ratio"])))) for p in own]
        longer = [p.measured_ms / s.arms[p.row["arm"]][p.name]["p50_ms"] for p, s in pairs if s is not None]
        load = median(p.row["rank_load_max_over_mean"] for p in own)
        told.append(f"{WORDS[fabric]} {median(longer):.2f} (rank's load {load:.2f})")
    return (
        "**Uneven loads** are left out of the model. Layers that keep the device busy take longer with them, in the median of the same shapes: "
        f"{', '.join(told)}. Ratios between the best dispatchers are {median(changes):.2f} times as large in the median, single ones {min(changes):.2f} to {max(changes):.2f} times."
    )


def _fabrics(found: Iterable[Point | Verdict]) -> list[str]:
    return list(dict.fromkeys(p.row["fabric"] if isinstance(p, Point) else p.shape.fabric for p in found))
