"""How the supervisor knows that a worker goes on: a number in a file that both have mapped into memory.

A pipe would fill up when nobody reads, and then stop the worker itself; multiprocessing's shared values want /dev/shm,
which not every container has.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

_NUMBER = struct.Struct("=d")


class Heart:
    """path: the file; it is made when it is not there. Either process makes its own `Heart` of it."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(_NUMBER.pack(time.monotonic()))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _NUMBER.size)

    def beat(self) -> None:
        """Say that all is well."""
        self._memory[:] = _NUMBER.pack(time.monotonic())  # one copy of eight bytes

    @property
    def last(self) -> float:
        """When it last beat, by the monotonic clock, in seconds."""
        seconds: float = _NUMBER.unpack(self._memory[:])[0]
        return seconds

    def close(self) -> None:
        """Let go of the file."""
        self._memory.close()
