"""Image files <-> pixels with what they mean. With `reader` and `strips` the only user of Pillow.

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
import os
import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import avif, lossless
from hourglass.codec.errors import InvalidArgument, LossWarning
from hourglass.codec.formats import FORMATS, STRIP_WRITABLE, WRITABLE, check_format
from hourglass.codec.limits import Limits
from hourglass.codec.metadata import KINDS, Keep, Metadata, Picture, Pixels, drop_orientation, reset_exif
from hourglass.codec.reader import (
    BAND_PIXELS,
    IPTC_RESOURCE,
    IPTC_TAG,
    READABLE,
    XMP_TAG,
    Reader,
    bands,
    describing,
    or_none,
    pillow_errors,
    pillow_of,
    quiet,
)
from hourglass.codec.strips import StripWriter
from hourglass.codec.watch import Bytes

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "READABLE",
    "SUFFIXES",
    "WRITABLE",
    "ImageSource",
    "Keep",
    "Metadata",
    "Picture",
    "Pixels",
    "format_of",
    "list_pictures",
    "load",
    "on_white",
    "read",
    "save",
    "seen",
    "size_of",
    "write",
]

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]"
"""A path, the bytes of an image file, a PIL image, or an array (H, W) or (H, W, 1 to 4) uint8."""

SUFFIXES = (*WRITABLE, ".gif")
"""Suffixes of the files that are taken for pictures when a folder is searched."""

_LARGE = 1 << 24
"""Pixels above which PNG, TIFF and PPM are written by rows; AVIF is from `avif.WHOLE` on."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 4},  # less than half the time of level 6, some per cent larger
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "AVIF": avif.OPTIONS,
}

_LEAN, _LEAN_WEBP = 1 << 22, {"method": 0, "quality": 0}
"""Pixels above which a WebP is written in a hurry: in 26 in place of 34 to 39 bytes of memory a pixel, in a tenth of
the time, a twentieth larger."""

_NOISY, _NOISE = 10_200_000, 20_000_000
"""Pixels of a WebP, and bytes of it made in a hurry, above both of which it would take more than 350 MB and twice the
raw picture: ordinary photographs of the first size have half as much."""


def read(source: ImageSource, limits: Limits | None = None) -> NDArray[np.uint8]:
    """Decode `source` to (H, W, 3) uint8 sRGB: grey is repeated, alpha put on white, metadata dropped.

    For training, metrics and benches. Warns with a `LossWarning` for each thing that is not kept; raises what
    `load` does.
    """
    picture = load(source, limits, keep="none")
    losses = [*picture.losses]
    if picture.alpha is not None:
        losses.append(f"{name_of(source)} has transparent parts; they are put on white")
    for loss in losses:
        warnings.warn(loss, LossWarning, stacklevel=2)
    return seen(picture)


def seen(picture: Picture) -> NDArray[np.uint8]:
    """What is seen of a picture, (H, W, 3): alpha put on white, grey repeated."""
    colour = picture.colour if picture.alpha is None else on_white(picture.colour, picture.alpha)
    return np.repeat(colour[:, :, None], 3, axis=2) if picture.grey else colour


def size_of(data: bytes | memoryview, limits: Limits | None = None) -> tuple[int, int]:
    """Width and height of an image file as its header has them; nothing is decoded.

    Raises `ImageError`, `LimitError`.
    """
    reader = Reader(name_of(data), limits or Limits(), "none", True, None)
    with pillow_errors(reader.name), reader.header(io.BytesIO(data)) as opened:
        return int(opened.width), int(opened.height)


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
    from 0; without it the first is used, and a loss says that there are more. The pixels of an array are not copied
    where they need not be.

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
        return reader.from_file(Bytes(source))
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as file:
            return reader.from_file(file)
    from PIL import Image

    if isinstance(source, Image.Image):
        at = source.tell()
        try:
            return reader.from_pillow(source)
        finally:
            source.seek(at)
    raise InvalidArgument(
        f"image is a {type(source).__name__}; expected a path, the bytes of an image file, a PIL image or a numpy array"
    )


