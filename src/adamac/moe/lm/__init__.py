"""A small language model on the expert layer: text, tokens, model, training, sampling.

Enough to ask what a shape of experts does to quality and time, on one core or several ranks, and to take the answer elsewhere
(:mod:`adamac.integrations.transformers`). See :mod:`adamac.moe.lm.train` for what a run is and what a kill costs,
:mod:`adamac.moe.lm.text` for where text comes from, :mod:`adamac.moe.lm.evaluate` for what is measured.

Needs ``numpy``, ``safetensors`` and ``tokenizers`` besides torch.
"""
