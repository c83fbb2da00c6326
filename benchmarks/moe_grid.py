"""Layers of other widths, ratios and numbers of experts a token: where BigMac pays, from the rows of the plan ``grid``.

Part of `moe_page.py`. Rows are stored without what nothing reads of them, no figure changed:

    python -m benchmarks.moe_grid ROWS.jsonl benchmarks/results/h200/moe_grid.jsonl

Of layers that leaves out the 95th and 99th percentile (of eight samples they say nothing) and ratios, which are made of the
times that stay; of bytes the formula's, which were equal to those counted where ``equal`` says so; and everywhere the versions of
packages that took no part.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from .gpu_page import table
from .moe.cases import COPY_PER_EXPERT, FABRICS, PRESETS
from .moe.rows import read
from .moe.summary import ok
from .moe_foreseen import WORDS

Row = dict[str, Any]

PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
# From what ratio on BigMac pays, here as in the verdict by fabric.
PAYS = 1.05
_WHERE = (
    f"**Where it pays** (more than {PAYS} between the best dispatchers, in both passes, balanced routing). Wider layers have more to send for "
    "the same launches, a smaller r leaves less of it, a slower fabric makes it dearer; narrow layers end at the host."
)
_ARMS = frozenset(f"{side}/{way}" for side, way in product(PRESETS, ("all_gather", COPY_PER_EXPERT, "per_rank")))  # fmt: skip
_NO_PART = (
    "python",
    "threads",
    "transformers",
    "deepspeed",
    "adamac",
    "note",
    "parameters",
    "flops_per_token",
)
_FEW = ("n", "p20_ms", "p50_ms", "p80_ms", "predicted_ms")


@dataclass(frozen=True)
class Shape:
    """A layer on a fabric by all six arms.

    Attributes:
        fabric: Where.
        routing: How tokens are routed.
        hidden: Width of the model, h.
        top_k: Experts that a token takes.
        r: The narrow width as a share of h.
        arms: Rows by arm.
    """

    fabric: str
    routing: str
    hidden: int
    top_k: int
    r: float
    arms: dict[str, Row]

    @property
    def words(self) -> str:
        """In a sentence."""
        return f"h {self.hidden:,}, top-{self.top_k}, r {share(self.r)}"

    @property
    def key(self) -> tuple[int, int, float]:
        """What is the same under another routing."""
        return self.hidden, self.top_k, self.r

    def best(self, name: str, what: str = "p50_ms") -> float:
        """The baseline's time divided by BigMac's, each by its best dispatcher; of what was measured or of what was said."""
        sides = [[row[name][what] for row in self.arms.values() if row["preset"] == side] for side in PRESETS]
        return min(sides[0]) / min(sides[1])

    def copies(self, name: str) -> float:
        """The same with a copy for each expert on both sides."""
        wide, narrow = (self.arms[f"{side}/{COPY_PER_EXPERT}"][name]["p50_ms"] for side in PRESETS)
        return wide / narrow

    @property
    def pays(self) -> bool:
        """Whether BigMac does between the best dispatchers, in both passes."""
        return all(self.best(name) > PAYS for name in PASSES)


def shapes(rows: list[Row], routing: str | None = None) -> list[Shape]:
    """Those that were measured by all six arms; of one routing or of all."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in ok(rows, "moe_layer"):
        key = tuple(row[name] for name in ("fabric", "routing", "hidden", "top_k", "ratio"))
        found.setdefault(key, {})[row["arm"]] = row
    whole = [Shape(*key, arms) for key, arms in found.items() if set(arms) == _ARMS]
    return [shape for shape in whole if routing in (None, shape.routing)]


def section(rows: list[Row], uneven: list[Row], former: list[Row]) -> str:
    """All that the page says of where it pays.

    Args:
        rows: Of the grid.
        uneven: Of a later run, unevenly routed on the fabrics where the first one had no time for all.
        former: Of the run that timed some of these layers at length.
    """
    even = shapes(rows, "balanced")
    parts = [_introduction(rows, even), where_words(even), extreme_words(even)]
    for fabric in dict.fromkeys(shape.fabric for shape in even):
        parts.append(
            f"**{_capital(WORDS[fabric])}**, forward / forward + backward; **bold** where it pays in both."
        )
        parts.append(fabric_table([shape for shape in even if shape.fabric == fabric]))
    return "\n\n".join(
        [*parts, dispatcher_words(rows), skewed_words(rows, uneven), again_words(rows, former)]
    )


