"""Image files <-> (H, W, 3) uint8 sRGB pixels. The only user of Pillow.

What a picture has beside its pixels is handled here, once: EXIF orientation is applied, an ICC profile is converted
to sRGB, 16-bit samples are scaled to 8, grey becomes three equal channels, transparency is put on white. When
something is lost on the way a `LossWarning` says what.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.errors import ImageError, InvalidArgument, LimitError, LossWarning
from hourglass.codec.limits import Limits

if TYPE_CHECKING:
    from PIL import Image

Pixels: TypeAlias = NDArray[np.uint8]
"""(H, W, 3) uint8, sRGB."""

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]"
"""A path, the bytes of an image file, a PIL image, or an array (H, W, 3) or (H, W) uint8."""

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
    ".bmp": "BMP",
}
"""File name suffix -> Pillow format, for pictures written."""

SUFFIXES = (*WRITABLE, ".gif")
"""Suffixes of the files that are taken for pictures when a folder is searched."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}


def read(source: ImageSource, limits: Limits | None = None) -> Pixels:
    """Decode `source` to (H, W, 3) uint8 sRGB, with a `LossWarning` for each thing that is not kept.

    Raises `ImageError` (no readable picture), `LimitError` (more pixels than `limits` allow, found before they
    are decoded), `InvalidArgument` (an array of another shape or type) and `OSError` (the path cannot be opened).
    """
    pixels, losses = load(source, limits)
    for loss in losses:
        warnings.warn(loss, LossWarning, stacklevel=2)
    return pixels


def load(source: ImageSource, limits: Limits | None = None) -> tuple[Pixels, list[str]]:
    """What `read` does, with the losses as a list: warnings are no way to pass them on from a thread."""
    limits = limits or Limits()
    if isinstance(source, np.ndarray):
        return _from_array(source, limits), []
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), limits, f"image data ({len(source)} bytes)")
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as file:
            return _from_file(file, limits, os.fspath(source))
    from PIL import Image

    if isinstance(source, Image.Image):
        losses: list[str] = []
        with _pillow_errors("PIL image"):
            return _from_pillow(source, limits, "PIL image", losses), losses
    raise InvalidArgument(
        f"image is a {type(source).__name__}; expected a path, the bytes of an image file, a PIL image or a numpy array"
    )


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


def write(pixels: Pixels, format: str) -> bytes:
    """Encode (H, W, 3) uint8 as the bytes of an image file; `format` is a value of `WRITABLE`.

    PNG, WebP, TIFF, PPM and BMP are lossless; JPEG and AVIF are written at quality 95 without chroma subsampling.
    Raises `InvalidArgument` for an unknown format or a picture too large for it.
    """
    from PIL import Image

    if format not in WRITABLE.values():
        raise InvalidArgument(f"format is {format!r}; expected one of {', '.join(sorted(set(WRITABLE.values())))}")
    out = io.BytesIO()
    try:
        Image.fromarray(pixels).save(out, format, **_OPTIONS.get(format, {}))
    except (OSError, ValueError) as exc:
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise InvalidArgument(f"a picture of {size} pixels cannot be written as {format}: {exc}") from exc
    return out.getvalue()


def _from_array(array: NDArray[Any], limits: Limits) -> Pixels:
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        raise InvalidArgument(
            f"image is an array {array.shape} {array.dtype}; expected (H, W, 3) or (H, W) uint8, not empty"
        )
    limits.check_size(array.shape[1], array.shape[0])
    return np.repeat(array[:, :, None], 3, axis=2) if grey else np.ascontiguousarray(array)


@contextmanager
def _pillow_errors(name: str) -> Iterator[None]:
    """Pillow's plug-ins raise whatever a broken file makes them stumble over; here it becomes ours."""
    from PIL import Image

    try:
        yield
    except (ImageError, LimitError):
        raise
    except Image.DecompressionBombError as exc:
        raise LimitError(f"{name} claims more pixels than are ever decoded: {exc}") from exc
    except Exception as exc:
        reason = str(exc) or type(exc).__name__
        raise ImageError(f"{name} cannot be decoded as a picture: {reason}") from exc


def _from_file(file: IO[bytes], limits: Limits, name: str) -> tuple[Pixels, list[str]]:
    from PIL import Image, UnidentifiedImageError

    losses: list[str] = []
    with _pillow_errors(name):
        try:
            opened = Image.open(file, formats=READABLE)
        except UnidentifiedImageError as exc:
            raise ImageError(f"{name} is of no known picture format ({', '.join(READABLE)})") from exc
        with opened:
            return _from_pillow(opened, limits, name, losses), losses


def _from_pillow(opened: Image.Image, limits: Limits, name: str, losses: list[str]) -> Pixels:
    from PIL import ImageOps

    limits.check_size(*opened.size)
    # A phone's JPEG may hold a second picture (MPO: preview, depth); that is no animation.
    frames = getattr(opened, "n_frames", 1) if opened.format not in ("JPEG", "MPO") else 1
    if frames > 1:
        losses.append(f"{name} has {frames} frames; only the first is used")
    picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith(("I", "F")):
        return _from_deep(picture, name, losses)
    profile = picture.info.get("icc_profile")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema() != (255, 255):
            losses.append(f"{name} has transparent parts; they are put on white")
            white = picture.copy()
            white.paste((255, 255, 255, 255), (0, 0, *picture.size))
            white.alpha_composite(picture)
            picture = white
    if profile:
        picture = _to_srgb(picture, profile, name, losses)
    return np.asarray(picture.convert("RGB"))


def _from_deep(picture: Image.Image, name: str, losses: list[str]) -> Pixels:
    """16-bit, 32-bit and float greys -> (H, W, 3) uint8. Pillow's own conversion would clip them at 255."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError(f"{name} has samples that are not finite numbers")
    highest = 65535.0 if picture.mode != "F" else 1.0 if values.max() <= 1.0 else 255.0
    scale = 255.0 / highest
    if values.min() < 0 or values.max() * scale > 255.5:
        raise ImageError(f"{name} has samples from {values.min():g} to {values.max():g}; expected 0 to {highest:g}")
    losses.append(f"{name} has {picture.mode} samples; they are reduced to 8 bits")
    grey = np.floor(values * scale + 0.5).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _to_srgb(picture: Image.Image, profile: bytes, name: str, losses: list[str]) -> Image.Image:
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return picture
        base = picture.convert("RGB") if picture.mode in ("RGBA", "P", "LA", "PA") else picture
        converted = ImageCms.profileToProfile(base, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as exc:
        losses.append(f"{name} has an ICC profile that cannot be used ({exc}); its colours are taken as sRGB")
        return picture
    return picture if converted is None else converted
