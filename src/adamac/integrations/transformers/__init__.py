"""adamac's language models for Hugging Face transformers.

Importing this package registers the model type ``adamac``; from then on ``AutoConfig`` and ``AutoModelForCausalLM`` load what
:func:`export` wrote, with ``generate``, batches padded on the left, and training by labels.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from adamac.integrations.transformers.export import export
from adamac.integrations.transformers.model import AdamacConfig, AdamacForCausalLM

AutoConfig.register(AdamacConfig.model_type, AdamacConfig, exist_ok=True)
AutoModelForCausalLM.register(AdamacConfig, AdamacForCausalLM, exist_ok=True)

__all__ = ["AdamacConfig", "AdamacForCausalLM", "export"]
