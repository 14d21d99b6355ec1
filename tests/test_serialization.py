"""Files: what is saved comes back bit for bit, and every other file is refused with its reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.exceptions import NotFittedError

from rvae_fast import serialization
from rvae_fast.detector import DETECTORS, RVAEDetector
from rvae_fast.models import MODELS, RVAE
from rvae_fast.serialization import FileFormatError, load, save
from tests.helpers.files import rewrite

SMALL: dict[str, Any] = {"epochs": 2, "widths": (16,), "random_state": 0}


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(80, 5)) * [1, 10, 100, 0.1, 1] + 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "saved.safetensors"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{"n_layers": 4}, {"widths": (9, 5), "likelihood": "absolute"}])
def test_model_round_trip(name: str, options: dict[str, Any], path: Path) -> None:
    model = MODELS[name](6, 2, **options)
    x = torch.rand(40, 6)
    model(x)  # statistics of BatchNorm that are not 0 and 1
    save(model, path)
    state = torch.get_rng_state()
    loaded = load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(model)
    assert loaded.config() == model.config()
    assert not loaded.training
    assert torch.equal(loaded.anomaly_score(x), model.anomaly_score(x))
    loaded.train().loss(x).backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_dtype_of_a_model_is_kept(path: Path) -> None:
    save(RVAE(6, 2, n_layers=4).double(), path)
    assert {p.dtype for p in load(path).parameters()} == {torch.float64}


@pytest.mark.parametrize("detector_class", DETECTORS.values())
def test_detector_round_trip(detector_class: Any, table: np.ndarray, path: Path) -> None:
    detector = detector_class(**SMALL, contamination=np.float32(0.25), batch_size=np.int64(32)).fit(table)
    detector.save(path)
    loaded = load(path)
    assert type(loaded) is detector_class
    np.testing.assert_array_equal(loaded.score_samples(table), detector.score_samples(table))
    np.testing.assert_array_equal(loaded.predict(table), detector.predict(table))
    np.testing.assert_array_equal(loaded.reconstruct(table), detector.reconstruct(table))
    parameters = loaded.get_params()
    assert parameters.pop("widths") == [16]
    assert parameters == {key: value for key, value in detector.get_params().items() if key != "widths"}
    assert (loaded.n_iter_, loaded.n_features_in_, loaded.offset_) == (2, 5, detector.offset_)
    assert loaded.history_.to_dict() == detector.history_.to_dict()
    loaded.fit(table)  # and it can be trained again


def test_feature_names_and_fill_values_come_along(table: np.ndarray, path: Path) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(table, columns=["a", "b", "c", "d", "é\n"])
    frame.iloc[0, 0] = np.nan
    detector = RVAEDetector(missing="median", scaler="minmax", **SMALL).fit(frame)
    save(detector, path)
    loaded = load(path)
    np.testing.assert_array_equal(loaded.feature_names_in_, detector.feature_names_in_)
    np.testing.assert_array_equal(loaded.score_samples(frame), detector.score_samples(frame))
    with pytest.raises(ValueError, match="feature names"):
        loaded.score_samples(frame[["b", "a", "c", "d", "é\n"]])


def test_device_can_be_chosen_while_loading(table: np.ndarray, path: Path) -> None:
    save(RVAEDetector(**SMALL).fit(table), path)
    assert load(path, device="cpu").device == "cpu"
    rewrite(path, lambda document, tensors: document["parameters"].update(device="cuda:7"))
    elsewhere = load(path)
    with pytest.raises(ValueError, match="device must be present, got 'cuda:7'"):
        elsewhere.score_samples(table)
    assert np.isfinite(load(path, device="cpu").score_samples(table)).all()


def test_saving_what_cannot_be_saved(table: np.ndarray, path: Path) -> None:
    with pytest.raises(NotFittedError):
        save(RVAEDetector(), path)
    with pytest.raises(TypeError, match="one of their detectors or an EnsembleDetector, got Linear"):
        save(torch.nn.Linear(2, 2), path)  # type: ignore[arg-type]

    class Mine(RVAE):
        pass

    class MyDetector(RVAEDetector):
        pass

    with pytest.raises(TypeError, match="subclass Mine"):
        save(Mine(6, 2, n_layers=4), path)
    with pytest.raises(TypeError, match="subclass MyDetector"):
        save(MyDetector(**SMALL).fit(table), path)
    assert not path.exists()


def test_a_generator_as_random_state_is_saved_as_none(table: np.ndarray, path: Path) -> None:
    save(RVAEDetector(**{**SMALL, "random_state": np.random.RandomState(3)}).fit(table), path)
    assert load(path).random_state is None


def test_a_failed_write_leaves_the_old_file_and_no_litter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(RVAE(6, 2, n_layers=4), path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(RVAE(7, 2, n_layers=4), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")
def test_only_files_are_replaced_and_links_are_followed(path: Path, tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    save(RVAE(6, 2, n_layers=4), target)
    link.symlink_to(target.name)
    save(RVAE(7, 2, n_layers=4), link)
    assert link.is_symlink()
    assert load(target).in_features == 7
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe is a device or a pipe, expected the name of a file"):
        save(RVAE(6, 2, n_layers=4), pipe)
    assert pipe.is_fifo()
    with pytest.raises(IsADirectoryError, match=" is a directory, expected the name of a file"):
        save(RVAE(6, 2, n_layers=4), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent/saved\.safetensors cannot be written: there is no directory"):
        save(RVAE(6, 2, n_layers=4), tmp_path / "absent" / path.name)
    assert sorted(tmp_path.iterdir()) == [link, pipe, target]


def test_absent_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"saved\.safetensors"):
        load(path)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load(path.parent)


def test_truncated_at_any_length(path: Path) -> None:
    save(RVAE(6, 2, widths=(4,)), path)
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(FileFormatError, match=r"saved\.safetensors is damaged, truncated or no safetensors file"):
            load(path)
    path.write_bytes(content + b"x")
    with pytest.raises(FileFormatError):
        load(path)


def test_a_flipped_bit_anywhere_is_noticed(table: np.ndarray, path: Path) -> None:
    detector = RVAEDetector(**{**SMALL, "widths": (4,)}).fit(table)
    save(detector, path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(0, header, 37), *range(header, len(content), 53)]
    rng = np.random.default_rng(0)
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        with pytest.raises(FileFormatError):
            load(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\x80\x04\x95 a pickle" * 40, b"a,b\n1,2\n" * 100])
def test_foreign_files(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="is damaged, truncated or no safetensors file at all"):
        load(path)


def test_somebody_elses_safetensors_file(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(FileFormatError, match=r"rvae_fast\.save did not write"):
        load(path)
    save_file({"weight": torch.zeros(3)}, path, {"rvae_fast": "not json"})
    with pytest.raises(FileFormatError, match="no document of ours"):
        load(path)


def test_newer_format_says_upgrade(path: Path) -> None:
    save(RVAE(6, 2, n_layers=4), path)
    rewrite(path, lambda document, tensors: document.update(format_version=2, library_version="9.9"))
    with pytest.raises(FileFormatError, match=r"rvae-fast 9\.9 in format 2; .* reads formats up to 1: upgrade"):
        load(path)


def test_content_that_does_not_fit_together(table: np.ndarray, path: Path) -> None:
    model, detector = RVAE(6, 2, n_layers=4), RVAEDetector(**SMALL).fit(table)
    first = next(f"model.{key}" for key in model.state_dict())

    def refused(obj: Any, change: Any, message: str) -> None:
        save(obj, path)
        rewrite(path, change)
        with pytest.raises(FileFormatError, match=message):
            load(path)

    refused(model, lambda d, t: d.update({"class": "GAN"}), "a model of class 'GAN', which rvae-fast .* does not know")
    refused(model, lambda d, t: d.update(kind="forest"), "a forest of class 'RVAE'")
    refused(model, lambda d, t: d["config"].update(in_features=8), "does not fit a RVAE of its configuration: .*shape")
    refused(model, lambda d, t: d["config"].update(n_layers=-1), "configuration that RVAE does not take: n_layers")
    refused(model, lambda d, t: d["config"].update(colour="red"), "configuration that RVAE does not take: .*colour")
    refused(model, lambda d, t: d.pop("config"), "lacks 'config'")
    refused(model, lambda d, t: t.pop(first), f"{first.removeprefix('model.')} is missing")
    refused(model, lambda d, t: t.update({"model.extra": torch.zeros(1)}), "extra is not known")
    refused(model, lambda d, t: t.update({first: torch.zeros(1)}), r"has shape \[1\], not")
    refused(detector, lambda d, t: d.update({"class": "AEDetector"}), "parameters that AEDetector does not take")
    refused(detector, lambda d, t: d.update(model_class="RAE"), "holds a RAE in a RVAEDetector")
    refused(detector, lambda d, t: t.update({"scaler.scale": torch.ones(4)}), r"scaler.scale has shape \[4\]")
    refused(detector, lambda d, t: t.pop("scaler.center"), r"lacks 'scaler\.center'")
    refused(detector, lambda d, t: d.update(feature_names=["a"]), r"feature_names has shape \[1\]")
    refused(detector, lambda d, t: d.update(feature_names=7), "cannot be a detector of class 'RVAEDetector': .*int")
    refused(detector, lambda d, t: d.update(offset=[]), "cannot be a detector of class 'RVAEDetector': float")
    refused(detector, lambda d, t: d.update(history="lost"), "cannot be a detector of class 'RVAEDetector'")
    refused(detector, lambda d, t: d["parameters"].update(anomaly_score=3), "cannot be a detector .*anomaly_score must")
    refused(model, lambda d, t: d.update(frozen=1), "cannot be a model of class 'RVAE'")
    refused(model, lambda d, t: d.update({"class": []}), "cannot be a model of class")
    refused(model, lambda d, t: t.update({first: t[first].int()}), "cannot be a model of class 'RVAE'")


def test_nothing_in_a_file_can_run(path: Path) -> None:
    """A class is looked up in a fixed list: a name from elsewhere is a name, not an import."""
    save(RVAE(6, 2, n_layers=4), path)
    rewrite(path, lambda document, tensors: document.update({"class": "os.system"}))
    with pytest.raises(FileFormatError, match=r"'os\.system'"):
        load(path)
    source = Path(serialization.__file__).read_text(encoding="utf-8")
    assert not [call for call in ("import pickle", "torch.load", " eval(", " exec(", "import_module") if call in source]


def test_a_device_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(RVAE(4, latent_features=2, n_layers=2), path)
    with pytest.raises(ValueError, match=r"device must be 'auto' or a torch device such as .*, got 'foo'"):
        load(path, device="foo")
    assert load(path, device="auto").in_features == 4
