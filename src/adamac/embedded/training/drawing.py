"""Anti-aliased drawing of the little world that the embedded model is trained on.

Everything an object shows is a set of polygons given in units of the object's size, so one function
draws a turning car as easily as a still ball, and the box around what was drawn is known exactly.
OpenCV draws polygons with sub-pixel corners; a clip of 49 frames costs a few milliseconds.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np

SUBPIXEL_BITS = 4
"""Fractional bits of the polygon corners passed to OpenCV (1/16 pixel)."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 38),
    "orange": (245, 140, 20),
    "yellow": (250, 218, 40),
    "green": (36, 160, 62),
    "blue": (36, 84, 214),
    "purple": (130, 50, 180),
    "pink": (250, 120, 180),
    "white": (248, 248, 248),
    "black": (24, 24, 26),
    "brown": (128, 74, 36),
}
"""RGB of every colour word."""

PLAIN_BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "a gray background": (150, 150, 152),
    "a white background": (240, 240, 236),
    "a black background": (30, 30, 34),
    "a pale blue background": (176, 210, 240),
    "a pale green background": (190, 226, 184),
    "a pale pink background": (246, 206, 214),
}
"""RGB of the one-colour backgrounds, by the words that name them."""

PICTURE_BACKGROUNDS = ("a meadow", "a beach", "a night sky")
"""Backgrounds with things in them, drawn by :func:`background`."""

BACKGROUNDS = (*PLAIN_BACKGROUNDS, *PICTURE_BACKGROUNDS)

HIDDEN_ON: dict[str, tuple[str, ...]] = {
    "white": ("a white background", "a pale pink background", "a pale green background"),
    "pink": ("a pale pink background",),
    "black": ("a black background", "a night sky"),
    "blue": ("a night sky",),
    "purple": ("a night sky",),
    "brown": ("a night sky", "a black background"),
    "green": ("a meadow",),
    "yellow": ("a beach", "a white background"),
    "orange": ("a beach",),
}
"""Backgrounds on which an object of a colour cannot be told from what is behind it."""


def circle(radius: float = 1.0, x: float = 0.0, y: float = 0.0, corners: int = 40) -> np.ndarray:
    """Corners of a regular polygon that is nearly a circle: ``(corners, 2)``."""
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _star() -> np.ndarray:
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.15, 0.5)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart() -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(angle) ** 3
    y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return np.stack([x, -y - 2], axis=1) / 15.5


def _fish() -> np.ndarray:
    body = circle(corners=28) * (0.95, 0.6)
    return np.concatenate([body[2:13], [(-1.4, 0.6), (-1.15, 0.0), (-1.4, -0.6)], body[16:27]])


Part = tuple[np.ndarray, float | tuple[int, int, int]]
"""Corners ``(n, 2)`` in units of the object's size, and a factor on its colour or an own colour."""

_DARK, _LIGHT = (35, 35, 38), (235, 240, 248)

SHAPES: dict[str, tuple[Part, ...]] = {
    "ball": ((circle(), 1.0), (circle(0.28, -0.34, -0.36, 16), 1.55)),
    "square": ((np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]), 1.0),),
    "triangle": ((np.array([(0.0, -1.1), (1.08, 0.82), (-1.08, 0.82)]), 1.0),),
    "star": ((_star(), 1.0),),
    "heart": ((_heart(), 1.0),),
    "ring": ((np.concatenate([circle(1.05), circle(1.05)[:1], circle(0.58)[:1], circle(0.58)[::-1]]), 1.0),),
    "fish": (
        (_fish(), 1.0),
        (circle(0.14, 0.52, -0.14, 12), _LIGHT),
        (circle(0.07, 0.55, -0.14, 8), _DARK),
    ),
    "car": (
        (
            np.array(
                [
                    (-1.4, 0.5),
                    (-1.4, -0.1),
                    (-0.8, -0.16),
                    (-0.5, -0.68),
                    (0.45, -0.68),
                    (0.85, -0.12),
                    (1.4, 0.0),
                    (1.4, 0.5),
                ]
            ),
            1.0,
        ),
        (np.array([(-0.6, -0.16), (-0.4, -0.55), (0.36, -0.55), (0.62, -0.16)]), _LIGHT),
        (circle(0.32, -0.78, 0.5, 20), _DARK),
        (circle(0.32, 0.78, 0.5, 20), _DARK),
    ),
}
"""Polygons of every shape word; the first one is the outline."""


def shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    """A colour made darker (``factor < 1``) or mixed with white (``factor > 1``)."""
    if factor <= 1:
        red, green, blue = (int(c * factor) for c in colour)
    else:
        red, green, blue = (int(c + (255 - c) * min(factor - 1, 1.0)) for c in colour)
    return red, green, blue


