"""The layer: ``descend → send → experts → collect → ascend``, and the baseline is the same with two identities.

BigMac (arXiv 2502.16927) and the fine-grained mixture it is compared with differ in where the two thin matrices are: the baseline
has them in every expert and sends rows at full width; BigMac has one pair for all experts, narrows a row before it is sent and
widens the weighted sum after it came back. Because the sum is linear, widening once after it is the same as widening each
answer. Everything else, the router above all, is shared by both, so that a comparison differs in the configuration alone.

What reads the full width: the router and the shared expert. What is sent, and what the routed experts read, is ``latent`` wide.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adamac.moe.cost.machine import Machine
from adamac.moe.dispatch import TOKENS, Local, Meter, choose
from adamac.moe.experts import Experts, SharedExpert
from adamac.moe.presets import MoEConfig, local_experts
from adamac.moe.routing import Router, Routing
from adamac.moe.shares import written_whole
from adamac.moe.timing import Clock
from adamac.moe.traffic import Traffic
from adamac.ops.grouped_mlp import MlpImpl

# Of matrices where an initialisation by fan-in is not asked for: GPT-2's.
_STD = 0.02


class MoE(nn.Module):
    """A mixture-of-experts layer of any of the shapes in :mod:`adamac.moe.presets`, on one rank or several.

    Each rank has its own tokens and ``num_experts / ranks`` of the experts; everything else is on every rank, and starts equal
    on all if their random seeds are equal.

    A forward pass:

    1. ``router`` reads ``x`` at full width and chooses experts and weights.
    2. ``descend`` narrows ``x`` to the latent width (identity in the baseline).
    3. the dispatcher sends rows to their experts' ranks; meanwhile the ``shared`` expert, if any, reads ``x`` at full width.
    4. ``experts`` answer; the dispatcher brings the answers back and adds them up by weight.
    5. ``norm``, if any, and ``ascend`` widen the sum.

    Attributes:
        dispatcher: What moves its rows.
        dispatcher_reason: Why it is this one, in words; a printed layer says so too.
        losses: The auxiliary losses of the last forward pass by name, unweighted; see :meth:`auxiliary_loss`.
        traffic: Bytes that this rank sent in the last forward pass and its backward, in which activation checkpointing sends
            forward once more.
        routing: That of the last forward pass, without gradients.
        clock: What the stages are timed with; nothing by default.
    """

    def __init__(
        self,
        config: MoEConfig,
        dispatcher: str = "auto",
        group: dist.ProcessGroup | None = None,
        *,
        machine: Machine | None = None,
        tokens: int = TOKENS,
        chunks: int = 1,
        impl: MlpImpl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build and initialise the layer from torch's random numbers.

        Args:
            config: The layer's shape.
            dispatcher: ``"local"``, ``"all_to_all"``, ``"per_rank"``, ``"all_gather"``, ``"static_gather"``; or ``"auto"``, which on several ranks
                takes the one that is predicted to be fastest on ``machine`` or, if none is given, the simplest of those that
                send the fewest bytes. Chosen once, here.
            group: The ranks that the experts are spread over; ``None`` means that all are on this rank.
            machine: Constants of this machine, as ``adamac advise moe --measure --out`` writes them, for ``"auto"`` alone; on
                all ranks of the group or on none. The first rank's count, and the others are told what it chose.
            tokens: Number of tokens on each rank that ``"auto"`` assumes; the layer takes any number.
            chunks: Parts that the tokens are sent in, so that the experts work on one while the next travels.
            impl: How the experts are computed, see :func:`adamac.ops.grouped_mlp.grouped_mlp`.
            device: Where the parameters are.
            dtype: Dtype of the parameters.

        Raises:
            ValueError: If the experts cannot be spread evenly, the dispatcher does not fit, or the machine has no constants of
                what is between ranks.
        """
        super().__init__()
        if not isinstance(chunks, int) or chunks < 1:
            raise ValueError(f"chunks must be a whole number, at least 1; got {chunks}")
        device = None if device is None else torch.device(device)
        self.config, self.group, self.chunks = config, group, chunks
        choice = choose(dispatcher, config, group, machine=machine, tokens=tokens)
        self.dispatcher, self.dispatcher_reason = choice.dispatcher, choice.reason
        own = local_experts(config.num_experts, self.dispatcher.ranks)
        self.router = Router(config, device, dtype)
        self.experts = Experts(config, own, self.dispatcher.rank * own, impl=impl, device=device, dtype=dtype)
        self.descend, self.ascend = nn.Identity(), nn.Identity()
        if config.latent is not None:
            self.descend = nn.Linear(config.hidden, config.latent, bias=False, device=device, dtype=dtype)
            self.ascend = nn.Linear(config.latent, config.hidden, bias=False, device=device, dtype=dtype)
        self.norm = (
            nn.RMSNorm(config.width, device=device, dtype=dtype) if config.latent_norm else nn.Identity()
        )
        self.shared = SharedExpert(config, device, dtype) if config.shared_ffn else None
        self.losses: dict[str, Tensor] = {}
        self.traffic = Traffic()
        self.routing: Routing | None = None
        self.clock = Clock()
        self.reset_parameters()

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """Compute the layer.

        Args:
            x: ``[..., hidden]``; ranks may have different numbers of tokens, and none.
            routing: Used for these tokens in place of the router's, on all ranks or none; for measurements, and to repeat a pass.
                Whether its experts exist, differ within a token and have room is checked on a CPU alone, as the check would
                wait for a GPU.

        Returns:
            Like ``x``; the residual is not added.

        Raises:
            ValueError: If width, dtype or routing do not fit, or the router gave NaN or infinity.
        """
        _check_input(x, self.config.hidden, self.descend)
        tokens, clock = x.reshape(-1, self.config.hidden), self.clock
        # Run once more by its own backward, it goes on counting where it left off.
        meter = Meter(self.traffic if _in_backward() else Traffic(), clock)
        self.losses = {}
        if routing is None:
            with clock.stage("gate"):
                routing, self.losses = self.router(tokens)
        else:
            _check_routing(routing, len(tokens), self.config)
        with clock.stage("descend"):
            rows = _autocast(self.descend(tokens))
        answers, shared = self._routed(tokens, rows, routing, meter)
        with clock.stage("ascend"):
            # Shaped before it is widened, not after: FSDP2 warns of a layer that returns a view.
            output = self.ascend(self.norm(_shaped(answers, x))).to(x.dtype)
        if shared is not None:
            output = output + _shaped(shared, x).to(x.dtype)
        self.traffic, self.routing = meter.traffic, routing.detached()
        return output

    def _routed(
        self, tokens: Tensor, rows: Tensor, routing: Routing, meter: Meter
    ) -> tuple[Tensor, Tensor | None]:
        """Let the experts answer, and the shared one while rows travel."""
        under_way = self.dispatcher.send(rows, routing, meter, chunks=self.chunks)
        shared = None
        if self.shared is not None:
            with self.clock.stage("shared"):
                shared = self.shared(tokens)
        for sent in under_way:
            arrived, counts = sent.arrive()
            with self.clock.stage("experts"):
                answers = self.experts(arrived, counts)
            sent.reply(answers)
        parts = [sent.collect() for sent in under_way]
        return parts[0] if len(parts) == 1 else torch.cat(parts), shared

    def auxiliary_loss(self) -> Tensor:
        """The losses of the last forward pass, weighted as the configuration says and added up.

        Of a pass without gradients they have none either. That is so of the first pass of *reentrant* activation checkpointing,
        which would train without them: checkpoint with ``use_reentrant=False``.
        """
        weights = {"balance": self.config.balance_weight, "z": self.config.z_weight}
        total = torch.zeros((), device=self.router.weight.device)
        for name, loss in self.losses.items():
            total = total + weights[name] * loss
        return total

    def waits(self, dtype: torch.dtype | None = None) -> str | None:
        """Say why a pass on a GPU waits for the device and cannot be recorded in a CUDA graph; ``None`` if nothing is read back.

        What is replayed runs no Python: it adds nothing to the load that :meth:`rebalance` goes by.

        Args:
            dtype: That experts compute in, as under autocast; ``None`` means that of their parameters.
        """
        name = type(self.dispatcher).__name__
        if self.dispatcher.reads:
            return f"rows are sent to other ranks ({name}), which reads how many there are"
        if self.router.config.capacity is not None and isinstance(self.dispatcher, Local):
            return "experts have a capacity: how many tokens they have no room for is read back"
        if type(self.clock) is not Clock:
            return f"the layer's stages are timed ({type(self.clock).__name__}), which a recording cannot be"
        return self.experts.waits(dtype)

    @torch.no_grad()
    def rebalance(self, group: dist.ProcessGroup | None = None) -> None:
        """Move the bias of the choice a step towards an even load, if the configuration balances by a bias.

        To be called once an optimiser step, on all ranks of a run alike.

        Args:
            group: Ranks whose loads are added up; ``None`` means all there are.
        """
        router = self.router
        if router.bias is None:
            return
        none = torch.zeros_like(router.bias, dtype=torch.int64)
        load = none if router.load is None else router.load
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load, group=group)
        router.rebalance(load)
        router.load = None

    def reset_parameters(self, residual_scale: float = 1.0) -> None:
        """Draw all matrices anew, and forget the bias of the choice.

        The same numbers come out where FSDP2 has divided the matrices, as it does with a model that was built on ``"meta"``; a
        rank then has room for each of them whole, one after another.

        Args:
            residual_scale: What the matrices that write to the residual are scaled by, usually ``(2 * layers) ** -0.5``.
                With ``sound_init`` that is the outermost one alone; else, as the common code does, the experts' too.
        """
        config, sound = self.config, self.config.sound_init

        def std(fan_in: int) -> float:
            return fan_in**-0.5 if sound else _STD

        inner_scale = 1.0 if sound and config.latent is not None else residual_scale
        seed = int(torch.randint(2**62, (), device="cpu"))  # also where "meta" is the default device
        _draw(self.router.weight, std(config.hidden))
        self.experts.draw(std(config.width), std(config.ffn) * inner_scale, seed)
        if isinstance(self.descend, nn.Linear):
            _draw(self.descend.weight, std(config.hidden))
        if isinstance(self.ascend, nn.Linear):
            _draw(self.ascend.weight, std(config.width) * residual_scale)
        if self.shared is not None:
            _draw(self.shared.up.weight, std(config.hidden))
            _draw(self.shared.down.weight, std(config.shared_ffn) * residual_scale)
        if isinstance(self.norm, nn.RMSNorm):
            self.norm.reset_parameters()
        self.router.load = None
        if self.router.bias is not None:
            self.router.bias.zero_()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not what the last forward pass left, whose losses hang on its graph."""
        return {**super().__getstate__(), "losses": {}, "traffic": Traffic(), "routing": None}

    def extra_repr(self) -> str:
        """What distinguishes the layer in a printed model."""
        config = self.config
        return (
            f"{config.hidden} hidden, {config.width} wide rows, {config.num_experts} experts of {config.ffn}, "
            f"top-{config.top_k}, {type(self.dispatcher).__name__} on {self.dispatcher.ranks} ranks "
            f"({self.dispatcher_reason})"
        )


def _draw(matrix: Tensor, std: float) -> None:
    with written_whole(matrix) as (whole,):
        nn.init.normal_(whole, std=std)


def _in_backward() -> bool:
    """Whether autograd is at work on this thread: a forward pass is then one that activation checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1  # what torch's own checkpointing asks


