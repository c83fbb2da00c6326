"""``adamac moe``: train a small language model with a mixture of experts, sample from it, export it, time its layers.

The dataclasses hold what a user may choose; what they mean is in :class:`adamac.moe.lm.recipe.Recipe`, whose defaults they
repeat so that help answers without loading torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

from rich.console import Console
from rich.text import Text
from tyro.conf import OmitArgPrefixes, Positional, subcommand

from adamac.bakeoff.errors import BadInput
from adamac.cli.lines import refusals_are_input, say
from adamac.cli.moe_bench import MoeBench, moe_bench
from adamac.cli.moe_progress import Watching, duration

if TYPE_CHECKING:
    from adamac.moe.lm.decoding import Decoder
    from adamac.moe.lm.recipe import Recipe
    from adamac.moe.lm.train import Result

SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class MoeTrain:
    """Train a small GPT with experts in every layer; alone, or on several ranks under torchrun.

    Without options: a tiny BigMac on text that every machine has, in about two minutes on two processor cores.

    Attributes:
        preset: vanilla, fine_grained, bigmac, bigmac_stable, latent_eff, latent_acc or k3.
        data: Text files (.txt, .txt.xz), directories of them, or the data folder of another run. If not given: the
            documentation of Python, its standard library and torch, as installed.
        out: Directory for checkpoints, rows and prepared data.
        resume: Continue the run that is in the directory.
        separator: Text between two documents; if not given, paragraphs are gathered into documents.
        held_out: Share of documents that are held out for evaluation.
        vocab: Size of the vocabulary; 257 means plain bytes. Another run's data keep theirs, and their held-out share.
        experts: Number of experts of the fine-grained baseline; vanilla has fewer, the latent shapes more.
        top_k: Experts per token, likewise of the baseline.
        ratio: Latent width as a share of the hidden width.
        change: Fields of the expert layer that differ from the preset, as capacity=1.2 or gated=True.
        layers: Number of transformer blocks.
        heads: Attention heads.
        hidden: Width of the model.
        context: Tokens in a training window.
        steps: Optimizer steps.
        batch: Windows in an optimizer step, over all ranks.
        micro_batch: Windows that a rank computes at once; its whole share of the batch if not given.
        lr: Peak learning rate.
        warmup: Steps over which the learning rate rises to its peak.
        eval_every: Steps between evaluations on held-out documents.
        eval_tokens: The most held-out tokens that an evaluation reads.
        save_every: Steps between checkpoints.
        log_every: Steps between rows in rows.jsonl.
        seed: Seed of the initial weights and of the order of windows.
        expert_ranks: Number of ranks that one set of experts is divided among (expert parallelism).
        machine: File that adamac advise moe --measure --out wrote on as many ranks: tokens are then sent to divided experts by
            the dispatcher that it predicts to be fastest, in place of the one that sends the fewest bytes. A resumed run keeps
            the dispatcher that it began with.
        layout: "replicated": parameters other than the experts' are whole on every rank. "sharded": every rank has a share of
            all parameters, gradients and moments (FSDP2); slower, for models that would not fit. A run may be resumed with
            the other.
        capture: Record a micro-batch as a CUDA graph and replay it, so that a GPU does not wait for its host; one line says why
            where that cannot be, and the run goes on as without. On several ranks a new run then sends tokens to divided experts
            by static_gather, as the other dispatchers read how many come. A run may be resumed with or without it.
        device: "auto", "cpu", "cuda" or "cuda:1".
        threads: CPU threads. Small models gain little from more than one, and lose much where cores are shared; the result is
            the same to the bit for the same number.
    """

    preset: str = "bigmac_stable"
    data: tuple[Path, ...] = ()
    out: Path = Path("out/moe")
    resume: bool = False
    separator: str | None = None
    held_out: float = 0.02
    vocab: int = 4096
    experts: int = 16
    top_k: int = 4
    ratio: float = 0.25
    change: tuple[str, ...] = ()
    layers: int = 2
    heads: int = 4
    hidden: int = 128
    context: int = 128
    steps: int = 900
    batch: int = 8
    micro_batch: int | None = None
    lr: float = 6e-3
    warmup: int = 50
    eval_every: int = 300
    eval_tokens: int = 50_000
    save_every: int = 300
    log_every: int = 1
    seed: int = 0
    expert_ranks: int = 1
    machine: Path | None = None
    layout: Literal["replicated", "sharded"] = "replicated"
    capture: bool = False
    device: str = "auto"
    threads: int = 1


@dataclass(frozen=True)
class MoeGenerate:
    """Continue prompts with a model that was trained here.

    Attributes:
        directory: What was given to train as --out, or one of its checkpoints.
        prompt: One or more beginnings; an empty one, which is the default, begins a document.
        tokens: The most tokens to add.
        temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
        top_k: Sample from this many likeliest tokens; 0 means all.
        samples: Continuations of each prompt.
        seed: Seed of the first continuation; each further one has the next.
        device: "auto", "cpu", "cuda" or "cuda:1".
    """

    directory: Positional[Path]
    prompt: tuple[str, ...] = ("",)
    tokens: int = 100
    temperature: float = 0.7
    top_k: int = 50
    samples: int = 1
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class MoeExport:
    """Write a trained model as a Hugging Face model, which AutoModelForCausalLM loads.

    Attributes:
        directory: What was given to train as --out, or one of its checkpoints.
        to: Directory to write; empty or absent.
    """

    directory: Positional[Path]
    to: Path


@dataclass(frozen=True)
class Moe:
    """Small language models with a mixture of experts: train, generate, export; and their layers: bench."""

    command: OmitArgPrefixes[
        Annotated[MoeTrain, subcommand("train", prefix_name=False)]
        | Annotated[MoeGenerate, subcommand("generate", prefix_name=False)]
        | Annotated[MoeExport, subcommand("export", prefix_name=False)]
        | Annotated[MoeBench, subcommand("bench", prefix_name=False)]
    ]


def moe(options: Moe, console: Console) -> int:
    """Run one of the commands."""
    rank = os.environ.get("RANK", "0")
    with refusals_are_input("" if rank == "0" else f"rank {rank}: "):
        match options.command:
            case MoeTrain():
                return moe_train(options.command, console)
            case MoeGenerate():
                return moe_generate(options.command, console)
            case MoeExport():
                return moe_export(options.command, console)
            case MoeBench():
                return moe_bench(options.command, console)


def moe_train(options: MoeTrain, console: Console) -> int:
    """Train, then say what was reached and show a sample."""
    import torch

    from adamac.moe.cost.machine import Machine
    from adamac.moe.lm.learner import Diverged
    from adamac.moe.lm.train import train
    from adamac.moe.lm.world import Gone, Left, World

    recipe = _recipe(options)
    if options.threads < 1:
        raise BadInput(f"threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    world = World.join(options.device, options.expert_ranks)
    console = console if world.first else Console(quiet=True)
    broken = False
    try:
        machine = (
            None if options.machine is None else world.from_first(partial(Machine.load, options.machine))
        )
        with Watching(console) as watching:
            result = train(
                recipe,
                options.out,
                resume=options.resume,
                world=world,
                watcher=watching,
                layout=options.layout,
                machine=machine,
                capture=options.capture,
            )
    except (Diverged, Left) as error:
        broken = isinstance(error, Gone)
        who = "adamac" if world.first else f"adamac: rank {world.rank}"
        say(Console(stderr=True), f"{who}: {error}")
        return 1
    except KeyboardInterrupt:
        say(console, f"broken off; go on with the same command and --resume: {options.out}")
        return 130
    finally:
        if not broken:  # else it would wait for the rank that is gone; the program's end sees to it
            world.leave()
    if world.first:
        _tell(result, options, console)
    return 0


def moe_generate(options: MoeGenerate, console: Console) -> int:
    """Print continuations."""
    if options.samples < 1:
        raise BadInput(f"samples must be at least 1, got {options.samples}")
    if options.top_k < 0:
        raise BadInput(f"top_k must be at least 1, or 0 for all tokens, got {options.top_k}")
    _alone("generate")
    prompts = [prompt for prompt in options.prompt for _ in range(options.samples)]
    texts = _continue(options, prompts)
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        if len(texts) > 1:  # texts have blank lines of their own
            console.print(f"[dim]{number} of {len(texts)}[/]", highlight=False)
        console.print(Text.assemble((prompt, "bold"), text), soft_wrap=True)
        console.print()
    return 0


def moe_export(options: MoeExport, console: Console) -> int:
    """Write the Hugging Face model."""
    from transformers.utils.logging import disable_progress_bar

    from adamac.integrations.transformers.export import export

    _alone("export")
    disable_progress_bar()
    export(options.directory, options.to)
    say(
        console,
        f"{options.to} is written; load it with\n"
        "  import adamac.integrations.transformers  # makes the model's class known\n"
        "  from transformers import AutoModelForCausalLM\n"
        f"  model = AutoModelForCausalLM.from_pretrained({str(options.to)!r})",
    )
    return 0


def _tell(result: Result, options: MoeTrain, console: Console) -> None:
    """Say what was reached, show what the model writes, and how to have more of it."""
    tokens = min(SAMPLE_TOKENS, options.context - 1)
    text = _continue(MoeGenerate(options.out, tokens=tokens, device=options.device), [""])[0]
    reached = Text.assemble(
        f"{result.steps} steps in {duration(result.time_s)}: ",
        (f"{result.bits_per_byte:.3f}", "bold"),
        " bits per byte of held-out text; knowing only how often each token occurs gives "
        f"{result.unigram_bits_per_byte:.3f}",
    )
    # What a model writes may read like rich's markup: it is a Text, never a string.
    for line in (reached, Text.assemble("a sample:\n", (text, "bold"))):
        console.print(line, soft_wrap=True)
    say(console, f"more: adamac moe generate {options.out} --prompt 'Return the'")


def _continue(options: MoeGenerate, prompts: list[str]) -> list[str]:
    """Continuations of prompts, each with the next seed; says so where a GPU waits for its host at every operation."""
    import torch

    from adamac.moe.lm.checkpoint import load_model, load_tokenizer
    from adamac.moe.lm.decoding import FEWEST
    from adamac.moe.lm.generate import generate
    from adamac.moe.lm.world import find_device

    tokenizer = load_tokenizer(options.directory)
    device = find_device(options.device)  # one process, also where several trained
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(options.directory, device, dtype)

    def told(decoder: Decoder) -> None:
        if device.type == "cuda" and decoder.reason and options.tokens > FEWEST:  # fewer are quick either way
            say(Console(stderr=True), f"decoding was not captured in a CUDA graph: {decoder.reason}")

    added = generate(
        model,
        [[tokenizer.end, *ids] for ids in tokenizer.encode_all(prompts)],
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        seeds=range(options.seed, options.seed + len(prompts)),
        end=tokenizer.end,
        watcher=told,
    )
    return [tokenizer.decode(ids) for ids in added]


def _recipe(options: MoeTrain) -> Recipe:
    from adamac.moe.lm.recipe import Recipe

    values: dict[str, Any] = {
        name: value for name, value in vars(options).items() if name in Recipe.__dataclass_fields__
    }
    values["data"] = tuple(map(str, options.data))
    values["num_experts"] = options.experts
    values["moe"] = dict(_change(text) for text in options.change)
    return Recipe(**values)


def _change(text: str) -> tuple[str, Any]:
    """Read ``name=value`` as the field of that name is annotated."""
    from adamac.moe.presets import MoEConfig

    name, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"change must be name=value, got {text!r}")
    kinds = get_type_hints(MoEConfig)
    if name not in kinds:
        raise BadInput(f"change: there is no field {name}; expected one of {', '.join(kinds)}")
    alternatives = get_args(kinds[name]) if isinstance(kinds[name], UnionType) else (kinds[name],)
    if NoneType in alternatives and value.lower() == "none":
        return name, None
    read, expected = _READERS.get(alternatives[0], (str, "a word"))
    try:
        return name, read(value)
    except (ValueError, KeyError):
        also = " or none" if NoneType in alternatives else ""
        raise BadInput(f"change: {name} must be {expected}{also}, got {value!r}") from None


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: _TRUTH[text.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
}


def _alone(command: str) -> None:
    """Refuse to do on every rank what one process does."""
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise BadInput(f"{command} is one process, got {ranks} ranks; run it without torchrun")
