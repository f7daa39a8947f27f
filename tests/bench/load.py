"""What the gRPC service does under load, measured in one run of five minutes on servers of its own.

    python tests/bench/load.py PICTURES --broken BROKEN --out load.json
    python tests/bench/load.py PICTURES --only throughput --seconds 20 -- --workers 1

Clients are asyncio's, in a process of their own. The parts, which --only chooses among:

throughput: 8 clients for --seconds, beside the embedded codec on the same cores just before and just after.
memory: 1,000 pictures of random sizes by 8 clients; how much the workers grow after they have warmed up.
overload: 64 clients on a queue of 8, first without a second try, then with; refusals, their times and hints.
kill: a worker is killed under load; what clients that try again see.
terminate: SIGTERM under load; what became of the calls in flight.
cancel: an encoding of 50 megapixels is given up at several moments; when the workers' CPUs are idle again.
broken: all files below --broken by 8 clients.

What follows -- goes to every server. Times in ms unless their name says seconds; memory in MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from head import head

from hourglass.client import AsyncClient
from hourglass.codec import Codec, errors, image
from hourglass.codec.runtime import usable_cores
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Load:
    """What clients saw. ms: of calls that succeeded, of those that were refused, of all others. counts: calls by
    status. failed: when calls began that did not succeed, by the monotonic clock.
    """

    seconds: float = 0.0
    pixels: int = 0
    accepted_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    other_ms: list[float] = field(default_factory=list)
    failed: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    without_retry_info: int = 0


def crops_of(files: list[bytes]) -> list[bytes]:
    """40 crops of pictures, of random sizes, as PPM."""
    chance = random.Random(1)
    crops = []
    for _ in range(40):
        pixels = image.read(chance.choice(files))
        height, width = (chance.randint(16, side) for side in pixels.shape[:2])
        crops.append(image.write(pixels[:height, :width], "PPM"))
    return crops


def embedded(files: list[bytes], seconds: float, answers: Any) -> None:
    """Pixels a second of the codec in a process of its own: the better of one call at a time and one for each core."""
    cores, best = usable_cores(), 0.0
    sizes = {file: image.read(file).shape for file in files}
    for calls, threads in ((1, cores), (cores, 1)):
        codec = Codec(threads=threads)
        codec.warm_up()
        end, pixels = time.monotonic() + seconds / 2, 0
        began = time.monotonic()

        def work(place: int, codec: Codec = codec, end: float = end) -> int:
            done = 0
            while time.monotonic() < end:
                file = files[place % len(files)]
                codec.encode(file)
                done += sizes[file][0] * sizes[file][1]
                place += 5
            return done

        with ThreadPoolExecutor(calls) as pool:
            pixels = sum(pool.map(work, range(calls)))
        best = max(best, pixels / (time.monotonic() - began))
    answers.send(best)


def clients(address: str, files: list[bytes], count: int, limits: tuple[float, int], kind: str, answers: Any) -> None:
    """A process of clients. limits: seconds, requests. kind: "raw" or "patient"; or "each", raw ones for every file
    once.
    """
    answers.send(asyncio.run(_clients(address, files, count, limits, kind)))


async def _clients(address: str, files: list[bytes], count: int, limits: tuple[float, int], kind: str) -> Load:
    load, left = Load(), iter(range(limits[1] or 1 << 62))
    sizes = {} if kind == "each" else {file: image.read(file).shape for file in set(files)}
    began = time.monotonic()
    end = began + limits[0] if limits[0] else float("inf")

    async def one(number: int) -> None:
        chance = random.Random(number)
        call = Patient(address) if kind == "patient" else Raw(address)
        async with call:
            await asyncio.sleep(number / count)  # not all at once
            while time.monotonic() < end and (place := next(left, None)) is not None:
                file = files[place] if kind == "each" else chance.choice(files)
                start = time.monotonic()
                status, hinted = await call.encode(file)
                took = (time.monotonic() - start) * 1000
                load.counts[status] += 1
                if status == "OK":
                    load.accepted_ms.append(took)
                    load.pixels += sizes[file][0] * sizes[file][1] if sizes else 0
                elif status == "RESOURCE_EXHAUSTED":
                    load.refused_ms.append(took)
                    load.without_retry_info += not hinted
                    await asyncio.sleep(chance.uniform(0.1, 0.3))
                else:
                    load.other_ms.append(took)
                if status != "OK":
                    load.failed.append(start)
                if status == "UNAVAILABLE":  # it goes away, and this client with it
                    return

    await asyncio.gather(*(one(number) for number in range(count)))
    load.seconds = time.monotonic() - began
    return load


class Raw:
    """A client that never tries again, on a connection of its own."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            address, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        )
        self._stub: Any = codec_pb2_grpc.CodecServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def encode(self, file: bytes) -> tuple[str, bool]:
        """Status, and whether it said when to try again."""
        try:
            await self._stub.Encode(pb.EncodeRequest(image_file=file), timeout=120)
        except grpc.aio.AioRpcError as error:
            status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]
            hints = [detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details] if status else []
            return error.code().name, any(hints)
        return "OK", False

    async def __aenter__(self) -> Raw:
        await self._channel.channel_ready()  # to connect is no part of a call
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()


