"""``python -m adamac.cli``: the same command for torchrun, and where no script was installed."""

from adamac.cli import entry

if __name__ == "__main__":
    entry()
