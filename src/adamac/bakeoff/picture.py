"""A picture that a video begins with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from adamac.bakeoff.errors import BadInput, one_line


@dataclass(frozen=True)
class Picture:
    """An image file.

    Attributes:
        file: Its path.
        digest: SHA-256 of the file, so that a run is not gone on with after the file was changed.
    """

    file: str
    digest: str

    @classmethod
    def find(cls, path: Path) -> Picture:
        """Look at a file.

        Raises:
            BadInput: If it cannot be read, or holds no image.
        """
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            why = getattr(error, "strerror", None) or one_line(error)
            raise BadInput(f"image: {path} is not an image that can be read ({why})") from None
        return cls(str(path), digest)

    def load(self) -> Image.Image:
        """Read it, in RGB; what is transparent comes out as it lies beneath."""
        with Image.open(self.file) as image:
            return image.convert("RGB")
