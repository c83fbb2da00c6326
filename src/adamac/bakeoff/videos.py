"""Video files that a browser plays: H.264, 4:2:0, index in front."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Visually lossless; the figures are computed from float frames and never from these files.
_QUALITY = "16"


def write_video(path: Path, frames: NDArray[np.floating], fps: int) -> None:
    """Write an mp4; the file appears whole or not at all.

    Args:
        path: Where to.
        frames: ``[frames, height, width, 3]``, values from 0 to 1. An odd last row or column is repeated, since 4:2:0
            needs even sides.
        fps: Frames a second.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    pixels = np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": _QUALITY})
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    part.replace(path)
