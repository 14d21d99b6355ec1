"""Claims, their tests and the sentence that says whether they hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Claim:
    """A claim and what became of it.

    Attributes
    ----------
    name : str
        A few words.
    held : bool or None
        None where the results at hand cannot tell.
    sentence : str
        What was found, with its numbers, and whether the claim held.
    p : float or None
        Of the paired test, where there is one.
    """

    name: str
    held: bool | None
    sentence: str
    p: float | None = None

    @property
    def verdict(self) -> str:
        """In a word or three."""
        return "not tested" if self.held is None else "held" if self.held else "did not hold"


def _verdict(held: bool) -> str:
    return "The claim held." if held else "The claim did not hold."


def untested(name: str, why: str) -> Claim:
    """A claim that the results at hand cannot test."""
    return Claim(name, None, f"{why}: the claim was not tested.")


def mean_sd(values: Sequence[float] | NDArray[np.float64]) -> str:
    """``mean ± standard deviation`` for reading; the mean alone of a single value."""
    array = np.asarray(values, dtype=np.float64)
    spread = f" ± {array.std(ddof=1):.4g}" if len(array) > 1 else ""
    return f"{array.mean():.4g}{spread}"


def greater(
    name: str,
    first: Mapping[tuple[str, ...], float],
    second: Mapping[tuple[str, ...], float],
    *,
    labels: tuple[str, str],
    quantity: str,
    alpha: float = 0.01,
) -> Claim:
    """The claim that the first is larger, pair by pair (Student's paired t-test, one-sided, beside Wilcoxon's).

    Parameters
    ----------
    first, second : mapping
        Values by whatever makes a pair (a digit and a seed); those in both are paired.
    labels : (str, str)
        What the two are called.
    quantity : str
        What is compared.
    alpha : float, default 0.01
        The claim holds when the mean difference is positive and the t-test's p is below this.
    """
    pairs = sorted(first.keys() & second.keys())
    if len(pairs) < 2:
        return untested(name, f"{len(pairs)} pairs of {labels[0]} and {labels[1]} are too few")
    from scipy import stats

    a, b = (np.array([side[pair] for pair in pairs]) for side in (first, second))
    difference = a - b
    if np.ptp(difference) == 0:  # no spread to test against
        p = 0.0 if difference[0] > 0 else 1.0
        wilcoxon = p
    else:
        p = float(stats.ttest_rel(a, b, alternative="greater").pvalue)
        wilcoxon = float(stats.wilcoxon(difference, alternative="greater").pvalue)
    held = bool(difference.mean() > 0 and p < alpha)
    wins = int((difference > 0).sum())
    sentence = (
        f"{quantity} of {labels[0]} is {mean_sd(a)}, of {labels[1]} {mean_sd(b)}; over {len(pairs)} pairs the "
        f"difference is {mean_sd(difference)}, positive in {wins} (paired t-test p = {p:.2g}, Wilcoxon p = "
        f"{wilcoxon:.2g}, asked for: below {alpha:g}). {_verdict(held)}"
    )
    return Claim(name, held, sentence, p)


def at_least(
    name: str, values: Sequence[float], bound: float, quantity: str, *, largest: bool = False, of: str = "cells"
) -> Claim:
    """The claim that the mean, or with ``largest`` the largest value, reaches a bound; ``of`` is what there are."""
    if not len(values):
        return untested(name, f"No results yet for {quantity}")
    figure, found = _figure(values, largest)
    held = figure >= bound
    return Claim(
        name, held, f"{found} {quantity} ({len(values)} {of}); asked for: at least {bound:g}. {_verdict(held)}"
    )


def at_most(name: str, values: Sequence[float], bound: float, quantity: str, *, largest: bool = False) -> Claim:
    """The claim that the mean, or with ``largest`` every value, stays within a bound."""
    if not len(values):
        return untested(name, f"No results yet for {quantity}")
    figure, found = _figure(values, largest)
    held = figure <= bound
    return Claim(
        name, held, f"{found} {quantity} ({len(values)} cells); asked for: at most {bound:g}. {_verdict(held)}"
    )


def _figure(values: Sequence[float], largest: bool) -> tuple[float, str]:
    if largest:
        top = float(np.max(values))
        return top, f"{top:.4g} is the largest"
    return float(np.mean(values)), f"{mean_sd(values)} is the"


def near_or_above(
    name: str, found: Mapping[str, Sequence[float]], reference: Mapping[str, float], margin: float, quantity: str
) -> Claim:
    """The claim that the mean of each class is above the article's value, or below it by less than ``margin``."""
    shared = [label for label in reference if found.get(label)]
    if len(shared) < len(reference):
        return untested(name, f"{quantity} is there for {len(shared)} of {len(reference)} classes")
    short = [
        f"{label} ({np.mean(found[label]):.3f} against {reference[label]:.3f})"
        for label in shared
        if np.mean(found[label]) < reference[label] - margin
    ]
    held = not short
    which = f"every one of {len(shared)} classes" if held else f"all but {', '.join(short)}"
    return Claim(
        name, held, f"{quantity} is within {margin:g} of the article's, or above it, for {which}. {_verdict(held)}"
    )