class Patient:
    """Hourglass's own client, which tries again."""

    def __init__(self, address: str) -> None:
        self._client = AsyncClient(address)

    async def encode(self, file: bytes) -> tuple[str, bool]:
        """Status."""
        try:
            await self._client.encode(file)
        except errors.HourglassError as error:
            return f"{type(error).__name__}: {error}"[:200], False
        return "OK", False

    async def __aenter__(self) -> Patient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()


@contextlib.contextmanager
def server(flags: list[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server: its address and its first process."""
    command = [str(Path(sys.executable).with_name("hourglass-server")), "--listen", "127.0.0.1:0", *flags]
    with subprocess.Popen([*command, "--log-level", "info"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = ""
        while "listening on" not in line:
            line = process.stderr.readline()
            if not line:
                sys.exit("the server did not start")
        drain = ThreadPoolExecutor(1)
        drain.submit(process.stderr.read)
        try:
            yield json.loads(line)["message"].split("listening on ")[1].split(",")[0], process
        finally:
            process.terminate()
            process.wait()
            drain.shutdown()


def workers_of(pid: int) -> list[int]:
    """The server's children that work, not the helper of multiprocessing."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def used(pids: list[int]) -> tuple[float, int]:
    """CPU seconds and resident bytes of processes."""
    seconds, resident = 0.0, 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / TICKS
        resident += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return seconds, resident


class Running:
    """`target` in a process of its own; its last argument is a pipe that it sends its result to."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._mine, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(*arguments, theirs))
        self._process.start()
        theirs.close()

    def result(self, each_second: Callable[[], None] = lambda: None) -> Any:
        """What it sends, once it does."""
        while not self._mine.poll(1.0):
            each_second()
        answer = self._mine.recv()
        self._process.join()
        return answer


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p99 and worst, in ms."""
    if not values:
        return {}
    ordered = sorted(values)
    at = lambda part: round(ordered[min(int(part * len(ordered)), len(ordered) - 1)], 1)  # noqa: E731
    return {"p50": at(0.5), "p99": at(0.99), "worst": round(ordered[-1], 1)}


def growth(memory: list[float]) -> float:
    """Per cent by which the mean of the last fifth of the memory's course is above that of the second fifth."""
    fifth = len(memory) // 5
    if not fifth:
        return 0.0
    early, late = (statistics.mean(memory[a:b]) for a, b in ((fifth, 2 * fifth), (-fifth, None)))
    return round(100 * (late / early - 1), 2)


def told(load: Load) -> dict[str, Any]:
    """Figures of a load."""
    figures: dict[str, Any] = {"calls": sum(load.counts.values()), "status": dict(load.counts)}
    for name in ("accepted_ms", "refused_ms", "other_ms"):
        if values := getattr(load, name):
            figures[name] = percentiles(values)
    return figures


@dataclass
class Bench:
    """All parts, and what they need."""

    files: list[bytes]
    broken: list[bytes]
    seconds: float
    flags: list[str]

    def throughput(self) -> dict[str, Any]:
        alone = [Running(embedded, self.files, self.seconds / 4).result()]
        with server(self.flags) as (address, process):
            pids = workers_of(process.pid)
            before, began = used(pids)[0], time.monotonic()
            load: Load = Running(clients, address, self.files, 8, (self.seconds, 0), "raw").result()
            cores = (used(pids)[0] - before) / (time.monotonic() - began)
        alone.append(Running(embedded, self.files, self.seconds / 4).result())
        served = load.pixels / load.seconds
        return {
            "mp_per_s": round(served / 1e6, 3),
            "embedded_mp_per_s": [round(value / 1e6, 3) for value in alone],
            "share_of_embedded": round(served / statistics.mean(alone), 3),
            "cores_in_use": round(cores, 2),
            **told(load),
        }

    def memory(self) -> dict[str, Any]:
        with server(self.flags) as (address, process):
            pids, course = workers_of(process.pid), list[float]()
            running = Running(clients, address, crops_of(self.files), 8, (0, 1000), "raw")
            load = running.result(lambda: course.append(round(used(pids)[1] / (1 << 20), 1)))
        return {"growth_percent": growth(course), **told(load), "workers_mib_each_second": course}

    def overload(self) -> dict[str, Any]:
        with server([*self.flags, "--queue", "8"]) as (address, _):
            raw: Load = Running(clients, address, self.files, 64, (self.seconds / 6, 0), "raw").result()
            patient = Running(clients, address, self.files, 64, (0, 192), "patient").result()
        hints = {"refused_without_retry_info": raw.without_retry_info}
        return {"without_second_try": {**told(raw), **hints}, "with_retries": told(patient)}

    def kill(self) -> dict[str, Any]:
        with server(self.flags) as (address, process):
            running = Running(clients, address, self.files, 8, (self.seconds / 3, 0), "patient")
            time.sleep(self.seconds / 10 + 2)
            os.kill(workers_of(process.pid)[0], signal.SIGKILL)
            return told(running.result())

    def terminate(self) -> dict[str, Any]:
        with server(self.flags) as (address, process):
            running = Running(clients, address, self.files, 8, (60, 0), "raw")
            time.sleep(self.seconds / 12 + 2)
            process.terminate()
            at = time.monotonic()
            load: Load = running.result()
            status = process.wait()
        # A call that began in the moments before was not yet in the house: it is refused, not broken off.
        lost = sum(begun < at - 0.1 for begun in load.failed)
        return {"exit_status": status, "in_flight_that_failed": lost, **told(load)}

    def cancel(self) -> dict[str, Any]:
        photo = image.read(self.files[0])
        across = np.tile(photo, (1, -(-8190 // photo.shape[1]), 1))
        # Each time moved on: rows that come twice would make it a drawing, to be stored without loss.
        rows = [np.roll(across, 37 * turn, 1)[:, :8190] for turn in range(-(-6100 // photo.shape[0]))]
        pixels = np.concatenate(rows)[:6100]
        sources = {"pixels": pixels.tobytes(), "PNG": image.write(pixels, "PNG"), "JPEG": image.write(pixels, "JPEG")}
        found: dict[str, Any] = {"pixels": pixels.shape[0] * pixels.shape[1]}
        with server(self.flags) as (address, process), grpc.insecure_channel(address) as channel:
            stub: Any = codec_pb2_grpc.CodecServiceStub(channel)  # type: ignore[no-untyped-call]
            pids = workers_of(process.pid)
            for name, content in sources.items():
                for after in (0.1, 0.5, 2.0):
                    seconds = cancelled(stub, pids, content, pixels.shape if name == "pixels" else None, after)
                    found[f"{name}, after {after:g} s"] = {"idle_seconds": seconds}
        found["worst_idle_seconds"] = max(entry["idle_seconds"] for entry in found.values() if isinstance(entry, dict))
        return found

    def refuse(self) -> dict[str, Any]:
        with server(self.flags) as (address, process):
            before = workers_of(process.pid)
            load = Running(clients, address, self.broken, 8, (0, len(self.broken)), "each").result()
            return {"workers_that_died": len(set(before) - set(workers_of(process.pid))), **told(load)}


def cancelled(stub: Any, pids: list[int], content: bytes, shape: tuple[int, ...] | None, after: float) -> float:
    """Seconds until processes are idle, once an encoding is given up `after` seconds behind its last byte."""
    sent = threading.Event()
    start = pb.EncodeStart(request=pb.EncodeRequest(), total_bytes=len(content))
    if shape:
        start.pixels.CopyFrom(pb.Pixels(width=shape[1], height=shape[0], channels=shape[2]))

    def requests() -> Iterator[pb.EncodeStreamRequest]:
        yield pb.EncodeStreamRequest(start=start)
        for begin in range(0, len(content), 1 << 20):
            yield pb.EncodeStreamRequest(chunk=content[begin : begin + (1 << 20)])
        sent.set()

    call = stub.EncodeStream(requests())
    sent.wait()
    time.sleep(after)
    if not call.is_active():
        raise SystemExit(f"the encoding to be given up was over before {after:g} s: {call.code()}")
    call.cancel()
    began = time.monotonic()
    course = []
    while time.monotonic() < began + 2.5:
        course.append((time.monotonic() - began, used(pids)[0]))
        time.sleep(0.01)
    # Idle from the moment on behind which no fifth of a second takes 15 % of a core.
    busy = [
        now
        for now, spent in course
        if next((more - spent for later, more in course if later >= now + 0.2), 0.0) >= 0.03
    ]
    return round(busy[-1] + 0.2, 2) if busy else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--broken", type=Path, help="folder of odd and broken files; without it that part is left out")
    parser.add_argument("--seconds", type=float, default=60, help="of the longest part; others take theirs from it")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path)
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options, flags = parser.parse_args(given[:cut]), given[cut + 1 :]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    files = [path.read_bytes() for path in image.list_pictures(options.pictures)[:24]]
    broken = (
        [path.read_bytes() for path in sorted(options.broken.rglob("*")) if path.is_file()] if options.broken else []
    )
    bench = Bench(files, broken, options.seconds, flags)
    results: dict[str, Any] = {
        **head(),
        "flags": flags,
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    began = time.monotonic()
    for name in options.only:
        if name == "broken" and not broken:
            continue
        results[name] = PARTS[name](bench)
        print(name, json.dumps({k: v for k, v in results[name].items() if k != "workers_mib_each_second"}), flush=True)
    results["seconds"] = round(time.monotonic() - began)
    print(f"{results['seconds']} s")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "throughput": Bench.throughput,
    "memory": Bench.memory,
    "overload": Bench.overload,
    "kill": Bench.kill,
    "terminate": Bench.terminate,
    "cancel": Bench.cancel,
    "broken": Bench.refuse,
}


if __name__ == "__main__":
    main()
