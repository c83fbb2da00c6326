"""Checkpoints are whole or refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from babble import tiny_recipe

from adamac.moe.lm.checkpoint import (
    KEPT,
    latest_checkpoint,
    load_model,
    load_tokenizer,
    read_parts,
    read_tensors,
    write_checkpoint,
)
from adamac.moe.lm.evaluate import bits_per_byte
from adamac.moe.lm.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):

    directory = tmp_path_factory.mktemp("runs") / "run"
    result = train(tiny_recipe(corpus, moe={"capacity": 1.2}), directory)
    return directory, result


def test_the_newest_two_stay(run):
    directory, _ = run
    folders = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert folders == ["step-00000004", "step-00000006"]
    assert len(folders) == KEPT


def test_a_copy_by_another_name_is_no_checkpoint_and_stays(corpus, tmp_path):
    train(tiny_recipe(corpus, steps=4), tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step-00000004-best", "step-1-try"):
        shutil.copytree(checkpoints / "step-00000004", checkpoints / name)
    assert latest_checkpoint(checkpoints).name == "step-00000004"
    write_checkpoint(checkpoints, 5, load_model(tmp_path / "run").config, {}, {}, {})
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000004",
        "step-00000004-best",
        "step-00000005",
        "step-1-try",
    ]


def test_a_run_or_a_checkpoint_can_be_loaded(run, corpus):
    directory, _ = run
    folder = latest_checkpoint(directory / "checkpoints")
    one, other = load_model(directory), load_model(folder)
    ids = torch.randint(corpus.vocab, (2, 8))
    assert torch.equal(one(ids), other(ids))
    assert one.config.moe.capacity is None
    assert load_tokenizer(directory).vocab == load_tokenizer(folder).vocab == corpus.vocab


def test_evaluation_does_not_depend_on_the_batch(run, corpus):
    model = load_model(run[0]).double()
    one, other = (bits_per_byte(model, corpus, tokens=300, batch=batch) for batch in (1, 7))
    assert one == pytest.approx(other, rel=1e-12)


def test_evaluation_of_a_model_with_a_capacity_does_not_depend_on_the_batch_either(run, corpus):
    model = load_model(run[0]).double()
    dropless = bits_per_byte(model, corpus, tokens=300, batch=1)
    for moe in model.moes:
        moe.router.config = replace(moe.router.config, capacity=0.5)
    model.config = replace(model.config, moe=replace(model.config.moe, capacity=0.5))
    assert bits_per_byte(model, corpus, tokens=300, batch=7) == pytest.approx(dropless, rel=1e-12)
    assert all(moe.router.config.capacity == 0.5 for moe in model.moes)


def test_a_rank_reads_its_part_and_no_more(run):
    file = latest_checkpoint(run[0] / "checkpoints") / "optimizer.safetensors"
    whole = read_tensors(file)
    parts = read_parts(
        file, lambda name, length: slice(1, 3) if ".moe.experts." in name else slice(0, length)
    )
    assert parts.keys() == whole.keys()
    for name, tensor in whole.items():
        divided = ".moe.experts." in name and tensor.ndim
        assert torch.equal(parts[name], tensor[1:3] if divided else tensor)


def test_bits_per_byte_is_the_length_of_the_code(run, corpus):
    model = load_model(run[0]).double()
    context = model.config.context
    ids = torch.tensor(corpus.held_out_tokens[: 3 * context + 1].astype("int64"))
    bits = size = 0.0
    for start in range(0, 3 * context, context):
        shares = model(ids[None, start : start + context])[0].log_softmax(-1)
        targets = ids[start + 1 : start + context + 1]
        bits -= shares.gather(1, targets[:, None]).sum().item() / torch.tensor(2.0).double().log().item()
        size += len(corpus.tokenizer.decode(targets.tolist()).encode())
    assert bits_per_byte(model, corpus, tokens=3 * context, batch=2) == pytest.approx(bits / size, rel=1e-9)


def test_what_a_kill_left_is_not_taken_for_a_checkpoint(run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(run[0], directory)
    (directory / "checkpoints" / "step-00000008.part").mkdir()
    assert latest_checkpoint(directory / "checkpoints").name == "step-00000006"


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("model.safetensors", b"\x08", "cannot read .*model.safetensors"),
        ("config.json", b"{", "cannot read .*config.json"),
        ("config.json", b"{}", "not a model configuration"),
    ],
)
def test_a_damaged_checkpoint_is_refused(run, tmp_path, file, content, problem):
    shutil.copytree(latest_checkpoint(run[0] / "checkpoints"), tmp_path / "step")
    (tmp_path / "step" / file).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        load_model(tmp_path / "step")


def test_a_truncated_checkpoint_is_refused(run, tmp_path):
    shutil.copytree(latest_checkpoint(run[0] / "checkpoints"), tmp_path / "step")
    file = tmp_path / "step" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors"):
        load_model(tmp_path / "step")


def test_beside_an_older_checkpoint_the_remedy_is_to_go_on_from_it(run, tmp_path):
    shutil.copytree(run[0] / "checkpoints", tmp_path / "checkpoints")
    newest = latest_checkpoint(tmp_path / "checkpoints")
    (newest / "model.safetensors").write_bytes(b"")
    older = f"remove {newest} to go on from step-00000004"
    with pytest.raises(ValueError, match=f"cannot read .*; {older}"):
        load_model(tmp_path)
    shutil.rmtree(newest)
    load_model(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(run, tmp_path):
    shutil.copytree(latest_checkpoint(run[0] / "checkpoints"), tmp_path / "step")
    config = tmp_path / "step" / "config.json"
    config.write_text(config.read_text().replace('"layers": 2', '"layers": 3'))
    with pytest.raises(ValueError, match=r"of another model: blocks\.2\..* expected .*, got nothing"):
        load_model(tmp_path / "step")


def test_where_nothing_was_trained_nothing_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
