"""A pipeline made ready by a function of the user's: LoRA, offload, quantised weights, another scheduler."""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamac.bakeoff.errors import BadInput, one_line


@dataclass(frozen=True)
class Setup:
    """A function in a file.

    Attributes:
        file: Path of the file.
        function: Name of the function. It takes the pipeline as it was loaded, on the processor, and puts it where it is to
            run; what it returns is used in its place, if that is anything.
        digest: SHA-256 of the file, so that a run is not gone on with after the file was changed.
    """

    file: str
    function: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> Setup:
        """Read ``FILE.py:FUNCTION``.

        Raises:
            BadInput: If it is of another form, or the file cannot be read.
        """
        file, colon, function = text.rpartition(":")
        if not colon or not file or not function.isidentifier():
            raise BadInput(f"setup must be FILE.py:FUNCTION, got {text!r}")
        try:
            digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError as error:
            raise BadInput(
                f"setup: {file} cannot be read ({error.strerror}); expected FILE.py:FUNCTION"
            ) from None
        return cls(file, function, digest)

    def make_ready(self, load: Callable[[], Any]) -> Any:
        """Call the function with a pipeline.

        Args:
            load: Loads the pipeline; called only when the function was found.

        Raises:
            BadInput: If the file has no such function, either of them fails, or it returns what is no pipeline.
        """
        try:
            function = runpy.run_path(self.file).get(self.function)
        except Exception as error:  # whatever the user's file does
            raise BadInput(f"setup: {self.file} raised {one_line(error)}") from error
        if not callable(function):
            raise BadInput(f"setup: {self.file} has no function {self.function}")
        pipe = load()
        try:
            made = function(pipe)
        except Exception as error:
            raise BadInput(f"setup: {self.file}:{self.function} raised {one_line(error)}") from error
        if made is not None and not callable(made):
            raise BadInput(
                f"setup: {self.file}:{self.function} returned {type(made).__name__}; expected a pipeline, or nothing if it "
                "changed the one it was given"
            )
        return pipe if made is None else made
