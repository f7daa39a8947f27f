"""Bounds on what is taken in, checked on headers before anything of that size is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from hourglass.codec.errors import LimitError


@dataclass(frozen=True)
class Limits:
    """Largest input that is worked on. The defaults suit a machine with a few GB of memory."""

    pixels: int = 1 << 26
    """Width times height of a picture held whole in memory: 67 million, some GB at work."""
    side: int = 1 << 24
    """Width or height in pixels."""
    metadata_bytes: int = 16 << 20
    """ICC profile, EXIF, XMP and IPTC of one picture together: 16 MiB."""
    file_bytes: int = 1 << 29
    """Size of a .hgc file: 512 MiB."""

    def check_size(self, width: int, height: int) -> None:
        """Raise `LimitError` when a picture of this size is too large."""
        if width > self.side or height > self.side:
            raise LimitError(f"picture is {width}x{height} pixels; the limit is {self.side} a side (Limits.side)")
        if width * height > self.pixels:
            raise LimitError(
                f"picture is {width}x{height} = {width * height} pixels; the limit is {self.pixels} (Limits.pixels)"
            )

    def check_bytes(self, count: int) -> None:
        """Raise `LimitError` when a .hgc file of this many bytes is too large."""
        if count > self.file_bytes:
            raise LimitError(f"file has {count} bytes; the limit is {self.file_bytes} (Limits.file_bytes)")

    def check_metadata(self, count: int) -> None:
        """Raise `LimitError` when a picture has more than this many bytes of metadata."""
        if count > self.metadata_bytes:
            raise LimitError(
                f"picture has {count} bytes of metadata; the limit is {self.metadata_bytes} (Limits.metadata_bytes)"
            )
