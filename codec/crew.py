"""The threads that work on the tiles of a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from hourglass.codec import watch
from hourglass.codec.runtime import Model
from hourglass.codec.tiles import Tile

_Result = TypeVar("_Result")

Work: TypeAlias = Callable[[Tile, Model], _Result]
"""What is done with a tile and the model that its thread uses."""


class Submit(Protocol):
    """Begin some work on a tile, in the order of the calls; its result is in the future."""

    def __call__(self, tile: Tile, work: Work[_Result], /) -> Future[_Result]: ...


@dataclass(frozen=True)
class Crew:
    """threads: of tiles that are worked on at a time. model: for each of them."""

    model: Model
    threads: int

    def each(self, tiles: list[Tile], work: Work[_Result]) -> list[_Result]:
        """Results of `work`, in the order of the tiles."""
        if len(tiles) == 1:
            return [self._one(tiles[0], work)]
        with self.at_work() as submit:
            return [future.result() for future in [submit(tile, work) for tile in tiles]]

    @contextmanager
    def at_work(self) -> Iterator[Submit]:
        """Threads to submit work to; in the end what has not begun is dropped, and the rest waited for.

        Work that waits for other work must be submitted behind it. A crew of one thread has none but the caller's: it
        does the work in the call.
        """
        if self.threads == 1:
            yield self._now
            return
        pool = ThreadPoolExecutor(self.threads)
        one = watch.carried(self._one)

        def submit(tile: Tile, work: Work[_Result]) -> Future[_Result]:
            return pool.submit(one, tile, work)

        try:
            yield submit
        finally:
            pool.shutdown(cancel_futures=True)

    def _one(self, tile: Tile, work: Work[_Result]) -> _Result:
        watch.check()
        return work(tile, self.model)

    def _now(self, tile: Tile, work: Work[_Result]) -> Future[_Result]:
        return done(self._one(tile, work))


def done(result: _Result) -> Future[_Result]:
    """A future of what there is already."""
    future: Future[_Result] = Future()
    future.set_result(result)
    return future
