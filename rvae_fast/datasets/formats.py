"""Decoders of the file formats that published data sets come in: idx, ARFF, R's .rda.

Each takes bytes, because the members come out of package archives; each checks what it reads and raises ValueError,
naming what was being read, on a truncated, foreign or malformed file.
"""

from __future__ import annotations

import gzip
import io
import re
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas

GZIP_MAGIC = b"\x1f\x8b"
# The third byte of an idx file names its type; values are big-endian.
IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def gunzip(content: bytes, what: str = "file") -> bytes:
    """Return `content` decompressed if it is gzip, unchanged if it is not; ValueError if it is damaged gzip."""
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{what}: damaged gzip data ({error})") from error


def decode_idx(content: bytes, what: str = "idx file") -> np.ndarray:
    """Decode an idx file, the format of MNIST (gzipped or not).

    Parameters
    ----------
    content : bytes
        Two zero bytes, type, number of dimensions, the dimensions as big-endian uint32, the values row-major.
    what : str
        Name used in errors.

    Returns
    -------
    ndarray
        Values in native byte order, of the file's own shape.

    Raises
    ------
    ValueError
        Not an idx file, an unknown type, or fewer or more bytes than the header announces.
    """
    content = gunzip(content, what)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_DTYPES:
        raise ValueError(
            f"{what}: not an idx file (it starts with {content[:4]!r}, expected two zero bytes and a type)"
        )
    dtype, n_dimensions = np.dtype(IDX_DTYPES[content[2]]), content[3]
    header = 4 + 4 * n_dimensions
    if n_dimensions == 0 or len(content) < header:
        raise ValueError(f"{what}: idx header cut short ({len(content)} bytes, {n_dimensions} dimensions announced)")
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=n_dimensions, offset=4))
    expected = header + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(f"{what}: idx data of shape {shape} need {expected} bytes, the file has {len(content)}")
    values = np.frombuffer(content, dtype=dtype, offset=header).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=True)


def encode_idx(values: np.ndarray) -> bytes:
    """Encode an array as an idx file, the inverse of `decode_idx`; TypeError for a type that idx has no code for."""
    values = np.asarray(values)
    codes = {np.dtype(name).newbyteorder("="): code for code, name in IDX_DTYPES.items()}
    if values.dtype not in codes:
        raise TypeError(f"values: idx cannot hold {values.dtype}; expected one of {', '.join(str(d) for d in codes)}")
    big_endian = values.astype(values.dtype.newbyteorder(">"))
    sizes = np.array(values.shape, dtype=">u4").tobytes()
    return bytes([0, 0, codes[values.dtype], values.ndim]) + sizes + big_endian.tobytes()


def decode_arff(content: bytes, what: str = "ARFF file") -> np.ndarray:
    """Return the numbers after the `@data` line of an ARFF (or KEEL .dat) file, float64, shape [n_rows, n_columns].

    The header is not interpreted: several published files have malformed headers (an unclosed quote, attributes that
    do not match) over sound data, so the caller names the columns.

    Raises
    ------
    ValueError
        No `@data` line, no rows, a value that is not a number, or rows of unequal length.
    """
    text = gunzip(content, what).decode("latin-1")
    start = re.search(r"^@data[ \t]*\r?$", text, flags=re.IGNORECASE | re.MULTILINE)
    if start is None:
        raise ValueError(f"{what}: no @data line")
    body = text[start.end() :]
    if not body.strip():
        raise ValueError(f"{what}: no rows after the @data line")
    try:
        return np.loadtxt(io.StringIO(body), delimiter=",", comments="%", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def decode_rda(content: bytes, variable: str, what: str = "R data file") -> pandas.DataFrame:
    """Return one data frame of an R workspace file (.rda), read by the `rdata` library.

    Raises
    ------
    ImportError
        `rdata` is not installed.
    ValueError
        The file is damaged, or has no data frame of that name.
    """
    try:
        import rdata
    except ImportError as error:
        raise ImportError("reading R data files needs the rdata library: pip install 'rvae-fast[data]'") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unknown encoding", category=UserWarning)  # ASCII class names
            objects = rdata.conversion.convert(rdata.parser.parse_data(content))
    except Exception as error:  # the parser raises whatever the damaged bytes lead it into
        raise ValueError(f"{what}: not a readable R data file ({type(error).__name__}: {error})") from error
    if not isinstance(objects, dict) or variable not in objects:
        found = ", ".join(objects) if isinstance(objects, dict) else "no named object"
        raise ValueError(f"{what}: no variable {variable!r} in it (found: {found})")
    frame = objects[variable]
    if not hasattr(frame, "columns"):
        raise ValueError(f"{what}: {variable!r} is a {type(frame).__name__}, expected a data frame")
    return frame
