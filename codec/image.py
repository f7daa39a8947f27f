"""Image files <-> pixels with what they mean. With `strips` the only user of Pillow.

What a picture has beside its pixels is handled here, once:

- EXIF orientation (or XMP's, where EXIF has none) is applied, and the tag reset to 1.
- An ICC profile is kept and the pixels stay in its space, or they are converted to sRGB on request.
- EXIF, XMP and IPTC are kept. Resolution and free text comments are not, and are no loss that is reported.
- Grey stays grey: 1-bit, 8-bit, 16-bit, float, and palettes of which only greys are used.
- 16-bit grey is rounded to 8 bits; of 16-bit colour (and of grey with alpha) the upper 8 bits are kept. 32-bit
  integers are taken as 0 to 65535; floats as 0 to 1, or as 0 to 255 where one is above 1.
- CMYK and LAB become sRGB, through the profile where there is one; YCbCr and HSV become RGB.
- Alpha is kept; premultiplied colour is divided by it. A colour key (tRNS) becomes alpha.
- A PNG's gAMA, cHRM and cICP are not applied: where they are not those of sRGB, a loss says so.
- One frame of an animation or a multi-page file is read.

When something is lost on the way, a sentence in `Picture.losses` says what.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.errors import HourglassError, ImageError, InvalidArgument, LimitError, LossWarning
from hourglass.codec.limits import Limits
from hourglass.codec.metadata import KINDS, PNG_MAGIC, colour_key, png_chunks, png_gamut, reset_exif, reset_xmp
from hourglass.codec.metadata import Metadata as Metadata

if TYPE_CHECKING:
    from PIL import Image

Pixels: TypeAlias = NDArray[np.uint8]
"""(H, W) grey, (H, W, 2) grey and alpha, (H, W, 3) RGB or (H, W, 4) RGBA; uint8, alpha not premultiplied."""

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]"
"""A path, the bytes of an image file, a PIL image, or an array (H, W) or (H, W, 1 to 4) uint8."""

Keep: TypeAlias = Literal["all", "icc", "none"]
"""Metadata kept: all, the ICC profile only, or none (then the pixels are converted to sRGB)."""

READABLE = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
"""Formats that are read; Pillow's other plug-ins are never tried on a user's bytes."""

WRITABLE = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".bmp": "BMP",
}
"""File name suffix -> Pillow format, for pictures written. A grey picture is a PGM whatever the suffix."""

SUFFIXES = (*WRITABLE, ".gif")
"""Suffixes of the files that are taken for pictures when a folder is searched."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}
HOLDS = {
    "PNG": {"alpha", "icc", "exif", "xmp"},
    "JPEG": {"icc", "exif", "xmp", "iptc"},
    "WEBP": {"alpha", "icc", "exif", "xmp"},
    "AVIF": {"alpha", "icc", "exif", "xmp"},
    "TIFF": {"alpha", "icc", "exif", "xmp", "iptc"},
    "PPM": set[str](),
    "BMP": set[str](),
}

_JPEG_SEGMENT = 65535 - 2
_IPTC_RESOURCE = 0x0404
_XMP_TAG, _IPTC_TAG = 700, 33723
_BAND_PIXELS = 1 << 20
_ICC_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
_COLOURED = ("P", "PA", "RGB", "RGBA", "RGBX", "YCbCr", "HSV")
_TIFF_EXIF = (270, 271, 272, 305, 306, 315, 316, 33432)
"""Tags of a TIFF's own directory that describe the picture: description, camera, software, date, artist, copyright."""


