"""A picture that a video begins with."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from adamac.bakeoff.errors import BadInput, one_line


@dataclass(frozen=True)
class Picture:
    """An image file as it was when the run began, whatever becomes of it later.

    Attributes:
        file: Its path.
        digest: SHA-256 of the file, so that a run is not gone on with after the file was changed.
        content: What was in the file.
    """

    file: str
    digest: str
    content: bytes = field(repr=False, compare=False)

    @classmethod
    def find(cls, path: Path) -> Picture:
        """Read a file.

        Raises:
            BadInput: If it cannot be read, holds no image, or one with more than 8 bits of grey.
        """
        try:
            content = path.read_bytes()
            picture = cls(str(path), hashlib.sha256(content).hexdigest(), content)
            picture.load()
        except BadInput:
            raise
        except UnidentifiedImageError:  # whose message names an object of Python's
            raise BadInput(f"image: {path} is not an image of a kind that is known") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            why = getattr(error, "strerror", None) or one_line(error)
            raise BadInput(f"image: {path} is not an image that can be read ({why})") from None
        return picture

    def load(self) -> Image.Image:
        """Decode it as diffusers' ``load_image`` does: in RGB and upright; what is transparent comes out as it lies beneath.

        Raises:
            BadInput: If it has more than 8 bits of grey, all of which but the darkest would come out white.
        """
        with Image.open(io.BytesIO(self.content)) as image:
            if image.mode.startswith(("I", "F")):
                raise BadInput(
                    f"image: {self.file} has more than 8 bits of grey, which RGB would cut off; save it with 8"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
