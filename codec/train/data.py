"""Training pictures: a folder -> pieces in device memory -> random crops.

Every picture is decoded once, cut into pieces of one size and kept as uint8 on the training device; a batch is one
gather there, so neither a CPU nor a GPU waits for decoding.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hourglass.codec import errors, image

PIECE = 320
"""Side in pixels of the pieces that pictures are kept in; smaller pictures leave part of theirs unused."""


@dataclass(frozen=True)
class Pieces:
    """Pictures in device memory: pixels (N, PIECE, PIECE, 3) uint8, sizes (N, 2) int64 as (height, width).

    Or their latents: pixels (N, PIECE / 16, PIECE / 16, C) float16.
    """

    pixels: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def crops(
        self,
        count: int,
        side: int,
        generator: torch.Generator,
        own: slice | Tensor = slice(None),
        mirror: bool = True,
    ) -> Tensor:
        """Random crops, half of them mirrored: (count, C, side, side) float32, values as they are.

        Only of pieces that are large enough. own: which of the `count` to make; the random numbers drawn are those
        for all.
        """
        device = self.pixels.device
        large = (self.sizes >= side).all(1).nonzero()[:, 0]
        which = large[torch.randint(len(large), (count,), generator=generator)[own].to(device)]
        place = torch.rand(count, 2, generator=generator)[own].to(device)
        corner = (place * (self.sizes[which] - side + 1)).long()
        along = torch.arange(side, device=device)
        rows = corner[:, :1] + along
        columns = corner[:, 1:] + along
        if mirror:
            mirrored = (torch.rand(count, 1, generator=generator) < 0.5)[own].to(device)
            columns = torch.where(mirrored, columns.flip(1), columns)
        crops = self.pixels[which[:, None, None], rows[:, :, None], columns[:, None, :]]
        return crops.permute(0, 3, 1, 2).float()

    def varied(self, count: int, side: int, generator: torch.Generator, own: slice, share: float) -> Tensor:
        """`crops` of which a `share` is made smaller, with sharper detail, and a `share` more colourful.

        The colours of the latter are also swapped, and half of them are negatives.
        """
        crops = self.crops(count, side, generator, own)
        smaller, colourful = torch.rand(2, count, generator=generator) < share
        strength = 1 + 2 * torch.rand(count, generator=generator)
        negative = torch.rand(count, generator=generator) < 0.5
        order = torch.rand(count, 3, generator=generator).argsort(1)
        members = range(count)[own]
        wider = side * 4 // 3 if torch.rand((), generator=generator) < 0.5 else side * 5 // 3
        if bool(smaller.any()) and bool((self.sizes >= wider).all(1).any()):
            places = [i for i, member in enumerate(members) if smaller[member]]
            chosen = torch.tensor([members[i] for i in places], dtype=torch.long)
            wide = self.crops(count, wider, generator, chosen)
            if places:
                crops[places] = F.interpolate(wide, (side, side), mode="bilinear", antialias=True)
        for i, member in enumerate(members):
            if colourful[member]:
                mixed = crops[i][order[member].to(crops.device)]
                grey = mixed.mean(0, keepdim=True)
                mixed = (grey + float(strength[member]) * (mixed - grey)).clamp(0, 255)
                crops[i] = 255 - mixed if negative[member] else mixed
        return crops

    def split(self, held_out: int) -> tuple[Pieces, Pieces]:
        """The pieces to train on, and the last `held_out` of full size, to judge by."""
        full = (self.sizes == PIECE).all(1).nonzero()[:, 0][-held_out:]
        keep = torch.ones(len(self), dtype=torch.bool, device=self.pixels.device)
        keep[full] = False
        return Pieces(self.pixels[keep], self.sizes[keep]), Pieces(self.pixels[full], self.sizes[full])


def grey_of(pictures: Tensor) -> Tensor:
    """The luma (ITU-R BT.601) of (B, 3, H, W) or (3, H, W), in one channel and of the same dtype."""
    red, green, blue = pictures.float().split(1, -3)  # type: ignore[no-untyped-call]
    luma: Tensor = 0.299 * red + 0.587 * green + 0.114 * blue
    return luma.round().to(pictures.dtype) if pictures.dtype == torch.uint8 else luma


def list_training(folder: Path, tier: str | None = None) -> list[Path]:
    """Picture files of a folder in order of name; with `tier`, those whose row of index.csv names that tier.

    Raises `InvalidArgument` when nothing is found.
    """
    if tier is None:
        return image.list_pictures(folder)
    index = folder / "index.csv"
    if not index.is_file():
        raise errors.InvalidArgument(f"--tier {tier} needs {index}, which does not exist; leave --tier out")
    with index.open(newline="") as rows:
        found = [folder / row["file"] for row in csv.DictReader(rows) if row["tier"] == tier]
    if not found:
        raise errors.InvalidArgument(f"{index} has no picture of tier {tier!r}")
    return found


def load_pieces(paths: list[Path], smallest: int, device: torch.device) -> Pieces:
    """Decode pictures into pieces on `device`. Parts narrower or lower than `smallest` pixels are left out."""
    pixels, sizes = [], []
    for path in paths:
        whole = image.read(path)
        for top in range(0, whole.shape[0], PIECE):
            for left in range(0, whole.shape[1], PIECE):
                part = whole[top : top + PIECE, left : left + PIECE]
                if min(part.shape[:2]) < smallest:
                    continue
                piece = np.zeros((PIECE, PIECE, 3), np.uint8)
                piece[: part.shape[0], : part.shape[1]] = part
                pixels.append(torch.from_numpy(piece))
                sizes.append(part.shape[:2])
    if not pixels:
        raise errors.InvalidArgument(f"no picture of at least {smallest}x{smallest} pixels among {len(paths)} files")
    return Pieces(torch.stack(pixels).to(device), torch.tensor(sizes, device=device))
