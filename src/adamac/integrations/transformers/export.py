"""Write a trained model as a folder that transformers loads: configuration, weights and tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerFast

from adamac.integrations.transformers.model import AdamacConfig, AdamacForCausalLM
from adamac.moe.lm.checkpoint import load_model, load_tokenizer
from adamac.moe.lm.tokenizer import END, Tokenizer


def export(run: Path, folder: Path) -> None:
    """Write the newest checkpoint of a run, or a checkpoint, as a Hugging Face model.

    Experts take all tokens that choose them, whatever capacity they were trained with.

    Args:
        run: Directory of the run or of one of its checkpoints.
        folder: Where to write; empty or absent.

    Raises:
        ValueError: If there is no model, or the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; choose another directory")
    gpt, tokenizer = load_model(run), load_tokenizer(run)
    model = AdamacForCausalLM(AdamacConfig(gpt.config.to_dict(), eos_token_id=tokenizer.end))
    model.gpt.load_state_dict(gpt.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.end, eos_token_id=tokenizer.end, pad_token_id=tokenizer.end
    )
    model.save_pretrained(folder)
    _fast(tokenizer, gpt.config.context).save_pretrained(folder)


def _fast(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer with the end token as one of its own, before every text and as padding on the left."""
    from tokenizers import Tokenizer as Pairs
    from tokenizers.processors import TemplateProcessing

    pairs = Pairs.from_str(tokenizer.to_json())
    pairs.add_special_tokens([END])
    assert pairs.token_to_id(END) == tokenizer.end
    pairs.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
