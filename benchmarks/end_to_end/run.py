"""The loop: models one after another, and on each the arms in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .arms import choose
from .build import arguments, build
from .models import MODELS, Model, tiny
from .ranks import Ranks
from .rows import Record, RowFile, stamp
from .turn import Bench, Deadline, Turn, kinds_of_turn, run_turn, warm_up

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Run:
    """Time denoising steps and write rows.

    Steps are counted for each turn; an arm makes as many turns as there are rounds.

    Attributes:
        models: Which models: cogvideox-2b, wan-1.3b, wan-14b, hunyuan-129f, hunyuan-193f.
        arms: Which arms: stock, best_dense, svg2, svg2_30, paper, default, default_15, default_8; with "+compile" behind
            its name an arm runs with the transformer's blocks compiled in full graphs.
        out: File of rows; rows of former runs in it stay.
        rounds: Turns of each arm.
        dense_steps: Steps of a dense arm in a turn.
        first_steps: Dense steps at the start of a sparse arm's turn. With 0 the projection of a whole video takes the
            dense steps of best_dense, which are the same.
        sparse_steps: Steps of a sparse arm in a turn, after the one that clusters from scratch.
        guidance: Classifier-free guidance, where the model uses it: twice the work in every step.
        compile: Run each arm also compiled.
        layers: Layers of the transformer; all if not given. Rows say so, and no video is projected.
        minutes: Stop cleanly after this long.
        warmup_layers: Layers of each list of blocks in the warm-up of an arm that is not compiled.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" (float32 on a CPU, bfloat16 elsewhere), "bfloat16", "float16" or "float32".
        tiny: Small models of the same classes, for a rehearsal.
        commit: Names the commit where the code is a copy without its repository.
    """

    models: tuple[str, ...] = ("wan-1.3b",)
    arms: tuple[str, ...] = ("stock", "best_dense", "svg2", "paper", "default", "default_15", "default_8")
    out: Path = Path("out/end_to_end.jsonl")
    rounds: int = 2
    dense_steps: int = 2
    first_steps: int = 1
    sparse_steps: int = 5
    guidance: bool = True
    compile: bool = False
    layers: int | None = None
    minutes: float | None = None
    warmup_layers: int = 1
    device: str = "auto"
    dtype: str = "auto"
    tiny: bool = False
    commit: str | None = None


def run(options: Run, say: Callable[[str], None] = print, ranks: Ranks | None = None) -> list[dict[str, Any]]:
    """Measure everything that is asked for.

    Args:
        options: What.
        say: Takes a line of progress.
        ranks: Those that all videos are spread over; each of them has to make this call.

    Returns:
        The rows of this run, which are in its file too.

    Raises:
        ValueError: If a name is unknown or a number makes no sense.
    """
    check(options)
    arms = choose(options.arms, compiled=options.compile)
    ranks = ranks or Ranks()
    deadline = Deadline(options.minutes, ranks)
    file, rows = RowFile(options.out), []
    started = datetime.now(UTC).isoformat(timespec="seconds")
    for name in options.models:
        model = _model(name, options)
        common = _common(model, options) | {"ranks": ranks.size, "run": started}
        records = [Record(arm, common, model) for arm in arms]
        former = list(rows)

        def save(records: list[Record] = records, former: list[dict[str, Any]] = former) -> None:
            rows[:] = former + [record.row() for record in records]
            if ranks.lead:
                file.save(rows)

        _measure(model, records, options, ranks, deadline, save, say if ranks.lead else lambda line: None)
        save()
        _free()
    return rows


def check(options: Run) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: Saying what is wrong.
    """
    if unknown := [name for name in options.models if name not in MODELS]:
        raise ValueError(f"unknown model {unknown[0]!r}; there are {', '.join(MODELS)}")
    if options.dtype not in ("auto", *_DTYPES):
        raise ValueError(f"unknown dtype {options.dtype!r}; there are auto, {', '.join(_DTYPES)}")
    for name, least in (("rounds", 1), ("dense_steps", 1), ("first_steps", 0), ("sparse_steps", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(options, name)}")
    most = min(_model(name, options).steps for name in options.models)
    if max(options.first_steps + 1 + options.sparse_steps, options.dense_steps) > most:
        raise ValueError(f"a turn has at most the {most} steps of a whole video; add rounds instead")


def _measure(
    model: Model,
    records: list[Record],
    options: Run,
    ranks: Ranks,
    deadline: Deadline,
    save: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Run the arms in turns until all rounds are done or time is over."""
    device, dtype = device_of(options), _dtype(options)
    say(f"{model.name}: {model.video_tokens} video tokens, {model.num_layers} layers")
    try:
        bench = Bench(
            model=model,
            pipe=build(model, device, dtype),
            arguments=arguments(model, device, dtype, guidance=options.guidance),
            device=device,
            deadline=deadline,
            min_tokens=1 if options.tiny else None,
            warmup_layers=options.warmup_layers,
            ranks=ranks,
        )
        ranks.spread(bench.pipe)
    except Exception as error:  # a model that does not fit is a result too
        for record in records:
            record.end("error", f"model could not be made: {_reason(error)}")
        return
    for number in range(options.rounds):
        for record in (record for record in records if record.status == "ok"):
            if not deadline.allows():
                record.end("stopped", f"time limit of {options.minutes:g} minutes before turn {number + 1}")
                continue
            turn = _turn(bench, record, options, first_turn=number == 0)
            if turn is None:
                say(f"  {record.arm.name}: {record.reason}")
            else:
                _take(record, turn, options)
                say(f"  {record.arm.name}: {_line(turn)}")
            save()


def _turn(bench: Bench, record: Record, options: Run, *, first_turn: bool) -> Turn | None:
    """One turn of an arm, with its warm-up if it is the first; ``None`` if it failed, which the record then says."""
    arm = record.arm
    kinds = kinds_of_turn(
        arm, dense=options.dense_steps, first=options.first_steps, sparse=options.sparse_steps
    )
    turn, problem = None, None
    try:
        if first_turn and not arm.compiled:  # compiled arms warm up within their turns
            warm_up(bench, arm)
        turn = run_turn(bench, arm, kinds)
    except Exception as error:  # an arm that fails is a row with the reason, and the next arm goes on
        problem = _reason(error)
    problem = bench.ranks.problem(problem)
    if problem is None and turn is not None:
        return turn.of_all(bench.ranks)
    record.end("error", problem or "")
    _free()  # out here the error, and with it the tensors in its frames, is gone
    return None


def _take(record: Record, turn: Turn, options: Run) -> None:
    record.add(turn)
    if not turn.in_time:
        record.end("stopped", f"time limit of {options.minutes:g} minutes within a turn")


def _line(turn: Turn) -> str:
    return " ".join(
        f"{kind[0] if kind != 'first_sparse' else 'f'}{time_ms:.0f}" for kind, time_ms in turn.steps
    )


def _model(name: str, options: Run) -> Model:
    model = MODELS[name]
    model = tiny(model) if options.tiny else model
    return model if options.layers is None else model.shortened(options.layers)


def _common(model: Model, options: Run) -> dict[str, Any]:
    """Entries that all arms on one model share."""
    whole = _model(model.name, replace(options, layers=None))
    guided = options.guidance or model.guidance == "embedded"
    return {
        "benchmark": "end_to_end",
        "model": model.name,
        "tiny": options.tiny,
        "source": model.source,
        "random_weights": True,
        "pipeline": model.pipeline,
        "scheduler": model.scheduler,
        "steps_of_video": model.steps,
        "dense_steps_of_video": model.dense_steps,
        "first_steps_of_turn": options.first_steps,
        "height": model.height,
        "width": model.width,
        "frames": model.frames,
        "video_tokens": model.video_tokens,
        "text_tokens": model.text.tokens if model.text.joint else 0,
        "text_tokens_valid": model.text.valid if model.text.joint else 0,
        "heads": model.heads,
        "head_dim": model.head_dim,
        "layers": model.num_layers,
        "layers_of_model": whole.num_layers,
        "guidance": model.guidance if guided else "off",
        "dtype": str(_dtype(options)).removeprefix("torch."),
        **stamp(device_of(options), options.commit),
    }


def device_of(options: Run) -> str:
    """Torch's name of the device to measure on."""
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(options: Run) -> torch.dtype:
    if options.dtype == "auto":
        return torch.float32 if device_of(options) == "cpu" else torch.bfloat16
    return _DTYPES[options.dtype]


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
