"""Other packages' layers at the same shape, with the baseline's weights.

``deepspeed``: its MoE layer without dropped tokens. It pads every expert to the busiest one, so that balanced routing is its best
case, and computes experts one after another. ``transformers``: its grouped experts behind its own all-to-all, both called as
its models call them. Its routers belong to models, so that ours is in front.

A package that is absent, too old, or fails is a row with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from adamac.moe import MoE
from adamac.moe.routing import Router

from .arms import Arm
from .cases import BASELINE, LayerCase
from .crew import Crew


class AbsentError(RuntimeError):
    """A package is not there, or lacks what is compared."""


def make_deepspeed(case: LayerCase, baseline: MoE, crew: Crew) -> Arm:
    """Build DeepSpeed's layer, and give it the baseline's weights.

    Raises:
        AbsentError: If the package is not installed or cannot be imported.
    """
    # Nothing is compiled, and which device it is for is not guessed.
    os.environ["DS_BUILD_OPS"] = "0"
    os.environ["DS_ACCELERATOR"] = crew.device.type
    found = _version("deepspeed")
    try:
        import deepspeed.comm
        from deepspeed.moe.layer import MoE as TheirMoE
    except ImportError as error:
        raise AbsentError(f"deepspeed {found} cannot be imported ({error})") from None

    if not deepspeed.comm.is_initialized():
        os.environ.update(RANK=str(crew.rank), WORLD_SIZE=str(crew.ranks), LOCAL_RANK=str(crew.rank))
        backend = "nccl" if crew.device.type == "cuda" else "gloo"
        deepspeed.comm.init_distributed(
            backend, auto_mpi_discovery=False, verbose=False, dist_init_required=False
        )
    config = baseline.config
    layer = TheirMoE(
        config.hidden,
        _Expert(config.hidden, config.ffn),
        num_experts=config.num_experts,
        ep_size=crew.ranks,
        k=config.top_k,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
    ).to(crew.device, crew.dtype)
    layer.set_deepspeed_parallelism()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(baseline.router.weight)
        experts = layer.deepspeed_moe.experts.deepspeed_experts
        for expert, up, down in zip(experts, baseline.experts.up, baseline.experts.down, strict=True):
            expert.up.weight.copy_(up.T)
            expert.down.weight.copy_(down.T)
    return Arm(
        "deepspeed",
        BASELINE,
        "all_to_all, padded",
        lambda x: layer(x)[0],
        list(layer.parameters()),
        note=f"deepspeed {found}, drop_tokens=False",
    )


def make_transformers(case: LayerCase, baseline: MoE, crew: Crew) -> Arm:
    """Put transformers' grouped experts, holding the baseline's own matrices, behind its all-to-all.

    Raises:
        AbsentError: If the package is not installed, or older than its all-to-all.
    """
    found = _version("transformers")
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
        from transformers.integrations.moe import use_experts_implementation
    except ImportError as error:
        raise AbsentError(f"transformers {found} has no all-to-all expert parallelism ({error})") from None
    from torch.distributed.device_mesh import init_device_mesh

    config = baseline.config
    made: Any = use_experts_implementation(has_gate=False, is_transposed=True)(_GroupedExperts)
    experts = made(_Asked(), baseline)
    mesh = init_device_mesh(crew.device.type, (crew.ranks, 1), mesh_dim_names=("ep", "tp"))
    exchange = EPImplementationInterface()["all_to_all"](experts, mesh["ep"], mesh["tp"])
    router = Router(config, crew.device, crew.dtype)
    with torch.no_grad():
        router.weight.copy_(baseline.router.weight)

    def forward(x: Tensor) -> Tensor:
        routing, _ = router(x)
        return exchange(x, routing.experts, routing.weights.to(x.dtype)).to(x.dtype)

    parameters = [*router.parameters(), baseline.experts.up, baseline.experts.down]
    note = f"transformers {found}, grouped_mm, ep all_to_all"
    return Arm("transformers", BASELINE, "all_to_all", forward, parameters, note=note)


RIVALS: dict[str, Callable[[LayerCase, MoE, Crew], Arm]] = {
    "deepspeed": make_deepspeed,
    "transformers": make_transformers,
}


class _Expert(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(rows)))


class _Asked:
    """The part of a model's configuration that experts look at."""

    _experts_implementation = "grouped_mm"


class _GroupedExperts(nn.Module):
    """Experts as transformers' models have them; how they are computed is the decorator's part."""

    def __init__(self, config: _Asked, baseline: MoE) -> None:
        super().__init__()
        self.config = config
        self.up_proj, self.down_proj = baseline.experts.up, baseline.experts.down
        self.num_experts = len(self.up_proj)
        self._is_expert_parallel = True
        self.act_fn = nn.functional.gelu

    def forward(self, *given: Tensor) -> Tensor:
        raise NotImplementedError("computed by the implementation that the configuration names")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise AbsentError(f"{package} is not installed") from None
