"""How much of a padded text is text, read from the device once a mask.

HunyuanVideo pads its text to 256 tokens behind the video and masks the padding in every attention call; dense kernels take a
third longer for the mask alone. If the text's length is known on the host, the padding can be cut off and nothing is
masked. The length lies on the device, and to read it waits for the device; but a pipeline hands the very same mask to the
transformer at every step, so that once a video (and guidance branch) is enough.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def common_length(mask: Tensor) -> int | None:
    """Read the number of leading ones that all samples of a mask share; waits for the device.

    Args:
        mask: ``[batch, text_tokens]``, ones (of any dtype) for text and zeros for padding.

    Returns:
        The number, or ``None`` if samples differ or a sample's ones do not all come first.
    """
    valid = mask.to(torch.int32)
    length = valid[:1].sum()
    first = torch.arange(mask.shape[1], device=mask.device) < length
    # One number, so that there is one wait: -1 stands for no common length.
    return _or_none(torch.where((valid == first).all(), length, -1).item())


def _or_none(length: float) -> int | None:
    return None if length < 0 else int(length)


class TextLengths:
    """Lengths of the texts of masks that are alive.

    A mask is known by identity and by torch's count of changes in place, so a new prompt's mask is read anew. Masks are
    held weakly.
    """

    def __init__(self, read: Callable[[Tensor], int | None] = common_length) -> None:
        self._read = read
        self._known = WeakTensorKeyDictionary()

    def of(self, mask: Tensor | None) -> int | None:
        """Say how many text tokens every sample has in front of its padding.

        Args:
            mask: What the pipeline gave to the transformer, if anything.

        Returns:
            The number, or ``None`` if it is not the same for all samples, the mask is of another kind, or reading it
            would break the capture of a CUDA graph.
        """
        if not isinstance(mask, Tensor) or mask.ndim != 2 or 0 in mask.shape:
            return None
        # Changes of a tensor made in inference mode are not counted: it has to be read every time.
        changes = None if mask.is_inference() else mask._version
        known = self._known.get(mask)
        if known is not None and changes is not None and known[0] == changes:
            return known[1]
        if mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        length = self._read(mask)
        self._known[mask] = (changes, length)
        return length
