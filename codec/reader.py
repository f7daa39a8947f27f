"""Pillow's picture -> `Picture`: what it means is found, kept, applied or given up, as `image` documents."""

from __future__ import annotations

import io
import math
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import vips
from hourglass.codec.errors import HourglassError, ImageError, InvalidArgument, LimitError
from hourglass.codec.limits import Limits
from hourglass.codec.metadata import (
    PNG_MAGIC,
    TIFF_MAGIC,
    Keep,
    Metadata,
    Picture,
    colour_key,
    png_chunks,
    png_gamut,
    raw_profile,
    reset_exif,
    reset_xmp,
    tiff_pages,
)
from hourglass.codec.watch import check

if TYPE_CHECKING:
    from PIL import Image

READABLE = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
"""Formats that are read; Pillow's other plug-ins are never tried on a user's bytes."""

IPTC_RESOURCE = 0x0404
XMP_TAG, IPTC_TAG = 700, 33723
_LARGE_WEBP, _MOST_WEBP = 1 << 24, 28_000_000
"""Pixels of a WebP above which libvips decodes it, where it is installed, and above which it has to: Pillow holds four
pictures of 32 bits at once."""
_NO_EXIF = 20  # bytes that Pillow makes of no tags at all
BAND_PIXELS = 1 << 20
_ICC_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}
_COLOURED = ("P", "PA", "RGB", "RGBA", "RGBX", "YCbCr", "HSV")
_MORE_XMP = b"http://ns.adobe.com/xmp/extension/\0"
_TIFF_EXIF = (270, 271, 272, 305, 306, 315, 316, 33432)
"""Tags of a TIFF's own directory that describe the picture: description, camera, software, date, artist, copyright."""


