"""The benchmark of one attention call: what its rows say."""

import json

import pytest
import torch

from adamac import cli
from adamac.attention import AdaCluster
from adamac.bench.attention import STAGES, Sparse, compare
from adamac.bench.run import bench_attention
from adamac.bench.shapes import SHAPES, draw, drift


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_that_of_its_layout(name):
    shape = SHAPES[name]
    layout = shape.layout()
    assert (layout.tokens, layout.video_tokens) == (shape.tokens, shape.video)
    assert layout.video_start == (shape.text if shape.text_first else 0)


def test_drawn_tensors_are_fresh_for_each_seed_and_lie_token_by_token(device):
    one, again, other = (draw(SHAPES["tiny"], device, torch.float32, seed) for seed in (0, 0, 1))
    for a, b, c in zip(one, again, other, strict=True):
        assert a.shape == (1, 2, 1024, 64)
        assert a.transpose(1, 2).is_contiguous()
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_drawn_tensors_look_like_attention(device):
    query, key, _ = draw(SHAPES["tiny"], device, torch.float32, seed=0)
    weights = (query @ key.transpose(-1, -2) / 8).softmax(-1)
    heaviest = weights.sort(dim=-1, descending=True).values[..., :102].sum(-1)  # a tenth of the keys
    assert heaviest.mean() > 0.35


def test_a_step_earlier_is_alike_but_not_the_same(device):
    key = draw(SHAPES["tiny"], device, torch.float32, seed=0)[1]
    former = drift(key, 0.1, seed=1)
    assert 0.09 < float((former - key).std() / key.std()) < 0.11


def test_rows_name_every_contender_with_its_facts(device):
    contenders = [Sparse(0.15, True), Sparse(0.5, False)]
    options = {"method": AdaCluster(), "device": device, "dtype": torch.float32, "rounds": 2}
    rows = {row["arm"]: row for row in compare(SHAPES["tiny"], contenders, **options)}
    for name in ("adamac 15% compensated", "adamac 50%"):
        assert {name, f"{name}, plan", f"{name}, attend"} <= rows.keys()
    assert (
        rows["dense native"]["speedup"] == pytest.approx(1)
        or rows["dense native"]["fastest_dense"] != "native"
    )
    sparse = rows["adamac 15% compensated"]
    assert sparse["density"] == pytest.approx(0.15, abs=1e-3)
    assert sparse["cost"] > sparse["density"]
    assert rows["adamac 50%"]["cost"] == rows["adamac 50%"]["density"]
    timed = [row for row in rows.values() if "refused" not in row]
    assert all(row["time_ms"] > 0 and row["host_ms"] > 0 and row["rounds"] == 2 for row in timed)
    assert "k-means of keys, adamac" in {row["arm"] for row in timed}
    for rival in ("flex blocks 15%", "flash4 blocks 15%", "k-means of keys, flash-kmeans"):
        assert rows[rival].get("refused") or rows[rival]["time_ms"] > 0
    if device.type == "cuda":
        assert set(sparse["stages_ms"]) == {*STAGES, "other"}
        assert sparse["stages_ms"]["attend"] > 0


def test_the_command_writes_rows_with_machine_and_shape(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = [
        "bench",
        "attention",
        "--densities",
        "0.2",
        "--key-roots",
        "6",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert cli.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    clusters = {row["arm"]: row.get("k_clusters") for row in rows}
    assert clusters["adamac 20% compensated"] == clusters["adamac 20%"] == 4 * 32
    assert clusters["adamac 20% compensated, keys 6 root N"] == 6 * 32
    assert all(row["shape"] == "tiny" and row["all_heads"] and row["torch"] for row in rows)
    said = capsys.readouterr().out
    assert said.startswith("timing tiny: 1,024 tokens, 2 heads of 64\n")
    assert "one self-attention call" in said


def test_a_shape_is_named_before_it_is_timed(monkeypatch):
    happened = []
    monkeypatch.setattr("adamac.bench.run.compare", lambda shape, *_, **__: happened.append("timed") or [])
    options = {"heads": 1, "rounds": 1, "device": "cpu", "dtype": torch.float32, "out": None}
    list(bench_attention(("tiny", "wan-1.3b"), (0.2,), told=happened.append, **options))
    assert [what.partition(":")[0] for what in happened] == [
        "timing tiny",
        "timed",
        "timing wan-1.3b",
        "timed",
    ]
