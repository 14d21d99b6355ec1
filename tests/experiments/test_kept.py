"""Kept models stand for their training: the same results, without it, for whatever scores are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rvae_fast.experiments import kept, work
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.experiment import Settings
from rvae_fast.experiments.store import ResultsError
from rvae_fast.experiments.work import run_cell

from .conftest import cell


def own(**changes: Any) -> Cell:
    return cell(model="RVAE", order="pre", **changes)


def untimed(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not name.endswith("seconds")}


def no_training(*given: Any, **options: Any) -> Any:
    raise AssertionError("a kept model was trained again")


@pytest.mark.parametrize("members", [1, 2])
def test_a_kept_model_is_scored_without_training(members: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_cell(own(members=members), models=str(folder))
    assert len(list(folder.glob("*.safetensors"))) == members
    monkeypatch.setattr(work, "train", no_training)
    again = run_cell(own(members=members), models=str(folder))
    assert untimed(again) == untimed(first)
    assert again["cpu_seconds"] > 0.5 * first["cpu_seconds"]  # the training's time is part of the record
    other = run_cell(own(members=members, scores=("reconstruction", "sap")), models=str(folder))
    assert {k: v for k, v in untimed(other).items() if k != "auroc_sap"} == untimed(first)


def varied(variant: str) -> Cell:
    return Settings(data=("digits",), seeds=1, variant=variant).vary([own()])[0]


def test_an_ensemble_takes_the_first_member_from_the_single_model(folder: Path) -> None:
    run_cell(own(), models=str(folder))
    before = kept.model_file(folder, own()).stat().st_mtime_ns
    ensemble = varied("ensemble")
    run_cell(ensemble, models=str(folder))
    assert kept.model_file(folder, own()).stat().st_mtime_ns == before
    assert [kept.model_file(folder, ensemble, i).exists() for i in range(3)] == [True] * 3
    assert len(list(folder.glob("*.safetensors"))) == 3


def test_parts_are_the_single_models_of_their_variants(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    singles = [run_cell(varied(name), models=str(folder)) for name in ("", "half-rate")]
    monkeypatch.setattr(work, "train", no_training)
    both = run_cell(varied("two-rates"), models=str(folder))
    assert varied("two-rates").recipe not in (varied("").recipe, varied("half-rate").recipe)
    assert both["train_loss"] == singles[1]["train_loss"]  # as of an ensemble, the last one's
    assert both["auroc_reconstruction"] not in [single["auroc_reconstruction"] for single in singles]
    records = [found[1] for name in ("", "half-rate") if (found := kept.find(folder, varied(name)))]
    assert len(records) == 2
    assert both["cpu_seconds"] >= sum(record["cpu_seconds"] for record in records)  # both trainings' count


def test_a_model_of_another_recipe_is_refused(folder: Path) -> None:
    run_cell(own(), models=str(folder))
    with pytest.raises(ResultsError, match="give another directory for the models"):
        run_cell(own(noise=0.1), models=str(folder))


def test_a_model_without_its_record_is_trained_again(folder: Path) -> None:
    first = run_cell(own(), models=str(folder))
    kept.model_file(folder, own()).with_suffix(".json").unlink()
    assert kept.find(folder, own()) is None
    assert untimed(run_cell(own(), models=str(folder))) == untimed(first)
    assert kept.find(folder, own()) is not None


def test_cells_that_want_their_steps_are_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cell(own(), models=str(folder))
    monkeypatch.setattr(work, "train", no_training)
    with pytest.raises(AssertionError, match="trained again"):
        run_cell(own(steps=True), str(folder), models=str(folder))