_quiet_lock = threading.Lock()
_quiet_users = 0
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings about a file, with a filter that is counted: leaving `warnings.catch_warnings` in one
    thread would end the silence of the others."""
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
        self.pages = 0  # of a TIFF that is read from a file
        self.monochrome = False  # an AVIF without colour, RGB to Pillow
        self.rows: vips.Fetch | None = None  # in place of what Pillow decodes

    def lose(self, what: str) -> None:
        self.losses.append(f"{self.name} {what}")

    def from_file(self, file: IO[bytes]) -> Picture:
        with pillow_errors(self.name), self.open(file) as opened:
            if opened.format == "WEBP" and getattr(opened, "n_frames", 1) == 1:
                self.choose_webp(file, opened)
            return self.from_pillow(opened)

    def choose_webp(self, file: IO[bytes], opened: Image.Image) -> None:
        """Let libvips decode a large WebP. Raises `LimitError` for one that would need it and it is not there."""
        pixels = opened.width * opened.height
        if pixels > _LARGE_WEBP:
            file.seek(0)
            self.rows = vips.open_rows(file.read(), self.name, opened.size, len(opened.getbands()))
        if pixels > _MOST_WEBP and self.rows is None:
            raise LimitError(
                f"{self.name} is a WebP of {opened.width}x{opened.height} = {pixels} pixels; above {_MOST_WEBP} pixels "
                "Pillow takes too much memory for one: install libvips, pip install 'hourglass-codec[large]'"
            )

    def bands(self, opened: Image.Image) -> Iterator[Image.Image]:
        """The picture from top to bottom, some rows at a time."""
        if self.rows is None:
            yield from bands(opened)
            return
        from PIL import Image

        rows = max(1, BAND_PIXELS // opened.width)
        for y in range(0, opened.height, rows):
            yield Image.fromarray(self.rows(y, min(rows, opened.height - y)))

    def open(self, file: IO[bytes]) -> Image.Image:
        """Read the header, and of some PPM the rest too. Raises `ImageError` and `LimitError`."""
        opened = self.header(file)
        if opened.format == "PPM" and opened.mode != "1" and opened.tile[0].codec_name.startswith("ppm"):
            return self.scaled_ppm(file, opened)
        return cast("Image.Image", opened)

    def header(self, file: IO[bytes]) -> Any:
        """Read the header, decode nothing. Raises `ImageError` and `LimitError`."""
        from PIL import Image, UnidentifiedImageError

        head = file.read(1 << 16)
        file.seek(0)
        if head.startswith(PNG_MAGIC):
            self.read_png_chunks(file)
            self.limits.check_size(*struct.unpack_from(">LL", self.png[b"IHDR"]))
        elif head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":  # Pillow allocates its canvas on opening
            self.limits.check_size(*(1 + int.from_bytes(head[i : i + 3], "little") for i in (24, 27)))
        elif head[4:8] == b"ftyp" and (av1 := head.find(b"av1C")) >= 0 and len(head) > av1 + 6:
            flags = head[av1 + 6]
            self.depth = 8 if not flags & 0x40 else 12 if flags & 0x20 else 10
            self.monochrome = bool(flags & 0x10)
        elif head[:4] in TIFF_MAGIC:
            self.pages = tiff_pages(file)
        file.seek(0)
        try:
            opened: Any = Image.open(file, formats=READABLE)
        except UnidentifiedImageError as exc:
            raise ImageError(f"{self.name} is of no picture format that can be read ({', '.join(READABLE)})") from exc
        self.limits.check_size(*opened.size)
        return opened

    def scaled_ppm(self, file: IO[bytes], opened: Any) -> Image.Image:
        """A PPM or PGM whose highest value is not 255. Pillow scales it value by value in Python."""
        from PIL import Image

        tile = opened.tile[0]
        highest = int(tile.args[-1])
        self.depth = highest.bit_length()
        shape = (opened.height, opened.width, *((3,) if opened.mode == "RGB" else ()))
        count = math.prod(shape)
        file.seek(tile.offset)
        if tile.codec_name == "ppm_plain":
            values = np.fromstring(re.sub(rb"#[^\r\n]*", b"", file.read()), np.int32, count, sep=" ")
        else:
            kind = np.dtype(">u2" if highest > 255 else "u1")
            values = np.frombuffer(file.read(count * kind.itemsize), kind, -1)
        if values.size != count or not 0 <= int(values.min()) <= int(values.max()) <= highest:
            raise ImageError(f"{self.name} is cut short or damaged: expected {count} values of 0 to {highest}")
        table = ((np.arange(highest + 1) * 510 + highest) // (2 * highest)).astype(np.uint8)
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
            if self.rows is None:
                opened.load()
            self.limits.check_size(*opened.size)
            metadata, orientation = self.metadata(opened)
            self.check_gamut()
            colour, alpha, metadata = self.convert(opened, metadata)
        if opened.format != "TIFF":  # Pillow turns these itself
            colour, alpha = _turned(colour, orientation), None if alpha is None else _turned(alpha, orientation)
        return Picture(colour, or_none(alpha), kept(metadata, metadata.icc, self.keep), tuple(self.losses))

    def check_gamut(self) -> None:
        if gamut := png_gamut(self.png):
            self.lose(f"has {gamut} other than sRGB's; its colours are taken as sRGB")

    def read_png_chunks(self, file: IO[bytes], *, checked: bool = True) -> None:
        self.png = png_chunks(file, self.name, self.limits, checked=checked)
        self.depth = self.png[b"IHDR"][8]

    def seek(self, opened: Image.Image) -> None:
        # A phone's JPEG may hold a second picture (MPO: preview, depth); that is no animation.
        frames = 1 if opened.format in ("JPEG", "MPO") else self.pages or getattr(opened, "n_frames", 1)
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
        exif = exif or raw_profile(opened.info.get("Raw profile type exif"))
        iptc = raw_profile(opened.info.get("Raw profile type iptc"))
        photoshop = opened.info.get("photoshop")
        if isinstance(photoshop, dict):
            iptc = bytes(photoshop.get(IPTC_RESOURCE, b""))
        if hasattr(opened, "tag_v2"):
            exif, iptc = self.tiff_exif(opened), _tiff_iptc(opened)
        exif = exif.removeprefix(b"Exif\0\0")
        xmp = self.png.get(b"xmp", b"") if self.png else info.get("xmp", b"")
        found = Metadata(info.get("icc_profile", b""), exif, xmp, iptc)
        self.limits.check_metadata(found.size)
        if any(content.startswith(_MORE_XMP) for _, content in getattr(opened, "applist", ())):
            self.lose("has XMP in more than one part; only the first is kept")
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
        try:
            kept = describing(opened.getexif())
            content = bytes(kept.tobytes())
            return content if len(content) > _NO_EXIF else b""
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
        for part in bands(opened):
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
        if key is None and opened.mode.startswith("I") and isinstance(opened.info.get("transparency"), int):
            key = np.array([opened.info["transparency"]])  # a PIL image that was read by its owner
        width, height = opened.size
        colour = np.empty((height, width) if grey else (height, width, 3), np.uint8)
        transparent = key is not None or opened.has_transparency_data
        alpha = np.empty((height, width), np.uint8) if transparent else None
        y = 0
        for part in self.bands(opened):
            here = slice(y, y + part.height)
            if alpha is not None:
                alpha[here] = _alpha(part, key)
            flat = reduction(part) if reduction else _opaque(part, space)
            pixels = np.asarray(
                transform(flat) if transform else flat if flat.mode in ("L", "RGB") else flat.convert("RGB")
            )
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
        if self.monochrome and not grey:  # the flag could be that of the alpha
            grey = all(_is_grey(np.asarray(part)) for part in bands(opened))
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


def bands(picture: Image.Image) -> Iterator[Image.Image]:
    rows = max(1, BAND_PIXELS // picture.width)
    for y in range(0, picture.height, rows):
        check()
        yield picture.crop((0, y, picture.width, min(picture.height, y + rows)))


def pillow_of(colour: NDArray[np.uint8], alpha: NDArray[np.uint8] | None) -> Image.Image:
    """Pillow's picture of (H, W) or (H, W, 3) and (H, W) uint8, with nothing else of its size on the way there."""
    from PIL import Image

    if alpha is None:
        return Image.fromarray(colour)
    height, width = alpha.shape
    picture = Image.new("LA" if colour.ndim == 2 else "RGBA", (width, height))
    rows = max(1, BAND_PIXELS // width)
    for y in range(0, height, rows):
        picture.paste(Image.fromarray(np.dstack((colour[y : y + rows], alpha[y : y + rows]))), (0, y))
    return picture


def _opaque(part: Image.Image, space: str) -> Image.Image:
    """The colours of a band without its alpha, as `space` or RGB."""
    if part.mode in ("La", "RGBa"):
        part = part.convert("LA" if part.mode == "La" else "RGBA")
    part.info.pop("transparency", None)
    return part if part.mode == space else part.convert("RGB" if part.mode in _COLOURED else space)


def _alpha(part: Image.Image, key: NDArray[Any] | None) -> NDArray[np.uint8]:
    """(H, W) alpha of a band: from a colour key (one value a channel), or from the picture's own."""
    if key is not None:
        same = np.asarray(part.convert("L") if part.mode == "1" else part) == key
        return np.where(same if same.ndim == 2 else same.all(axis=2), 0, 255).astype(np.uint8)
    if part.mode in ("La", "RGBa"):
        part = part.convert("LA" if part.mode == "La" else "RGBA")
    if part.mode not in ("LA", "PA", "RGBA"):
        part = part.convert("RGBA")
    return np.asarray(part.getchannel("A"))


def _is_grey(pixels: NDArray[np.uint8]) -> bool:
    return bool(np.array_equal(pixels[:, :, 0], pixels[:, :, 1]) and np.array_equal(pixels[:, :, 1], pixels[:, :, 2]))


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
    found = opened.tag_v2.get(IPTC_TAG, b"")
    if isinstance(found, tuple) and all(isinstance(part, int) for part in found):
        order = "<" if opened.tag_v2.prefix == b"II" else ">"
        found = struct.pack(f"{order}{len(found)}L", *(part & 0xFFFFFFFF for part in found))
    if isinstance(found, bytes) and found:
        return found
    return bytes(opened.get_photoshop_blocks().get(IPTC_RESOURCE, {}).get("data", b""))


def describing(tags: Image.Exif) -> Image.Exif:
    """Of EXIF, or a TIFF's directory, the tags that describe the picture, not how it is stored."""
    from PIL import Image

    kept = Image.Exif()
    kept.update({tag: tags[tag] for tag in _TIFF_EXIF if tag in tags})
    for ifd in (0x8769, 0x8825):  # EXIF proper, GPS
        if ifd in tags:
            kept.get_ifd(ifd).update(tags.get_ifd(ifd))
            kept[ifd] = 0  # where it is: Pillow fills it in
    return kept


def kept(metadata: Metadata, icc: bytes, keep: Keep) -> Metadata:
    """What `keep` leaves of a picture's metadata, with the profile that its pixels are in."""
    return replace(metadata, icc=icc) if keep == "all" else Metadata(icc=icc if keep == "icc" else b"")


def or_none(alpha: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    return None if alpha is None or int(alpha.min()) == 255 else alpha