def polygon(canvas: np.ndarray, corners: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Fill one polygon on ``canvas`` (uint8 RGB) in place; ``corners`` are (x, y) pixels."""
    fixed = np.round(corners * (1 << SUBPIXEL_BITS)).astype(np.int32)
    cv2.fillPoly(canvas, [fixed], colour, lineType=cv2.LINE_AA, shift=SUBPIXEL_BITS)


def rod(
    canvas: np.ndarray, start: np.ndarray, end: np.ndarray, width: float, colour: tuple[int, int, int]
) -> np.ndarray:
    """Draw a straight rod ``width`` pixels thick; returns its four corners."""
    along = np.asarray(end, float) - np.asarray(start, float)
    across = np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-6) * width / 2
    corners = np.stack([start + across, end + across, end - across, start - across])
    polygon(canvas, corners, colour)
    return corners


def sprite(
    canvas: np.ndarray,
    shape: str,
    colour: str,
    x: float,
    y: float,
    size: float,
    angle: float = 0.0,
    flip: bool = False,
) -> np.ndarray:
    """Draw one object in place.

    Args:
        canvas: Frame ``(height, width, 3)``, uint8 RGB.
        shape: A key of :data:`SHAPES`.
        colour: A key of :data:`COLOURS`.
        x: Centre, pixels from the left.
        y: Centre, pixels from the top.
        size: Half of the object's extent, pixels.
        angle: Clockwise turn, radians.
        flip: Mirror left and right (a car that drives to the left).

    Returns:
        Corners ``(n, 2)`` of the outline in pixels, from which its box follows.
    """
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    mirror = np.array([-1.0 if flip else 1.0, 1.0])
    base = COLOURS[colour]
    everything = []
    for corners, paint in SHAPES[shape]:
        placed = (corners * mirror) @ turn * size + (x, y)
        polygon(canvas, placed, paint if isinstance(paint, tuple) else shade(base, paint))
        everything.append(placed)
    return np.concatenate(everything)


def box_of(corners: np.ndarray, height: int, width: int) -> tuple[float, float, float, float]:
    """Box ``(left, top, right, bottom)`` in pixels around corners, three pixels of blur included.

    It is cut at the frame's border; all zeros if nothing of it is in the frame.
    """
    left, top = np.maximum(corners.min(axis=0) - 3, 0)
    right, bottom = np.minimum(corners.max(axis=0) + 3, (width, height))
    if right <= left or bottom <= top:
        return 0.0, 0.0, 0.0, 0.0
    return float(left), float(top), float(right), float(bottom)


@functools.lru_cache(maxsize=64)
def background(name: str, height: int, width: int) -> np.ndarray:
    """The backdrop that ``name`` says, uint8 RGB ``(height, width, 3)``; do not write into it."""
    rows = np.linspace(0, 1, height)[:, None, None]
    if name in PLAIN_BACKGROUNDS:
        fill = np.array(PLAIN_BACKGROUNDS[name], float) * (1.04 - 0.1 * rows)
        return np.broadcast_to(fill, (height, width, 3)).clip(0, 255).astype(np.uint8).copy()
    if name == "a meadow":
        return _meadow(height, width, rows)
    if name == "a beach":
        return _beach(height, width, rows)
    if name == "a night sky":
        return _night(height, width, rows)
    raise ValueError(f"background: expected one of {BACKGROUNDS}, got {name!r}")


def _meadow(height: int, width: int, rows: np.ndarray) -> np.ndarray:
    sky = np.array((120, 184, 240)) + rows * np.array((90, 50, 10))
    canvas = np.broadcast_to(sky, (height, width, 3)).clip(0, 255).astype(np.uint8).copy()
    x = np.arange(width + 1, dtype=float)
    for level, swell, phase, colour in ((0.62, 0.05, 0.5, (126, 190, 96)), (0.72, 0.04, 3.0, (96, 168, 70))):
        ridge = height * (level + swell * np.sin(x / width * 6 + phase))
        outline = np.concatenate([np.stack([x, ridge], 1), [(width, height), (0, height)]])
        polygon(canvas, outline, colour)
    return canvas


def _beach(height: int, width: int, rows: np.ndarray) -> np.ndarray:
    sky = np.array((150, 204, 246)) + rows * np.array((60, 30, 5))
    canvas = np.broadcast_to(sky, (height, width, 3)).clip(0, 255).astype(np.uint8).copy()
    canvas[int(height * 0.45) : int(height * 0.68)] = (46, 134, 190)
    canvas[int(height * 0.68) :] = (232, 208, 150)
    return canvas


def _night(height: int, width: int, rows: np.ndarray) -> np.ndarray:
    sky = np.array((10, 14, 44)) + rows * np.array((24, 26, 44))
    canvas = np.broadcast_to(sky, (height, width, 3)).astype(np.uint8).copy()
    places = np.random.default_rng(0).uniform(0, 1, (24, 2)) * (width, height)
    for place in places:
        polygon(canvas, circle(height / 112, *place, corners=8), (225, 225, 205))
    polygon(canvas, circle(height * 0.09, width * 0.84, height * 0.2), (240, 236, 200))
    return canvas


@functools.lru_cache(maxsize=4096)
def _glyphs(text: str, pixels: int) -> np.ndarray:
    """Coverage mask of ``text`` in Pillow's built-in font, float32 in 0..1, with a margin."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=pixels)
    left, top, right, bottom = font.getbbox(text, stroke_width=pixels // 20)
    margin = 2
    image = Image.new("L", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin))
    ImageDraw.Draw(image).text(
        (margin - left, margin - top), text, fill=255, font=font, stroke_width=pixels // 20
    )
    return np.asarray(image, np.float32) / 255


def letters(canvas: np.ndarray, text: str, colour: str, x: float, y: float, pixels: float) -> np.ndarray:
    """Write ``text`` in place, centred at ``(x, y)``, with capitals about 0.7 ``pixels`` tall.

    Returns:
        The four corners of the rectangle that holds the writing, in pixels.
    """
    master = 72
    mask = _glyphs(text, master)
    scale = pixels / master
    shift = np.array([x, y]) - scale * np.array(mask.shape[::-1]) / 2
    place = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    height, width = canvas.shape[:2]
    # Shrinking by linear interpolation alone would drop thin strokes: blur by the step first.
    soft = cv2.GaussianBlur(mask, (0, 0), 0.4 / scale) if scale < 0.9 else mask
    cover = cv2.warpAffine(soft, place, (width, height), flags=cv2.INTER_LINEAR)[..., None]
    canvas[:] = (canvas * (1 - cover) + np.array(COLOURS[colour], np.float32) * cover).round()
    tall, wide = mask.shape
    corners = np.array([(0, 0), (wide, 0), (wide, tall), (0, tall)], float)
    return corners * scale + shift
