"""Experts spread over ranks, everything else replicated or sharded over all of them.

The ranks form a grid of ``data x expert``. A row of it holds all experts once, divided among its ranks; a column holds the same
experts on each of its ranks. Every rank has tokens of its own, so that

- what is not an expert's is on all ranks, and its gradient is the mean over all of them;
- an expert's gradient on one rank is already the sum over its row, because the row's tokens came to it. The mean over
  all ranks is therefore the sum over its *column*, divided by the number of *all* ranks. Dividing by the size of the column, as
  data parallelism would if it was only told that group, makes the experts' gradients too large by the size of a row.

:func:`shard` does that with FSDP2, :func:`average_gradients` with plain all-reduces for a model that is not sharded. The layers
themselves take ``group=expert_group(mesh)`` when they are built.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from adamac.moe.layer import MoE

BUCKET_BYTES = 64 * 2**20
"""Gradients that travel at once."""


def expert_mesh(expert_ranks: int, device_type: str = "cpu") -> DeviceMesh:
    """Arrange all ranks as a grid ``("data", "expert")``; the ranks of a row are neighbours.

    Args:
        expert_ranks: Ranks that one set of all experts is divided among.
        device_type: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: If the ranks cannot be arranged so.
    """
    ranks = dist.get_world_size()
    if expert_ranks < 1 or ranks % expert_ranks:
        raise ValueError(f"expert_ranks must divide the number of ranks, {ranks}; got {expert_ranks}")
    return init_device_mesh(
        device_type, (ranks // expert_ranks, expert_ranks), mesh_dim_names=("data", "expert")
    )


def expert_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks that this rank's layers send rows to."""
    return mesh.get_group("expert")


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: tuple[type[nn.Module], ...] = (),
    expert_dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Shard a model with FSDP2, in place: experts over the ``data`` axis, everything else over all ranks.

    Every loss is a rank's own mean; gradients come out as the mean over all ranks.

    Args:
        model: With layers that were built with ``group=expert_group(mesh)``.
        mesh: Of :func:`expert_mesh`.
        blocks: Kinds of module that are gathered as a whole for their forward pass; the model's blocks.
        expert_dtype: That experts are gathered in, for a model whose rows have this dtype when they reach them, as under
            autocast: half the bytes travel, and the numbers are those of a cast after the gathering. Gradients are added up
            in the dtype of the parameters. ``None`` is theirs.
        **options: Passed to every ``fully_shard``: ``mp_policy``, ``reshard_after_forward``, ``offload_policy``.

    Returns:
        The model.

    Raises:
        ValueError: If both ``expert_dtype`` and ``mp_policy`` are given.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if expert_dtype is not None and "mp_policy" in options:
        raise ValueError(
            "expert_dtype is a policy of precision for the experts: give it or mp_policy, not both"
        )
    everyone = init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("all",))
    # A column of one rank has nothing to shard, and FSDP2 would not divide there: its experts stay as they are.
    whole: set[nn.Parameter] = set()
    for layer in moe_layers(model):
        if mesh["data"].size() == 1:
            whole |= set(layer.experts.parameters())
            continue
        of_experts = dict(options)
        if expert_dtype is not None:
            of_experts["mp_policy"] = MixedPrecisionPolicy(expert_dtype, reduce_dtype=layer.experts.up.dtype)
        fully_shard(layer.experts, mesh=mesh["data"], **of_experts)
        layer.experts.set_gradient_divide_factor(mesh.size())  # ty: ignore[not-callable]
        if mesh.device_type != "cuda":  # gloo cannot scale while it sums
            layer.experts.set_force_sum_reduction_for_comms(True)  # ty: ignore[not-callable]
    for parameter in whole:
        parameter.register_hook(lambda gradient: gradient / mesh.size())
    for module in list(model.modules()):
        if module is not model and isinstance(module, blocks):
            fully_shard(module, mesh=everyone, ignored_params=whole, **options)
    fully_shard(model, mesh=everyone, ignored_params=whole, **options)
    return model


@torch.no_grad()
def average_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Average the gradients of a model that is not sharded, after the backward; every loss is a rank's own mean.

    They travel in flat buckets rather than from hooks of the backward: that works alike for parameters that got no gradient,
    and gives the same bits whatever the order in which gradients became ready.

    Args:
        model: With layers that were built with ``group=expert_group(mesh)``.
        mesh: Of :func:`expert_mesh`.
    """
    gradients: dict[bool, list[Tensor]] = {False: [], True: []}
    for parameter, is_expert in parameters_by_kind(model):
        if parameter.grad is None:  # an expert that got no token: the other ranks still wait for it
            parameter.grad = torch.zeros_like(parameter)
        gradients[is_expert].append(parameter.grad)
    rows = mesh["data"].size()
    columns = {False: None, True: None if rows == mesh.size() else mesh.get_group("data")}
    for is_expert, some in gradients.items():
        for bucket in _buckets(some):
            _average(bucket, mesh.size(), columns[is_expert], alone=is_expert and rows == 1)


@torch.no_grad()
def clip_gradients(model: nn.Module, mesh: DeviceMesh | None, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm over the whole model, each expert counted once, is at most ``max_norm``.

    torch's own function refuses gradients of two meshes, and would count only this rank's experts.

    Args:
        model: Sharded or not; its gradients are averaged.
        mesh: Of :func:`expert_mesh`; ``None`` if there is one rank.
        max_norm: The largest norm that is left.

    Returns:
        The norm before, a float64 scalar, the same on all ranks.
    """
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    # A shard is on one rank; where the whole of a gradient is on several, each of them adds it.
    by_holders: dict[int, list[Tensor]] = {}
    for parameter, is_expert in parameters_by_kind(model):
        if parameter.grad is not None:
            gradient, holders = local(parameter.grad), 1
            if mesh is not None and gradient is parameter.grad:
                holders = mesh["data"].size() if is_expert else mesh.size()
            by_holders.setdefault(holders, []).append(gradient)
    for holders, gradients in by_holders.items():
        # float16 could not hold the norms.
        precision = functools.reduce(torch.promote_types, (each.dtype for each in gradients), torch.float32)
        norms = torch._foreach_norm(gradients, 2, dtype=precision)
        total += torch.stack(norms).double().square().sum() / holders
    if mesh is not None:
        dist.all_reduce(total)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for gradients in by_holders.values():
        torch._foreach_mul_(gradients, scale)
    return norm


def moe_layers(model: nn.Module) -> Iterator[MoE]:
    """The mixture-of-experts layers within a model."""
    return (module for module in model.modules() if isinstance(module, MoE))


def parameters_by_kind(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """All parameters, each with whether it is an expert's."""
    experts = {id(parameter) for layer in moe_layers(model) for parameter in layer.experts.parameters()}
    return ((parameter, id(parameter) in experts) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharded or not, as a plain tensor in the same memory."""
    # Asked for by what it can do: importing DTensor to ask costs half a second where nothing is sharded.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # ty: ignore[not-callable]


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def _average(bucket: list[Tensor], ranks: int, group: dist.ProcessGroup | None, *, alone: bool) -> None:
    """Add up over a group, unless this rank is alone in it, and divide by the number of all ranks."""
    if alone:
        torch._foreach_div_(bucket, ranks)
        return
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    dist.all_reduce(flat, group=group)
    flat /= ranks
    for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(mean.view_as(gradient))