def _introduction(rows: list[Row], even: list[Shape]) -> str:
    layers = ok(rows, "moe_layer")
    tokens = {row["fabric"]: row["tokens"] for row in layers}
    where = ", ".join(f"{number:,} over {WORDS[fabric]}" for fabric, number in tokens.items())
    samples = [sorted({row[name]["n"] for row in layers}) for name in PASSES]
    return (
        f"{len({shape.key for shape in even})} shapes of 64 experts on two ranks at commit `{layers[-1]['commit']}`, rows in `h200/moe_grid.jsonl`; tokens on "
        f"each rank: {where}. Few samples of each, {samples[0][0]} to {samples[0][-1]} forward and {samples[1][0]} to {samples[1][-1]} in both passes, where the other "
        "layers on this page have 24. *r* is the narrow width "
        "as a share of h and shapes both sides: the baseline's experts are h → r h → h, BigMac's r h → h → r h between two projections. A smaller "
        "r makes the experts of both smaller alike, in parameters and FLOPs; of what is sent, only BigMac's rows get narrower. What r costs in "
        "quality was measured at r = 1/4 and small widths alone ([below](#quality)): what 1/8 learns is not known from here."
    )


def verdict_words(rows: list[Row]) -> str:
    """One line on other shapes, beside the verdict on XL."""
    even, told = shapes(rows, "balanced"), []
    for fabric in dict.fromkeys(shape.fabric for shape in even):
        own = [shape for shape in even if shape.fabric == fabric]
        told.append(f"{WORDS[fabric]} in {sum(shape.pays for shape in own)} of {len(own)}")
    wide = [s for s in even if s.fabric == "shm" and s.hidden == 4096]
    found = [shape.best(name) for shape in wide for name in PASSES]
    return (
        f"**And other shapes?** [Between the best dispatchers, in both passes](#other-widths-ratios-and-numbers-of-experts-a-token), it paid over {', '.join(told)} shapes: at h "
        f"4,096 through shared memory in {sum(shape.pays for shape in wide)} of {len(wide)}, {min(found):.2f} to {max(found):.2f} times as fast."
    )


def where_words(even: list[Shape], head: str = _WHERE) -> str:
    """Fabric by fabric, at which widths BigMac pays; ``head`` says what counts as that, and why."""
    lines = []
    for fabric in dict.fromkeys(shape.fabric for shape in even):
        own = [shape for shape in even if shape.fabric == fabric]
        counts = [(width, [s.pays for s in own if s.hidden == width]) for width in _widths(own)]
        told = ", ".join(f"{sum(found)} of {len(found)} at h {width:,}" for width, found in counts)
        few = [shape for shape in own if shape.pays]
        which = f" ({'; '.join(shape.words for shape in few)})" if 0 < len(few) <= 6 else ""
        lines.append(f"- {_capital(WORDS[fabric])}: in {len(few)} of {len(own)} shapes{which}: {told}.")
    return "\n".join([head, "", *lines])


def extreme_words(even: list[Shape]) -> str:
    """The best and the worst of each fabric."""
    lines = []
    for fabric in dict.fromkeys(shape.fabric for shape in even):
        found = [(s.best(name), s.words, PASSES[name]) for s in even if s.fabric == fabric for name in PASSES]
        copied = max(s.copies(name) for s in even if s.fabric == fabric for name in PASSES)
        (low, *there), (high, *here) = min(found), max(found)
        lines.append(
            f"{WORDS[fabric]} {low:.2f} ({', '.join(there)}) to {high:.2f} ({', '.join(here)}), by copies up to {copied:.2f}"
        )
    return f"The least and the most between the best dispatchers: {'; '.join(lines)}."


def fabric_table(own: list[Shape]) -> str:
    """Ratios of a fabric: a line for each number of experts and ratio, a column for each width."""
    widths = _widths(own)
    by_key = {shape.key: shape for shape in own}
    lines = []
    for top_k, r in sorted({(s.top_k, s.r) for s in own}, key=lambda pair: (-pair[1], pair[0])):
        line = [by_key.get((width, top_k, r)) for width in widths]
        cells = [_best_cell(shape) for shape in line] + [_copies_cell(shape) for shape in line]
        lines.append([f"r {share(r)}, top-{top_k}", *cells])
    head = ["", *(f"best, h {width}" for width in widths), *(f"copies, h {width}" for width in widths)]
    return table(head, lines)


def _best_cell(shape: Shape | None) -> str:
    if shape is None:
        return "-"
    cell = " / ".join(f"{shape.best(name):.2f}" for name in PASSES)
    return f"**{cell}**" if shape.pays else cell


def _copies_cell(shape: Shape | None) -> str:
    return "-" if shape is None else " / ".join(f"{shape.copies(name):.2f}" for name in PASSES)


def dispatcher_words(rows: list[Row]) -> str:
    """How often the gather was the fastest way to send, or nearly."""
    over = []
    for shape, side, name in product(shapes(rows), PRESETS, PASSES):
        times = {r["dispatcher"]: r[name]["p50_ms"] for r in shape.arms.values() if r["preset"] == side}
        over.append(times["all_gather"] / min(times.values()))
    return (
        f"Which dispatcher is the best hardly depends on the shape: on two ranks `all_gather` was the fastest in {sum(ratio == 1 for ratio in over)} of "
        f"{len(over)} (shapes of either routing, both sides, both passes), and within 7 % of it in {sum(ratio <= 1.07 for ratio in over)}."
    )