def on_white(colour: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put (H, W) or (H, W, 3) uint8 with (H, W) uint8 alpha on white; the shape of `colour` comes back."""
    out = np.empty_like(colour)
    rows = max(1, BAND_PIXELS // colour.shape[1])
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

    Large WebP and AVIF take up to 24 bytes a pixel; `Codec.unload()` before it gives back what the models hold.
    """
    whole = [picture]
    del picture
    data, losses = save(whole.pop(), format)  # where the caller does not have the pixels either, they are free soon
    for loss in losses:
        warnings.warn(loss, LossWarning, stacklevel=2)
    return data


def save(picture: Picture | Pixels, format: str) -> tuple[bytes, list[str]]:
    """What `write` does, with the losses as a list: warnings are no way to pass them on from a thread."""
    if not isinstance(picture, Picture):
        picture = _from_array(picture, Limits(pixels=1 << 62))
    check_format(format, picture.width, picture.height)
    if picture.grey and picture.metadata.icc and (format == "WEBP" or (format == "AVIF" and picture.alpha is not None)):
        picture = _grey_in_srgb(picture)  # it is written as RGB, which a grey profile does not fit
    with quiet():
        metadata, losses = _fitting(picture.metadata, format)
    colour, alpha = picture.colour, picture.alpha
    if alpha is not None and "alpha" not in FORMATS[format].holds:
        losses.append(f"{format} holds no transparency; it is put on white")
        colour, alpha = on_white(colour, alpha), None
    large = picture.width * picture.height > (avif.WHOLE if format == "AVIF" else _LARGE) and format in STRIP_WRITABLE
    if large and (written := _by_rows(colour, alpha, metadata, format)) is not None:
        return written, losses
    out, size, count = io.BytesIO(), f"{picture.width}x{picture.height}", picture.width * picture.height
    if format == "WEBP" and count > _NOISY and lossless.hurried_bits(colour, alpha) * count / 8 > _NOISE:
        raise InvalidArgument(
            f"a picture of {size} pixels that is all but noise is not written as WEBP, whose encoder would take too "
            f"much memory; the limit for such ones is {_NOISY} pixels; choose PNG, TIFF, JPEG or AVIF"
        )
    try:
        with quiet():
            options = {**_OPTIONS.get(format, {}), **_save_options(metadata, format)}
            if format == "AVIF" and colour.ndim == 2 and alpha is None:
                options |= avif.GREY
            if format == "WEBP" and count > _LEAN:
                options |= _LEAN_WEBP
            converted = pillow_of(colour, alpha)
            del picture, colour, alpha  # where nobody else has them their memory is free now
            converted.save(out, format, **options)
    except (OSError, ValueError, MemoryError) as exc:
        raise InvalidArgument(f"a picture of {size} pixels cannot be written as {format}: {exc}") from exc
    return out.getvalue(), losses


def _by_rows(colour: Pixels, alpha: Pixels | None, metadata: Metadata, format: str) -> bytes | None:
    """A large picture: by rows it takes less time and memory; None where that would lose metadata or alpha."""
    holds = FORMATS[format].by_rows or frozenset()
    if (alpha is not None and format != "AVIF") or any(getattr(metadata, kind) for kind in {*KINDS} - holds):
        return None
    out = io.BytesIO()
    with StripWriter(
        out, format, colour.shape[1], colour.shape[0], colour.ndim == 2, metadata, alpha is not None
    ) as writer:
        writer.write(colour, alpha)
    return out.getvalue()


def _grey_in_srgb(picture: Picture) -> Picture:
    from PIL import Image

    transform, _ = Reader("the picture", Limits(), "none", True, None).transform(picture.metadata.icc, "L")
    colour = picture.colour
    if transform is not None:
        parts = [np.asarray(transform(part))[:, :, 1] for part in bands(Image.fromarray(colour))]
        colour = np.concatenate(parts)
    return replace(picture, colour=colour, metadata=replace(picture.metadata, icc=b""))


def _fitting(metadata: Metadata, format: str) -> tuple[Metadata, list[str]]:
    """What of `metadata` the format can hold, and a sentence for each kind that it cannot."""

    kept, losses = {}, []
    for kind, label in KINDS.items():
        content: bytes = getattr(metadata, kind)
        if not content:
            continue
        if kind not in FORMATS[format].holds:
            losses.append(f"{format} holds no {label}; {len(content)} bytes are dropped")
        elif len(content) > (room := FORMATS[format].room.get(kind, len(content))):
            losses.append(f"{format} holds {room} bytes of {label}; {len(content)} bytes are dropped")
        else:
            kept[kind] = content
    if "exif" in kept and format in ("AVIF", "TIFF"):  # there Pillow parses it, or writes it anew
        try:
            _, exif = reset_exif(kept["exif"])
            if format == "AVIF":
                kept["exif"] = drop_orientation(exif)
            describing(_parsed(kept["exif"])).tobytes()
        except Exception as exc:
            del kept["exif"]
            losses.append(f"EXIF cannot be written as {format} ({exc}); it is dropped")
    return Metadata(**kept), losses


def _parsed(exif: bytes) -> Image.Exif:
    from PIL import Image

    tags = Image.Exif()
    if exif:
        tags.load(exif)
    return tags


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
        resource = b"8BIM" + struct.pack(">HHL", IPTC_RESOURCE, 0, len(metadata.iptc)) + metadata.iptc
        segment = b"Photoshop 3.0\0" + resource + bytes(len(resource) & 1)
        options["extra"] = b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment
    if format == "TIFF" and metadata.size > len(metadata.icc):
        tags = options["exif"] = describing(_parsed(metadata.exif))
        tags.update({tag: part for tag, part in ((XMP_TAG, metadata.xmp), (IPTC_TAG, metadata.iptc)) if part})
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
    return Picture(colour, or_none(alpha))
