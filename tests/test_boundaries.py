"""What an import brings along, and what it must not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import adamac

HEAVY = ("torch", "diffusers", "transformers", "triton", "matplotlib", "jinja2", "numpy")
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def imported_by(statement: str) -> set[str]:
    probe = f"{statement}; import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_adamac_imports_nothing_heavy():
    assert imported_by("import adamac") == set()


def test_importing_the_command_line_imports_nothing_heavy():
    assert imported_by("import adamac.cli") == set()


def test_importing_the_embedded_pipeline_imports_nothing_heavy():
    assert imported_by("import adamac.embedded") == set()


def test_attention_needs_torch_alone():
    assert imported_by("import adamac.attention") <= {"torch", "numpy"}


def test_lazy_names_are_the_real_ones():
    from adamac.attention import AdaCluster

    assert adamac.AdaCluster is AdaCluster
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adamac.nothing


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example):
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout
