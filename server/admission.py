"""Who may come in, who waits and who works: the bounds of one process, all on its event loop."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any


class Busy(Exception):  # what the server is, not what went wrong
    """The call is refused now and may succeed later. retry_seconds: when to try again."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class Closing(Exception):
    """The process takes no new calls."""


@dataclass(frozen=True)
class Bounds:
    """slots: works at a time. queue: calls in the house beyond these. queue_seconds: longest wait for a slot.
    client_calls: calls of one client in the house. memory: bytes that all of them may hold and work with.
    """

    slots: int
    queue: int
    queue_seconds: float
    client_calls: int
    memory: int


@dataclass
class _Waiter:
    future: asyncio.Future[None]
    cost: int


class Admission:
    """Every call holds a ticket while it is in the house, and a slot while the codec works for it.

    Slots are given in the order of asking. A work that would break the memory budget waits until it fits or nothing
    else runs, so that everything that passed the limits gets done.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._clients: Counter[str] = Counter()
        self._waiters: deque[_Waiter] = deque()
        self._seconds = 0.1  # how long works take, of late
        self.inside = self.running = self.memory = 0
        self.closing = False

    @property
    def waiting(self) -> int:
        """Works that wait for a slot."""
        return len(self._waiters)

    @contextmanager
    def ticket(self, client: str) -> Iterator[None]:
        """Be in the house. Raises `Busy` when it is full, or full of this client's calls, and `Closing`."""
        if self.closing:
            raise Closing("the server is shutting down; try another one, or again")
        if self.inside >= self._bounds.slots + self._bounds.queue:
            raise Busy(f"the server is busy: {self.inside} calls are in work or wait", self._retry())
        if self._clients[client] >= self._bounds.client_calls:
            raise Busy(f"this client has {self._clients[client]} calls here, as many as it may", self._retry())
        self.inside += 1
        self._clients[client] += 1
        try:
            yield
        finally:
            self.inside -= 1
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Have `size` bytes of a client's in memory. Raises `Busy` when the budget has no room for them."""
        if self.memory and self.memory + size > self._bounds.memory:
            raise Busy(f"the server has no memory to take in {size} bytes more now", self._retry())
        self.memory += size
        try:
            yield
        finally:
            self.memory -= size
            self._give()

    @asynccontextmanager
    async def slot(self, cost: int, seconds: float | None) -> AsyncIterator[Slot]:
        """Wait for one's turn, `seconds` at most; None for the queue's own limit, infinity to be patient.

        cost: bytes that the work takes. The slot is free again when the block is left, or, where work was begun in it
        that cannot be awaited, when that has ended. Raises `Busy`.
        """
        waiter = _Waiter(asyncio.get_running_loop().create_future(), cost)
        self._waiters.append(waiter)
        self._give()
        limit = self._bounds.queue_seconds if seconds is None else seconds
        try:
            done, _ = await asyncio.wait({waiter.future}, timeout=limit if limit < 1e6 else None)
        except asyncio.CancelledError:
            self._leave(waiter)
            raise
        if not done:
            self._leave(waiter)
            raise Busy(f"the call waited {limit:g} s and its turn did not come", self._retry())
        slot = Slot(self, cost)
        try:
            yield slot
        finally:
            slot.leave()

    def _leave(self, waiter: _Waiter) -> None:
        if waiter.future.done():  # its turn came in the same moment
            self.free(waiter.cost, None)
        else:
            self._waiters.remove(waiter)
            self._give()

    def free(self, cost: int, seconds: float | None) -> None:
        """Give a slot back that was worked in for `seconds`."""
        self.running -= 1
        self.memory -= cost
        if seconds is not None:
            self._seconds += (seconds - self._seconds) * 0.1
        self._give()

    def _give(self) -> None:
        while self._waiters and self.running < self._bounds.slots:
            waiter = self._waiters[0]
            if self.running and self.memory + waiter.cost > self._bounds.memory:
                return
            self._waiters.popleft()
            self.running += 1
            self.memory += waiter.cost
            waiter.future.set_result(None)

    def _retry(self) -> float:
        """When a slot is likely to be free for one more."""
        return min(max(self._seconds * (self.waiting + 1) / self._bounds.slots, 0.05), 5.0)


class Slot:
    """One turn at the codec."""

    def __init__(self, admission: Admission, cost: int) -> None:
        self._admission, self._cost = admission, cost
        self._began = monotonic()
        self._work: asyncio.Future[Any] | None = None

    def occupy(self, work: asyncio.Future[Any]) -> None:
        """Keep the slot until `work`, which runs in a thread and cannot be taken back, has ended."""
        self._work = work

    def leave(self) -> None:
        """Free the slot, now or when its work has ended."""
        if self._work is None or self._work.done():
            self._admission.free(self._cost, monotonic() - self._began)
        else:
            self._work.add_done_callback(lambda _: self._admission.free(self._cost, monotonic() - self._began))
