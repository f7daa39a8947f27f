"""Models at run time: the zoo, its manifests and frozen numbers, the ONNX sessions. The only user of onnxruntime.

A model is a folder `zoo/<id>/`: manifest.json, tables.npz, encoder.onnx, decoder.onnx and what else its family has. The
manifest names the sha256 of the other files; each is verified when it is first loaded, and no file is loaded before it
is needed.

    Model
    +-- Hyperprior   the flagship: prior.onnx says the tables, from a hyper-latent and what is known of the latent
    +-- Classic      static tables for each channel; location maps where it pools by maximum
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import exactness
from hourglass.codec.entropy import TOTAL, Tables
from hourglass.codec.errors import HourglassError, ModelError, UnknownModelError
from hourglass.codec.watch import hop

if TYPE_CHECKING:
    import onnxruntime as ort

ZOO = Path(__file__).parent / "zoo"
"""The models that ship with the package."""

HYPER_STEP = 4
"""What prior.onnx calls the step for the hyper-latent, of a model where it has a context; 0 to 3 are the latent's."""

DEFAULT_MODEL = "hourglass-13"

# Since 1.29 onnxruntime tells its maker, on Linux too, which models it runs, unless this is set before it loads.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def model_ids(zoo: Path = ZOO) -> list[str]:
    """Ids of the models in a zoo, sorted."""
    return sorted(path.parent.name for path in zoo.glob("*/manifest.json"))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


STRIDE = 16
"""Pixels a side that one position of the latent covers."""

PADDING = 64
"""Pixels a side that one position of the hyper-latent covers; pictures are padded to multiples of it."""

_FILTERED = 2
"""The largest scale at which a post-filter is part of the graph that makes pixels, where the manifest says nothing."""

_HOPS = {"encoder.onnx": "analysis", "prior.onnx": "prior", "gradient.onnx": "quantisation"}
"""What running a graph is a part of, in `watch.HOPS`; all others make pixels."""

_EXPONENT = 60 * 256
"""Largest magnitude of the exponents of the prior's units, and of what scales have beside, in 1/256 octaves: no product
overflows or underflows, and 6 times the sum of two and 5120 is below what the proof takes for `level_offset`."""


