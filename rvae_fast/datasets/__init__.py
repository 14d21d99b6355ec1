"""Data: named data sets, splits for novelty detection, readers and writers of tables.

>>> from rvae_fast import datasets
>>> digits = datasets.load("digits")
>>> split = datasets.novelty_split(digits.scaled(), digits.y, novel_class=0, seed=0)

Data sets are looked for in a cache folder (`RVAE_FAST_DATA`, by default `~/.cache/rvae-fast`) and fetched through the
packages and libraries that carry them. Only NumPy is imported here; pandas, pyarrow and the rest are when they are
used.
"""

from __future__ import annotations

from .cache import cache_folder
from .loading import DatasetInfo, fetch, fetch_all, list_datasets, load, names
from .readers import iter_table, read_table
from .splits import NoveltySplit, anomaly_split, novelty_split
from .tables import Table, TableError, anomaly_labels
from .types import Dataset, DatasetContentError, DatasetUnavailableError
from .writers import write_scores

__all__ = [
    "Dataset",
    "DatasetContentError",
    "DatasetInfo",
    "DatasetUnavailableError",
    "NoveltySplit",
    "Table",
    "TableError",
    "anomaly_labels",
    "anomaly_split",
    "cache_folder",
    "fetch",
    "fetch_all",
    "iter_table",
    "list_datasets",
    "load",
    "names",
    "novelty_split",
    "read_table",
    "write_scores",
]
