"""The parent of the workers: keeps their number, passes signals on, serves their metrics."""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

import prometheus_client as prometheus
from prometheus_client import multiprocess
from prometheus_client.registry import Collector

from hourglass.codec import errors
from hourglass.codec.runtime import ZOO
from hourglass.server import worker
from hourglass.server.config import Config, split_address
from hourglass.server.heart import Heart

_log = logging.getLogger("hourglass.server")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_PAUSE_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Before a worker that died is replaced: the more have died of late, the longer."""

_CALM_SECONDS = 60.0


_LOOK_SECONDS = 1.0
"""Between two looks at the workers' hearts, at most."""

_START_SECONDS = 120.0
"""How long a new worker may take, at least, before it says its first word: the disk with its libraries may be slow."""


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    heart: Heart
    reloads: int
    ready: bool = False


def supervise(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises `InvalidArgument` and what keeps the first workers from serving."""
    with ExitStack() as stack:
        config = stack.enter_context(_reserved(config))
        signals = stack.enter_context(_signals())
        zoo = stack.enter_context(_models(config))
        metrics = stack.enter_context(tempfile.TemporaryDirectory(prefix="hourglass-metrics-"))
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics  # the workers read it when they import the library
        if config.metrics_listen:
            stack.callback(_serve_metrics(config.metrics_listen, metrics))
        _Supervisor(config, zoo, metrics, signals).run()


class _Supervisor:
    def __init__(self, config: Config, zoo: _Zoo, metrics: str, signals: Connection) -> None:
        self._config, self._zoo, self._metrics, self._signals = config, zoo, metrics, signals
        self._workers: list[_Worker] = []
        self._deaths: list[float] = []
        self._next_start = 0.0
        self._announced = False
        self._reloads = self._started = 0
        self._looked = self._awake = time.monotonic()

    def run(self) -> None:
        try:
            for _ in range(self._config.processes):
                self._start()
            while self._turn():
                pass
        except BaseException:
            for one in self._workers:
                one.process.kill()
            raise
        self._stop()

    def _start(self) -> None:
        mine, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # gRPC and onnxruntime do not survive a fork
        self._started += 1
        path = Path(self._metrics) / f"heart-{self._started}"
        heart = Heart(path)
        arguments = self._config, str(self._zoo.folder), theirs, str(path)
        process = context.Process(target=worker.run, args=arguments, name="worker")
        # A new process inherits this, and hears signals only when it has handlers for them: before that they would end
        # it, or make Python print a traceback.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        theirs.close()
        self._workers.append(_Worker(process, mine, heart, self._reloads))

    def _turn(self) -> bool:
        """Wait for something to happen and answer to it. Returns whether to go on."""
        missing = self._config.processes - len(self._workers)
        timeout = self._pause
        if missing:
            timeout = min(max(self._next_start - time.monotonic(), 0.0), timeout)
        watched = [one.pipe for one in self._workers if not one.ready] + [one.process.sentinel for one in self._workers]
        happened = wait([*watched, self._signals], timeout if timeout < math.inf else None)
        if self._signals in happened:
            number = self._signals.recv_bytes()[0]
            if number != signal.SIGHUP:
                return False
            self._zoo.refresh()
            self._reloads += 1
            for one in self._workers:
                self._send(one, signal.SIGHUP)
        for one in list(self._workers):
            if one.pipe in happened:
                self._hear(one)
            if one.process.sentinel in happened:
                self._bury(one)
        if missing and time.monotonic() >= self._next_start:
            self._start()
        self._feel()
        return True

    @property
    def _pause(self) -> float:
        """Longest wait between two looks at the workers' hearts."""
        limit = self._config.stall_seconds
        return min(limit / 4, _LOOK_SECONDS) if limit else math.inf

    def _feel(self) -> None:
        """Kill workers whose event loop stands still; `_bury` replaces them."""
        now, limit = time.monotonic(), self._config.stall_seconds
        if now - self._looked > 2 * self._pause:
            self._awake = now  # this process itself stood still, so all may have: a machine or container was frozen
        self._looked = now
        for one in self._workers:
            still = now - max(one.heart.last, self._awake)
            if limit and still > (limit if one.ready else max(limit, _START_SECONDS)) and one.process.is_alive():
                _log.error("worker %d stands still for %.0f s; it is killed", one.process.pid, still)
                one.process.kill()

    def _hear(self, one: _Worker) -> None:
        """A new worker serves, or says why it cannot, or is dead."""
        try:
            news = one.pipe.recv()
        except (EOFError, OSError):
            one.ready = True  # its end is told by its sentinel
            return
        if news is not None:
            if not self._announced:
                raise news
            _log.error("a new worker cannot serve: %s", news)
        one.ready = True
        if one.reloads < self._reloads:  # it may have read its files before, and was deaf to the signal
            self._send(one, signal.SIGHUP)
        if not self._announced and all(worker.ready for worker in self._workers):
            self._announced = True
            config = self._config
            _log.info(
                "listening on %s, model %s, %d workers, %d slots each",
                config.listen,
                config.model,
                config.processes,
                config.slots,
            )

    def _bury(self, one: _Worker) -> None:
        one.process.join()
        self._workers.remove(one)
        one.pipe.close()
        one.heart.close()
        multiprocess.mark_process_dead(one.process.pid, self._metrics)  # type: ignore[no-untyped-call]
        if not self._announced:
            raise errors.HourglassError(
                f"a worker ended with status {one.process.exitcode} before it served; see its log"
            )
        now = time.monotonic()
        self._deaths = [then for then in self._deaths if now - then < _CALM_SECONDS] + [now]
        pause = _PAUSE_SECONDS[min(len(self._deaths), len(_PAUSE_SECONDS)) - 1]
        self._next_start = now + pause
        _log.error("worker %d ended with status %s; replaced in %g s", one.process.pid, one.process.exitcode, pause)

    def _stop(self) -> None:
        grace = self._config.grace_seconds
        _log.info("stopping: calls in flight have %g s to finish", grace)
        for one in self._workers:
            self._send(one, signal.SIGTERM)
        end = time.monotonic() + grace + 5
        for one in self._workers:
            one.process.join(max(end - time.monotonic(), 0))
            if one.process.exitcode is None:
                _log.error("worker %d does not end; it is killed", one.process.pid)
                one.process.kill()
                one.process.join()
        _log.info("stopped")

    def _send(self, one: _Worker, number: signal.Signals) -> None:
        # A worker that is not ready has no handler yet for SIGHUP, and one that waits for SIGTERM.
        if one.process.pid is not None and one.process.is_alive() and (one.ready or number == signal.SIGTERM):
            os.kill(one.process.pid, number)


class _Zoo:
    """A folder with a link to each model of the package and of --models. `refresh` looks for new ones."""

    def __init__(self, folder: Path, sources: list[Path]) -> None:
        self.folder, self._sources = folder, sources
        self.refresh()

    def refresh(self) -> None:
        found = {path.parent.name: path.parent for source in reversed(self._sources) for path in _manifests(source)}
        for link in self.folder.iterdir():
            if found.get(link.name) != link.readlink():
                link.unlink()
        for name, target in found.items():
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(target)


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.resolve().glob("*/manifest.json"))


