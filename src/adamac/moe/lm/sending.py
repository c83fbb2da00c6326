"""How rows get to the experts of a run: chosen once, kept with the run, and the same when it goes on.

All dispatchers compute the same up to rounding, so that another one would not spoil a run; but a run that goes on would no longer
equal one that was never broken off. What was chosen is therefore written beside the recipe, with the number of ranks and tokens
that it was chosen for, and holds wherever these are the same. Where they are not, rounding differs anyway and how long a layer
takes too: there it is chosen anew, and written down as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adamac.moe.cost.machine import COLLECTIVES, Machine
from adamac.moe.dispatch import SENDERS, resolve
from adamac.moe.lm.recipe import Recipe

UNREAD = "static_gather"
"""The dispatcher whose passes the host does not wait for, so that they can be captured."""


@dataclass(frozen=True, kw_only=True)
class Sending:
    """What sends rows to experts, in every layer of a run.

    Attributes:
        dispatcher: Its name.
        ranks: Among which the experts are divided.
        tokens: That each of them routes at once.
        reason: Why it is this dispatcher, in words.
    """

    dispatcher: str
    ranks: int
    tokens: int
    reason: str

    @classmethod
    def from_dict(cls, values: Any) -> Sending:
        """Undo ``dataclasses.asdict``.

        Raises:
            ValueError: If it is something else.
        """
        try:
            read = cls(**values)
        except TypeError as error:
            raise ValueError(f"no choice of a dispatcher: {error}") from None
        if read.dispatcher not in SENDERS:
            raise ValueError(f"dispatcher must be one of {', '.join(SENDERS)}, got {read.dispatcher!r}")
        return read


def choose_sending(
    recipe: Recipe,
    ranks: int,
    tokens: int,
    machine: Machine | None = None,
    kept: Sequence[Sending] = (),
    *,
    capture: bool = False,
) -> Sending | None:
    """Choose how rows are sent in a run, or go on as it did before.

    Args:
        recipe: What is trained.
        ranks: Among which the experts are divided.
        tokens: That each of them routes at once.
        machine: What to go by; ``None``: what was kept or, if nothing was, bytes.
        kept: What was chosen when the run began, and later elsewhere.
        capture: Whether micro-batches are to be captured, which takes a dispatcher that reads nothing; what was kept holds all the
            same.

    Returns:
        The choice; ``None`` on one rank, where nothing is sent.

    Raises:
        ValueError: If the machine has nothing to choose here, does not know the fabric between so many ranks, or would have a
            run go on with another dispatcher than it had, or is given to choose where ``capture`` has chosen; or the experts
            cannot be spread.
    """
    if machine is not None:
        _check(machine, ranks)
    if ranks == 1:
        return None
    former = next((each for each in kept if (each.ranks, each.tokens) == (ranks, tokens)), None)
    if former is not None and machine is None:
        return former
    if former is None and capture and machine is not None:
        raise ValueError(
            f"--machine chooses how rows are sent to experts, and --capture takes {UNREAD}, the only way that reads nothing; "
            "leave one of them out"
        )
    if former is None and capture:
        found, reason = UNREAD, "asked for by --capture: the others read how many rows come"
    else:
        found, reason = resolve(recipe.model(recipe.vocab).moe, ranks, machine=machine, tokens=tokens)
    if former is None:
        chosen = Sending(dispatcher=found, ranks=ranks, tokens=tokens, reason=reason)
        return _anew(chosen, kept[-1]) if kept else chosen
    if former.dispatcher != found:
        raise ValueError(
            f"the run sends rows to experts by {former.dispatcher}, and {found} is {reason}; leave --machine out to go on as "
            "before, or begin another run"
        )
    return former


def _anew(chosen: Sending, former: Sending) -> Sending:
    """Say that a run goes on elsewhere than it was."""
    before = f"{former.dispatcher} on {former.ranks} ranks with {former.tokens} tokens each"
    return replace(chosen, reason=f"{chosen.reason}; chosen anew, as the run had {before}")


def _check(machine: Machine, ranks: int) -> None:
    """Refuse a machine that has nothing to say here."""
    if ranks == 1:
        raise ValueError(
            "--machine is for experts that are divided among ranks, and here every rank has all of them; leave it out, or "
            "divide them by --expert-ranks 2 or more under torchrun"
        )
    if not isinstance(machine, Machine):  # refused by name where it is used
        return
    known = [machine.costs[kind] for kind in COLLECTIVES if kind in machine.costs]
    measured = any(cost.source == "measured" for cost in known)
    if len(known) < len(COLLECTIVES) or (measured and machine.ranks not in (None, ranks)):
        had = f"{machine.ranks} ranks" if measured and machine.ranks else "one rank"
        raise ValueError(
            f"{machine.name} was measured on {had}, and {ranks} divide the experts here; measure on so many (torchrun "
            f"--nproc-per-node {ranks} -m adamac.cli advise moe --measure --out FILE), or leave --machine out"
        )
