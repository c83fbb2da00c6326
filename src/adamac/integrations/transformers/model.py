"""The language model as transformers sees it: the same modules, with its masks and its cache.

Nothing is computed anew here. transformers' attention mask becomes a :class:`adamac.moe.lm.model.View`, its cache keeps
keys and values, and logits come from the same :class:`adamac.moe.lm.model.GPT`; hence they are equal to ours.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from adamac.moe import preset
from adamac.moe.lm.model import GPT, GPTConfig, Keep, View

# What the output calls keys and values of earlier calls: renamed in transformers 5.24.
_CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class AdamacConfig(PretrainedConfig):
    """A :class:`adamac.moe.lm.model.GPTConfig` with the names that transformers looks for.

    Attributes:
        gpt: The configuration as plain values.
    """

    model_type = "adamac"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(self, gpt: dict[str, Any] | None = None, **values: Any) -> None:
        """Describe a model; without arguments, the smallest that transformers may ask for when it compares with defaults."""
        config = _SMALLEST if gpt is None else GPTConfig.from_dict(gpt)
        self.gpt = config.to_dict()
        values |= {
            "vocab_size": config.vocab,
            "hidden_size": config.hidden,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "max_position_embeddings": config.context,
            "tie_word_embeddings": False,  # a tied model has no second matrix that could be tied
        }
        for name, value in values.items():
            setattr(self, name, value)
        super().__init__(**values)


_SMALLEST = GPTConfig(vocab=2, layers=1, heads=1, hidden=4, context=1, moe=preset("bigmac", 4, 1, 1))


class AdamacForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model.

    Attributes:
        gpt: The model that computes.
    """

    config_class = AdamacConfig
    base_model_prefix = "gpt"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012  as transformers declares it

    def __init__(self, config: AdamacConfig) -> None:
        """Build it; where transformers builds on no device to load weights later, it ends on none."""
        super().__init__(config)
        place = torch.get_default_device()
        with torch.device("cpu"):  # experts are drawn from seeds, which must be numbers
            gpt = GPT(GPTConfig.from_dict(config.gpt))
        self.gpt = gpt.to(place)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights are drawn where they are made, and all that a model holds is in its file."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """The matrix that token ids choose rows of."""
        return self.gpt.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replace it."""
        self.gpt.embedding = value  # ty: ignore[invalid-assignment]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *given: Any, **more: Any) -> Any:
        """Refuse another vocabulary: the matrix that reads logits, and what is saved, would keep the former.

        Raises:
            NotImplementedError: If it is one.
        """
        vocab = self.gpt.config.vocab
        if new_num_tokens not in (None, vocab) or given or more:
            raise NotImplementedError(
                f"the vocabulary of an adamac model stays as it was trained, {vocab}; got {new_num_tokens}: train one with a larger "
                "--vocab"
            )
        return self.get_input_embeddings()

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **unused: Any) -> Tensor | None:
        """Leave the mask as it is where transformers would make one of four axes for a static cache."""
        return attention_mask

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss where labels are given.

        Args:
            input_ids: ``[batch, tokens]``.
            attention_mask: ``[batch, tokens so far]``, 0 at padding.
            position_ids: ``[batch, tokens]``; counted from the mask if not given.
            past_key_values: Keys and values of earlier calls, as transformers called them up to 5.23.
            cache: The same, as it calls them since.
            labels: ``[batch, tokens]``, like the ids, -100 where nothing is predicted; with auxiliary losses added in training.
            use_cache: Whether keys and values are kept.
            logits_to_keep: Logits of so many last tokens only, or of these; 0 of all.
            num_items_in_batch: Predicted tokens of all batches whose gradients are added up, as ``Trainer`` counts them: losses
                are then shares of their mean over all of these. ``None``: this batch is all.
            **unused: What transformers also passes.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        view = _view(input_ids, attention_mask, position_ids, cache)
        features = self.gpt.features(input_ids, view)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.gpt.logits(features[:, kept])
        loss = None
        if labels is not None:
            share = None if num_items_in_batch is None else (labels[:, 1:] != -100).sum() / num_items_in_batch
            loss = self.loss_function(logits, labels, self.gpt.config.vocab, num_items_in_batch)
            if self.training:
                auxiliary = torch.stack([moe.auxiliary_loss() for moe in self.gpt.moes]).sum()
                loss = loss + (auxiliary if share is None else share * auxiliary)
        kept_values: dict[str, Any] = {_CACHE: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **kept_values)


def _view(ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None, cache: Cache | None) -> View:
    """What transformers' arguments say about the tokens.

    Whether any of them is padding is looked up once here, which waits for the device, so that no layer has to.
    """
    tokens = ids.shape[1]
    # A number: a static cache counts in a tensor, in place.
    past = 0 if cache is None else int(cache.get_seq_length())
    keep = None if cache is None else _keep(cache, past + tokens)
    columns = torch.arange(past + tokens, device=ids.device)
    new = columns[past:, None]
    if attention_mask is None or bool(attention_mask.all()):
        positions = columns[None, past:].expand(len(ids), -1) if positions is None else positions
        return View(positions, (columns <= new)[None, None] if past and tokens > 1 else None, None, keep)
    valid = attention_mask.bool()
    if positions is None:
        positions = (valid.cumsum(-1) - 1).clamp_min(0)[:, past:]
    # Padding reads itself: a row that reads nothing would be NaN.
    mask = ((columns <= new) & valid[:, None]) | (columns == new)
    padded = valid[:, past:]
    return View(positions, mask[:, None], None if past and bool(padded.all()) else padded, keep)


def _keep(cache: Cache, length: int) -> Keep:
    """Store keys and values, and give what is written: a static cache has room for more."""

    def keep(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = cache.update(key, value, layer)
        return keys[:, :, :length], values[:, :, :length]

    return keep
