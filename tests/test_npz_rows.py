"""Rows out of an NPZ that anybody may send: right ones arrive, damaged ones end in one kind of error, and soon."""

import io
import tracemalloc

import numpy as np
import pytest

from sdfserver.errors import CloudFormatError
from sdfserver.formats.arrays import read_rows

NAMES = ("points", "origins")


def packed(*, compressed: bool = False, **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "f2"])
@pytest.mark.parametrize("compressed", [False, True])
def test_numbers_of_any_type_and_order_arrive(dtype: str, compressed: bool) -> None:
    rows = np.arange(12).reshape(4, 3)
    body = packed(compressed=compressed, points=np.asfortranarray(rows.astype(dtype)), origins=rows[:0].astype(dtype))
    found = read_rows(io.BytesIO(body), NAMES, 4)
    assert (found["points"] == rows).all()
    assert found["points"].dtype == np.float64
    assert found["origins"].shape == (0, 3)
    with pytest.raises(CloudFormatError, match="'points' has 4 rows; send 3 at a time"):
        read_rows(io.BytesIO(body), NAMES, 3)


def test_damaged_ones_end_in_an_error_or_in_rows() -> None:
    body = packed(points=np.arange(30.0).reshape(10, 3), origins=np.zeros((2, 3), np.float32))
    rng = np.random.default_rng(0)
    said = []
    for i in range(3000):
        wrong = bytearray(body[: rng.integers(len(body))] if i % 10 == 0 else body)
        for _ in range(rng.integers(1, 4)):
            if wrong:
                wrong[rng.integers(len(wrong))] = rng.integers(256)
        try:
            with np.errstate(all="ignore"):
                found = read_rows(io.BytesIO(bytes(wrong)), NAMES, 1000)
        except CloudFormatError as error:
            said.append(str(error))
        else:
            assert all(array.shape[1:] == (3,) and len(array) <= 1000 for array in found.values())
    assert len(said) > 1000
    assert not any("\n" in message for message in said)


def test_what_is_too_long_takes_no_memory() -> None:
    bomb = packed(compressed=True, points=np.zeros((3_000_000, 3)))
    tracemalloc.start()
    try:
        with pytest.raises(CloudFormatError, match="3,000,000 rows"):
            read_rows(io.BytesIO(bomb), NAMES, 1000)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
