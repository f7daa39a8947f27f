"""Load on a server of its own, by asyncio clients in another process, against the embedded codec on the same cores.

    python tests/bench/load.py PICTURES --seconds 60 --clients 8 --out load.json
    python tests/bench/load.py PICTURES --overload --clients 64 -- --queue 8
    python tests/bench/load.py PICTURES --requests 1000 --random-sizes

What follows -- goes to the server. Embedded and served are measured in turns, `--rounds` of them, because machines
that do other things too drift. Prints throughput in megapixels a second, p50 and p99 in ms, errors and the cores that
the workers use; writes all of it, with the workers' memory over time, as JSON.
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
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hourglass.client import AsyncClient
from hourglass.codec import Codec, errors, image
from hourglass.codec.runtime import usable_cores
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Load:
    """What clients saw. ms: of calls that succeeded, of those that were refused. counts: calls by status."""

    seconds: float = 0.0
    pixels: int = 0
    accepted_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    without_retry_info: int = 0


def pictures_of(folder: Path, sizes: bool) -> list[bytes]:
    """Files of pictures: those of `folder`, or 40 crops of them of random sizes as PPM."""
    files = [path.read_bytes() for path in image.list_pictures(folder)[:24]]
    if not sizes:
        return files
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
    """A process of clients. limits: seconds, requests."""
    answers.send(asyncio.run(_clients(address, files, count, limits, kind)))


async def _clients(address: str, files: list[bytes], count: int, limits: tuple[float, int], kind: str) -> Load:
    load, left = Load(), iter(range(limits[1] or 1 << 62))
    sizes = {file: image.read(file).shape for file in set(files)}
    began = time.monotonic()
    end = began + limits[0] if limits[0] else float("inf")

    async def one(number: int) -> None:
        chance = random.Random(number)
        call = Raw(address) if kind == "raw" else Patient(address)
        async with call:
            await asyncio.sleep(number / count)  # not all at once
            while time.monotonic() < end and next(left, None) is not None:
                file = chance.choice(files)
                start = time.monotonic()
                status, hinted = await call.encode(file)
                took = (time.monotonic() - start) * 1000
                load.counts[status] += 1
                if status == "OK":
                    load.accepted_ms.append(took)
                    load.pixels += sizes[file][0] * sizes[file][1]
                elif status == "RESOURCE_EXHAUSTED":
                    load.refused_ms.append(took)
                    load.without_retry_info += not hinted
                    await asyncio.sleep(chance.uniform(0.1, 0.3))

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
def server(flags: list[str]) -> Iterator[tuple[str, int]]:
    """A server; its address and the id of its first process."""
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
            yield json.loads(line)["message"].split("listening on ")[1].split(",")[0], process.pid
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


def run(target: Any, *arguments: Any, pids: list[int] | None = None) -> tuple[Any, list[tuple[float, float]], float]:
    """What `target` sends from its own process; memory of `pids` over time, (seconds, MiB); their cores in use."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=target, args=(*arguments, theirs))
    began, before = time.monotonic(), used(pids or [])[0]
    process.start()
    theirs.close()
    memory = []
    while not mine.poll(1.0):
        memory.append((round(time.monotonic() - began, 1), round(used(pids or [])[1] / (1 << 20), 1)))
    result = mine.recv()
    cores = (used(pids or [])[0] - before) / (time.monotonic() - began)
    process.join()
    return result, memory, cores


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p99 and worst, in ms."""
    if not values:
        return {}
    ordered = sorted(values)
    at = lambda part: round(ordered[min(int(part * len(ordered)), len(ordered) - 1)], 1)  # noqa: E731
    return {"p50": at(0.5), "p99": at(0.99), "worst": round(ordered[-1], 1)}


def drift(memory: list[tuple[float, float]]) -> float:
    """Per cent by which the mean of the last third of the memory's course is above that of the middle third."""
    third = len(memory) // 3
    if not third:
        return 0.0
    middle, last = (statistics.mean(size for _, size in memory[a:b]) for a, b in ((third, 2 * third), (-third, None)))
    return round(100 * (last / middle - 1), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=0, help="end after so many, not after seconds")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--random-sizes", action="store_true")
    parser.add_argument("--overload", action="store_true", help="count refusals; no embedded codec")
    parser.add_argument("--patient", action="store_true", help="clients that try again")
    parser.add_argument("--out", type=Path)
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    options, flags = parser.parse_args(given[:cut]), given[cut + 1 :]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    files = pictures_of(options.pictures, options.random_sizes)
    limits = (0.0 if options.requests else options.seconds, options.requests)
    kind = "patient" if options.patient else "raw"
    rounds = []
    with server(flags) as (address, pid):
        pids = workers_of(pid)
        for _ in range(options.rounds):
            alone = 0.0 if options.overload else run(embedded, files, options.seconds / 2)[0]
            load, memory, cores = run(clients, address, files, options.clients, limits, kind, pids=pids)
            rounds.append(summary(load, memory, cores, alone))
            print(json.dumps({k: v for k, v in rounds[-1].items() if k != "memory_mib"}), flush=True)
    if options.out:
        facts = {"date": time.strftime("%Y-%m-%d"), "cores": usable_cores(), "flags": flags}
        options.out.write_text(json.dumps({**facts, "clients": options.clients, "rounds": rounds}, indent=1) + "\n")


def summary(load: Load, memory: list[tuple[float, float]], cores: float, alone: float) -> dict[str, Any]:
    """One round's figures."""
    served = load.pixels / load.seconds
    return {
        "mp_per_s": round(served / 1e6, 3),
        "embedded_mp_per_s": round(alone / 1e6, 3),
        "share_of_embedded": round(served / alone, 3) if alone else None,
        "calls": sum(load.counts.values()),
        "status": dict(load.counts),
        "accepted_ms": percentiles(load.accepted_ms),
        "refused_ms": percentiles(load.refused_ms),
        "refused_without_retry_info": load.without_retry_info,
        "cores_in_use": round(cores, 2),
        "memory_drift_percent": drift(memory),
        "memory_mib": memory,
    }


if __name__ == "__main__":
    main()
