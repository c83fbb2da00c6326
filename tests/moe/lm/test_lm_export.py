"""The Hugging Face model is ours."""

from __future__ import annotations

import pytest
import torch
from babble import tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from adamac.integrations.transformers import export
from adamac.moe.lm.checkpoint import load_model, load_tokenizer
from adamac.moe.lm.generate import generate
from adamac.moe.lm.model import GPT
from adamac.moe.lm.train import train

PROMPTS = ["the owl sees a ball", "fish", "deep water and rain"]


@pytest.fixture(scope="module", params=["bigmac", "bigmac_stable", "k3"])
def run(request, tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("export")
    changes = {"tied": request.param != "k3", "moe": {"capacity": 1.2} if request.param == "bigmac" else {}}
    train(
        tiny_recipe(corpus, preset=request.param, hidden=28, ratio=0.5, context=24, **changes), folder / "run"
    )
    export(folder / "run", folder / "hf")
    return folder


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder / "hf", **options).eval()


def test_logits_are_equal(run, corpus):
    ids = torch.randint(corpus.vocab, (3, 20))
    ours = load_model(run / "run")
    theirs = loaded(run)
    assert torch.equal(theirs(ids).logits, ours(ids))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == sum(
        p.numel() for p in ours.parameters()
    )


def test_generation_of_a_padded_batch_is_equal(run):
    ours, tokenizer = load_model(run / "run").double(), load_tokenizer(run / "run")
    theirs, inputs = (
        loaded(run, dtype=torch.float64),
        AutoTokenizer.from_pretrained(run / "hf")(PROMPTS, return_tensors="pt", padding=True),
    )
    output = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs.input_ids.shape[1] :]
    ids = [[tokenizer.end, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    expected = generate(ours, ids, tokens=6, temperature=0, end=tokenizer.end)
    found = [row[: row.index(tokenizer.end)] if tokenizer.end in row else row for row in output.tolist()]
    assert found == expected


@pytest.mark.parametrize("padding", [0, 3])
def test_a_static_cache_gives_the_same_tokens(run, corpus, padding):
    model, ids = loaded(run, dtype=torch.float64), torch.randint(corpus.vocab - 1, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    one, other = (
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation=kind)
        for kind in ("dynamic", "static")
    )
    assert one.shape[1] > 8
    assert torch.equal(one, other)


def test_layers_hear_of_padding_only_where_there_is_some(run, corpus, monkeypatch):
    views = []

    def watched(gpt, ids, view=None, own=GPT.features):
        views.append(view)
        return own(gpt, ids, view)

    monkeypatch.setattr(GPT, "features", watched)
    model, ids = loaded(run), torch.randint(corpus.vocab - 1, (2, 8))
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [(view.mask, view.valid) for view in views] == [(None, None)] * len(views)
    views.clear()
    mask[1, :3] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [view.valid is None for view in views] == [False] + [True] * (len(views) - 1)
    assert all(view.mask is not None for view in views)


def test_the_tokenizer_is_ours_with_the_end_before_every_text(run):
    tokenizer, theirs = load_tokenizer(run / "run"), AutoTokenizer.from_pretrained(run / "hf")
    for text in (*PROMPTS, "  odd   spaces\n", "naïve 漢字"):
        assert theirs(text).input_ids == [tokenizer.end, *tokenizer.encode(text)]
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text


def test_labels_give_the_loss_and_it_can_be_trained_further(run, corpus):
    model, ids = loaded(run), torch.randint(corpus.vocab, (2, 20))
    loss = model(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(
        load_model(run / "run")(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_losses_of_accumulated_batches_add_up_to_the_mean_over_all_their_tokens(run, corpus):
    model, ids = loaded(run, dtype=torch.float64), torch.randint(corpus.vocab, (4, 20))
    labels = ids.clone()
    labels[0, 5:] = -100  # as padding would have it
    number = (labels[:, 1:] != -100).sum()

    def loss(rows: slice) -> torch.Tensor:
        return model(ids[rows], labels=labels[rows], num_items_in_batch=number).loss

    parts = [slice(0, 1), slice(1, 4)]
    torch.testing.assert_close(sum(map(loss, parts)), model(ids, labels=labels).loss)
    before = [loss(part) for part in parts]
    model.train()
    for part, plain, share in zip(parts, before, (4 / 61, 57 / 61), strict=True):
        added = loss(part) - plain
        torch.testing.assert_close(added, share * sum(moe.auxiliary_loss() for moe in model.gpt.moes))


def test_what_was_saved_again_loads_again(run, corpus, tmp_path):
    model, ids = loaded(run), torch.randint(corpus.vocab, (2, 20))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, model(ids).logits
    )


def test_another_vocabulary_is_refused(run, corpus):
    model = loaded(run)
    with pytest.raises(
        NotImplementedError, match=f"as it was trained, {corpus.vocab}; got {corpus.vocab + 8}"
    ):
        model.resize_token_embeddings(corpus.vocab + 8)
    assert model.resize_token_embeddings(corpus.vocab) is model.gpt.embedding


def test_an_exported_model_is_no_run(run):
    with pytest.raises(
        ValueError, match="hf is a model for transformers; expected the directory that it was"
    ):
        load_model(run / "hf")


def test_nothing_is_overwritten(run, tmp_path):
    with pytest.raises(ValueError, match="is not empty"):
        export(run / "run", run / "hf")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export(tmp_path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