def _check_input(x: Tensor, hidden: int, descend: nn.Module) -> None:
    if x.ndim == 0 or x.shape[-1] != hidden:
        raise ValueError(f"expected rows of hidden width {hidden}; got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"expected rows of floating point values; got {x.dtype}")
    if not isinstance(descend, nn.Linear) or torch.is_autocast_enabled(x.device.type):
        return
    if x.dtype != descend.weight.dtype:
        raise ValueError(
            f"rows are {x.dtype} but weights are {descend.weight.dtype}; cast one to the other, or use torch.autocast"
        )


def _check_routing(routing: Routing, tokens: int, config: MoEConfig) -> None:
    expected, got = (tokens, config.num_experts), (routing.tokens, routing.num_experts)
    if expected != got:
        raise ValueError(
            f"expected a routing of {expected[0]} tokens to {expected[1]} experts; got one of {got[0]} to {got[1]}"
        )
    experts = routing.experts
    if experts.device.type == "cpu" and experts.numel():
        least, most = (int(end) for end in experts.aminmax())
        if least < 0 or most >= config.num_experts:
            wrong = least if least < 0 else most
            raise ValueError(f"a routing names experts 0 to {config.num_experts - 1}; got {wrong}")
        _check_choices(routing)


def _check_choices(routing: Routing) -> None:
    """Refuse what buffers would be made too short for."""
    if bool((routing.experts.sort(1).values.diff(dim=1) == 0).any()):
        raise ValueError("a routing names different experts for a token; got one of them twice")
    if routing.room is not None and (most := int(routing.load().max())) > routing.room:
        raise ValueError(
            f"a routing says that no expert takes more than {routing.room} tokens (room); got {most} for one; "
            "drop the others, or leave room out"
        )


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Rows in the shape of the layer's input, but for their width."""
    shape = (*like.shape[:-1], rows.shape[-1])
    return rows if rows.shape == shape else rows.view(shape)


def _autocast(rows: Tensor) -> Tensor:
    """Rows in the dtype of autocast, where that is on: the grouped product is not on its list."""
    device = rows.device.type
    return rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows
