"""idx, ARFF and .rda: right values from right files, an error that says what is wrong from all others."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from rvae_fast.datasets.formats import decode_arff, decode_idx, decode_rda, encode_idx

ARRAYS = [
    np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    np.array([-3, 0, 127], dtype=np.int8),
    np.array([[-300, 300]], dtype=np.int16),
    np.array([2**30, -(2**30)], dtype=np.int32),
    np.array([[1.5, -2.25], [np.inf, 0.0]], dtype=np.float32),
    np.array([1e300], dtype=np.float64),
    np.zeros((0, 28, 28), dtype=np.uint8),
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}-{array.shape}")
def test_idx_holds_every_type_it_has_a_code_for(array: np.ndarray, zipped: bool) -> None:
    content = encode_idx(array)
    decoded = decode_idx(gzip.compress(content) if zipped else content)
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)
    assert decoded.flags.writeable


def test_idx_is_big_endian_as_published() -> None:
    content = bytes([0, 0, 0x0B, 2]) + struct.pack(">II", 1, 2) + struct.pack(">hh", 258, -1)
    np.testing.assert_array_equal(decode_idx(content), [[258, -1]])


@pytest.mark.parametrize("length", range(29))
def test_idx_cut_anywhere_is_an_error(length: int) -> None:
    content = encode_idx(np.arange(16, dtype=np.uint8).reshape(4, 4))
    assert len(content) == 28
    if length == 28:
        assert decode_idx(content).shape == (4, 4)
        return
    with pytest.raises(ValueError, match="my-file"):
        decode_idx(content[:length], "my-file")


def test_idx_with_bytes_left_over_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) need 11 bytes, the file has 12"):
        decode_idx(encode_idx(np.arange(3, dtype=np.uint8)) + b"x")


def test_idx_of_unknown_type_and_damaged_gzip_are_errors() -> None:
    with pytest.raises(ValueError, match="not an idx file"):
        decode_idx(bytes([0, 0, 7, 1, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="damaged gzip"):
        decode_idx(gzip.compress(encode_idx(np.zeros(1000, dtype=np.uint8)))[:-9])
    with pytest.raises(TypeError, match="idx cannot hold complex128"):
        encode_idx(np.zeros(2, dtype=complex))


def test_arff_is_read_after_its_data_line_whatever_the_header() -> None:
    content = b"@RELATION 'unclosed\n@ATTRIBUTE x\n% note\n@Data  \r\n1,0.0,2.5\n% between\n2,1.0,-3e-2\n"
    np.testing.assert_array_equal(decode_arff(content), [[1, 0, 2.5], [2, 1, -0.03]])
    np.testing.assert_array_equal(decode_arff(b"@data\n5,6\n"), [[5, 6]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"@relation x\n1,2\n", "no @data line"),
        (b"@relation x\n@database\n1,2\n", "no @data line"),
        (b"@data\n\n", "no rows"),
        (b"@data\n1,2\n3\n", "number of columns changed"),
        (b"@data\n1,red\n", "red"),
    ],
)
def test_arff_errors(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"t.arff: .*{message}"):
        decode_arff(content, "t.arff")


def test_rda_gives_the_data_frame(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rdata = pytest.importorskip("rdata", reason="rdata is not installed")
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    if not hasattr(rdata, "write_rda"):
        pytest.skip("this version of rdata cannot write the file that the test reads")
    frame = pandas.DataFrame({"V1": [1.0, 2.5], "Class": pandas.Categorical(["High", "Rad.Flow"])})
    path = tmp_path / "t.rda"
    rdata.write_rda(str(path), {"Shuttle": frame})
    read = decode_rda(path.read_bytes(), "Shuttle", "t.rda")
    assert read["V1"].tolist() == [1.0, 2.5]
    assert read["Class"].astype(str).tolist() == ["High", "Rad.Flow"]
    with pytest.raises(ValueError, match=r"no variable 'Satellite'.*found: Shuttle"):
        decode_rda(path.read_bytes(), "Satellite", "t.rda")
    with pytest.raises(ValueError, match=r"t.rda: not a readable R data file"):
        decode_rda(path.read_bytes()[:40], "Shuttle", "t.rda")


def test_rda_without_rdata_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rdata", None)
    with pytest.raises(ImportError, match=r"pip install 'rvae-fast\[data\]'"):
        decode_rda(b"", "Shuttle")