@contextmanager
def _models(config: Config) -> Iterator[_Zoo]:
    with tempfile.TemporaryDirectory(prefix="hourglass-models-") as folder:
        yield _Zoo(Path(folder), [ZOO, *([Path(config.models)] if config.models else [])])


@contextmanager
def _reserved(config: Config) -> Iterator[Config]:
    """Hold the ports for the workers to share, so that no stranger can, and no other server is there already."""
    with ExitStack() as stack:
        for name in ("listen", "probe_listen"):
            if not getattr(config, name):
                continue
            host, port = split_address(getattr(config, name))
            held = stack.enter_context(_hold(host, port))
            text = f"[{host}]" if ":" in host else host
            config = replace(config, **{name: f"{text}:{held.getsockname()[1]}"})  # type: ignore[arg-type]
        yield config


def _hold(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen. A trial without SO_REUSEPORT finds out whether the port is free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        trial = socket.socket(family, kind, protocol)
        with trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a past server may linger
            trial.bind(address)
            address = (address[0], trial.getsockname()[1], *address[2:])
        held = socket.socket(family, kind, protocol)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError as exc:
        raise errors.InvalidArgument(
            f"cannot listen on '{host}:{port}': {exc.strerror or exc}; is the port in use, or is it no HOST:PORT?"
        ) from exc
    return held


@contextmanager
def _signals() -> Iterator[Connection]:
    """A pipe that gets a byte with the number of each signal, so that one wait sees them too."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def tell(number: int, _frame: FrameType | None) -> None:
        sender.send_bytes(bytes([number]))

    before = {number: signal.signal(number, tell) for number in _SIGNALS}
    try:
        yield receiver
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Sum(Collector):
    """The workers' metrics, added up. A file that is empty was just made, or its worker was killed as it made it; the
    library's own collector fails on it, from then on at every scrape.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[prometheus.Metric]:
        files = []
        for path in self._folder.glob("*.db"):
            with suppress(FileNotFoundError):  # a gauge of a worker that has died
                files += [str(path)] if path.stat().st_size else []
        merged: Iterable[prometheus.Metric] = multiprocess.MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        return merged


class _Errors(io.StringIO):
    """Where wsgiref prints why a scrape failed: the log."""

    def flush(self) -> None:
        if text := self.getvalue().strip():
            self.seek(self.truncate(0))
            last = text.splitlines()[-1]
            _log.error("the metrics cannot be told: %s", last, extra={"facts": {"traceback": text}})


def _serve_metrics(address: str, folder: str) -> Callable[[], None]:
    """Serve the sum of the workers' metrics; returns what ends that."""
    registry = prometheus.CollectorRegistry()
    registry.register(_Sum(Path(folder)))
    host, port = split_address(address, "--metrics-listen")
    try:
        server, thread = prometheus.start_http_server(port, host, registry)
    except OSError as exc:
        raise errors.InvalidArgument(
            f"cannot serve metrics on {address!r}: {exc.strerror}; is the port in use?"
        ) from exc
    kind: Any = server.RequestHandlerClass
    server.RequestHandlerClass = type("Handler", (kind,), {"get_stderr": lambda _: _Errors()})
    _log.info("metrics on %s:%d", host, server.server_port)

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close