@dataclass(frozen=True)
class Picture:
    """Pixels with their meaning."""

    colour: NDArray[np.uint8]
    """(H, W, 3) RGB or (H, W) grey, C-contiguous."""
    alpha: NDArray[np.uint8] | None = None
    """(H, W), not premultiplied; None when there is none or all is 255."""
    metadata: Metadata = field(default_factory=Metadata)
    losses: tuple[str, ...] = ()
    """One sentence for each thing that the source held and this does not."""

    def __post_init__(self) -> None:
        shape = self.colour.shape
        if self.colour.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)) or 0 in shape:
            raise InvalidArgument(
                f"colour is an array {shape} {self.colour.dtype}; expected (H, W, 3) or (H, W) uint8, not empty"
            )
        if self.alpha is not None and (self.alpha.dtype != np.uint8 or self.alpha.shape != shape[:2]):
            raise InvalidArgument(
                f"alpha is an array {self.alpha.shape} {self.alpha.dtype}; expected {shape[:2]} uint8, as its colour"
            )

    @property
    def pixels(self) -> Pixels:
        """Colour and alpha as one array."""
        return self.colour if self.alpha is None else np.dstack((self.colour, self.alpha))

    @property
    def width(self) -> int:
        return int(self.colour.shape[1])

    @property
    def height(self) -> int:
        return int(self.colour.shape[0])

    @property
    def grey(self) -> bool:
        return self.colour.ndim == 2


def read(source: ImageSource, limits: Limits | None = None) -> NDArray[np.uint8]:
    """Decode `source` to (H, W, 3) uint8 sRGB: grey is repeated, alpha put on white, metadata dropped.

    For training, metrics and benches. Warns with a `LossWarning` for each thing that is not kept; raises what
    `load` does.
    """
    picture = load(source, limits, keep="none")
    losses = [*picture.losses]
    colour = picture.colour
    if picture.alpha is not None:
        losses.append(f"{name_of(source)} has transparent parts; they are put on white")
        colour = on_white(colour, picture.alpha)
    for loss in losses:
        warnings.warn(loss, LossWarning, stacklevel=2)
    return np.repeat(colour[:, :, None], 3, axis=2) if picture.grey else colour


def load(
    source: ImageSource,
    limits: Limits | None = None,
    *,
    keep: Keep = "all",
    srgb: bool = False,
    frame: int | None = None,
) -> Picture:
    """Decode `source`, keep what it means, and say in `losses` what could not be kept.

    `keep="none"` drops all metadata and so converts the colours to sRGB; `keep="icc"` keeps the profile only.
    `srgb=True` converts to sRGB and drops the profile. `frame` picks a frame of an animation or a page of a TIFF
    from 0; without it the first is used, and a loss says that there are more.

    Raises `ImageError` (no readable picture), `LimitError` (more pixels or metadata than `limits` allow, found
    before they are decoded), `InvalidArgument` (an array of another shape or type, a frame that is not there) and
    `OSError` (the path cannot be opened).
    """
    limits = limits or Limits()
    if keep not in get_args(Keep):
        raise InvalidArgument(f"keep is {keep!r}; expected one of {', '.join(get_args(Keep))}")
    if frame is not None and frame < 0:
        raise InvalidArgument(f"frame is {frame}; expected a number from 0")
    reader = Reader(name_of(source), limits, keep, srgb or keep == "none", frame)
    if isinstance(source, np.ndarray):
        reader.choose_frame(1)
        return _from_array(source, limits)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return reader.from_file(io.BytesIO(source))
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as file:
            return reader.from_file(file)
    from PIL import Image

    if isinstance(source, Image.Image):
        return reader.from_pillow(source)
    raise InvalidArgument(
        f"image is a {type(source).__name__}; expected a path, the bytes of an image file, a PIL image or a numpy array"
    )


