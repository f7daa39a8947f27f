"""Integer symbols + frozen integer tables <-> bytes. No floats of a model, no model.

A table gives the frequencies of the symbols first, first + 1, ..., and last that of the escape code, all positive
integers with sum 2**16. Symbols are grouped by table (a stable sort), each group is one call of constriction's
range coder. Behind them stand the escaped symbols' distances from their tables, as Elias gamma codes.

Exactness: a frequency divided by 2**16 is exact in float64, and so is every partial sum of them; constriction's
`Categorical(perfect=False)` then builds the same 24-bit integer model on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import constriction
import numpy as np
from numpy.typing import NDArray

from hourglass.codec.errors import CorruptError
from hourglass.codec.watch import hop

TOTAL = 1 << 16
"""Sum of the frequencies of every table."""


@dataclass(frozen=True)
class Tables:
    """Frozen probability tables, ragged, in one flat array.

    first (T,) int32: the symbol that entry 0 of a table stands for.
    start (T + 1,) int32: where each table begins in `frequencies`.
    frequencies (N,) uint32: entries; the last one of a table is its escape code.

    A table of one entry codes nothing: its symbols are sure zeros.
    """

    first: NDArray[np.int32]
    start: NDArray[np.int32]
    frequencies: NDArray[np.uint32]

    def __post_init__(self) -> None:
        sums = np.add.reduceat(self.frequencies.astype(np.int64), self.start[:-1]) if len(self.first) else np.zeros(0)
        whole = len(self.start) == len(self.first) + 1 and self.start[-1] == len(self.frequencies)
        if not whole or (np.diff(self.start) < 1).any() or (sums != TOTAL).any() or not self.frequencies.all():
            raise ValueError(f"every table needs positive frequencies with sum {TOTAL}")

    def __len__(self) -> int:
        return len(self.first)

    def frequencies_of(self, table: int) -> NDArray[np.uint32]:
        return self.frequencies[self.start[table] : self.start[table + 1]]

    @cached_property
    def sure_zero(self) -> NDArray[np.bool_]:
        """(T,) bool: the tables that code nothing."""
        return np.asarray(np.diff(self.start) == 1)

    @cached_property
    def escapes(self) -> NDArray[np.int32]:
        """(T,) int32: the number of the escape code among the entries of each table."""
        return np.diff(self.start) - 1

    def model(self, table: int) -> constriction.stream.model.Model:
        """constriction's model of a table; made once."""
        if table not in self._models:
            probabilities = self.frequencies_of(table).astype(np.float64) / TOTAL
            self._models[table] = constriction.stream.model.Categorical(probabilities, lazy=False, perfect=False)
        return self._models[table]

    @cached_property
    def _models(self) -> dict[int, constriction.stream.model.Model]:
        return {}