def _by_depth(values: Mapping[int, Mapping[str, float]]) -> tuple[list[int], list[str], np.ndarray]:
    """Depths, the seeds that all of them have, and the values ``[depth, seed]``."""
    depths = sorted(values)
    seeds = sorted(set.intersection(*(set(values[depth]) for depth in depths))) if depths else []
    return depths, seeds, np.array([[values[depth][seed] for seed in seeds] for depth in depths])


def keeps_falling(name: str, values: Mapping[int, Mapping[str, float]], quantity: str) -> Claim:
    """The claim that no depth's mean is above its predecessor's by more than a standard error of their difference.

    Parameters
    ----------
    values : mapping of depth to mapping of seed to value
    """
    depths, seeds, table = _by_depth(values)
    if len(depths) < 2 or len(seeds) < 2:
        return untested(name, f"{quantity} is there for {len(depths)} depths and {len(seeds)} seeds, at least 2 needed")
    rises = np.diff(table, axis=0)
    error = rises.std(axis=1, ddof=1) / math.sqrt(len(seeds))
    bad = [
        f"{depths[i]} to {depths[i + 1]} (+{rises[i].mean():.3g}, standard error {error[i]:.2g})"
        for i in range(len(rises))
        if rises[i].mean() > error[i]
    ]
    held = not bad
    ends = f"from {table[0].mean():.4g} at {depths[0]} layers to {table[-1].mean():.4g} at {depths[-1]}"
    how = "without a rise beyond one standard error" if held else f"but rises from {'; '.join(bad)}"
    return Claim(name, held, f"{quantity} goes {ends}, {how} ({len(seeds)} seeds). {_verdict(held)}")


def turns_up(
    name: str, values: Mapping[int, Mapping[str, float]], by: int, quantity: str, alpha: float = 0.05
) -> Claim:
    """The claim that the mean, least at some depth, is larger at depth ``by`` (paired t-test over seeds, one-sided)."""
    depths, seeds, table = _by_depth({depth: of for depth, of in values.items() if depth <= by})
    if by not in depths or len(depths) < 2 or len(seeds) < 2:
        return untested(name, f"{quantity} is not there for {by} layers and 2 seeds")
    from scipy import stats

    means = table.mean(axis=1)
    least = int(np.argmin(means))
    text = f"{quantity} is least at {depths[least]} layers ({means[least]:.4g}) and {means[-1]:.4g} at {by}"
    if least == len(depths) - 1:
        return Claim(name, False, f"{text}: it has not turned up. {_verdict(False)}")
    difference = table[-1] - table[least]
    p = (
        0.0
        if np.ptp(difference) == 0
        else float(stats.ttest_rel(table[-1], table[least], alternative="greater").pvalue)
    )
    held = p < alpha
    return Claim(name, held, f"{text} ({len(seeds)} seeds, paired t-test p = {p:.2g}). {_verdict(held)}", p)
