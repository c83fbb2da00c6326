"""What keeps a pass of a model from being recorded as a CUDA graph, whatever the pass is for."""

from __future__ import annotations

import torch

from adamac.moe.lm.model import GPT


def unrecordable(model: GPT, dtype: torch.dtype | None = None) -> str:
    """Say why no pass of a model can be recorded, in words; empty if one can.

    Args:
        model: As it would be recorded.
        dtype: That it computes in, as under autocast; ``None`` means that of its parameters.
    """
    device = model.embedding.weight.device.type
    if device != "cuda":
        return f"the model is on {device}, and CUDA graphs are for GPUs"
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        return "parameters are spread over ranks, which would have to record together"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "modules have forward hooks, which a replay would not call"
    for moe in model.moes:
        if problem := moe.waits(dtype):
            return problem
    return ""
