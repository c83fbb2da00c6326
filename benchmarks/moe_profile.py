"""Kernels of a layer's passes by what they are for, and what that says of one GPU: from the rows `moe_launches`.

Part of `moe_page.py`.
"""

from __future__ import annotations

from typing import Any

from .gpu_page import table
from .moe.cases import BASELINE
from .moe.summary import latest, ok

Row = dict[str, Any]

ACTIVATION, PROJECTIONS, ROWS_MOVED, ROUTER = "activation", "projections", "rows moved", "router"
# By a part of the kernel's name; what runs under none of them is small (counting, scans, sums of losses, copies).
KINDS = {
    "experts' products": ("GroupProblem",),
    ACTIVATION: ("Gelu", "_activate", "_activation", "_activation_gradient"),
    PROJECTIONS: ("nvjet_sm90_tst",),
    ROWS_MOVED: ("vectorized_gather_kernel", "_copies", "_sums", "_gradients"),
    "messages": ("nccl",),
    ROUTER: ("nvjet_sm90_tss", "gemm_f32f32", "simt_sgemm", "direct_copy_kernel", "_gate", "_gradient"),
}
REST = "the rest"


def kind_of(kernel: str) -> str:
    """What a kernel is for."""
    for kind, names in KINDS.items():
        # Those of our own are one word, of which one is the beginning of another.
        if any(kernel == name if name.startswith("_") else name in kernel for name in names):
            return kind
    return REST


def by_kind(row: Row) -> dict[str, float]:
    """Milliseconds of a pass by kind; kernels that the row left out for being short are in the rest."""
    found = dict.fromkeys((*KINDS, REST), 0.0)
    for kernel in row["kernels"]:
        found[kind_of(kernel["name"])] += kernel["ms"]
    found[REST] += row["device_ms"] - sum(found.values())
    return found


def profiles(rows: list[Row], fabric: str, name: str) -> dict[str, Row]:
    """Rows of a pass by arm, of the latest run."""
    found = [row for row in ok(rows, "moe_launches") if row["experts"] == "auto" and row["fabric"] == fabric]
    return {row["arm"]: row for row in latest(found) if row["pass"] == name}


def kind_table(rows: list[Row]) -> str:
    """Where the device's time goes, by arm."""
    lines = [
        [f"{fabric}: {arm}", title, *(f"{ms:.2f}" for ms in by_kind(row).values()), f"{row['device_ms']:.2f}"]
        for fabric, name, title in (
            ("none", "forward", "forward"),
            ("none", "forward_backward", "forward + backward"),
            ("nvlink", "forward", "forward"),
        )
        for arm, row in profiles(rows, fabric, name).items()
    ]
    return table(["kernels, ms", "pass", *KINDS, REST, "sum"], lines)


def one_name_words(rows: list[Row]) -> str:
    """What the table cannot tell apart, if any of its rows is of when two kernels had one name."""
    shown = [row for name in ("forward", "forward_backward") for row in profiles(rows, "none", name).values()]
    if not any(kernel["name"] == "_activate" for row in shown for kernel in row["kernels"]):
        return ""
    return " In both passes on one GPU the activation's gradient is under the router: in this run the kernels of both have one name."


def launch_table(rows: list[Row], former: list[Row]) -> str:
    """Launches and their time beside the time that passed; before, on another card, where there are any of the same arm."""
    then = {
        (row["fabric"], row["arm"], row["pass"], row["experts"]): row for row in ok(former, "moe_launches")
    }
    lines = []
    for row in ok(rows, "moe_launches"):
        key = row["fabric"], row["arm"], row["pass"], row["experts"]
        old = then.get(key)
        measured = passed(rows, row), passed(former, row)
        cells = [
            f"{row['launches']:.0f}",
            f"{old['launches']:.0f}" if old else "-",
            f"{row['device_ms']:.2f}",
            *("-" if ms is None else f"{ms:.2f}" for ms in measured),
        ]
        lines.append([f"{row['fabric']}: {row['arm']}", row["pass"].replace("_", " + "), *cells])
    head = ["16,384 tokens", "pass", "launches", "before", "kernels, ms", "passed, ms", "before, on H100"]
    return table(head, lines)


def passed(rows: list[Row], profile: Row) -> float | None:
    """Milliseconds that the arm of a profile takes when nobody profiles it: the case that targets are judged by."""
    same = ("fabric", "arm", "experts", "tokens", "top_k", "hidden")
    for row in ok(rows, "moe_layer"):
        if row["routing"] == "balanced" and not row["rivals"] and all(row[n] == profile[n] for n in same):
            return row[profile["pass"]]["p50_ms"]
    return None