@dataclass(frozen=True)
class TensorRule:
    """The rule for one code tensor: (channels, ceil(H / stride), ceil(W / stride)) int16.

    whole: pixels a side up to which a picture has one position all the same.
    """

    name: str
    channels: int
    stride: int
    whole: int = 0

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        if max(width, height) <= self.whole:
            return self.channels, 1, 1
        return self.channels, -(-height // self.stride), -(-width // self.stride)

    def part(self, tensor: NDArray[np.int16], x: int, y: int, width: int, height: int) -> NDArray[np.int16]:
        """The view of a rectangle given in pixels, its corner multiples of `stride`."""
        rows, columns = self.shape(width, height)[1:]
        top, left = y // self.stride, x // self.stride
        return tensor[:, top : top + rows, left : left + columns]


@dataclass(frozen=True)
class Units:
    """Inputs of prior.onnx that depend on quality and width; integers, or integers of 9 bits times powers of two.

    known_unit: for `known_of`. mean_unit, level_offset, known_unit: for each step in its order. hyper_mean_unit,
    hyper_level_offset: for the hyper-latent, of a model that is `contextual`.
    """

    width: NDArray[np.int64]
    quality: NDArray[np.float32]
    hyper_unit: NDArray[np.float32]
    hyper_mean_unit: NDArray[np.float32]
    hyper_level_offset: NDArray[np.float32]
    known_unit: list[NDArray[np.float32]]
    mean_unit: list[NDArray[np.float32]]
    level_offset: list[NDArray[np.float32]]


@dataclass(frozen=True)
class Patch:
    """Dequantised latents of a rectangle and of what lies around it, and which of them are the rectangle's.

    core (1, c, h, w) float32. rest (1, r, h, w) float32, or of the rectangle and the model's `ring` around it where its
    `lone_rest`, or (1, r, 1, 1) where it is all zero. keep: first and last row, first and last column (exclusive).
    """

    core: NDArray[np.float32]
    rest: NDArray[np.float32]
    keep: tuple[int, int, int, int]
    quality: float


Analysis: TypeAlias = Mapping[str, NDArray[Any]]
"""What the analysis transforms make of a tile: by name the latent, and what else the family's code has, (C, h, w)."""


def open_model(model_id: str, zoo: Path = ZOO, threads: int | None = None) -> Model:
    """A model of a zoo, of the class of its family.

    threads: cores that one analysis or synthesis may use; the symbols do not depend on it.

    Raises `UnknownModelError` (no such id), and `ModelError` when its manifest is unusable.
    """
    if model_id not in (known := model_ids(zoo)):
        raise UnknownModelError(f"no model {model_id!r} is installed; known models: {', '.join(known) or 'none'}")
    try:
        manifest: dict[str, Any] = json.loads((zoo / model_id / "manifest.json").read_text())
        family = _FAMILIES[manifest.get("family", "hyperprior")]
        return family(model_id, zoo / model_id, manifest, threads or usable_cores())
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ModelError(f"model {model_id!r} has an unusable manifest: {exc!r}; reinstall the package") from exc


def trim() -> None:
    """Give free memory back to the system, which glibc does not do by itself."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


class Model:
    """One model of a zoo; `open_model` makes it. Thread-safe; sessions are made on first use and kept.

    id: permanent. manifest: as plain data. tensors: the rules of its code tensors, the first of them the latent.
    coded: the rule of the tensor that says how many channels of each tile's latent are coded, or None for all of them.
    widths: how many of each quarter of the latent's channels may be coded. side: of a tile, in pixels. whole: of a
    picture that is one tile all the same, 0 for none. padding: pictures are padded to multiples of it. edge: the same
    for what the transforms see; behind that they see zeros, as behind the crops of training. halo: positions around a
    tile that the transforms look at. reach: positions of the latent beyond its own that a pixel depends on. core:
    channels of each quarter that every tile's synthesis gets.
    lone_rest: whether it gets the others of the positions that are wanted alone, and of `ring` positions around them,
    at which a post-filter looks; nothing else around depends on them.
    colours: channels of the pictures, 3, or 1 for a model of grey ones. grey: id of the model for grey pictures,
    or None. short: whether its files have short headers, see `container`.

    Raises `ModelError` whenever a file is missing or is not what the manifest says.
    """

    coded: TensorRule | None = None
    colours = 3
    grey: str | None = None
    side: int
    whole = 0
    padding: int
    edge: int = STRIDE
    reach: int
    core: int
    lone_rest = False
    ring = 0
    _reduces = False  # whether it has graphs for smaller pictures
    widths: tuple[int, ...]

    def __init__(self, model_id: str, folder: Path, manifest: dict[str, Any], threads: int) -> None:
        self.id, self.manifest = model_id, manifest
        self._folder = folder
        self._threads = threads
        self._lock = threading.Lock()
        self._sessions: dict[str, Future[ort.InferenceSession]] = {}
        self._costs: dict[int, NDArray[np.float32]] = {}
        self.tensors = tuple(TensorRule(**rule) for rule in manifest["code"])
        self.latent = self.tensors[0]
        self.halo = int(manifest["halo"])
        self.short = manifest.get("format", 1) == 2
        self._sha256: dict[str, str] = dict(manifest["sha256"])

    @cached_property
    def _numbers(self) -> dict[str, NDArray[Any]]:
        with np.load(io.BytesIO(self._file("tables.npz")), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    @cached_property
    def tables(self) -> Tables:
        """The frozen probability tables."""
        return Tables(*(self._numbers[name] for name in ("first", "start", "frequencies")))

    def costs(self, reach: int) -> NDArray[np.float32]:
        """(tables, 2 reach + 1) float32: bits of the symbols -reach..reach in each table, escapes at 32."""
        if reach not in self._costs:
            tables = self.tables
            costs = np.full((len(tables), 2 * reach + 1), 32, np.float32)
            for table in range(len(tables)):
                bits = -np.log2(tables.frequencies_of(table)[:-1] / TOTAL)
                first = int(tables.first[table])
                low, high = max(first, -reach), min(first + len(bits), reach + 1)
                if low < high:
                    costs[table, low + reach : high + reach] = bits[low - first : high - first]
            self._costs[reach] = costs
        return self._costs[reach]

    def gain(self, quality: float) -> NDArray[np.float32]:
        """(C,) float32: what the latent is multiplied by before rounding."""
        return self._at_quality("log_gain", quality)

    def inverse_gain(self, quality: float) -> NDArray[np.float32]:
        """(C,) float32: what a dequantised symbol is multiplied by before synthesis."""
        return self._at_quality("log_inverse", quality)

    def _at_quality(self, name: str, quality: float) -> NDArray[np.float32]:
        """exp of an (anchors, channels) table of logarithms, linear in between; anchors lie evenly in 0..100."""
        rows = self._numbers[name]
        place = quality / 100 * (len(rows) - 1)
        low = min(int(place), len(rows) - 2)
        part = np.float32(place - low)
        return np.asarray(np.exp(rows[low] * (1 - part) + rows[low + 1] * part), np.float32)

    def analyse(self, pixels: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> Analysis:
        """Analysis transforms of a rectangle of a picture (H, W, 3) or (H, W) uint8: the latent, float32, and what else
        the family has of it.

        x, y: its corner, multiples of 64. Where the picture ends it is padded with its last row and column, up to a
        multiple of `edge`, and the latent with its last ones, up to one of `padding`.
        """
        raise NotImplementedError

    def synthesise(self, patch: Patch, scale: int = 1) -> NDArray[np.uint8]:
        """Synthesis transform: (16 rows / scale, 16 columns / scale, colours) uint8 of the positions to keep.

        scale: 1, or 2, 4, 8 for a smaller picture.
        """
        raise NotImplementedError

    def expect_prior(self) -> None:
        """Begin to load what says the tables of symbols, where a graph does, while other work is done."""

    def expect_synthesis(self, scale: int = 1) -> None:
        """Begin to load what `synthesise` needs, while other work is done."""
        self._ahead(self._graph_of(scale))

    def _graph_of(self, scale: int) -> str:
        """What makes pixels."""
        return f"reduced-{scale}.onnx" if scale > 1 and self._reduces else "decoder.onnx"

    def _image(self, pixels: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> dict[str, NDArray[Any]]:
        """The inputs of encoder.onnx for a rectangle, see `analyse`."""
        halo = self.halo * STRIDE
        bottom, right = y + height + -height % self.edge, x + width + -width % self.edge
        top, left = max(y - halo, 0), max(x - halo, 0)
        # Beyond the rectangle only what the picture has.
        low, far = (
            max(end, min(end + halo, size + -size % STRIDE))
            for end, size in ((bottom, pixels.shape[0]), (right, pixels.shape[1]))
        )
        part = pixels[top:low, left:far]
        if part.ndim == 2:
            part = np.repeat(part[..., None], self.colours, axis=2)
        missing = (low - top - part.shape[0], far - left - part.shape[1])
        if any(missing):
            part = np.pad(part, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        keep = np.array([y - top, bottom - top, x - left, right - left], np.int64) // STRIDE
        return {"image": np.ascontiguousarray(part)[None], "keep": keep}

    def _run(self, file: str, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        session = self._open(file)
        with hop(_HOPS.get(file, "synthesis")):
            try:
                results: list[NDArray[Any]] = session.run(None, inputs)
            except Exception as exc:  # onnxruntime's exceptions share no public base class
                shapes = ", ".join(f"{name} {value.shape}" for name, value in inputs.items())
                raise HourglassError(f"{file} of model {self.id!r} failed on {shapes}: {exc}") from exc
        return results

    def unload(self) -> None:
        """Close the sessions; they are opened again when they are used."""
        with self._lock:
            self._sessions.clear()

    def _ahead(self, file: str) -> None:
        """Begin to open a session that is needed soon, in a thread beside."""
        if file not in self._sessions:
            threading.Thread(target=self._open_quietly, args=(file,)).start()

    def _open_quietly(self, file: str) -> None:
        with suppress(Exception):  # whoever needs it meets the same error
            self._open(file)

    def _open(self, file: str) -> ort.InferenceSession:
        """The session of a graph, opened by the first who asks while the others wait."""
        with self._lock:
            opened = self._sessions.get(file)
            if mine := opened is None:
                opened = self._sessions[file] = Future()
        if mine:
            try:
                opened.set_result(self._session(file))
            except BaseException as exc:
                with self._lock:
                    self._sessions.pop(file, None)  # the next one tries again
                opened.set_exception(exc)
        return opened.result()

    def _session(self, file: str) -> ort.InferenceSession:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        # A busy server gains nothing from spinning.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        data = self._file(file)
        if file == "prior.onnx" and exactness.bounds(data) != self.manifest.get("exactness"):
            raise ModelError(f"prior.onnx of model {self.id!r} is not as exact as its manifest says; reinstall")
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

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


class Hyperprior(Model):
    """Mean and scale of each symbol come from prior.onnx, out of a hyper-latent z and what is known of the latent y.

    Further files: prior.onnx, gradient.onnx, reduced-2.onnx, -4 and -8. contextual: a half of the hyper-latent has a
    mean and a scale, too, out of the other half.
    """

    padding = PADDING
    _reduces = True

    def __init__(self, model_id: str, folder: Path, manifest: dict[str, Any], threads: int) -> None:
        super().__init__(model_id, folder, manifest, threads)
        _, self.hyper, self.coded = self.tensors
        self.side, self.whole = self.coded.stride, self.coded.whole
        self.widths = tuple(int(width) for width in manifest["widths"])
        self.edge = int(manifest.get("edge", PADDING))
        network = manifest["network"]
        self.core = int(network["core"]) // 4
        self.lone_rest = bool(manifest.get("lone_rest", False))
        self.ring = 1 if network.get("post") else 0
        self._filtered = int(manifest.get("filtered", _FILTERED))
        self.contextual = bool(network.get("contextual"))
        self._anchors = int(network["anchors"])
        # 3x3 filters, one in each block at 1/16 and 1/8 resolution, and one more.
        fine, coarse = network["synthesis_blocks"]
        self.reach = int(coarse) + (int(fine) + 2) // 2
        self._features, self._lambdas = network["features"], (network["lambda_low"], network["lambda_high"])

    @cached_property
    def _numbers(self) -> dict[str, NDArray[Any]]:
        numbers = super()._numbers
        # What the proof of exactness takes for granted of the prior's inputs.
        exponents = (numbers.get(name) for name in ("latent_exponent", "hyper_exponent", "scale_shift"))
        largest = max(abs(values.astype(np.int64)).max() for values in exponents if values is not None)
        if numbers["mantissa"].max() > exactness.MANTISSA or largest > _EXPONENT:
            raise ModelError(f"tables.npz of model {self.id!r} has units that prior.onnx is not exact for; reinstall")
        return numbers

    @property
    def level_tables(self) -> NDArray[np.uint8]:
        """(64,) uint8: the table of each scale of the prior's ladder."""
        tables: NDArray[np.uint8] = self._numbers["level_tables"]
        return tables

    def tables_of(self, level: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`level_tables` of levels (..., w), an array of its own; in a third of `take`'s time."""
        found = bytearray(np.ascontiguousarray(level).data).translate(self._translation)
        return np.frombuffer(found, np.uint8).reshape(level.shape)

    @cached_property
    def _translation(self) -> bytes:
        return self.level_tables.tobytes().ljust(256, b"\0")

    @cached_property
    def centroids(self) -> NDArray[np.int32] | None:
        """(64, 2 n + 1) int32, for each level and for symbols from -n (or below) to n (or above): how far from a symbol
        the centroid is that it stands for, in 1/FINE symbols. None where symbols stand for themselves.
        """
        nearer = self._numbers.get("nearer")
        if nearer is None:
            return None
        nearer = nearer.astype(np.int32)
        return np.concatenate([nearer[:, ::-1], np.zeros_like(nearer[:, :1]), -nearer], 1)

    def hyper_tables(self, quality: float) -> NDArray[np.uint8]:
        """(Z,) uint8: the table of each channel of the hyper-latent at `quality`."""
        tables: NDArray[np.uint8] = self._numbers["hyper_tables"][_nearest(quality)]
        return tables

    def hyper_gain(self, quality: float) -> NDArray[np.float32]:
        """(Z,) float32: what the hyper-latent is multiplied by before rounding."""
        return self._at_quality("log_hyper_gain", quality)

    def units(self, quality: float, width: int) -> Units:
        """The prior's inputs that depend on quality and width alone, from integers, the same on every machine."""
        numbers = self._numbers
        per_unit = _interpolate(numbers["latent_exponent"], quality)  # 256 * log2 of symbols per unit
        per_hyper = _interpolate(numbers["hyper_exponent"], quality)
        anchors = len(numbers["latent_exponent"])
        spacing = 10_000 // (anchors - 1)
        low = min(_hundredths(quality) // spacing, anchors - 2)
        part = (_hundredths(quality) - low * spacing) * 32 // spacing
        weights = np.zeros(anchors, np.float32)
        weights[low], weights[low + 1] = 32 - part, part
        quarters = per_unit.reshape(4, -1)[:, : self.widths[width]]
        orders = [np.concatenate([quarters[step ^ phase] for phase in range(4)]) for step in range(4)]
        scales = [order + shift for order, shift in zip(orders, self._scale_shifts(quality, width), strict=True)]
        return Units(
            width=np.array(width, np.int64),
            quality=weights.reshape(1, -1, 1, 1),
            hyper_unit=self._power(-per_hyper, 1 if self.contextual else 5),
            hyper_mean_unit=self._power(per_hyper, -5),
            hyper_level_offset=(6 * per_hyper + 5120).astype(np.float32)[:, None, None],
            known_unit=[self._power(-order, 2) for order in orders],
            mean_unit=[self._power(order, -5) for order in orders],
            level_offset=[(6 * scale + 5120).astype(np.float32)[:, None, None] for scale in scales],
        )

    def _scale_shifts(self, quality: float, width: int) -> NDArray[np.int64]:
        """(4, c): what scales have of their own at a quality, in 1/256 octaves, for each step in its order."""
        shift, channels = self._numbers.get("scale_shift"), self.widths[width]
        if shift is None:
            return np.zeros((4, 4 * channels), np.int64)
        own = _interpolate(shift.reshape(len(shift), -1), quality).reshape(4, 4, -1)
        return own[:, :, :channels].reshape(4, -1)

    def _power(self, exponent: NDArray[np.int64], shift: int) -> NDArray[np.float32]:
        """2**(exponent / 256 + shift), with 9 bits: a shipped table of integers times a power of two, both exact."""
        mantissa = self._numbers["mantissa"][exponent % 256]
        return np.ldexp(mantissa.astype(np.float32), (exponent // 256 + shift - 8).astype(np.int32))[:, None, None]

    def analyse(self, pixels: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> Analysis:
        """See `Model.analyse`: y (C, 4 h, 4 w) and z (Z, h, w), h = ceil(height / 64), w = ceil(width / 64)."""
        latent, hyper = self._run("encoder.onnx", self._image(pixels, x, y, width, height))
        return {"y": latent[0], "z": hyper[0]}

    def expect_prior(self) -> None:
        self._ahead("prior.onnx")

    def step(
        self, step: int, z: NDArray[np.int16], known: NDArray[np.int16], features: NDArray[np.float32], units: Units
    ) -> tuple[NDArray[np.uint8], NDArray[np.int16], NDArray[np.float32]]:
        """One step of the prior: levels uint8 and means int16 in 1/16 symbols, both (c, h/2, w/2), phase by phase.

        z: hyper-latent (Z, h/4, w/4), its symbols or, of a `contextual` model, 1/16 of these. known: latent so far in
        the prior's units (c, h, w), 0 where unknown, c = 4 times the width of `units`. features: what step 0 gives as
        its third result; `no_features` at step 0.
        """
        return self._prior(step, z, known, features, units, units.mean_unit[step], units.level_offset[step])

    def expect(self, known: NDArray[np.int16], units: Units) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        """Of a `contextual` model, levels uint8 and means int16 in 1/16 symbols of the hyper-latent, both (Z, h, w), of
        use where nothing is known of it.

        known: hyper-latent so far in 1/16 symbols (Z, h, w), 0 where unknown.
        """
        nothing = np.zeros((len(known), 1, 1), np.int16)
        of_hyper = units.hyper_mean_unit, units.hyper_level_offset
        level, mean, _ = self._prior(HYPER_STEP, known, nothing, self.no_features, units, *of_hyper)
        return level, mean

    def _prior(
        self,
        step: int,
        z: NDArray[np.int16],
        known: NDArray[np.int16],
        features: NDArray[np.float32],
        units: Units,
        mean_unit: NDArray[np.float32],
        level_offset: NDArray[np.float32],
    ) -> tuple[NDArray[np.uint8], NDArray[np.int16], NDArray[np.float32]]:
        inputs: dict[str, NDArray[Any]] = {
            "step": np.array(step, np.int64),
            "width": units.width,
            "z": z[None],
            "known": known[None],
            "features_before": features,
            "quality": units.quality,
            "hyper_unit": units.hyper_unit,
            "mean_unit": mean_unit,
            "level_offset": level_offset,
        }
        level, mean, features = self._run("prior.onnx", inputs)
        return level[0], mean[0], features

    @cached_property
    def no_features(self) -> NDArray[np.float32]:
        return np.zeros((1, self._features, 1, 1), np.float32)

    def weight_of_error(self, quality: float) -> float:
        """lambda: bits for each pixel that one unit of mean squared error (0..255 scale) was worth in training."""
        low, high = self._lambdas
        return float(low * (high / low) ** (quality / 100))

    def error_slope(
        self,
        latent: NDArray[np.float32],
        quality: float,
        pixels: NDArray[np.uint8],
        counted: tuple[slice, slice] | None = None,
    ) -> tuple[float, NDArray[np.float32]]:
        """Squared error of what a latent (C, h, w) decodes to at `quality`, summed over the samples of
        (H, W, 3) or (H, W) uint8, and its gradient.

        The picture is padded as for the analysis; the padding has no error, and positions behind it no gradient.
        counted: rows and columns whose error counts, by default all.
        """
        image = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
        (height, width), edge = pixels.shape[:2], self.edge
        image = np.pad(image, ((0, -height % edge), (0, -width % edge), (0, 0)), mode="edge")
        inside = np.zeros((1, *image.shape[:2], 1), np.uint8)
        inside[0][counted or np.s_[:height, :width]] = 1
        seen = np.s_[:, : image.shape[0] // STRIDE, : image.shape[1] // STRIDE]
        inputs: dict[str, NDArray[Any]]
        inputs = {"latent": np.ascontiguousarray(latent[seen])[None], "image": image[None], "inside": inside}
        if self.ring:
            inputs["quality"] = self._hats(quality)
        error, slope = self._run("gradient.onnx", inputs)
        whole = np.zeros_like(latent)
        whole[seen] = slope[0]
        return float(error), whole

    def synthesise(self, patch: Patch, scale: int = 1) -> NDArray[np.uint8]:
        """Synthesis transform: (16 rows / scale, 16 columns / scale, 3) uint8 of the positions to keep.

        scale: 1, or 2, 4, 8 for a smaller picture at less than half the work.
        """
        graph = self._graph_of(scale)
        inputs: dict[str, NDArray[Any]] = {
            "core": patch.core,
            "rest": patch.rest,
            "keep": np.array(patch.keep, np.int64),
        }
        if self.ring and scale <= self._filtered:
            inputs["quality"] = self._hats(patch.quality)
        elif self.ring and patch.rest.shape[2:] != (1, 1):  # no filter looks at what is around
            (y0, y1, x0, x1), ring = patch.keep, self.ring
            up, before = min(y0, ring), min(x0, ring)
            inputs["rest"] = patch.rest[:, :, up : up + y1 - y0, before : before + x1 - x0]
        if not self.lone_rest:
            inputs["rest_end"] = np.array(1 if patch.rest.shape[2:] == (1, 1) else 1 << 31, np.int64)
        (pixels,) = self._run(graph, inputs)
        decoded: NDArray[np.uint8] = pixels[0]
        return decoded

    def _hats(self, quality: float) -> NDArray[np.float32]:
        """(1, anchors) float32: the weights of linear interpolation between anchors that lie evenly in 0..100."""
        place = np.float32(quality / 100 * (self._anchors - 1))
        hats: NDArray[np.float32] = np.maximum(1 - abs(place - np.arange(self._anchors, dtype=np.float32)), 0)
        return hats[None]


class Classic(Model):
    """Each channel of the latent y has one table for each quality. Where the network pools by maximum, the location map
    l (C, h, w) is the other half of the code: 0 to 3 for the place in a patch of 2x2, and 0 where y is 0.

    What the synthesis takes is y with l behind it, as channels.
    """

    padding = STRIDE

    def __init__(self, model_id: str, folder: Path, manifest: dict[str, Any], threads: int) -> None:
        super().__init__(model_id, folder, manifest, threads)
        self.located = self.tensors[1] if len(self.tensors) > 1 else None
        self.side, self.reach = int(manifest["side"]), self.halo
        self.widths = (self.latent.channels // 4,)
        self.core = sum(rule.channels for rule in self.tensors) // 4
        self.colours, self.grey = int(manifest["network"]["colours"]), manifest.get("grey")

    def symbol_tables(self, quality: float) -> NDArray[np.uint8]:
        """(C,) uint8: the table of each channel of the latent at `quality`."""
        tables: NDArray[np.uint8] = self._numbers["symbol_tables"][_nearest(quality)]
        return tables

    def inverse_gain(self, quality: float) -> NDArray[np.float32]:
        """See `Model.inverse_gain`; 1 for locations."""
        inverse = super().inverse_gain(quality)
        return np.pad(inverse, (0, 4 * self.core - len(inverse)), constant_values=1)

    @property
    def location_tables(self) -> NDArray[np.uint8]:
        """(C,) uint8: the table of each channel of the location map, where the latent is not 0."""
        tables: NDArray[np.uint8] = self._numbers["location_tables"]
        return tables

    def analyse(self, pixels: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> Analysis:
        """See `Model.analyse`: y, and l int16, both (C, ceil(height / 16), ceil(width / 16))."""
        results = self._run("encoder.onnx", self._image(pixels, x, y, width, height))
        return {rule.name: result[0] for rule, result in zip(self.tensors, results, strict=True)}

    def synthesise(self, patch: Patch, scale: int = 1) -> NDArray[np.uint8]:
        """See `Model.synthesise`; a smaller picture is the whole one's means."""
        (pixels,) = self._run(self._graph_of(scale), {"latent": patch.core, "keep": np.array(patch.keep, np.int64)})
        return reduced(pixels[0], scale)


_FAMILIES: dict[str, type[Model]] = {"hyperprior": Hyperprior, "classic": Classic}


def reduced(pixels: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """Means of scale x scale pixels; where the picture ends it is padded with its last row and column."""
    if scale == 1:
        return pixels
    height, width = pixels.shape[:2]
    padding = [(0, -height % scale), (0, -width % scale), *[(0, 0)] * (pixels.ndim - 2)]
    padded = np.pad(pixels, padding, mode="edge")
    shape = (len(padded) // scale, scale, padded.shape[1] // scale, scale, *pixels.shape[2:])
    sums = padded.reshape(shape).sum((1, 3), dtype=np.uint32)
    return np.asarray((sums + scale * scale // 2) // (scale * scale), np.uint8)


def _nearest(quality: float) -> int:
    """The row of a table with one for each whole quality."""
    return (_hundredths(quality) + 50) // 100


def _hundredths(quality: float) -> int:
    """Quality as the file stores it."""
    return round(quality * 100)


def _interpolate(rows: NDArray[np.int32], quality: float) -> NDArray[np.int64]:
    """Linear interpolation between anchors that lie evenly in 0..100, in integers: (anchors, N) -> (N,)."""
    spacing = 10_000 // (len(rows) - 1)
    low = min(_hundredths(quality) // spacing, len(rows) - 2)
    part = _hundredths(quality) - low * spacing
    pair = rows[low : low + 2].astype(np.int64)
    between: NDArray[np.int64] = (pair[0] * (spacing - part) + pair[1] * part + spacing // 2) // spacing
    return between
