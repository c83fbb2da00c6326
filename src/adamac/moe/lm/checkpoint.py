"""Checkpoints: whole or absent, and readable without running anything.

A checkpoint is a folder of ``config.json`` (the model's shape), ``model.safetensors``, ``optimizer.safetensors`` and
``state.json`` (step, seconds). It is written beside its place, forced to the disk, and renamed; only then are older
ones removed. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamac.files import force
from adamac.moe.lm.model import GPT, GPTConfig
from adamac.moe.lm.tokenizer import Tokenizer
from adamac.moe.parallel import local

KEPT = 2
"""Checkpoints that stay: one to go on from, and one before it."""


def write_checkpoint(
    root: Path,
    step: int,
    config: GPTConfig,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint and remove all but the newest ones.

    Args:
        root: Where the checkpoints of a run are.
        step: Steps done.
        config: Shape of the model.
        weights: By name.
        optimizer: By name.
        state: Plain values.

    Returns:
        The folder.

    Raises:
        OSError: If it cannot be written; the former ones stay.
    """
    folder = root / f"step-{step:08d}"
    part = root / f"{folder.name}.part"
    shutil.rmtree(part, ignore_errors=True)  # what a kill left
    try:
        part.mkdir(parents=True)
        for name, tensors in (("model", weights), ("optimizer", optimizer)):
            save_file(
                {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
                part / f"{name}.safetensors",
            )
        (part / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        (part / "state.json").write_text(json.dumps({"step": step, **state}) + "\n", encoding="utf-8")
        for file in part.iterdir():
            force(file)
        force(part)
    except (OSError, SafetensorError) as error:  # a full disk is either
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"cannot write {folder}: {error}") from error
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    force(root)
    for old in _folders(root)[:-KEPT]:
        shutil.rmtree(old)
    return folder


def latest_checkpoint(root: Path) -> Path | None:
    """Find the newest whole checkpoint; ``None`` if there is none."""
    folders = _folders(root)
    return folders[-1] if folders else None


def read_config(folder: Path) -> GPTConfig:
    """Read the shape of a checkpoint's model.

    Raises:
        ValueError: If it cannot be read, or is one for transformers.
    """
    values = read_json(folder / "config.json")
    if isinstance(values, dict) and "model_type" in values:
        raise ValueError(
            f"{folder} is a model for transformers; expected the directory that it was exported from, given to adamac moe train "
            "as --out"
        )
    return GPTConfig.from_dict(values)


def read_tensors(file: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: If it is missing or damaged.
    """
    try:
        return load_file(file, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(_unreadable(file, error)) from None


def read_parts(file: Path, part: Callable[[str, int], slice]) -> dict[str, Tensor]:
    """Read a part of each tensor of a safetensors file; what is not of the part is not read.

    Args:
        file: The file.
        part: Name and length of a tensor's first axis to the part of it.

    Raises:
        ValueError: If it is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
            return {
                name: values[part(name, shape[0])] if (shape := values.get_shape()) else values[...]
                for name, values in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(_unreadable(file, error)) from None


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Copy weights into a model.

    Args:
        model: The model, sharded or not.
        weights: What this rank holds of each.
        source: What is named in errors.

    Raises:
        ValueError: If they are another model's, naming the first difference.
    """
    own = {name: local(value) for name, value in model.state_dict().items()}
    for name in sorted(own.keys() | weights.keys()):
        expected = tuple(own[name].shape) if name in own else "nothing"
        got = tuple(weights[name].shape) if name in weights else "nothing"
        if expected != got:
            raise ValueError(f"{source} is of another model: {name} expected {expected}, got {got}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(weights[name])


def load_model(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> GPT:
    """Load the model of a run or of one of its checkpoints, on one rank, ready to be used.

    Experts take all tokens that choose them: a capacity is for training.

    Raises:
        ValueError: If there is no whole checkpoint.
    """
    folder = (
        directory
        if (directory / "model.safetensors").is_file()
        else latest_checkpoint(directory / "checkpoints")
    )
    if folder is None:
        about = directory / "run.json"
        if about.is_file() and is_bake_off(about):
            raise ValueError(
                f"{directory} holds a bake-off; expected a directory given to adamac moe train as --out"
            )
        resume = " --resume" if about.is_file() else ""
        raise ValueError(
            f"{directory} holds no checkpoint; train one with adamac moe train --out {directory}{resume}"
        )
    model = GPT(read_config(folder).dropless())
    load_weights(model, read_tensors(folder / "model.safetensors"), folder)
    return model.to(device, dtype).eval()


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of a run, given the run or one of its checkpoints.

    Raises:
        ValueError: If there is none.
    """
    beside = (directory, directory.parent.parent)  # a checkpoint is two levels down
    files = [folder / "tokenizer.json" for folder in beside if (folder / "tokenizer.json").is_file()]
    if not files:
        raise ValueError(
            f"{directory} {_lacking(directory)}: expected a directory given to adamac moe train as --out"
        )
    return Tokenizer.load(files[0])


def read_json(file: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: If the file is missing or no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None


def is_bake_off(about: Path) -> bool:
    """Whether a run's ``run.json`` is one of ``adamac bakeoff``, which calls its file the same."""
    values = read_json(about)
    return isinstance(values, dict) and "config" in values and "recipe" not in values


def _lacking(directory: Path) -> str:
    if not directory.exists():
        return "does not exist"
    return "holds no tokenizer" if directory.is_dir() else "is a file"


def _unreadable(file: Path, error: Exception) -> str:
    """What is wrong with a checkpoint's file, and where one can go on from if the newest one is damaged for good."""
    folders = _folders(file.parent.parent)
    remedy = ""
    if isinstance(error, SafetensorError | FileNotFoundError) and folders[1:] and folders[-1] == file.parent:
        remedy = f"; remove {file.parent} to go on from {folders[-2].name}"
    return f"cannot read {file}: {error}{remedy}"


def _folders(root: Path) -> list[Path]:
    """Whole checkpoints, the oldest first; a copy by another name is somebody's own."""
    steps = {path: path.name.removeprefix("step-") for path in root.glob("step-*")}
    return sorted(
        (path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path])
    )
