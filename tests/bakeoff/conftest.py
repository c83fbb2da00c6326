"""Fixtures of the bake-off's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from play import PlayPipeline, Silence, save_tiny_wan

from adamac.bakeoff.config import RunDirectory


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> PlayPipeline:
    """The play pipeline, in place of whatever model a run asks for."""
    pipe = PlayPipeline()
    monkeypatch.setattr("adamac.bakeoff.studio.load_pipeline", lambda model, device, dtype, **placed: pipe)
    return pipe


@pytest.fixture
def progress() -> Silence:
    return Silence()


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Wan."""
    folder = tmp_path_factory.mktemp("tiny-wan")
    save_tiny_wan(folder)
    return folder