class Encoder:
    """Codes any number of arrays of symbols, one behind the other."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._coder = constriction.stream.queue.RangeEncoder()

    @hop("entropy")
    def put(self, symbols: NDArray[np.int16], index: NDArray[np.uint8]) -> None:
        """Code `symbols` (any shape, int16), each with the table that `index` (same shape, uint8) names.

        Symbols whose table is a sure zero must be 0 (`ValueError`).
        """
        tables = self._tables
        places, groups = _grouped(index, tables)
        values = symbols.reshape(-1)[places].astype(np.int32)
        if np.count_nonzero(values) != np.count_nonzero(symbols):
            raise ValueError("a symbol whose table is a sure zero is not 0")
        outside = []
        for table, members in groups:
            entries = tables.start[table + 1] - tables.start[table] - 1
            entry = values[members]
            entry -= tables.first[table]
            if entry.min() < 0 or entry.max() >= entries:
                escaped = (entry < 0) | (entry >= entries)
                distance = np.where(entry < 0, -2 * entry - 1, 2 * (entry - entries))[escaped]
                outside.append(distance)
                entry[escaped] = entries
            self._coder.encode(entry, tables.model(table))
        if outside:
            _encode_gamma(self._coder, np.concatenate(outside))

    @hop("entropy")
    def finish(self) -> bytes:
        """All that was coded."""
        words: NDArray[np.uint32] = self._coder.get_compressed()
        return words.astype("<u4").tobytes()


class Decoder:
    """Inverse of `Encoder`: the same calls with the same index. Raises `CorruptError` for bytes no encoder wrote."""

    def __init__(self, data: bytes | memoryview, tables: Tables) -> None:
        if len(data) % 4:
            raise CorruptError(f"entropy-coded data has {len(data)} bytes; expected a multiple of 4")
        self._tables = tables
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    @hop("entropy")
    def get(self, index: NDArray[np.uint8]) -> NDArray[np.int16]:
        """The next symbols, int16 of the shape of `index`."""
        tables = self._tables
        places, groups = _grouped(index, tables)
        flat = np.zeros(index.size, np.int16)
        if not groups:
            return flat.reshape(index.shape)
        used = np.array([table for table, _ in groups])
        counts = [members.stop - members.start for _, members in groups]
        try:
            runs = map(self._coder.decode, map(tables.model, used.tolist()), counts)
            entries = np.concatenate(list(runs))
            escaped = np.flatnonzero(entries == np.repeat(tables.escapes[used], counts))
            entries += np.repeat(tables.first[used], counts)
            values = entries.astype(np.int16)
            if len(escaped):
                _decode_escapes(self._coder, values, escaped, index.reshape(-1)[places[escaped]], tables)
        except AssertionError as exc:  # what constriction raises when the bits fit no symbol
            raise CorruptError(f"entropy-coded data is invalid: {exc}") from exc
        flat[places] = values
        return flat.reshape(index.shape)

    def finish(self) -> None:
        """Raises `CorruptError` when there is more."""
        if not self._coder.maybe_exhausted():
            raise CorruptError("entropy-coded data goes on behind the last symbol")


def ideal_bits(symbols: NDArray[np.int16], index: NDArray[np.uint8], tables: Tables) -> float:
    """What the tables say that `Encoder.put` takes, in bits; escape codes without what follows them."""
    total = 0.0
    for table, counts in count(symbols, index, tables):
        total += float(counts @ -np.log2(tables.frequencies_of(table) / TOTAL))
    return total


def count(
    symbols: NDArray[np.int16], index: NDArray[np.uint8], tables: Tables
) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """(table, how often each of its entries comes) for each table in use, ascending; sure zeros left out."""
    places, groups = _grouped(index, tables)
    values = symbols.reshape(-1)[places].astype(np.int64)
    for table, members in groups:
        entries = len(tables.frequencies_of(table))
        entry = values[members] - tables.first[table]
        entry[(entry < 0) | (entry >= entries - 1)] = entries - 1
        yield table, np.bincount(entry, minlength=entries)


def _grouped(index: NDArray[np.uint8], tables: Tables) -> tuple[NDArray[np.intp], list[tuple[int, slice]]]:
    """Symbols that are coded, by table: their places in flat order, those of one table behind those of another,
    ascending; and for each table in use which of the places are its symbols'.
    """
    flat = index.reshape(-1)
    coding = np.ones(flat.size, np.bool_)
    for table in np.flatnonzero(tables.sure_zero):  # one, and more than half of all symbols have it at many qualities
        coding &= flat != table
    coded = np.flatnonzero(coding)
    used = flat[coded]
    places = coded[np.argsort(used, kind="stable")]  # a radix sort for uint8
    sizes = np.bincount(used, minlength=len(tables)).tolist()
    begins = accumulate(sizes, initial=0)
    groups = enumerate(zip(begins, sizes, strict=False))
    return places, [(table, slice(begin, begin + size)) for table, (begin, size) in groups if size]


def _encode_gamma(coder: constriction.stream.queue.RangeEncoder, distance: NDArray[np.int32]) -> None:
    """Elias gamma codes of distance + 1: how many bits follow its leading one (uniform in 0..17), then these."""
    number = distance.astype(np.int64) + 1
    bits = np.frexp(number)[1] - 1  # floor(log2(number)), exact: log2 itself may round
    coder.encode(bits.astype(np.int32), constriction.stream.model.Uniform(18))
    for low in range(1, 18):
        group = number[bits == low]
        if len(group):
            coder.encode((group - (1 << low)).astype(np.int32), constriction.stream.model.Uniform(1 << low))


def _decode_escapes(
    coder: constriction.stream.queue.RangeDecoder,
    values: NDArray[np.int16],
    places: NDArray[np.intp],
    index: NDArray[np.uint8],
    tables: Tables,
) -> None:
    """Read the distances behind the symbols and put the escaped symbols, in the order coded, into `values`.

    places: of those in `values`. index: the table of each.
    """
    bits = coder.decode(constriction.stream.model.Uniform(18), len(places))
    number = np.ones(len(places), np.int64)
    for low in range(1, 18):
        group = np.flatnonzero(bits == low)
        if len(group):
            number[group] = coder.decode(constriction.stream.model.Uniform(1 << low), len(group)) + (1 << low)
    distance = number - 1
    below = distance % 2 == 1
    value = tables.first[index] + np.where(below, -(distance + 1) // 2, tables.escapes[index] + distance // 2)
    if (value.astype(np.int16) != value).any():
        raise CorruptError("an escaped symbol is outside the range of int16")
    values[places] = value
