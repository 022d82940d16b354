"""A tensor that is seldom looked at, kept out of the computation's memory: in a file of its own that has no name.

Knows nothing of what it holds.
"""

import tempfile

import numpy as np
import torch
from torch import Tensor


class Shelf:
    """Holds a copy of the last tensor that was put on it, on its device again when it is taken. Raises OSError when the
    disk has no room for it."""

    def __init__(self, tensor: Tensor) -> None:
        self._file = tempfile.TemporaryFile(prefix="moa-")   # noqa: SIM115 - as long as the shelf
        self.put(tensor)

    def put(self, tensor: Tensor) -> None:
        self._like = tensor.shape, tensor.dtype, tensor.device
        self._file.seek(0)
        self._file.truncate()
        self._file.write(memoryview(tensor.detach().contiguous().cpu().numpy().reshape(-1).view(np.uint8)))
        self._file.flush()

    def take(self) -> Tensor:
        shape, dtype, device = self._like
        self._file.seek(0)
        return torch.frombuffer(bytearray(self._file.read()), dtype=dtype).view(shape).to(device)
