"""Where and with what a figure was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import adamac


def machine_stamp(device: str, ranks: int = 1) -> dict[str, Any]:
    """Describe the machine, the versions and the commit (``None`` if installed, not run from its repository), in short.

    Args:
        device: Torch's name of a device.
        ranks: How many of them make a video together.
    """
    name = _device_name(device)
    stamp: dict[str, Any] = {
        "device": name if ranks == 1 else f"{ranks} x {name}",
        "threads": torch.get_num_threads(),
    }
    stamp["python"] = platform.python_version()
    stamp["torch"] = torch.__version__
    if device.startswith("cuda"):
        stamp["triton"] = version_of("triton")
    stamp["diffusers"] = version_of("diffusers")
    stamp["adamac"] = adamac.__version__
    stamp["commit"] = _commit()
    return stamp


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_name()}, {cores} cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def version_of(package: str) -> str | None:
    """Name the installed version of a package, or ``None``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Name the commit if the package runs from its own repository, with a + if files were changed."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():  # installed; a repository around it would be somebody else's
        return None
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or no commit yet
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