def skewed_words(rows: list[Row], later: list[Row]) -> str:
    """What uneven routing changes, by fabric: of a later run where there is one, against the balanced shapes of the first."""
    even = {(shape.fabric, shape.key): shape for shape in shapes(rows, "balanced")}
    first, second = ({(s.fabric, s.key): s for s in shapes(each, "trained_like")} for each in (rows, later))
    lines = []
    for fabric in dict.fromkeys(fabric for fabric, _ in even):
        keys = [key for place, key in even if place == fabric]
        chosen = second if any(place == fabric for place, _ in second) else first
        own = [chosen[fabric, key] for key in keys if (fabric, key) in chosen]
        if own:
            changes = [s.best(name) / even[fabric, s.key].best(name) for s in own for name in PASSES]
            other = sum(s.pays != even[fabric, s.key].pays for s in own)
            lines.append(
                f"- {_capital(WORDS[fabric])}: {len(own)} of {len(keys)} shapes, it pays in {sum(s.pays for s in own)}; ratio {median(s.best(n) for s in own for n in PASSES):.2f} in the "
                f"median, {median(changes):.2f} times that of the same shapes with balanced routing; another verdict in {other}."
            )
    return "\n".join(
        [
            f"**Uneven routing** (`trained_like`), between the best dispatchers. {_repeated_words(first, second)}",
            "",
            *lines,
        ]
    )


def _repeated_words(first: dict[Any, Shape], second: dict[Any, Shape]) -> str:
    """How far the two runs of uneven shapes agree where both have them."""
    both = first.keys() & second.keys()
    if not both:
        return ""
    apart = [abs(second[key].best(name) / first[key].best(name) - 1) for key in both for name in PASSES]
    commits = dict.fromkeys(shape.arms[f"bigmac/{COPY_PER_EXPERT}"]["commit"] for shape in second.values())
    named = " and ".join(f"`{commit}`" for commit in commits)
    return (
        f"Those over NVLink and sockets are of later runs ({named}, `h200/moe_grid_uneven.jsonl`), beside which the machine's other cards were at work; the {len(both)} shapes "
        f"that the run of the grid had come out {median(apart):.0%} apart in the median."
    )


def again_words(rows: list[Row], former: list[Row]) -> str:
    """How far layers that both runs timed differ between them."""
    then = {(s.fabric, s.routing, s.key): s for s in shapes(_plain(former))}
    lines = []
    for fabric in dict.fromkeys(row["fabric"] for row in ok(rows, "moe_layer")):
        pairs = [
            (s, then[s.fabric, s.routing, s.key])
            for s in shapes(rows)
            if s.fabric == fabric and (s.fabric, s.routing, s.key) in then
        ]
        if pairs:
            times = [
                abs(new.arms[arm][name]["p50_ms"] / old.arms[arm][name]["p50_ms"] - 1)
                for new, old in pairs
                for arm in _ARMS
                for name in PASSES
            ]
            ratios = [abs(new.best(name) / old.best(name) - 1) for new, old in pairs for name in PASSES]
            lines.append(
                f"{WORDS[fabric]} times by {median(times):.0%} in the median and {max(times):.0%} at most, ratios between the best by "
                f"{median(ratios):.0%} and {max(ratios):.0%}"
            )
    first = next(s for s in shapes(rows, "balanced") if s.fabric == "shm" and s.key == (2048, 8, 0.25))
    before = then[first.fabric, first.routing, first.key]
    return (
        f"**How far to trust one cell.** Layers that the longer run (`h200/moe.jsonl`) timed too differ between the runs: {'; '.join(lines)}. The "
        "baseline's copies, which keep a link busy longest, come out the same; what waits for the host goes with its pace: through shared memory XL top-8 forward "
        f"between the best is {first.best('forward'):.2f} here and was {before.best('forward'):.2f}. Where a cell is within a fifth of 1, the host may have decided it."
    )


def _plain(rows: list[Row]) -> list[Row]:
    """Layers as the grid has them: no rivals, the fabric's own number of tokens."""
    return [
        row
        for row in ok(rows, "moe_layer")
        if not row["rivals"] and row["experts"] == "auto" and row["tokens"] == FABRICS[row["fabric"]].tokens
    ]


def share(r: float) -> str:
    """As people write it."""
    return f"1/{1 / r:g}"


def _widths(own: list[Shape]) -> list[int]:
    return sorted({shape.hidden for shape in own})


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def thinned(row: Row) -> Row:
    """A row without what nothing reads."""
    kept = {name: value for name, value in row.items() if name not in _NO_PART}
    for name in PASSES:
        if isinstance(kept.get(name), dict):
            kept[name] = {what: value for what, value in kept[name].items() if what in _FEW}
    if isinstance(kept.get("bytes"), dict):  # of a layer; a kernel has one number
        kept["bytes"] = {
            name: {what: entry[what] for what in ("payload", "equal")}
            for name, entry in kept["bytes"].items()
        }
    return kept


def store(rows: Iterable[Row], path: Path) -> None:
    """Write rows, thinned."""
    path.write_text("".join(json.dumps(thinned(row)) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    store(read(options.rows), options.out)
