"""What tests share: photographs, one codec, one real server, and the table printed at the end of the run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Tests run in processes beside each other: one thread in each, or threads that wait for each other take a core's time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported

import numpy as np
import pytest
from numpy.typing import NDArray

from hourglass.client import Client
from hourglass.codec import Codec, metrics, runtime
from hourglass.server.config import Config
from hourglass.server.worker import Server

HERE = Path(__file__).parent
ROOT = HERE.parent
PHOTOS = sorted((HERE / "images").glob("*.png"))


@dataclass(frozen=True)
class Row:
    picture: str
    quality: float
    bytes: int
    bpp: float
    ratio: float
    psnr: float
    ms_ssim: float


TABLE: list[Row] = []


@pytest.fixture(params=PHOTOS, ids=lambda path: path.stem)
def photo(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="session")
def parrots() -> Path:
    return HERE / "images" / "parrots.png"


@pytest.fixture(scope="session")
def codec() -> Codec:
    return Codec()


@pytest.fixture
def with_tiles(tmp_path: Path) -> Callable[..., Codec]:
    """side, whole, threads -> a codec with a copy of the default model whose tiles have `side` pixels at most, and
    pictures of up to `whole` are one."""

    def made(side: int, whole: int = 0, threads: int | None = None) -> Codec:
        copy = tmp_path / f"tiles-{side}-{whole}" / runtime.DEFAULT_MODEL
        shutil.copytree(runtime.ZOO / runtime.DEFAULT_MODEL, copy)
        manifest: dict[str, Any] = json.loads((copy / "manifest.json").read_text())
        manifest["code"][2] |= {"stride": side, "whole": whole}
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return Codec(zoo=copy.parent, threads=threads)

    return made


@contextmanager
def _served(config: Config) -> Iterator[Server]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(config)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(60)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="session")
def serve() -> Callable[[Config], AbstractContextManager[Server]]:
    """A server in a thread of this process, for as long as the context lasts."""
    return _served


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """HOST:PORT of a server that runs in a thread for the whole session."""
    with _served(Config(listen="127.0.0.1:0", slots=2)) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as connected:
        yield connected


@pytest.fixture(scope="session")
def report() -> Callable[[str, float, int, NDArray[np.uint8], NDArray[np.uint8]], Row]:
    """Measure a decoded picture against its original, and add a row to the table at the end."""

    def add(picture: str, quality: float, size: int, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> Row:
        height, width = a.shape[:2]
        bpp, ratio = metrics.bpp(size, width, height), metrics.compression_ratio(size, width, height)
        TABLE.append(Row(picture, quality, size, bpp, ratio, metrics.psnr(a, b), metrics.ms_ssim(a, b)))
        return TABLE[-1]

    return add


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process beside others hands its rows to the one that prints."""
    handed = getattr(session.config, "workeroutput", None)
    if handed is not None:
        handed["table"] = [asdict(row) for row in TABLE]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    TABLE.extend(Row(**row) for row in getattr(node, "workeroutput", {}).get("table", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TABLE:
        return
    terminalreporter.section("what the codec makes of the test photographs")
    terminalreporter.line(
        f"{'picture':<14}{'quality':>8}{'bytes':>9}{'bpp':>8}{'ratio':>8}{'PSNR dB':>9}{'MS-SSIM':>9}"
    )
    for r in sorted(TABLE, key=lambda row: (row.picture, row.quality, row.bytes)):
        terminalreporter.line(
            f"{r.picture:<14}{r.quality:>8g}{r.bytes:>9}{r.bpp:>8.3f}{r.ratio:>8.1f}{r.psnr:>9.2f}{r.ms_ssim:>9.4f}"
        )