def on_white(colour: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put (H, W) or (H, W, 3) uint8 with (H, W) uint8 alpha on white; the shape of `colour` comes back."""
    out = np.empty_like(colour)
    rows = max(1, _BAND_PIXELS // colour.shape[1])
    for y in range(0, len(colour), rows):
        a = alpha[y : y + rows].astype(np.uint32)
        a = a if colour.ndim == 2 else a[:, :, None]
        out[y : y + rows] = (colour[y : y + rows] * a + 255 * (255 - a) + 127) // 255
    return out


def list_pictures(folder: Path) -> list[Path]:
    """Files below `folder` that have a picture's suffix, in order of name. Raises `InvalidArgument` for none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InvalidArgument(f"no pictures in {folder}; expected files with {', '.join(SUFFIXES)}")
    return found


def format_of(path: str | os.PathLike[str]) -> str:
    """Pillow's name of the format that a file name's suffix asks for. Raises `InvalidArgument`."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITABLE:
        raise InvalidArgument(f"cannot write {os.fspath(path)!r}: suffix {suffix!r} is none of {', '.join(WRITABLE)}")
    return WRITABLE[suffix]


def write(picture: Picture | Pixels, format: str) -> bytes:
    """Encode a picture as the bytes of an image file; `format` is a value of `WRITABLE`.

    PNG, WebP, TIFF, PPM and BMP are lossless; JPEG and AVIF are written at quality 95 without chroma subsampling.
    Grey stays grey but for WebP, which has none. Warns with a `LossWarning` when the format cannot hold alpha (it
    is put on white) or a kind of metadata. Raises `InvalidArgument` for an unknown format, an array of another
    shape, or a picture too large for the format.
    """
    from PIL import Image

    if format not in HOLDS:
        raise InvalidArgument(f"format is {format!r}; expected one of {', '.join(sorted(HOLDS))}")
    if not isinstance(picture, Picture):
        picture = _from_array(picture, Limits(pixels=1 << 62))
    metadata, losses = _fitting(picture.metadata, format)
    pixels = picture.pixels
    if picture.alpha is not None and "alpha" not in HOLDS[format]:
        losses.append(f"{format} holds no transparency; it is put on white")
        pixels = on_white(picture.colour, picture.alpha)
    for loss in losses:
        warnings.warn(loss, LossWarning, stacklevel=2)
    out = io.BytesIO()
    try:
        with quiet():
            options = _OPTIONS.get(format, {}) | _save_options(metadata, format)
            Image.fromarray(pixels).save(out, format, **options)
    except (OSError, ValueError, MemoryError) as exc:
        size = f"{picture.width}x{picture.height}"
        raise InvalidArgument(f"a picture of {size} pixels cannot be written as {format}: {exc}") from exc
    return out.getvalue()


def _fitting(metadata: Metadata, format: str) -> tuple[Metadata, list[str]]:
    """What of `metadata` the format can hold, and a sentence for each kind that it cannot."""
    from PIL import Image

    kept, losses = {}, []
    room = {"exif": _JPEG_SEGMENT - 6, "xmp": _JPEG_SEGMENT - 29, "iptc": _JPEG_SEGMENT - 28, "icc": 255 * 65519}
    for kind, label in KINDS.items():
        content: bytes = getattr(metadata, kind)
        if not content:
            continue
        if kind not in HOLDS[format]:
            losses.append(f"{format} holds no {label}; {len(content)} bytes are dropped")
        elif format == "JPEG" and len(content) > room[kind]:
            losses.append(f"JPEG holds {room[kind]} bytes of {label}; {len(content)} bytes are dropped")
        else:
            kept[kind] = content
    if "exif" in kept and format in ("TIFF", "AVIF"):  # there Pillow writes it anew
        try:
            with quiet():
                options = _save_options(Metadata(exif=kept["exif"]), format)
                Image.new("L", (1, 1)).save(io.BytesIO(), format, **options)
        except Exception as exc:  # whatever broken EXIF makes it stumble over
            del kept["exif"]
            losses.append(f"EXIF cannot be written as {format} ({exc}); it is dropped")
    return Metadata(**kept), losses


def _save_options(metadata: Metadata, format: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if metadata.icc:
        options["icc_profile"] = metadata.icc
    if metadata.exif:
        options["exif"] = b"Exif\0\0" + metadata.exif
    if metadata.xmp and format in ("JPEG", "WEBP", "AVIF"):
        options["xmp"] = metadata.xmp
    if metadata.xmp and format == "PNG":
        from PIL import PngImagePlugin

        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp)
    if metadata.iptc and format == "JPEG":
        resource = b"8BIM" + struct.pack(">HHL", _IPTC_RESOURCE, 0, len(metadata.iptc)) + metadata.iptc
        segment = b"Photoshop 3.0\0" + resource + bytes(len(resource) & 1)
        options["extra"] = b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment
    if format == "TIFF" and metadata.size > len(metadata.icc):
        from PIL import Image

        tags = options["exif"] = Image.Exif()
        tags.load(metadata.exif)
        tags.update({tag: part for tag, part in ((_XMP_TAG, metadata.xmp), (_IPTC_TAG, metadata.iptc)) if part})
    return options


def name_of(source: object) -> str:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"image data ({len(source)} bytes)"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return "numpy array" if isinstance(source, np.ndarray) else "PIL image"


def _from_array(array: NDArray[Any], limits: Limits) -> Picture:
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if array.dtype != np.uint8 or channels not in (1, 2, 3, 4) or 0 in array.shape:
        raise InvalidArgument(
            f"image is an array {array.shape} {array.dtype}; expected (H, W) or (H, W, 1 to 4) uint8, not empty"
        )
    limits.check_size(array.shape[1], array.shape[0])
    layers = array.reshape(*array.shape[:2], channels)
    colour = np.ascontiguousarray(layers[:, :, :3] if channels > 2 else layers[:, :, 0])
    alpha = np.ascontiguousarray(layers[:, :, -1]) if channels in (2, 4) else None
    return Picture(colour, _or_none(alpha))


def kept(metadata: Metadata, icc: bytes, keep: Keep) -> Metadata:
    """What `keep` leaves of a picture's metadata, with the profile that its pixels are in."""
    return replace(metadata, icc=icc) if keep == "all" else Metadata(icc=icc if keep == "icc" else b"")


def _or_none(alpha: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    return None if alpha is None or int(alpha.min()) == 255 else alpha


_quiet_lock = threading.Lock()
_quiet_users = 0
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow's warnings about a file are silenced, with a filter that is counted: leaving `warnings.catch_warnings` in
    one thread would end the silence of the others."""
    global _quiet_users
    with _quiet_lock:
        _quiet_users += 1
        cast("list[Any]", warnings.filters).insert(0, _QUIET)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if _quiet_users == 0:
                filters = cast("list[Any]", warnings.filters)
                filters[:] = [entry for entry in filters if entry is not _QUIET]


@contextmanager
def pillow_errors(name: str) -> Iterator[None]:
    """Pillow's plug-ins raise whatever a broken file makes them stumble over; here it becomes ours."""
    from PIL import Image

    try:
        with quiet():
            yield
    except HourglassError:
        raise
    except Image.DecompressionBombError as exc:
        raise LimitError(f"{name} claims more pixels than PIL.Image.MAX_IMAGE_PIXELS allows: {exc}") from exc
    except Exception as exc:
        reason = str(exc) or type(exc).__name__
        raise ImageError(f"{name} cannot be decoded as a picture: {reason}") from exc


class Reader:
    """One picture on its way in. The pixels are converted by bands of rows, so that little more than Pillow's
    picture and the result is ever held."""

    def __init__(self, name: str, limits: Limits, keep: Keep, srgb: bool, frame: int | None) -> None:
        self.name, self.limits, self.keep, self.srgb, self.frame = name, limits, keep, srgb, frame
        self.losses: list[str] = []
        self.png: dict[bytes, bytes] = {}
        self.depth = 0  # bits a sample where the header says it, else 0

    def lose(self, what: str) -> None:
        self.losses.append(f"{self.name} {what}")

    def from_file(self, file: IO[bytes]) -> Picture:
        with pillow_errors(self.name), self.open(file) as opened:
            return self.from_pillow(opened)

    def open(self, file: IO[bytes]) -> Image.Image:
        """Read the header. Raises `ImageError` and `LimitError`."""
        from PIL import Image, UnidentifiedImageError

        head = file.read(30)
        file.seek(0)
        if head.startswith(PNG_MAGIC):
            self.read_png_chunks(file)
        elif head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":  # Pillow allocates its canvas on opening
            self.limits.check_size(*(1 + int.from_bytes(head[i : i + 3], "little") for i in (24, 27)))
        file.seek(0)
        try:
            opened: Any = Image.open(file, formats=READABLE)
        except UnidentifiedImageError as exc:
            raise ImageError(f"{self.name} is of no picture format that can be read ({', '.join(READABLE)})") from exc
        self.limits.check_size(*opened.size)
        if opened.format == "PPM" and opened.mode != "1" and opened.tile[0].codec_name.startswith("ppm"):
            return self.scaled_ppm(file, opened)
        return cast("Image.Image", opened)

    def scaled_ppm(self, file: IO[bytes], opened: Any) -> Image.Image:
        """A PPM or PGM whose highest value is not 255. Pillow scales it value by value in Python."""
        from PIL import Image

        tile = opened.tile[0]
        highest = int(tile.args[-1])
        self.depth = highest.bit_length()
        if tile.codec_name != "ppm":  # in plain text
            return cast("Image.Image", opened)
        shape = (opened.height, opened.width, *((3,) if opened.mode == "RGB" else ()))
        size = math.prod(shape) * (2 if highest > 255 else 1)
        file.seek(tile.offset)
        values = np.frombuffer(file.read(size), ">u2" if highest > 255 else "u1")
        if values.nbytes != size:
            raise ImageError(f"{self.name} is cut short: {values.nbytes} of {size} bytes of pixels")
        table = np.minimum((np.arange(1 << 16) * 510 + highest) // (2 * highest), 255).astype(np.uint8)
        return Image.fromarray(table[values].reshape(shape))

    def choose_frame(self, frames: int, current: int = 0) -> None:
        """Check `frame` against the number of frames, and say what is left out."""
        if self.frame is not None and self.frame >= frames:
            raise InvalidArgument(f"frame is {self.frame}; {self.name} has {frames}, numbered from 0")
        if self.frame is None and frames > 1:
            which = "only the first is used" if current == 0 else f"only frame {current} is used"
            self.lose(f"has {frames} frames; {which} (--frame N picks another)")

    def from_pillow(self, opened: Image.Image) -> Picture:
        with pillow_errors(self.name):
            self.limits.check_size(*opened.size)
            self.seek(opened)
            opened.load()
            self.limits.check_size(*opened.size)
            metadata, orientation = self.metadata(opened)
            self.check_gamut()
            colour, alpha, metadata = self.convert(opened, metadata)
        if opened.format != "TIFF":  # Pillow turns these itself
            colour, alpha = _turned(colour, orientation), None if alpha is None else _turned(alpha, orientation)
        return Picture(colour, _or_none(alpha), kept(metadata, metadata.icc, self.keep), tuple(self.losses))

    def check_gamut(self) -> None:
        if gamut := png_gamut(self.png):
            self.lose(f"has {gamut} other than sRGB's; its colours are taken as sRGB")

    def read_png_chunks(self, file: IO[bytes], *, checked: bool = True) -> None:
        self.png = png_chunks(file, self.name, self.limits, checked=checked)
        self.depth = self.png[b"IHDR"][8]

    def seek(self, opened: Image.Image) -> None:
        # A phone's JPEG may hold a second picture (MPO: preview, depth); that is no animation.
        frames = getattr(opened, "n_frames", 1) if opened.format not in ("JPEG", "MPO") else 1
        self.choose_frame(frames, opened.tell() if frames > 1 else 0)
        if self.frame:
            try:
                opened.seek(self.frame)
            except EOFError as exc:
                raise ImageError(f"{self.name} claims {frames} frames; frame {self.frame} is missing") from exc

    def metadata(self, opened: Image.Image) -> tuple[Metadata, int]:
        """What the picture has beside its pixels, with its orientation (1 to 8), which is reset to 1."""
        info = {key: value for key, value in opened.info.items() if isinstance(value, bytes)}
        exif = self.png.get(b"eXIf", b"") if self.png else info.get("exif", b"")
        iptc = b""
        photoshop = opened.info.get("photoshop")
        if isinstance(photoshop, dict):
            iptc = bytes(photoshop.get(_IPTC_RESOURCE, b""))
        if hasattr(opened, "tag_v2"):
            exif, iptc = self.tiff_exif(opened), _tiff_iptc(opened)
        exif = exif.removeprefix(b"Exif\0\0")
        xmp = self.png.get(b"xmp", b"") if self.png else info.get("xmp", b"")
        found = Metadata(info.get("icc_profile", b""), exif, xmp, iptc)
        self.limits.check_metadata(found.size)
        orientation, xmp = reset_xmp(found.xmp)
        if exif:
            try:
                turned, exif = reset_exif(exif)
                orientation = turned or orientation
            except (ValueError, struct.error):
                exif = b""
                self.lose(f"has EXIF of {len(found.exif)} bytes that cannot be read; it is dropped")
        return replace(found, exif=exif, xmp=xmp), orientation if orientation in range(1, 9) else 1

    def tiff_exif(self, opened: Any) -> bytes:
        """EXIF structure with the tags of a TIFF that describe the picture, b"" for none."""
        from PIL import Image

        try:
            tags, kept = opened.getexif(), Image.Exif()
            kept.update({tag: tags[tag] for tag in _TIFF_EXIF if tag in tags})
            kept.update({ifd: dict(tags.get_ifd(ifd)) for ifd in (0x8769, 0x8825) if ifd in tags})
            return bytes(kept.tobytes()) if len(kept) else b""
        except Exception as exc:
            self.lose(f"has EXIF that cannot be read ({exc}); it is dropped")
            return b""

    def reduction(self, opened: Any) -> _Reduction | None:
        """How samples of more than 8 bits are brought to 8, or None; says it as a loss."""
        tags = getattr(opened, "tag_v2", {})
        depth = self.depth or max(tags.get(258, (8,)))
        if opened.mode == "F":
            self.lose("has float samples; they are reduced to 8 bits")
        elif depth > 8 or opened.mode.startswith("I"):
            self.lose(f"has samples of {depth if depth > 8 else 16} bits; they are reduced to 8 bits")
        if not opened.mode.startswith(("I", "F")):
            return None
        low, high = 0.0, 0.0
        for part in _bands(opened):
            values = np.asarray(part)
            if not np.isfinite(values).all():
                raise ImageError(f"{self.name} has samples that are not finite numbers")
            low, high = min(low, float(values.min())), max(high, float(values.max()))
        full = 4095.0 if depth == 12 else 65535.0 if opened.mode != "F" else 1.0 if high <= 1 else 255.0
        if low < 0 or high * 255 > full * 255.5:
            raise ImageError(f"{self.name} has samples from {low:g} to {high:g}; expected 0 to {full:g}")
        return _Reduction(255 / full, inverted=tags.get(262) == 0)

    def convert(self, opened: Image.Image, metadata: Metadata) -> tuple[Any, Any, Metadata]:
        """(colour, alpha, metadata with the profile that the colours are now in)."""
        if self.png and b"tRNS" not in self.png:
            opened.info.pop("transparency", None)  # a text chunk of that name
        reduction = self.reduction(opened)
        grey, space = self.space(opened, metadata.icc)
        transform, icc = self.transform(metadata.icc, space)
        key = colour_key(self.png, opened.mode)
        width, height = opened.size
        colour = np.empty((height, width) if grey else (height, width, 3), np.uint8)
        transparent = key is not None or opened.has_transparency_data
        alpha = np.empty((height, width), np.uint8) if transparent else None
        y = 0
        for part in _bands(opened):
            here = slice(y, y + part.height)
            if alpha is not None:
                alpha[here] = _alpha(part, key)
            flat = reduction(part) if reduction else _opaque(part, space)
            pixels = np.asarray(transform(flat) if transform else flat if flat.mode == "L" else flat.convert("RGB"))
            if pixels.ndim == 2:
                pixels = pixels[:, :, None]
            colour[here] = pixels[:, :, pixels.shape[2] // 2] if grey else pixels
            y += part.height
        return colour, alpha, replace(metadata, icc=icc)

    def space(self, opened: Image.Image, icc: bytes) -> tuple[bool, str]:
        """Whether the picture becomes grey, and the Pillow mode that its profile must fit."""
        if opened.mode in ("CMYK", "LAB"):
            return False, opened.mode
        if opened.mode in ("YCbCr", "HSV"):
            self.lose(f"has {opened.mode} samples; they are converted to RGB")
        grey = opened.mode in ("1", "L", "LA", "La", "F") or opened.mode.startswith("I")
        grey = grey or (bool(self.png) and self.png[b"IHDR"][9] == 4)  # 16-bit grey with alpha, RGBA to Pillow
        if opened.mode in ("P", "PA"):
            grey = icc[16:20] != b"RGB " and _grey_palette(opened)
        return grey, "L" if grey else "RGB"

    def transform(self, icc: bytes, space: str) -> tuple[Callable[[Image.Image], Image.Image] | None, bytes]:
        """The conversion to sRGB that is needed, or None, and the profile that the colours have after it."""
        from PIL import ImageCms

        source = None
        target = ImageCms.createProfile("sRGB")
        if icc:
            try:
                source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
                held = source.profile.xcolor_space.strip()
                if held != _ICC_SPACES[space]:
                    raise ValueError(f"it is for {held} pixels, these are {space}")
                made = ImageCms.buildTransform(source, target, space, "RGB")
                known = "sRGB" in ImageCms.getProfileDescription(source)
            except (ImageCms.PyCMSError, OSError, ValueError) as exc:
                source, icc = None, b""
                taken = "" if space in ("CMYK", "LAB") else "; its colours are taken as sRGB"
                self.lose(f"has an ICC profile that cannot be used ({exc}){taken}")
        if space in ("CMYK", "LAB"):
            self.lose(f"has {space} samples; they are converted to sRGB")
            if source is None and space == "CMYK":
                return None, b""
            if source is None:
                made = ImageCms.buildTransform(ImageCms.createProfile("LAB"), target, "LAB", "RGB")
        elif source is None or not self.srgb:
            return None, icc
        elif known:
            return None, b""
        return lambda part: cast("Image.Image", ImageCms.applyTransform(part, made)), b""


@dataclass(frozen=True)
class _Reduction:
    """Grey of 12, 16 or 32 bits or floats -> 8 bits. Pillow's own conversion would clip at 255."""

    scale: float
    inverted: bool  # a TIFF whose white is zero, which Pillow does not turn over at this depth

    def __call__(self, part: Image.Image) -> Image.Image:
        from PIL import Image

        grey = np.floor(np.asarray(part).astype(np.float64) * self.scale + 0.5).astype(np.uint8)
        return Image.fromarray(255 - grey if self.inverted else grey)


def _bands(picture: Image.Image) -> Iterator[Image.Image]:
    rows = max(1, _BAND_PIXELS // picture.width)
    for y in range(0, picture.height, rows):
        yield picture.crop((0, y, picture.width, min(picture.height, y + rows)))


def _opaque(part: Image.Image, space: str) -> Image.Image:
    """The colours of a band without its alpha, as `space` or RGB."""
    if part.mode in ("La", "RGBa"):
        part = part.convert("LA" if part.mode == "La" else "RGBA")
    part.info.pop("transparency", None)
    return part if part.mode == space else part.convert("RGB" if part.mode in _COLOURED else space)


def _alpha(part: Image.Image, key: NDArray[np.uint16] | None) -> NDArray[np.uint8]:
    """(H, W) alpha of a band: from a colour key (one value a channel), or from the picture's own."""
    if key is not None:
        same = np.asarray(part.convert("L") if part.mode == "1" else part) == key
        return np.where(same if same.ndim == 2 else same.all(axis=2), 0, 255).astype(np.uint8)
    if part.mode in ("La", "RGBa"):
        part = part.convert("LA" if part.mode == "La" else "RGBA")
    if part.mode not in ("LA", "PA", "RGBA"):
        part = part.convert("RGBA")
    return np.asarray(part.getchannel("A"))


def _grey_palette(picture: Image.Image) -> bool:
    """Whether the palette entries that a P or PA picture uses are all grey."""
    indices = picture if picture.mode == "P" else picture.getchannel("P")
    used = np.flatnonzero(indices.histogram()[:256])
    entries = np.zeros((256, 3), np.uint8)
    given = np.array((picture.getpalette("RGB") or [])[:768], np.uint8)
    entries.reshape(-1)[: len(given)] = given
    return bool((entries[used, 0] == entries[used, 1]).all() and (entries[used, 1] == entries[used, 2]).all())


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Apply an EXIF orientation (1 to 8) to (H, W) or (H, W, 3)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _tiff_iptc(opened: Any) -> bytes:
    """IPTC records of a TIFF: its own tag (sometimes called 32-bit numbers), or within Photoshop's."""
    found = opened.tag_v2.get(_IPTC_TAG, b"")
    if isinstance(found, tuple) and all(isinstance(part, int) for part in found):
        order = "<" if opened.tag_v2.prefix == b"II" else ">"
        found = struct.pack(f"{order}{len(found)}L", *(part & 0xFFFFFFFF for part in found))
    if isinstance(found, bytes) and found:
        return found
    return bytes(opened.get_photoshop_blocks().get(_IPTC_RESOURCE, {}).get("data", b""))
