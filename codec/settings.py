"""How to encode and what to decode: the keyword arguments of the calls, and their checks."""

from __future__ import annotations

import math
import numbers
from typing import TypeAlias, TypedDict, get_args

from hourglass.codec import image
from hourglass.codec.errors import InvalidArgument
from hourglass.codec.image import ImageSource, Keep, Picture
from hourglass.codec.limits import Limits
from hourglass.codec.quantise import Effort

DEFAULT_QUALITY = 50.0

Region: TypeAlias = tuple[int, int, int, int]
"""x, y, width, height of a rectangle in pixels of the whole picture."""

SCALES = (1, 2, 4, 8)
"""What a picture may be divided by when it is decoded."""

GOALS = ("quality", "target_size", "target_bpp", "target_psnr")


class Settings(TypedDict, total=False):
    """How to encode. At most one of the first four; without any of them quality 50.

    quality: 0 (smallest) to 100 (best).
    target_size: bytes that the file may have at most: a number, or text such as "40k", "1.5M" or "5%" of the source
        file. The result has at least 97 % of that (or 8 bytes less, for the tiniest), unless quality 100 needs less.
    target_bpp: the same in bits per pixel.
    target_psnr: dB over RGB that the decoded picture has at least.
    effort: "fast" rounds, "default" drops symbols that cost more than they are worth, "best" also searches.
    metadata: "all" keeps ICC profile, EXIF, XMP and IPTC, "icc" the profile only, "none" nothing: then colours are
        converted to sRGB.
    srgb: convert colours to sRGB and drop the profile.
    frame: which one of an animation or of several pages, from 0.
    fallback: whether a picture may be stored losslessly where that is smaller; by default it may.
    grey_model: whether a grey picture is coded by the model's counterpart for these, where it has one; by default so.
    """

    quality: float
    target_size: int | str
    target_bpp: float
    target_psnr: float
    effort: Effort
    metadata: Keep
    srgb: bool
    frame: int
    fallback: bool
    grey_model: bool


class View(TypedDict, total=False):
    """What to decode. region: a rectangle of the picture. scale: 1, 2, 4 or 8, by which its sides are divided.

    salvage: decode what is not damaged, mark the rest, and say so in a `LossWarning`.
    """

    region: Region
    scale: int
    salvage: bool


def check_settings(settings: Settings) -> None:
    """Raise `InvalidArgument` for names or values that no picture can be encoded with."""
    _check_names(settings, Settings)
    effort, keep = settings.get("effort", "default"), settings.get("metadata", "all")
    if effort not in get_args(Effort):
        raise InvalidArgument(f"effort is {effort!r}; expected one of {', '.join(get_args(Effort))}")
    if keep not in get_args(Keep):
        raise InvalidArgument(f"metadata is {keep!r}; expected one of {', '.join(get_args(Keep))}")
    frame = settings.get("frame", 0)
    if not isinstance(frame, numbers.Integral) or frame < 0:
        raise InvalidArgument(f"frame is {frame!r}; expected 0 or a larger whole number")
    given = [name for name in settings if name in GOALS]
    if len(given) > 1:
        raise InvalidArgument(f"{' and '.join(given)} exclude each other; give one of them")
    if "quality" in settings:
        check_quality(settings["quality"])
    bpp, psnr = settings.get("target_bpp", 1.0), settings.get("target_psnr", 30.0)
    if not isinstance(bpp, numbers.Real) or not 0 < bpp < math.inf:
        raise InvalidArgument(f"target_bpp is {bpp!r}; expected a positive number of bits per pixel")
    if not isinstance(psnr, numbers.Real) or not 0 < psnr < 100:
        raise InvalidArgument(f"target_psnr is {psnr!r}; expected dB, more than 0 and less than 100")


def check_quality(quality: float) -> None:
    """Raise `InvalidArgument` unless `quality` is a number from 0 to 100."""
    if not isinstance(quality, numbers.Real) or not 0 <= quality <= 100:
        got = f"{quality:g}" if isinstance(quality, numbers.Real) else repr(quality)
        raise InvalidArgument(f"quality is {got}; expected a number from 0 (smallest) to 100 (best)")


def check_view(width: int, height: int, view: View) -> None:
    """Raise `InvalidArgument` for what cannot be decoded of a picture of this size."""
    _check_names(view, View)
    scale = view.get("scale", 1)
    if scale not in SCALES:
        raise InvalidArgument(f"scale is {scale!r}; expected one of {', '.join(map(str, SCALES))}")
    region = tuple(view.get("region", (0, 0, width, height)))
    if len(region) != 4 or not all(isinstance(value, numbers.Integral) for value in region):
        raise InvalidArgument(f"region is {region}; expected four whole numbers: x, y, width, height")
    x, y, across, down = region
    if x < 0 or y < 0 or across < 1 or down < 1 or x + across > width or y + down > height:
        raise InvalidArgument(f"region is {across}x{down} at {x},{y}; the picture has {width}x{height} pixels")


def _check_names(given: Settings | View, kind: type[Settings | View]) -> None:
    unknown = [name for name in given if name not in kind.__annotations__]
    if unknown:
        raise InvalidArgument(f"{unknown[0]!r} is no setting; expected {', '.join(kind.__annotations__)}")


def load(source: ImageSource, limits: Limits | None, settings: Settings) -> Picture:
    """A picture with what the settings keep of it. Raises as `image.load`."""
    keep, srgb, frame = settings.get("metadata", "all"), settings.get("srgb", False), settings.get("frame")
    return image.load(source, limits, keep=keep, srgb=srgb, frame=frame)


def is_aimed(settings: Settings) -> bool:
    """Whether something else than a quality is asked for, which takes a search."""
    return any(name in settings for name in GOALS[1:])


def quality_of(settings: Settings) -> float:
    """As the file stores it."""
    return round(float(settings.get("quality", DEFAULT_QUALITY)), 2)
