"""Bounds on what is taken in, checked on headers before anything of that size is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from hourglass.codec.errors import LimitError


@dataclass(frozen=True)
class Limits:
    """Largest input that is worked on. The defaults suit a machine with a GB of memory to spare."""

    pixels: int = 1 << 26
    """Width times height of a picture that is held in memory: 67 million."""
    streamed_pixels: int = 1 << 34
    """The same for one that goes from file to file a few rows at a time: 17 thousand million."""
    band_bytes: int = 1 << 28
    """Memory for rows of the whole width, of one that goes to or from a file that is read and written row by row."""
    side: int = 1 << 24
    """Width or height in pixels."""
    file_bytes: int = 1 << 34
    """Size of a .hgc file: 16 GiB."""
    tiles: int = 1 << 16
    """Tiles of a picture."""
    sections: int = 1 << 18
    """Sections of a .hgc file: two for each tile, and metadata."""
    metadata_bytes: int = 16 << 20
    """Size of a picture's metadata (ICC, EXIF, XMP, IPTC), together and when inflated: 16 MiB."""

    def check_side(self, width: int, height: int) -> None:
        """Raise `LimitError` when a picture is too wide or too high."""
        if width > self.side or height > self.side:
            raise LimitError(f"picture is {width}x{height} pixels; the limit is {self.side} a side (Limits.side)")

    def check_size(self, width: int, height: int) -> None:
        """Raise `LimitError` when a picture of this size is too large to hold in memory."""
        self.check_side(width, height)
        if width * height > self.pixels:
            raise LimitError(
                f"picture is {width}x{height} = {width * height} pixels; the limit is {self.pixels} (Limits.pixels)"
            )

    def check_streamed(self, width: int, height: int) -> None:
        """Raise `LimitError` when a picture of this size is too large even to pass through."""
        self.check_side(width, height)
        if width * height > self.streamed_pixels:
            raise LimitError(
                f"picture is {width}x{height} = {width * height} pixels; the limit is {self.streamed_pixels} "
                "(Limits.streamed_pixels)"
            )

    def check_band(self, width: int, height: int, count: int) -> None:
        """Raise `LimitError` when the rows of a picture that have to be held at a time take too many bytes."""
        if count > self.band_bytes:
            raise LimitError(
                f"picture is {width}x{height} pixels; of a file that is read or written row by row {count} bytes would "
                f"be held at a time, the limit is {self.band_bytes} (Limits.band_bytes); take PPM or uncompressed "
                "TIFF, which can be of any width"
            )

    def check_tiles(self, count: int) -> None:
        """Raise `LimitError` when a picture has too many tiles."""
        if count > self.tiles:
            raise LimitError(f"picture has {count} tiles; the limit is {self.tiles} (Limits.tiles)")

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
