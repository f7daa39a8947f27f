"""What a caller may want of work that goes on: to know where its time goes, and to stop it.

    with watching() as seconds:
        codec.encode("photo.jpg")
    print(seconds)  # {"analysis": 0.05, "quantisation": 0.02, "prior": 0.04, "entropy": 0.01, "pack": 0.0001, ...}

Nothing else in the package knows who watches. What is done in other threads is watched if it was `carried` there.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

from hourglass.codec.errors import Cancelled

_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")

HOPS = ("analysis", "quantisation", "prior", "entropy", "pack", "unpack", "synthesis", "lossless")
"""Parts of the work.

analysis: pixels to latent. quantisation: the search for symbols. prior: their probabilities. entropy: the range coder.
pack, unpack: the container with its checksums. synthesis: latent to pixels. lossless: alpha, pictures stored without
loss, and the look at whether that may pay.
"""


@dataclass
class _Watch:
    """One for each open hop of a thread. inside: seconds of the hops inside this one, which are not its own."""

    seconds: dict[str, float]
    stop: threading.Event | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: float = 0.0


_now: ContextVar[_Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watching(stop: threading.Event | None = None) -> Iterator[dict[str, float]]:
    """Watch the work of this block: seconds by hop, of `HOPS` those that there were, summed over tiles and threads.

    A hop inside another counts for itself alone. stop: once it is set, what is watched raises `Cancelled` before its
    next step: a hop, a tile, or some rows or bytes of a picture that is read. Inside another `watching` the seconds
    begin anew, and without a `stop` of its own that of the other holds.
    """
    outer = _now.get()
    watch = _Watch({}, outer.stop if stop is None and outer is not None else stop)
    with _as(watch):
        yield watch.seconds


@contextmanager
def hop(name: str) -> Iterator[None]:
    """The block, or the function that this decorates, is the hop `name`. Costs a microsecond when nobody watches."""
    outer = _now.get()
    if outer is None:
        yield
        return
    check()
    mine = replace(outer, inside=0.0)
    began = time.perf_counter()
    try:
        with _as(mine):
            yield
    finally:
        took = time.perf_counter() - began
        outer.inside += took
        with outer.lock:
            outer.seconds[name] = outer.seconds.get(name, 0.0) + took - mine.inside


def check() -> None:
    """Raise `Cancelled` when nobody waits for the result any more."""
    watch = _now.get()
    if watch is not None and watch.stop is not None and watch.stop.is_set():
        raise Cancelled("stopped before it was done: nobody waits for the result")


def carried(work: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """`work`, to be called in other threads and watched there as it would be here."""
    watch = _now.get()
    if watch is None:
        return work

    def watched(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with _as(replace(watch, inside=0.0)):
            return work(*args, **kwargs)

    return watched


class Bytes(io.BytesIO):
    """A file in memory that is read in many steps, between which its reader can be stopped."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises `Cancelled`."""
        check()
        return super().read(size)


@contextmanager
def _as(watch: _Watch) -> Iterator[None]:
    token = _now.set(watch)
    try:
        yield
    finally:
        _now.reset(token)
