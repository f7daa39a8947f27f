"""Whoever watches the codec is told where its time goes, and can stop it at any of its steps."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hourglass.codec import Codec, errors, image
from hourglass.codec.watch import hop, watching

ENCODING = {"analysis", "quantisation", "prior", "entropy", "pack", "lossless"}
DECODING = {"unpack", "entropy", "prior", "synthesis"}


@pytest.mark.parametrize("threads", [1, 2])
def test_seconds_by_hop(threads: int, parrots: Path) -> None:
    codec, picture = Codec(threads=threads), image.load(parrots)
    codec.warm_up()
    data = codec.encode(picture)
    for work, names in ((lambda: codec.encode(picture), ENCODING), (lambda: codec.decode(data), DECODING)):
        began = time.perf_counter()
        with watching() as seconds:
            work()
        took = time.perf_counter() - began
        assert seconds.keys() == names
        assert all(value > 0 for value in seconds.values())
        # Nothing is counted twice, and next to nothing is left out; two tiles, one for each thread.
        assert 0.5 * took < sum(seconds.values()) <= threads * took


def test_a_hop_counts_for_itself_alone() -> None:
    with watching() as seconds, hop("outer"):
        time.sleep(0.02)
        with hop("inner"):
            time.sleep(0.1)
        with watching() as others, hop("inner"):
            pass
    assert 0.02 <= seconds["outer"] < 0.1 <= seconds["inner"]
    assert others.keys() == {"inner"}


@pytest.mark.parametrize("threads", [1, 2])
def test_stop(threads: int, parrots: Path) -> None:
    codec, stop = Codec(threads=threads), threading.Event()
    pixels = np.tile(image.read(parrots), (8, 5, 1))
    data = codec.encode(parrots)
    with watching(stop) as seconds:
        assert codec.encode(parrots) == data
        threading.Timer(1.0, stop.set).start()
        with pytest.raises(errors.Cancelled, match="nobody waits"):
            codec.encode(pixels)
        assert seconds["prior"] > 0  # it had begun
        with watching(), pytest.raises(errors.Cancelled):
            codec.decode(data)
    codec.decode(data)


class _Impatient(threading.Event):
    """An event that is set by being asked for the `last` time."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last, self.asked = last, 0

    def is_set(self) -> bool:
        self.asked += 1
        if self.asked == self.last:
            self.set()
        return super().is_set()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "PPM"])
def test_reading_can_be_stopped_on_the_way(format: str, parrots: Path) -> None:
    """Pillow takes a file 64 KiB at a time, and is stopped between any two of them."""
    file = image.write(np.tile(image.read(parrots), (4, 4, 1)), format)
    patient = _Impatient(0)
    with watching(patient):
        image.load(file)
    assert patient.asked > len(file) / (64 << 10)
    for last in range(1, patient.asked + 1, max(1, patient.asked // 7)):
        with watching(_Impatient(last)), pytest.raises(errors.Cancelled):
            image.load(file)
