"""``rvae-fast demo``: the whole way on real data, from rows to a report."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rvae_fast.cli.common import (
    DebugOption,
    ForceOption,
    JsonOption,
    command,
    note,
    print_json,
    refuse_to_overwrite,
    usage_error,
)
from rvae_fast.cli.score import QuietOption

if TYPE_CHECKING:
    from rvae_fast.datasets import Dataset, NoveltySplit

__all__ = ["demo"]

# Minutes on two cores, where the preset's own number would take an hour.
_EPOCHS = {"mnist": 10, "fashion_mnist": 10, "emnist": 5, "covertype": 5, "kddcup99": 15, "shuttle": 15}

MODEL = "model.safetensors"

# The threshold flags this share of held-out normal rows.
_FALSE_ALARMS = 0.05


def _split(dataset: Dataset, novel: str | None, seed: int) -> tuple[NoveltySplit, str, str]:
    """Return the split, what is novel, and what is normal, in words."""
    from rvae_fast.datasets import anomaly_split, novelty_split

    if not dataset.is_image:
        if novel is not None:
            usage_error(f"{dataset.name} says itself which rows are anomalies", "--novel")
        return anomaly_split(dataset.X, dataset.y, seed=seed), "anomaly", "normal row"
    novel = dataset.class_names[0] if novel is None else novel
    index = dataset.class_index(novel)
    split = novelty_split(dataset.scaled(), dataset.y, index, seed=seed)
    return split, f"image of class {dataset.class_names[index]}", "image of the other classes"


def _throughput(detector: Any, X: Any) -> float:
    """Return rows scored a second: repeated for half a second, after a first call that allocates."""
    detector.score_samples(X)
    rows, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < 0.5:
        detector.score_samples(X)
        rows += len(X)
    return rows / seconds


def _fingerprint(model: Path) -> str:
    """Return what a demo's page says of the model beside it: by this a later demo knows the file again."""
    import hashlib

    return "sha256 " + hashlib.sha256(model.read_bytes()).hexdigest()


def _may_write(directory: Path, force: bool) -> None:
    """Stop unless the directory is new, empty, or an earlier demo's: only that may be replaced unasked."""
    from rvae_fast.report.page import is_report, output_files

    page, pictures = output_files(directory)
    model = directory / MODEL
    if directory.exists() and not directory.is_dir():
        usage_error(f"{directory} is a file", "--out")
    if not force and directory.exists() and any(directory.iterdir()):
        if not is_report(page) or "<title>Demo: " not in (text := page.read_text(encoding="utf-8")):
            usage_error(f"{directory} holds other files; choose another directory, or --force", "--out")
        if model.is_file() and _fingerprint(model) not in text:
            usage_error(f"{model} is not of the demo beside it; choose another directory, or --force", "--out")
    refuse_to_overwrite([page, model, *pictures.values()], force=True)  # a directory of such a name, no permission


@command
def demo(
    data: Annotated[
        str, typer.Option("--data", help="digits (comes with the installation), mnist, shuttle ... (`rvae-fast data`).")
    ] = "digits",
    novel: Annotated[
        str | None, typer.Option("--novel", help="Images: the class held back as the anomaly [default: the first].")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for report and model.")] = Path("demo-report"),
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs", "-e", min=1, help="[default: by the data; digits: 100, mnist: 10, which takes minutes]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Of the split and of the training.")] = 0,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """See it work: train, score held-out rows, write a report.

    Trains an RVAE as in the RaPP article's novelty experiment: one class is held back as the anomaly, 60 % of the
    other rows are trained on, 20 % set the threshold (it flags 5 % of them), 20 % are mixed with the anomalies for the
    test. A second run replaces the first one's report and model.

    **Examples**

    - `rvae-fast demo`
    - `rvae-fast demo --data mnist --novel 0 --epochs 50 --out mnist-report`
    """

    from rvae_fast import datasets
    from rvae_fast.cli.common import console
    from rvae_fast.cli.defaults import starting_parameters
    from rvae_fast.cli.evaluate import evaluation_table
    from rvae_fast.cli.run import rate
    from rvae_fast.report import evaluate_scores, write_report
    from rvae_fast.report.page import require_packages

    require_packages()
    _may_write(out, force)
    if data not in datasets.names():
        usage_error(f"no built-in data set {data!r}; there are {', '.join(datasets.names())}", "--data")
    with console().status(f"loading {data}"):
        dataset = datasets.load(data)
    split, anomaly, normal = _split(dataset, novel, seed)
    anomalies = int(split.y_test.sum())

    def say(text: str) -> None:
        if not quiet:
            note(text)

    say(f"{dataset.name}: {dataset.description}")
    say(f"anomaly: any {anomaly}; normal: every {normal}")
    say(
        f"training on {len(split.X_train):,} normal rows; testing on {len(split.X_test) - anomalies:,} normal rows and "
        f"{anomalies:,} anomalies that the model has never seen"
    )

    from rvae_fast.detector import RVAEDetector
    from rvae_fast.serialization import save

    parameters = starting_parameters(dataset.name, is_image=dataset.is_image)
    epochs = _EPOCHS.get(dataset.name) if epochs is None else epochs
    parameters |= {} if epochs is None else {"epochs": epochs}
    parameters |= {"random_state": seed, "verbose": 0 if quiet else 1}
    started = time.perf_counter()
    with warnings.catch_warnings():
        # The margin of most images is one colour throughout: nothing that a newcomer should worry about.
        warnings.filterwarnings("ignore", message="constant column", category=UserWarning)
        detector = RVAEDetector(**parameters).fit(split.X_train)
    seconds = time.perf_counter() - started

    # A threshold from the training rows would be too low: the model knows them. Held-out rows set it.
    detector.calibrate(split.X_validation, false_alarm_rate=_FALSE_ALARMS)
    scores = -detector.score_samples(split.X_test)
    evaluation = evaluate_scores(scores, split.y_test, detector.threshold_)
    speed = _throughput(detector, split.X_test)

    out.mkdir(parents=True, exist_ok=True)
    save(detector, out / MODEL)
    page = write_report(
        out,
        scores=scores,
        threshold=detector.threshold_,
        labels=split.y_test,
        detector=detector,
        X=split.X_test,
        ids=[f"{dataset.name} {index}" for index in split.test_indices],
        image_shape=dataset.image_shape,
        feature_names=dataset.feature_names,
        title=f"Demo: {dataset.name}, RVAE",
        description=f"{dataset.description}. Anomaly: any {anomaly}. The threshold flags 5 % of held-out normal rows.",
        facts={"Training": f"{seconds:.1f} s", "Scoring": rate(speed)},
        configuration={**detector.get_params(deep=False), MODEL: _fingerprint(out / MODEL)},
    )
    if json_output:
        print_json(
            evaluation.to_dict()
            | {
                "data": dataset.name,
                "epochs": detector.n_iter_,
                "train_rows": len(split.X_train),
                "train_seconds": round(seconds, 3),
                "rows_per_second": round(speed, 1),
                "report": str(page),
                "model": str(out / MODEL),
            }
        )
        return
    more = {"training": f"{seconds:.1f} s", "scoring": rate(speed)}
    screen = console(stderr=False)
    screen.print()
    screen.print(evaluation_table(evaluation, more))
    screen.print()
    screen.print(f"report  {page}", soft_wrap=True, markup=False)
    screen.print(f"model   {out / MODEL}", soft_wrap=True, markup=False)
