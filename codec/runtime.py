"""Models at run time: the zoo, its manifests and frozen numbers, the ONNX sessions. The only user of onnxruntime.

A model is a folder `zoo/<id>/`: encoder.onnx, decoder.onnx, tables.npz, manifest.json. The manifest names the sha256
of the other files; each is verified when it is first loaded, and no file is loaded before it is needed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.entropy import Tables
from hourglass.codec.errors import HourglassError, ModelError, UnknownModelError

if TYPE_CHECKING:
    import onnxruntime as ort

ZOO = Path(__file__).parent / "zoo"
"""The models that ship with the package."""

DEFAULT_MODEL = "hourglass-0"


def model_ids(zoo: Path = ZOO) -> list[str]:
    """Ids of the models in a zoo, sorted."""
    return sorted(path.parent.name for path in zoo.glob("*/manifest.json"))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class TensorRule:
    """The rule for one code tensor: (channels, ceil(H / stride), ceil(W / stride)) int16."""

    name: str
    channels: int
    stride: int

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        return self.channels, -(-height // self.stride), -(-width // self.stride)


class Model:
    """One model of a zoo. Thread-safe; sessions are made on first use and kept.

    threads: cores that one analysis or synthesis may use; the symbols do not depend on it.

    Raises `UnknownModelError` (no such id), and `ModelError` whenever a file is missing or is not what the
    manifest says.
    """

    def __init__(self, model_id: str, zoo: Path = ZOO, threads: int | None = None) -> None:
        self.id = model_id
        self._folder = zoo / model_id
        self._threads = threads or usable_cores()
        self._lock = threading.Lock()
        self._sessions: dict[str, ort.InferenceSession] = {}
        if model_id not in (known := model_ids(zoo)):
            raise UnknownModelError(f"no model {model_id!r} is installed; known models: {', '.join(known) or 'none'}")
        try:
            self.manifest: dict[str, Any] = json.loads((self._folder / "manifest.json").read_text())
            self.tensor = TensorRule(**self.manifest["code"])
            self._sha256: dict[str, str] = dict(self.manifest["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ModelError(f"model {model_id!r} has an unusable manifest: {exc!r}; reinstall the package") from exc

    @cached_property
    def _numbers(self) -> dict[str, NDArray[Any]]:
        with np.load(io.BytesIO(self._file("tables.npz")), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    @cached_property
    def tables(self) -> Tables:
        """The frozen probability tables."""
        return Tables(*(self._numbers[name] for name in ("first", "start", "frequencies")))

    def table_index(self, quality: float) -> NDArray[np.uint8]:
        """(channels,) uint8: the table that each channel of the code uses at `quality`."""
        index: NDArray[np.uint8] = self._numbers["index"][int(quality + 0.5)]
        return index

    def gain(self, quality: float) -> NDArray[np.float32]:
        """(channels,) float32: what the latent is multiplied by before rounding."""
        return self._at_quality("log_gain", quality)

    def inverse_gain(self, quality: float) -> NDArray[np.float32]:
        """(channels,) float32: what a symbol is multiplied by before synthesis."""
        return self._at_quality("log_inverse", quality)

    def _at_quality(self, name: str, quality: float) -> NDArray[np.float32]:
        """exp of an (anchors, channels) table of logarithms, linear in between; anchors lie evenly in 0..100."""
        rows = self._numbers[name]
        place = quality / 100 * (len(rows) - 1)
        low = min(int(place), len(rows) - 2)
        part = np.float32(place - low)
        return np.asarray(np.exp(rows[low] * (1 - part) + rows[low + 1] * part), np.float32)

    def analyse(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Analysis transform: (H, W, 3) uint8 -> latent (channels, ceil(H / stride), ceil(W / stride)) float32.

        Sides that are no multiple of the stride are padded with their last row or column.
        """
        height, width = pixels.shape[:2]
        stride = self.tensor.stride
        bottom, right = -height % stride, -width % stride
        if bottom or right:
            pixels = np.pad(pixels, ((0, bottom), (0, right), (0, 0)), mode="edge")
        return self._run("encoder.onnx", "image", pixels)

    def synthesise(self, latent: NDArray[np.float32], width: int, height: int) -> NDArray[np.uint8]:
        """Synthesis transform: latent (channels, h, w) float32 -> (height, width, 3) uint8."""
        return np.ascontiguousarray(self._run("decoder.onnx", "latent", latent)[:height, :width])

    def _run(self, file: str, name: str, value: NDArray[Any]) -> NDArray[Any]:
        session = self._sessions.get(file) or self._open(file)
        try:
            (result,) = session.run(None, {name: value[None]})
        except Exception as exc:  # onnxruntime's exceptions share no public base class
            raise HourglassError(f"{file} of model {self.id!r} failed on {value.shape}: {exc}") from exc
        first: NDArray[Any] = result[0]
        return first

    def _open(self, file: str) -> ort.InferenceSession:
        import onnxruntime as ort

        with self._lock:
            if file not in self._sessions:
                options = ort.SessionOptions()
                options.intra_op_num_threads = self._threads
                # Without the arena memory goes back after each picture; a busy server gains nothing from spinning.
                options.enable_cpu_mem_arena = False
                options.add_session_config_entry("session.intra_op.allow_spinning", "0")
                options.log_severity_level = 3
                self._sessions[file] = ort.InferenceSession(
                    self._file(file), options, providers=["CPUExecutionProvider"]
                )
            return self._sessions[file]

    def _file(self, name: str) -> bytes:
        try:
            data = (self._folder / name).read_bytes()
        except OSError as exc:
            raise ModelError(f"model {self.id!r} lacks {name}: {exc}; reinstall the package") from exc
        digest = hashlib.sha256(data).hexdigest()
        if digest != self._sha256.get(name):
            raise ModelError(
                f"{name} of model {self.id!r} has sha256 {digest}, its manifest says {self._sha256.get(name)}; "
                "reinstall the package"
            )
        return data
