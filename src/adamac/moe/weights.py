"""Weights in one safetensors file that any number of ranks can read.

Experts are saved whole, as if all were on one rank: a file says nothing of how many ranks wrote it, and each rank that reads it takes
the range of experts that it holds. FSDP2 shards are put together likewise. The file replaces the former one only when it is
complete. Optimiser states are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adamac.files import force
from adamac.moe.layer import MoE
from adamac.moe.shares import put


@torch.no_grad()
def save_weights(model: nn.Module, path: Path | str) -> None:
    """Write all weights of a model; called on every rank, written by the first.

    Args:
        model: With any number of :class:`adamac.moe.layer.MoE` layers, sharded by FSDP2 or not.
        path: Of the file, ``.safetensors``.

    Raises:
        OSError: If it cannot be written; on every rank. A former file stays as it was.
    """
    path, first = Path(path), not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, tensor, layer in _named(model):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if layer is not None and layer.group is not None:
            full = _all_experts(full, layer.group)
        if first:
            whole[name] = full.detach().cpu().contiguous().clone()
    problem = _write(whole, path) if first else None
    if dist.is_initialized():  # so that the other ranks do not go on without a file, or wait for one
        failed = torch.tensor(int(problem is not None), device=next(model.parameters()).device)
        dist.all_reduce(failed)
        if failed and not first:
            raise OSError(f"the first rank could not write {path}; its own message says why")
    if problem is not None:
        raise OSError(f"could not write {path}: {problem}")


def _write(weights: dict[str, Tensor], path: Path) -> str | None:
    """Replace a file at once; return what went wrong, if anything."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    try:
        save_file(weights, part)
        force(part)  # else a power cut may leave the new name with nothing behind it
        part.replace(path)
        force(path.parent)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        return str(error)
    return None


@torch.no_grad()
def load_weights(model: nn.Module, path: Path | str) -> None:
    """Read the weights of a model, on every rank that rank's part; nothing is changed if any weight does not fit.

    Args:
        model: Like the one that was saved, on any number of ranks, sharded by FSDP2 or not.
        path: A file of :func:`save_weights`.

    Raises:
        ValueError: If the file is missing, damaged, or of another model.
    """
    path = Path(path)
    named = list(_named(model))
    with _opened(path) as file:
        _compare_names({name for name, _, _ in named}, set(file.keys()), path)
        for name, tensor, layer in named:
            expected, got = _whole_shape(tensor, layer), tuple(file.get_slice(name).get_shape())
            if expected != got:
                raise ValueError(
                    f"{path} is of another model: {name} is {got} there, {expected} here; build the model with its configuration"
                )
        for name, tensor, layer in named:
            if layer is None:
                value = file.get_tensor(name)
            else:
                first, number = layer.experts.first, layer.config.num_experts // layer.dispatcher.ranks
                value = file.get_slice(name)[first : first + number]
            put(tensor, value)


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor, MoE | None]]:
    """All weights by name; an expert's with the layer that it is of."""
    layers = {
        f"{path}.experts." if path else "experts.": module
        for path, module in model.named_modules()
        if isinstance(module, MoE)
    }
    for name, tensor in model.state_dict().items():
        owner = next((layer for prefix, layer in layers.items() if name.startswith(prefix)), None)
        yield name, tensor, owner


def _all_experts(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return torch.cat(parts)


def _whole_shape(tensor: Tensor, layer: MoE | None) -> tuple[int, ...]:
    return tuple(tensor.shape) if layer is None else (layer.config.num_experts, *tensor.shape[1:])


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); use another copy") from None


def _compare_names(expected: set[str], got: set[str], path: Path) -> None:
    missing, extra = sorted(expected - got), sorted(got - expected)
    if missing or extra:
        differences = [f"it lacks {missing[0]}"] * bool(missing) + [
            f"it has {extra[0]}, unknown here"
        ] * bool(extra)
        number = len(missing) + len(extra)
        raise ValueError(
            f"{path} is of another model: {' and '.join(differences)} ({number} differences in all)"
        )
