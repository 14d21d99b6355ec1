"""Each kind of claim where it holds, where it does not, and where the results cannot tell."""

from __future__ import annotations

import numpy as np
import pytest

from rvae_fast.experiments.claims import (
    at_least,
    at_most,
    greater,
    keeps_falling,
    near_or_above,
    turns_up,
)  # fmt: skip

PAIRS = [(str(digit), str(seed)) for digit in range(10) for seed in range(5)]


def side(shift: float, noise: float = 0.01) -> dict[tuple[str, ...], float]:
    rng = np.random.default_rng(0 if shift == 0 else 1)
    base = np.random.default_rng(9).uniform(0.4, 0.99, len(PAIRS))  # digits differ far more than models
    return dict(zip(PAIRS, base + shift + noise * rng.normal(size=len(PAIRS)), strict=True))


def test_greater_is_a_paired_test() -> None:
    from scipy import stats

    first, second = side(0.01), side(0.0)
    claim = greater("x", first, second, labels=("RVAE", "VAE"), quantity="AUROC")
    expected = stats.ttest_rel(list(first.values()), list(second.values()), alternative="greater").pvalue
    assert claim.held is True
    assert claim.p == pytest.approx(expected)
    assert claim.sentence.startswith("AUROC of RVAE is ")
    assert "over 50 pairs" in claim.sentence
    assert claim.sentence.endswith("The claim held.")
    # The spread between digits would hide the difference from a test that is not paired.
    assert stats.ttest_ind(list(first.values()), list(second.values()), alternative="greater").pvalue > 0.2


@pytest.mark.parametrize("shift", [-0.01, 1e-9])
def test_greater_does_not_hold(shift: float) -> None:
    claim = greater("x", side(shift), side(0.0, 0.0101), labels=("RVAE", "VAE"), quantity="AUROC")
    assert claim.held is False
    assert claim.sentence.endswith("The claim did not hold.")
    assert claim.verdict == "did not hold"


def test_greater_pairs_what_both_have() -> None:
    first, second = side(0.01), side(0.0)
    for pair in PAIRS[:20]:
        del first[pair]
    assert "over 30 pairs" in greater("x", first, second, labels=("a", "b"), quantity="q").sentence
    few = greater("x", dict(list(first.items())[:1]), second, labels=("a", "b"), quantity="q")
    assert few.held is None
    assert few.verdict == "not tested"


def test_greater_without_spread() -> None:
    for gain, held in ((0.25, True), (0.0, False), (-0.25, False)):
        same = dict.fromkeys(PAIRS[:3], 0.5 + gain)
        claim = greater("x", same, dict.fromkeys(PAIRS[:3], 0.5), labels=("a", "b"), quantity="q")
        assert claim.held is held


def test_bounds() -> None:
    assert at_least("x", [0.91, 0.90], 0.9, "AUROC").held is True
    assert at_least("x", [0.91, 0.88], 0.9, "AUROC").held is False
    assert at_least("x", [], 0.9, "AUROC").held is None
    assert at_most("x", [1.0, 12.0], 10.0, "spike").held is True
    claim = at_most("x", [1.0, 12.0], 10.0, "spike", largest=True)
    assert claim.held is False
    assert claim.sentence.startswith("12 is the largest spike (2 cells); asked for: at most 10.")
    assert at_least("x", [1.0, 12.0], 10.0, "spike", largest=True).held is True


def test_near_or_above_names_the_classes_that_fall_short() -> None:
    article = {"0": 0.99, "9": 0.848}
    assert near_or_above("x", {"0": [0.981], "9": [0.9, 0.8]}, article, 0.01, "AUROC").held is True
    claim = near_or_above("x", {"0": [0.979], "9": [0.95]}, article, 0.01, "AUROC")
    assert claim.held is False
    assert "0 (0.979 against 0.990)" in claim.sentence
    assert near_or_above("x", {"0": [0.99]}, article, 0.01, "AUROC").held is None


def depths(means: dict[int, float], spread: float = 0.01) -> dict[int, dict[str, float]]:
    rng = np.random.default_rng(3)
    return {d: {str(s): m + spread * float(rng.normal()) for s in range(5)} for d, m in means.items()}


def test_keeps_falling() -> None:
    assert keeps_falling("x", depths({2: 3.0, 8: 2.0, 16: 1.5}), "loss").held is True
    claim = keeps_falling("x", depths({2: 3.0, 8: 2.0, 16: 2.5}), "loss")
    assert claim.held is False
    assert "8 to 16 (+0.49" in claim.sentence
    assert keeps_falling("x", {2: {"0": 1.0}, 8: {"0": 0.5}}, "loss").held is None


def test_turns_up() -> None:
    claim = turns_up("x", depths({2: 3.0, 8: 2.0, 16: 2.5}), 16, "loss")
    assert claim.held is True
    assert "least at 8 layers" in claim.sentence
    assert turns_up("x", depths({2: 3.0, 8: 2.0, 16: 1.5}), 16, "loss").held is False
    assert turns_up("x", depths({2: 3.0, 8: 2.0, 16: 2.001}), 16, "loss").held is False  # within the noise
    assert turns_up("x", depths({2: 3.0, 8: 2.0}), 16, "loss").held is None
