"""Symbols to bytes and back: exact, near the ideal size, total on any bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from hourglass.codec.entropy import TOTAL, Decoder, Encoder, Tables, ideal_bits
from hourglass.codec.errors import CorruptError


def _tables() -> Tables:
    """0: a sure zero; 1: -1..1; 2: 3..10, far from zero; 3: geometric -20..20."""
    geometric = 0.7 ** np.abs(np.arange(-20, 21))
    wide = np.maximum(1, np.rint(geometric / geometric.sum() * (TOTAL - 100))).astype(int)
    wide = np.append(wide, TOTAL - wide.sum())
    entries = [[TOTAL], [10_000, TOTAL - 15_000, 4_999, 1], [8_192] * 7 + [8_191, 1], wide.tolist()]
    start = np.cumsum([0, *map(len, entries)])
    first = np.array([0, -1, 3, -20], np.int32)
    return Tables(first, start.astype(np.int32), np.concatenate(entries).astype(np.uint32))


TABLES = _tables()


def encode(symbols: NDArray[np.int16], index: NDArray[np.uint8], tables: Tables = TABLES) -> bytes:
    encoder = Encoder(tables)
    encoder.put(symbols, index)
    return encoder.finish()


def decode(data: bytes, index: NDArray[np.uint8], tables: Tables = TABLES) -> NDArray[np.int16]:
    decoder = Decoder(data, tables)
    symbols = decoder.get(index)
    decoder.finish()
    return symbols


@st.composite
def _coded(draw: st.DrawFn) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=12))
    index = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 3)))
    values = st.one_of(st.integers(-2, 2), st.integers(-32767, 32767))
    symbols = draw(hnp.arrays(np.int16, shape, elements=values))
    return np.where(index == 0, 0, symbols).astype(np.int16), index


@settings(deadline=None, max_examples=200)
@given(_coded())
def test_round_trip(coded: tuple[NDArray[np.int16], NDArray[np.uint8]]) -> None:
    symbols, index = coded
    assert np.array_equal(decode(encode(symbols, index, TABLES), index, TABLES), symbols)


@pytest.mark.parametrize("table", [1, 2, 3])
def test_every_int16_escapes_and_returns(table: int) -> None:
    symbols = np.arange(-32768, 32768).astype(np.int16)
    index = np.full(symbols.shape, table, np.uint8)
    assert np.array_equal(decode(encode(symbols, index, TABLES), index, TABLES), symbols)


def test_exact_bytes() -> None:
    """The coder is part of the format: these bytes are for ever."""
    symbols = np.array([0, 1, -1, 5, 0, 300, -7, 4, -32767, 0], np.int16)
    index = np.array([0, 1, 1, 2, 1, 1, 3, 2, 3, 0], np.uint8)
    assert encode(symbols, index, TABLES).hex() == "ae9338efebdea69550ad7217"


def test_size_is_ideal() -> None:
    rng = np.random.default_rng(1)
    p = TABLES.frequencies_of(3) / TOTAL
    symbols = (rng.choice(len(p) - 1, 100_000, p=p[:-1] / p[:-1].sum()) - 20).astype(np.int16)
    ideal = -np.log2(p[symbols + 20]).sum() / 8
    size = len(encode(symbols, np.full(symbols.shape, 3, np.uint8), TABLES))
    assert ideal < size < ideal * 1.001 + 8


def test_parts_follow_each_other() -> None:
    """What one call leaves, escapes with it, the next takes up."""
    rng = np.random.default_rng(2)
    parts = [
        (np.where(index == 0, 0, rng.integers(-30, 30, index.shape)).astype(np.int16), index)
        for index in (rng.integers(0, 4, (3, size)).astype(np.uint8) for size in (1, 50, 7, 400))
    ]
    encoder = Encoder(TABLES)
    for symbols, index in parts:
        encoder.put(symbols, index)
    decoder = Decoder(encoder.finish(), TABLES)
    for symbols, index in parts:
        assert np.array_equal(decoder.get(index), symbols)
    decoder.finish()


def test_ideal_bits() -> None:
    symbols, index = np.array([0, 0, 3, 9], np.int16), np.array([0, 1, 2, 3], np.uint8)
    expected = -np.log2(TABLES.frequencies_of(1)[1] / TOTAL) + 3 - np.log2(TABLES.frequencies_of(3)[29] / TOTAL)
    assert ideal_bits(symbols, index, TABLES) == pytest.approx(expected)


def test_sure_zeros_cost_nothing_and_must_be_zero() -> None:
    index = np.zeros(1000, np.uint8)
    assert len(encode(np.zeros(1000, np.int16), index, TABLES)) <= 4
    with pytest.raises(ValueError, match="sure zero"):
        encode(np.ones(1000, np.int16), index, TABLES)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60), st.integers(0, 40))
def test_any_bytes_decode_or_are_refused(data: bytes, count: int) -> None:
    index = np.arange(count).astype(np.uint8) % 4
    try:
        symbols = decode(data, index, TABLES)
    except CorruptError:
        return
    assert symbols.shape == index.shape


def test_left_over_data_is_refused() -> None:
    index = np.ones(100, np.uint8)
    data = encode(np.zeros(100, np.int16), index, TABLES)
    with pytest.raises(CorruptError, match="goes on"):
        decode(data + bytes(range(1, 41)), index, TABLES)
    with pytest.raises(CorruptError, match="multiple of 4"):
        decode(data + b"\0", index, TABLES)


@pytest.mark.parametrize(
    ("first", "start", "frequencies"),
    [
        ([0], [0, 2], [TOTAL - 1, 2]),  # wrong sum
        ([0], [0, 2], [TOTAL, 0]),  # a frequency of 0
        ([0, 0], [0, 1], [TOTAL]),  # start too short
        ([0], [0, 1], [TOTAL, 1]),  # frequencies beyond the last table
    ],
)
def test_bad_tables_are_refused(first: list[int], start: list[int], frequencies: list[int]) -> None:
    with pytest.raises(ValueError, match="sum 65536"):
        Tables(np.array(first, np.int32), np.array(start, np.int32), np.array(frequencies, np.uint32))
