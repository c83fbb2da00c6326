"""Record what reaches self-attention in a pipeline, for `output_error.py` to judge plans by.

Tensors are taken where torch's attention is called, after normalisation and position embedding, from the layers and denoising
steps asked for, and written as float16 into one safetensors file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adamac import embedded

# Text encoders attend too, over fewer tokens than any video has.
LEAST_TOKENS = 512


class Capture(TorchFunctionMode):
    """Keep query, key and value of the chosen calls of self-attention, which are counted from 0."""

    def __init__(self, wanted: set[int]) -> None:
        super().__init__()
        self.wanted = wanted
        self.calls = 0
        self.tensors: dict[int, tuple[Tensor, ...]] = {}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[
                :3
            ]
            if query.shape == key.shape and query.shape[2] >= LEAST_TOKENS:
                if self.calls in self.wanted:
                    self.tensors[self.calls] = tuple(tensor.half().cpu() for tensor in (query, key, value))
                self.calls += 1
        return function(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument(
        "--prompts", nargs="+", help="ids of held-out prompts; the second of each category if not given"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 9], help="denoising steps, from 0")
    parser.add_argument("--layers", type=int, nargs="+", help="layers, from 0; every second if not given")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    pipe = embedded.load()
    pipe.set_progress_bar_config(disable=True)
    layers = len(pipe.transformer.blocks)
    chosen = options.layers or list(range(0, layers, 2))
    prompts = {entry["id"]: entry["prompt"] for entry in embedded.prompts()}
    ids = options.prompts or [embedded.prompts(category)[1]["id"] for category in embedded.CATEGORIES]
    tensors: dict[str, Tensor] = {}
    for prompt in ids:
        generator = torch.Generator().manual_seed(options.seed)
        wanted = {step * layers + layer: (step, layer) for step in options.steps for layer in chosen}
        with Capture(set(wanted)) as capture:
            pipe(prompt=prompts[prompt], generator=generator, output_type="latent", **embedded.GENERATION)
        for call, (step, layer) in wanted.items():
            for name, tensor in zip(("query", "key", "value"), capture.tensors[call], strict=True):
                tensors[f"{prompt}/{step}/{layer}/{name}"] = tensor.contiguous()
        print(f"{prompt}: {capture.calls} calls, kept {len(capture.tensors)}")
    save_file(tensors, str(options.out))


if __name__ == "__main__":
    main()
