"""The server as its operator has it: processes that are replaced, reloaded and drained while clients work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hourglass.client import Client
from hourglass.codec import Codec, image
from hourglass.codec.runtime import DEFAULT_MODEL, ZOO, model_ids
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc

SERVER = str(Path(sys.executable).with_name("hourglass-server"))


class Process:
    """A server process; its log is read all the time. Every flag is given by environment variables."""

    def __init__(self, **settings: object) -> None:
        variables = {f"HOURGLASS_{name.upper()}": str(value) for name, value in settings.items()}
        environment = {**os.environ, "HOURGLASS_LISTEN": "127.0.0.1:0", **variables}
        self.process = subprocess.Popen([SERVER], stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        said = self.wait_for("listening on ")
        self.address = said.split("listening on ")[1].split(",")[0]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.raw.append(line)

    def wait_for(self, text: str, count: int = 1) -> str:
        """The message with `text`, once there have been `count`."""
        for _ in range(1200):
            found = [line["message"] for line in self.lines if text in line["message"]]
            if len(found) >= count:
                return str(found[-1])
            assert self.process.poll() is None, f"the server ended: {self.lines}"
            time.sleep(0.05)
        raise AssertionError(f"no {text!r} in {self.lines}")

    def metrics(self) -> dict[str, float]:
        port = self.wait_for("metrics on ").rpartition(":")[2]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [pid for pid in map(int, children) if _works(pid)]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process.wait()
        # Whatever happens to its processes: what is no line of the log, no collector of logs can read.
        assert self.raw == []
        assert [line for line in self.lines if "traceback" in line] == []


@pytest.fixture
def started() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start(**settings: object) -> Process:
        processes.append(Process(**settings))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


def test_kill_reload_and_drain_under_load(started: Callable[..., Process], tmp_path: Path, parrots: Path) -> None:
    """Two workers: one is killed, the folder of models and the tokens change, then SIGTERM; nobody notices."""
    tokens = tmp_path / "tokens"
    tokens.write_text("one:the-first-token-there-is\n")
    (tmp_path / "models").mkdir()
    server = started(
        workers=2,
        metrics_listen="127.0.0.1:0",
        probe_listen="127.0.0.1:0",
        models=tmp_path / "models",
        token_file=tokens,
        grace_seconds=600,  # far longer than the calls take, on any machine
        queue_seconds=60,  # for machines that do other things too
    )
    small = image.write(image.read(parrots)[:128, :128], "PNG")
    expected = Codec().encode(small)
    stop = threading.Event()

    def work(_: int) -> int:
        done = 0
        with Client(server.address, token="the-first-token-there-is") as client:
            while not stop.is_set():
                assert client.encode(small) == expected
                done += 1
        return done

    with ThreadPoolExecutor(6) as pool:
        loads = [pool.submit(work, number) for number in range(6)]
        try:
            _hup(server, tokens, tmp_path / "models")
            _kill(server)
        finally:
            stop.set()
        assert all(load.result() > 0 for load in loads)

    calls = server.metrics()
    encoded = [line for line in server.lines if line.get("method") == "Encode" and line["code"] == "OK"]
    # What the killed worker counted stays counted: its calls are those logged, but for one at the moment of its end.
    counted = calls['hourglass_calls_total{code="OK",method="Encode"}']
    assert abs(counted - len(encoded)) <= 1
    assert calls['hourglass_pixels_total{method="Encode"}'] == pytest.approx(128 * 128 * counted, abs=128 * 128)
    assert encoded[0]["client"] == "one"
    clock = {"receive", "header", "queue", "image", "codec", "send"}
    inside = {"analysis", "quantisation", "prior", "entropy", "pack", "lossless"}
    hops = encoded[0]["hops_ms"]
    assert hops.keys() == clock | inside
    assert 0 < sum(hops[name] for name in inside) <= hops["codec"] + 1  # rounded; one thread for each call
    for name in clock | inside:
        assert calls[f'hourglass_hop_seconds_count{{hop="{name}",method="Encode"}}'] >= len(encoded) - 1
    _terminate(server, parrots)


def _hup(server: Process, tokens: Path, models: Path) -> None:
    shutil.copytree(ZOO / DEFAULT_MODEL, models / "another")
    tokens.write_text("one:the-first-token-there-is\ntwo:the-second-token-there-is\n")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for(f"reloaded; models: {', '.join(['another', *model_ids()])}", 2)
    with Client(server.address, model="another", token="the-second-token-there-is") as client:
        assert [model.id for model in client.models()] == ["another", *model_ids()]
        assert client.encode(image.read(Path(__file__).parent / "images" / "parrots.png")[:64, :64])


def _kill(server: Process) -> None:
    before = server.workers()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    server.wait_for("ended with status -9; replaced")
    for _ in range(600):
        if server.metrics().get("hourglass_workers") == 2:
            break
        time.sleep(0.05)
    assert before[1] in server.workers()
    assert len(server.workers()) == 2


def _wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def _terminate(server: Process, parrots: Path) -> None:
    """Calls in flight at SIGTERM end well, later ones are UNAVAILABLE, watchers hear of it, status 0."""
    metadata = [("authorization", "Bearer the-first-token-there-is")]
    # Long enough to be in flight for sure.
    picture = image.write(image.read(parrots)[:192, :192], "PNG")
    request = pb.EncodeRequest(image_file=picture, effort=pb.EFFORT_BEST)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    channels = [grpc.insecure_channel(server.address, options) for _ in range(6)]
    stubs: list[Any] = [codec_pb2_grpc.CodecServiceStub(c) for c in channels]  # type: ignore[no-untyped-call]
    for channel in channels:
        grpc.channel_ready_future(channel).result(20)
    watch = health_pb2_grpc.HealthStub(channels[0]).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    _wait_until(lambda: server.metrics()["hourglass_inside"] == 0)  # what was before is over
    calls = [stub.Encode.future(request, metadata=metadata) for stub in stubs]
    _wait_until(lambda: server.metrics()["hourglass_inside"] >= 3)  # a sample; some may be done
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("stopping")
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stubs[0].Encode(request, metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    assert all(call.result().file for call in calls)
    # The calls take what the machine needs. Then watchers and idle connections do not hold it for all of the grace.
    assert server.process.wait(30) == 0
    for channel in channels:
        channel.close()


def test_a_worker_that_stands_still_is_replaced(started: Callable[..., Process], parrots: Path) -> None:
    """Stopped in the midst of its calls, it neither dies nor answers; the clients' calls go on all the same.

    Where the whole server was stopped, as a container may be, nobody is taken for one that stands still.
    """
    server = started(workers=2, stall_seconds=2, metrics_listen="127.0.0.1:0")
    small = image.write(image.read(parrots)[:128, :128], "PNG")
    expected = Codec().encode(small)
    stop = threading.Event()

    def work(_: int) -> int:
        done = 0
        with Client(server.address) as client:
            while not stop.is_set():
                assert client.encode(small) == expected
                done += 1
        return done

    before = server.workers()
    with ThreadPoolExecutor(6) as pool:
        loads = [pool.submit(work, number) for number in range(6)]
        try:
            time.sleep(2.5)  # longer than the limit: who works hard does not stand still
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for pid in (server.process.pid, *before):
                    os.kill(pid, number)
                time.sleep(2.5)
            assert server.workers() == before
            os.kill(before[0], signal.SIGSTOP)
            server.wait_for(f"worker {before[0]} stands still for ")
            server.wait_for(f"worker {before[0]} ended with status -9; replaced")
            _wait_until(lambda: server.metrics().get("hourglass_workers") == 2)
            time.sleep(1)
        finally:
            stop.set()
        assert all(load.result() > 0 for load in loads)
    assert before[1] in server.workers()
    assert len(server.workers()) == 2


def test_scrapes_outlive_what_killed_workers_leave(
    started: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may be killed as it makes a file of its metrics. One that is damaged is said to be so, in the log."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    server = started(workers=1, metrics_listen="127.0.0.1:0")
    (folder,) = tmp_path.glob("hourglass-metrics-*")
    (folder / "counter_1.db").touch()
    _wait_until(lambda: server.metrics().get("hourglass_workers") == 1)
    (folder / "counter_2.db").write_bytes(b"\1\0")
    with pytest.raises(HTTPError, match="500"):
        server.metrics()
    server.wait_for("the metrics cannot be told: struct.error")
    server.lines.clear()  # it has a traceback, as it should


def test_what_cannot_start_says_so() -> None:
    for flags, status, message in (
        (["--model", "none-such"], 2, "no model 'none-such' is installed"),
        (["--listen", "0.0.0.0:0"], 2, "beyond loopback and there is no TLS"),
        (["--token-file", "/nowhere/tokens"], 2, "--token-file"),
    ):
        done = subprocess.run([SERVER, *flags], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_signals_to_workers_that_begin(started: Callable[..., Process], number: signal.Signals) -> None:
    """A terminal's Ctrl-C goes to all processes, also to one that reads its libraries and has no handlers yet."""
    server = started(workers=1)
    (first,) = server.workers()
    os.kill(first, signal.SIGKILL)
    server.wait_for("ended with status -9; replaced")
    _wait_until(lambda: server.workers() not in ([], [first]))
    (second,) = server.workers()
    for _ in range(10):
        os.kill(second, number)
        time.sleep(0.03)
    if number == signal.SIGTERM:  # heard as soon as it can be, and obeyed
        server.wait_for(f"worker {second} ended with status 0; replaced")
        return
    with Client(server.address) as client:
        assert client.models()
    assert server.workers() == [second]


def test_supervisor_gone_while_a_worker_begins(started: Callable[..., Process]) -> None:
    server = started(workers=1)
    (first,) = server.workers()
    os.kill(first, signal.SIGKILL)
    _wait_until(lambda: server.workers() not in ([], [first]))
    (second,) = server.workers()
    # Before a new process has its orders it is Python's alone, which then prints a traceback of its own.
    _wait_until(lambda: "numpy" in Path(f"/proc/{second}/maps").read_text())
    server.process.kill()
    _wait_until(lambda: not _works(second))


def _works(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it ended since its number was read
        return False


def test_supervisor_gone_workers_go(started: Callable[..., Process]) -> None:
    server = started(workers=1)
    (pid,) = server.workers()
    server.process.kill()
    _wait_until(lambda: not _works(pid))
