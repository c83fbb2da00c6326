"""What the tests of expert parallelism run on each rank."""

from __future__ import annotations

import functools
import itertools
import os
import time
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor

from adamac.moe import MoE, MoEConfig
from adamac.moe.cost import Machine
from adamac.moe.dispatch import Dispatcher, Meter, choose
from adamac.moe.dispatch.exchange import Started
from adamac.moe.experts import casts_kept
from adamac.moe.parallel import average_gradients, clip_gradients, expert_group, expert_mesh, shard
from adamac.moe.routing import Routing
from adamac.moe.timing import STAGES, StageClock
from adamac.moe.weights import load_weights, save_weights
from adamac.ops.grouped_mm import reference
from adamac.ops.launch import interpreted

NAMES = ("all_to_all", "per_rank", "all_gather")
EXPERTS, WIDTH = 8, 6


def strict() -> None:
    """Make memory that is never written show."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def routings(tokens: int, top_k: int) -> dict[str, Routing]:
    """Routings of all tokens that are hard in different ways."""
    generator = torch.Generator().manual_seed(tokens * 10 + top_k)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    even = (torch.arange(tokens)[:, None] * top_k + torch.arange(top_k)) % EXPERTS
    skew = scores.clone()
    skew[:, 3] = 2  # everybody wants one expert
    idle = scores.clone()
    idle[:, EXPERTS // 2 :] = -1  # the second half of the experts gets nothing while there are others

    def best(scores: Tensor) -> Tensor:
        return scores.topk(top_k).indices

    dropped = torch.rand(tokens, top_k, generator=generator) < 0.4
    found = {
        "random": Routing(best(scores), weights, EXPERTS),
        "even": Routing(even, weights, EXPERTS),
        "skew": Routing(best(skew), weights, EXPERTS),
        "dropped": Routing(best(scores), weights, EXPERTS, dropped),
        "all dropped": Routing(best(scores), weights, EXPERTS, torch.ones_like(dropped)),
    }
    if top_k <= EXPERTS // 2:
        found["idle ranks"] = Routing(best(idle), weights, EXPERTS)
    return found


def shares(tokens: int, ranks: int) -> dict[str, list[int]]:
    """Ways to divide tokens among ranks: where each rank's begin and end."""
    uneven = [0, *(tokens * (rank + 1) ** 2 // ranks**2 for rank in range(ranks))]
    return {
        "equal": [tokens * rank // ranks for rank in range(ranks + 1)],
        "uneven": uneven,
        "first has all": [0] + [tokens] * ranks,
    }


def dense_answer(rows: Tensor, matrices: Tensor, routing: Routing) -> Tensor:
    """The answer to every token without sorting or sending anything: each row through all experts, most with weight 0."""
    weights = routing.weights if routing.dropped is None else routing.weights * ~routing.dropped
    by_expert = weights.new_zeros(routing.tokens, EXPERTS).scatter_add(1, routing.experts, weights)
    return torch.einsum("te,tw,ewv->tv", by_expert, rows, matrices)


def answer(dispatcher: Dispatcher, rows: Tensor, matrices: Tensor, routing: Routing, meter: Meter) -> Tensor:
    """The same through a dispatcher, with this rank's experts."""
    (sent,) = dispatcher.send(rows, routing, meter)
    arrived, counts = sent.arrive()
    parts = arrived[: counts.sum()].split(counts.tolist())
    nobodys = torch.full_like(arrived[counts.sum() :], torch.nan)  # room to spare is read by nobody
    answers = [part @ matrix for part, matrix in zip(parts, matrices, strict=True)]
    sent.reply(torch.cat([*answers, nobodys]))
    return sent.collect()


def worst_errors(rank: int, tokens: int) -> dict[str, float]:
    """Largest error of outputs and gradients against :func:`dense_answer`, for every dispatcher, routing and division."""
    strict()
    errors = _worst_errors(rank, tokens, 3, routings(tokens, 3))
    for top_k in (1, EXPERTS):
        some = {kind: routings(tokens, top_k)[kind] for kind in ("random", "skew")}
        errors |= _worst_errors(rank, tokens, top_k, some)
    return errors


def worst_errors_by_kernels(rank: int, tokens: int) -> dict[str, float]:
    """The same of a few routings, with rows and choices put in order by kernels, as on a GPU."""
    strict()
    some = {kind: routings(tokens, 3)[kind] for kind in ("random", "dropped", "idle ranks")}
    with ExitStack() as stack:
        for module in ("adamac.moe.rows", "adamac.moe.choices"):
            stack.enter_context(patch(f"{module}.by_kernel", return_value=True))
        return _worst_errors(rank, tokens, 3, some)


def worst_errors_of_static_shapes(rank: int, tokens: int) -> dict[str, float]:
    """The same of the dispatcher whose ranks must have equally many tokens, in plain torch and with orders by kernels."""
    strict()
    equal = ("static_gather",), ("equal",)
    errors = {}
    for top_k in (1, 3, EXPERTS):
        errors |= _worst_errors(rank, tokens, top_k, routings(tokens, top_k), *equal)
    if interpreted():
        with patch("adamac.moe.rows.by_kernel", return_value=True):
            found = _worst_errors(rank, tokens, 3, routings(tokens, 3), *equal)
        errors |= {f"by kernels, {case}": error for case, error in found.items()}
    return errors


def _worst_errors(
    rank: int,
    tokens: int,
    top_k: int,
    kinds: dict[str, Routing],
    names: tuple[str, ...] = NAMES,
    divisions: tuple[str, ...] = ("equal", "uneven", "first has all"),
) -> dict[str, float]:
    group, ranks = dist.group.WORLD, dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    matrices = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    wanted = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    own = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    config = MoEConfig(hidden=WIDTH, num_experts=EXPERTS, top_k=top_k, ffn=1)
    errors = {}
    for kind, routing in kinds.items():
        whole = [tensor.clone().requires_grad_() for tensor in (rows, matrices, routing.weights)]
        expected = dense_answer(
            whole[0], whole[1], Routing(routing.experts, whole[2], EXPERTS, routing.dropped)
        )
        gradients = torch.autograd.grad(expected, whole, wanted)
        for name, division in itertools.product(names, divisions):
            bounds = shares(tokens, ranks)[division]
            here = slice(bounds[rank], bounds[rank + 1])
            part = routing.part(here.start, here.stop)
            leaves = [t.clone().requires_grad_() for t in (rows[here], matrices[own], part.weights)]
            routed = Routing(part.experts, leaves[2], EXPERTS, part.dropped)
            output = answer(choose(name, config, group).dispatcher, leaves[0], leaves[1], routed, Meter())
            found = [output, *torch.autograd.grad(output, leaves, wanted[here])]
            right = [expected[here], gradients[0][here], gradients[1][own], gradients[2][here]]
            error = max(_largest(a - b) for a, b in zip(found, right, strict=True))
            errors[f"{name}, top-{top_k}, {kind}, {division}"] = error
    return errors


def static_and_announced(rank: int, cases: list[tuple[MoEConfig, int]]) -> list[dict[str, Any]]:
    """What differs between a layer of static shapes and the gather that announces: values and gradients; numbers read from the device."""
    return [_static_and_announced(rank, *case) for case in cases]


def _static_and_announced(rank: int, config: MoEConfig, chunks: int) -> dict[str, Any]:
    strict()
    results, reads = {}, {}
    for name in ("all_gather", "static_gather"):
        torch.manual_seed(7)
        layer = MoE(config, name, dist.group.WORLD, chunks=chunks, dtype=torch.float64)
        torch.manual_seed(rank)
        x = torch.randn(12, config.hidden, dtype=torch.float64, requires_grad=True)
        layer(x)
        with reads_counted() as read:
            output = layer(x)
            (output.square().sum() + layer.auxiliary_loss()).backward()
        reads[name] = list(read)
        results[name] = [output.detach(), x.grad, *(p.grad for p in layer.parameters())]
    pairs = zip(results["static_gather"], results["all_gather"], strict=True)
    return {"worst": max(_largest(a - b) for a, b in pairs), "reads": reads}


def static_lengths(rank: int, cases: list[tuple[MoEConfig, int]]) -> list[list[int]]:
    """Rows of what experts are given, chunk by chunk, by a dispatcher of static shapes; every rank has 12 tokens."""
    found = []
    for config, chunks in cases:
        layer, lengths = MoE(config, "static_gather", dist.group.WORLD, chunks=chunks), []
        layer.experts.register_forward_pre_hook(lambda _, given, to=lengths: to.append(len(given[0])))
        layer(torch.randn(12, config.hidden))
        found.append(lengths)
    return found


@contextmanager
def reads_counted():
    """Note who asks for numbers of a tensor, which on a GPU waits for the device; the experts, whose loop on a CPU does, aside."""
    read: list[str] = []
    with ExitStack() as stack:
        for name in ("tolist", "item", "__int__", "__bool__", "__float__", "nonzero"):
            was = getattr(Tensor, name)

            def noted(self, *given, was=was, name=name):
                read.append(name)
                return was(self, *given)

            stack.enter_context(patch.object(Tensor, name, noted))
        stack.enter_context(patch("adamac.moe.layer._check_routing"))
        stack.enter_context(
            patch("adamac.ops.grouped_mm.reference.grouped_mm", _unread(reference.grouped_mm, read))
        )
        yield read


def _unread(function, read: list[str]):
    def called(*given):
        before = len(read)
        result = function(*given)
        del read[before:]
        return result

    return called


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def layer_errors(rank: int, cases: list[tuple[MoEConfig, str, int]]) -> list[float]:
    """Largest error of a layer over all ranks against the same layer on one: outputs, gradients, losses."""
    strict()
    group, ranks = dist.group.WORLD, dist.get_world_size()
    errors = []
    for config, name, chunks in cases:
        torch.manual_seed(7)
        alone = MoE(config, dtype=torch.float64)
        torch.manual_seed(7)
        spread = MoE(config, name, group, chunks=chunks, dtype=torch.float64)
        x = torch.randn(13, config.hidden, dtype=torch.float64)
        wanted = torch.randn_like(x)
        bounds = shares(13, ranks)["uneven"]
        here = slice(bounds[rank], bounds[rank + 1])
        whole, part = x.clone().requires_grad_(), x[here].clone().requires_grad_()
        expected, output = alone(whole), spread(part)
        expected.backward(wanted)
        output.backward(wanted[here])
        local = config.num_experts // ranks
        pairs = [(output, expected[here]), (part.grad, whole.grad[here])]
        for (path, found), right in zip(spread.named_parameters(), alone.parameters(), strict=True):
            if path.startswith("experts."):
                pairs.append((found.grad, right.grad[rank * local : (rank + 1) * local]))
            else:
                dist.all_reduce(found.grad)
                pairs.append((found.grad, right.grad))
        errors.append(max(_largest(a - b) for a, b in pairs))
    return errors


class Stack(torch.nn.Module):
    """Two layers and something that is no layer."""

    def __init__(self, config: MoEConfig, group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = MoE(config, "auto", group, dtype=dtype)
        self.between = torch.nn.Linear(config.hidden, config.hidden, dtype=dtype)
        self.second = MoE(config, "auto", group, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.between(self.first(x)))


def gradient_errors(rank: int, config: MoEConfig, per_row: list[int]) -> dict[tuple[str, int, bool], float]:
    """Error of gradients and of their norm on grids of ranks, against one rank that has the tokens of all."""
    strict()
    errors = {}
    for expert_ranks, sharded in itertools.product(per_row, (False, True)):
        gradients, norm = _gradient_errors(rank, config, expert_ranks, sharded)
        errors |= {("gradient", expert_ranks, sharded): gradients, ("norm", expert_ranks, sharded): norm}
    return errors


def _gradient_errors(rank: int, config: MoEConfig, expert_ranks: int, sharded: bool) -> tuple[float, float]:
    ranks, mesh = dist.get_world_size(), expert_mesh(expert_ranks)
    torch.manual_seed(3)
    alone = Stack(config, None, torch.float64)
    torch.manual_seed(3)
    spread = Stack(config, expert_group(mesh), torch.float64)
    batches = torch.randn(ranks, 5, config.hidden, dtype=torch.float64)
    sum(alone(batch).square().mean() / ranks for batch in batches).backward()
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
    if sharded:
        shard(spread, mesh, blocks=(MoE,))
    spread(batches[rank]).square().mean().backward()
    if not sharded:
        average_gradients(spread, mesh)
    clipped = clip_gradients(spread, mesh, 0.5)
    return _worst_of(alone, spread, lambda p: p.grad), float(abs(clipped - norm))


def accumulated_casts_error(rank: int, config: MoEConfig) -> float:
    """Largest difference that keeping casts makes to gradients of two pieces in bfloat16, in a model that FSDP2 gathers."""
    mesh, gradients = expert_mesh(1), []
    for kept in (False, True):
        torch.manual_seed(3)
        model = shard(Stack(config, None, torch.float32), mesh, blocks=(MoE,))
        with casts_kept(model) if kept else nullcontext():
            for piece in torch.randn(2, 5, config.hidden, generator=torch.Generator().manual_seed(rank)):
                with torch.autocast("cpu", torch.bfloat16):
                    model(piece).square().mean().backward()
        gradients.append([parameter.grad.full_tensor() for parameter in model.parameters()])
    return max(_largest(a - b) for a, b in zip(*gradients, strict=True))


def _worst_of(alone: torch.nn.Module, spread: torch.nn.Module, what) -> float:
    worst, right = 0.0, {name: what(p) for name, p in alone.named_parameters()}
    with torch.no_grad():
        for name, parameter in spread.named_parameters():
            found, wanted = what(parameter), right[name]
            found = found.full_tensor() if hasattr(found, "full_tensor") else found
            if ".experts." in name:
                layer = spread.get_submodule(name.split(".experts.")[0])
                wanted = wanted[layer.experts.first :][: len(found)]
            worst = max(worst, _largest(found - wanted))
    return worst


def write_weights(rank: int, config: MoEConfig, expert_ranks: int, path: str, sharded: bool) -> None:
    mesh = expert_mesh(expert_ranks)
    torch.manual_seed(5)
    model = Stack(config, expert_group(mesh), torch.float32)
    save_weights(shard(model, mesh) if sharded else model, path)


def read_weights(rank: int, config: MoEConfig, expert_ranks: int, path: str, sharded: bool) -> float:
    """Largest difference of what was read to the model that was written."""
    mesh = expert_mesh(expert_ranks)
    torch.manual_seed(5)
    original = Stack(config, None, torch.float32)
    model = Stack(config, expert_group(mesh), torch.float32)
    load_weights(shard(model, mesh) if sharded else model, path)
    return _worst_of(original, model, lambda p: p)


def loads_under_ddp(rank: int, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """Tokens by expert of three passes between two updates, as the router counted them and as their routings say."""
    torch.manual_seed(2)
    layer = MoE(config)
    wrapped = torch.nn.parallel.DistributedDataParallel(layer)
    expected = torch.zeros(config.num_experts, dtype=torch.int64)
    torch.manual_seed(rank)
    for _ in range(3):
        wrapped(torch.randn(5 + rank, config.hidden)).square().sum().backward()
        expected += layer.routing.load()
    return layer.router.load, expected


def drawn_in_shares(rank: int, config: MoEConfig, expert_ranks: int) -> float:
    """Largest difference of a model that was built on no device, divided, and drawn last to one that was built on one rank."""
    mesh = expert_mesh(expert_ranks)
    original = Stack(config, None, torch.float32)
    with torch.device("meta"):
        model = Stack(config, expert_group(mesh), torch.float32)
    model = shard(model, mesh).to_empty(device="cpu")
    for each in (original, model):
        for tensor in each.state_dict().values():  # what memory may hold
            tensor.fill_(7)
        torch.manual_seed(5)
        each.first.reset_parameters()
        each.second.reset_parameters()
    return _worst_of(original, model, lambda p: p)


def counted_bytes(
    rank: int, config: MoEConfig, sets: list[tuple[int, ...]]
) -> dict[tuple[str, bool], tuple[int, int]]:
    """Payload and metadata that each dispatcher counted, forward alone and with the backward."""
    counted = {}
    for name in (*NAMES, "static_gather"):
        rows = torch.randn(len(sets), config.width, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(len(sets), config.top_k, dtype=torch.float64, requires_grad=True)
        meter = Meter()
        (sent,) = choose(name, config, dist.group.WORLD).dispatcher.send(
            rows, Routing(torch.tensor(sets), weights, config.num_experts), meter
        )
        arrived, _ = sent.arrive()
        sent.reply(2 * arrived)
        output = sent.collect()
        counted[name, False] = _bytes(meter)
        output.sum().backward()
        counted[name, True] = _bytes(meter)
    return counted


def order_of_arrival(rank: int, config: MoEConfig) -> dict[str, list[str]]:
    """What each dispatcher does while rows arrive: exchanges that it waits for, and sorts."""
    done: dict[str, list[str]] = {}
    for name in NAMES:
        module, seen = import_module(f"adamac.moe.dispatch.{name}"), done.setdefault(name, [])
        routing = Routing.even(12, config.top_k, config.num_experts)
        (sent,) = choose(name, config, dist.group.WORLD).dispatcher.send(
            torch.randn(12, config.width), routing, Meter()
        )

        def finish(started: Started, seen=seen, finish=module.finish) -> Tensor:
            seen.append(started.travelling.collective.kind)
            return finish(started)

        sorts = "by_run" if name == "all_to_all" else "by_label"
        sort = getattr(module, sorts)

        def ordered(*arguments, seen=seen, sort=sort, **options):
            seen.append("order")
            return sort(*arguments, **options)

        with patch.object(module, "finish", finish), patch.object(module, sorts, ordered):
            sent.arrive()
    return done


def chosen_dispatchers(
    rank: int, config: MoEConfig, machines: list[Machine | None], tokens: int
) -> tuple[str, str, str]:
    """What ``"auto"`` chose by this rank's machine, its reason, and what the layer prints; or what refused it."""
    try:
        with torch.device("meta"):  # as large models are built
            layer = MoE(config, "auto", dist.group.WORLD, machine=machines[rank], tokens=tokens)
    except ValueError as error:
        return "refused", str(error), ""
    return type(layer.dispatcher).__name__, layer.dispatcher_reason, layer.extra_repr()


def _bytes(meter: Meter) -> tuple[int, int]:
    return meter.traffic.bytes_sent(kind="payload"), meter.traffic.bytes_sent(kind="metadata")


def refusals(rank: int) -> list[str]:
    """What the layer says of input that only one rank sees, and of experts that cannot be divided."""
    said = []
    config = MoEConfig(hidden=8, num_experts=4, top_k=2, ffn=4)
    for name in NAMES:
        x = torch.randn(3, 8)
        if rank == 1:
            x[0, 0] = torch.nan
        said.append(_refusal(lambda name=name, x=x: MoE(config, name, dist.group.WORLD)(x)))
    said.append(_refusal(lambda: MoE(config, "static_gather", dist.group.WORLD)(torch.randn(3 + rank, 8))))
    odd = MoEConfig(hidden=8, num_experts=5, top_k=2, ffn=4)
    said.append(_refusal(lambda: MoE(odd, "auto", dist.group.WORLD)))
    said.append(_refusal(lambda: MoE(config, "local", dist.group.WORLD)))
    said.append(_refusal(lambda: expert_mesh(3)))
    said.append(
        _refusal(lambda: save_weights(MoE(config, "auto", dist.group.WORLD), "/nowhere/weights.safetensors"))
    )
    return said


def _refusal(function) -> str:
    try:
        function()
    except (ValueError, OSError) as error:
        return str(error)
    return "nothing was refused"


def fail(rank: int, how: str) -> int:
    """Fail on rank 1 while the others wait for it."""
    if rank == 1:
        if how == "raises":
            raise ZeroDivisionError("on purpose")
        if how == "dies":
            os._exit(7)
        if how == "hangs":
            time.sleep(1000)
    dist.all_reduce(torch.ones(1))
    return rank


def ways_of_training(rank: int, config: MoEConfig) -> dict[str, float]:
    """Largest difference of output and gradients between a plain pass and others that must equal it; then some facts."""
    strict()
    torch.manual_seed(2)
    layer = MoE(config, "per_rank", dist.group.WORLD, dtype=torch.float64)
    x = torch.randn(9, config.hidden, dtype=torch.float64)

    def learned(forward) -> list[Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        output = forward(leaf)
        output.square().sum().backward()
        return [output.detach(), leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())]

    plain = learned(layer)
    forward = layer.traffic.bytes_sent(direction="forward")
    expected = layer.traffic.bytes_sent() + forward
    counted = []
    for reentrant in (False, True):
        # What comes after the layer is needed too, so that all of it is run again.
        block = functools.partial(
            torch.utils.checkpoint.checkpoint, lambda x: layer(x).sin(), use_reentrant=reentrant
        )
        learned(block)
        counted.append(layer.traffic.bytes_sent())
    again = learned(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
    with torch.no_grad():
        quiet = layer(x)
    layer.clock = StageClock()
    layer(x)
    return {
        "bytes not counted": max(abs(expected - each) for each in counted),
        "recomputed": max(_largest(a - b) for a, b in zip(plain, again, strict=True)),
        "without gradients": _largest(quiet - plain[0]),
        "stages unseen": len(set(STAGES) - set(layer.clock.time_ms())),
    }


def in_half_precision(rank: int, config: MoEConfig) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Output of each dispatcher in bfloat16, that of one rank in float64, and that of one rank in bfloat16."""
    results = {}
    for name in NAMES:
        torch.manual_seed(2)
        alone = MoE(config, dtype=torch.bfloat16)
        torch.manual_seed(2)
        layer = MoE(config, name, dist.group.WORLD, dtype=torch.bfloat16)
        x = torch.randn(70, config.hidden, dtype=torch.bfloat16)
        with torch.no_grad():
            found, eager = layer(x), alone(x)
            # The same choice, so that only what rows go through differs.
            oracle = alone.double()
            oracle.router.bfloat16()
            results[name] = (found, oracle(x.double()), eager)
    return results