def one_gpu_words(rows: list[Row], before: list[Row]) -> str:
    """What narrow rows save on one GPU and what they cost, and what a free activation would make of it.

    Args:
        rows: With kernels and profiles of one GPU.
        before: Of the run before activation and spreading were kernels of ours.
    """
    arms = profiles(rows, "none", "forward")
    wide, narrow = (by_kind(arms[f"{name}/local"]) for name in (BASELINE, "bigmac"))
    sums = [arms[f"{name}/local"]["device_ms"] for name in (BASELINE, "bigmac")]
    saved = wide[ROWS_MOVED] - narrow[ROWS_MOVED]
    activated = narrow[ACTIVATION] - wide[ACTIVATION]
    free = (sums[0] - wide[ACTIVATION]) / (sums[1] - narrow[ACTIVATION])
    rate, then = (_activation_rate(each) for each in (rows, before))
    old = [profiles(before, "none", "forward")[f"{name}/local"]["device_ms"] for name in (BASELINE, "bigmac")]
    return (
        f"**One GPU** (target 1.2). Nothing is sent. Narrow rows save {saved:.2f} ms of moving rows; four times as many inner "
        f"values cost {activated:.2f} ms more to activate and the two projections cost {narrow[PROJECTIONS]:.2f} ms: "
        f"{sums[0]:.2f} ms of kernels become {sums[1]:.2f}. Both sides' products of experts are the same FLOPs and take the same "
        f"time. If the activation cost nothing on either side the kernels' ratio would be {free:.2f}: {'not enough' if free < 1.2 else 'enough'} by "
        f"itself. Activation and spreading are kernels of ours since the run of the layers: of BigMac's inner values {rate:,.0f} GB/s where torch's moved {then:,.0f}; the kernels' ratio "
        f"was {old[0] / old[1]:.2f} and is {sums[0] / sums[1]:.2f}, as spreading helps wide rows most. Next: a first product with the activation inside, at the speed of PyTorch's "
        "([what was tried](decisions/activation-stays-apart.md))."
    )


def _activation_rate(rows: list[Row]) -> float:
    """GB/s of BigMac's activation at 16,384 tokens, of the latest run."""
    found = [row for row in ok(rows, "moe_kernels") if (row["kernel"], row["preset"]) == ("activation", "bigmac")]  # fmt: skip
    return next(row["gb_per_s"] for row in reversed(found) if row["tokens"] == 16384)


def router_words(rows: list[Row]) -> str:
    """What the router's gradient takes, which the cost model does not know."""
    once, both = (
        by_kind(profiles(rows, "none", name)[f"{BASELINE}/local"])[ROUTER]
        for name in ("forward", "forward_backward")
    )
    return f"{both - once:.2f} ms backward after {once:.2f} ms forward"


def cost_words(rows: list[Row]) -> str:
    """What the host pays for a launch, and what of a layer's time that is."""
    us = {row["call"]: row["host_us"] for row in rows}
    layer = [us[f"layer, {side}"] for side in ("fine_grained", "bigmac")]
    bare = sorted((us["add in place"], us["product"]))
    pieces = (
        us["gate"] + us["rows in order"] + us["rows added up, one kernel of ours"] + 2 * us["grouped product"]
    )
    return (
        f"Without gradients, measured later at commit `{rows[0]['commit']}` on a host of the same kind (`h200/launch_cost.jsonl`): torch's "
        f"plain operations {bare[0]:.0f} to {bare[1]:.0f} µs, rows added up by a kernel of ours {us['rows added up, one kernel of ours']:.0f}. A layer of 8 tokens, XL top-8, takes {layer[0] / 1e3:.2f} "
        f"and {layer[1] / 1e3:.2f} ms until its call returns, in which the thread never sleeps: it is Python's work and the driver's. Its gate, order, sums and grouped products are "
        f"{pieces / 1e3:.2f} ms of that; the rest are modules, checks, the balance loss and small operations between. The floor above is of another layer, in training mode, and until the "
        "device is done, so that the two do not compare. What is replayed from a CUDA graph pays none of it ([decoding](#prefill-and-decoding))."
    )


def cost_table(rows: list[Row]) -> str:
    """Microseconds by call."""
    lines = [[row["call"], f"{row['host_us']:.1f}", f"{row['least_us']:.1f}"] for row in rows]
    return table(["call", "host, µs (median)", "least"], lines)
