"""What was to be reached on one H100, and whether it was, in one table. Part of `gpu_page.py`."""

from __future__ import annotations

from collections.abc import Iterable

from .gpu_steps import COMPILED, SPARSE_ARMS, Row, Runs, arm, newest, p50_ms, ratio, tail

Rows = dict[tuple[str, str], Row]
CALLS = {  # speed-up of a call over the fastest dense kernel, compensated
    ("cogvideox-2b", 15): 2.0,
    ("wan-1.3b", 15): 3.5,
    ("wan-14b", 15): 4.5,
    ("hunyuan-129f", 15): 4.8,
    ("wan-14b", 8): 7.0,
    ("hunyuan-129f", 8): 7.5,
    ("hunyuan-193f", 8): 8.0,
}
PLANNING = 0.08  # of the fastest dense kernel, from 75,000 tokens on
STEPS = {  # over the best dense step at 15 % and at 8 %, over stock diffusers
    "cogvideox-2b": (1.25, 1.3, 1.67),
    "wan-1.3b": (1.5, 1.6, 1.85),
    "wan-14b": (1.9, 2.1, 2.4),
    "hunyuan-129f": (2.2, 2.6, 4.0),
    "hunyuan-193f": (2.8, 3.6, 4.31),
}
TAIL = 1.05
STATE_GB = 0.5  # Wan2.1-14B, both guidance branches
PEAK = 1.10  # over dense


def target_rows(attention: Rows, runs: Runs, compiled: Runs) -> Iterable[list[str]]:
    """Rows of the table: what, where, target, measured, measured with compiled blocks, met."""
    yield from _calls(attention)
    yield from _steps(runs, compiled)
    yield from _stock(runs, compiled)
    yield from _tails([runs, compiled])
    yield from _memory(runs)


def _calls(attention: Rows) -> Iterable[list[str]]:
    for (shape, density), target in CALLS.items():
        reached = attention[shape, f"adamac {density}% compensated"]["speedup"]
        met = "yes" if reached >= target else "**no**"
        yield [f"one call at {density} %", shape, f"≥ {target:g}×", f"{reached:.2f}×", "-", met]
    for shape in ("wan-14b", "hunyuan-129f", "hunyuan-193f"):
        share = 1 / attention[shape, "adamac 15% compensated, plan"]["speedup"]
        met = "yes" if share <= PLANNING else "**no**"
        yield ["planning ÷ dense", shape, f"≤ {PLANNING:.0%}", f"{share:.1%}", "-", met]


def _steps(runs: Runs, compiled: Runs) -> Iterable[list[str]]:
    for model, (*targets, _) in STEPS.items():
        for name, target in zip(SPARSE_ARMS, targets, strict=True):
            reached = [
                ratio(run, model, f"best_dense{kind}", name + kind)
                for among, kind in ((runs, ""), (compiled, COMPILED))
                for run in [newest(among, model, f"best_dense{kind}", name + kind) or []]
            ]
            yield _line(f"step over best dense, {_percent(name)}", model, f"≥ {target:g}×", reached, target)


def _stock(runs: Runs, compiled: Runs) -> Iterable[list[str]]:
    """Over stock diffusers as it comes, which is not compiled; both densities in one row."""
    for model, (*_, target) in STEPS.items():
        texts, verdicts, about = [], [], False
        for among, kind in ((runs, ""), (compiled, COMPILED)):
            reached, whose = _over_stock(among, model, kind)
            texts.append(" / ".join(f"{times:.2f}×" for times in reached) + whose if reached else "not run")
            verdicts.append([times >= target for times in reached])
            about |= bool(whose)
        yield [
            "step over stock, 15 / 8 %",
            model,
            f"≥ {target:g}×",
            *texts,
            "about" if about else _both(*verdicts),  # machines of a kind differ by a per cent
        ]


def _over_stock(runs: Runs, model: str, kind: str) -> tuple[list[float], str]:
    """How many times as fast as stock each density is, and whose stock that is if the same run has none."""
    arms = [name + kind for name in SPARSE_ARMS]
    same, sparse = newest(runs, model, "stock", *arms), newest(runs, model, *arms)
    alone = newest(runs, model, "stock")
    if sparse is None or alone is None:
        return [], ""
    times = [arm(same or sparse, model, name) for name in arms]
    stock = arm(same or alone, model, "stock")
    whose = "" if same else " (stock of another machine of the kind)"
    return [p50_ms(stock) / p50_ms(row) for row in times if row and stock], whose


def _both(plain: list[bool], compiled: list[bool]) -> str:
    for verdicts, word in ((plain, "yes"), (compiled, "compiled")):
        if verdicts and all(verdicts):
            return word
    if any(plain) or any(compiled):
        return "at 8 %"
    return "**no**" if plain or compiled else "-"


def _tails(kinds: list[Runs]) -> Iterable[list[str]]:
    for model in STEPS:
        for name in SPARSE_ARMS:
            found = []
            for runs, kind in zip(kinds, ("", COMPILED), strict=True):
                rows = (arm(run, model, name + kind) for run in runs.values())
                found.append(next((spread for row in rows if row and (spread := tail(row))), None))
            if any(found):
                texts = ["-" if spread is None else f"{spread:.3f}" for spread in found]
                met = all(spread is None or spread <= TAIL for spread in found)
                what = f"p99 / p50 of a sparse step, {_percent(name)}"
                yield [what, model, f"≤ {TAIL}", *texts, "yes" if met else "**no**"]


def _memory(runs: Runs) -> Iterable[list[str]]:
    run = newest(runs, "wan-14b", "best_dense", "default_15")
    dense, sparse = (arm(run or [], "wan-14b", name) for name in ("best_dense", "default_15"))
    if not dense or not sparse:
        return
    state, peak = 2 * sparse["state_bytes"] / 1e9, sparse["peak_gib"] / dense["peak_gib"]
    for what, target, measured, met in (
        (
            "state, both branches",
            f"≤ {STATE_GB} GB",
            f"{state:.2f} GB (2 × what one branch held)",
            state <= STATE_GB,
        ),
        ("peak over dense", f"≤ {PEAK - 1:+.0%}", f"{peak - 1:+.1%} (one branch)", peak <= PEAK),
    ):
        yield [what, "wan-14b", target, measured, "-", "yes" if met else "**no**"]


def _percent(name: str) -> str:
    return f"{name.removeprefix('default_')} %"


def _line(what: str, where: str, target: str, reached: list[float | None], least: float) -> list[str]:
    """A row for what has to reach a ratio: as it comes, and with compiled blocks."""
    texts = ["not run" if times is None else f"{times:.2f}×" for times in reached]
    verdicts = [[] if times is None else [times >= least] for times in reached]
    return [what, where, target, *texts, _both(*verdicts)]
