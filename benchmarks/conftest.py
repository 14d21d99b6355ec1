"""Options and fixtures of the benchmarks: ``pytest benchmarks`` is the short form; ``--full`` writes results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch

SHORT_ROUNDS, FULL_ROUNDS = 15, 200


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rvae-fast benchmarks")
    group.addoption(
        "--full", action="store_true", help=f"{FULL_ROUNDS} rounds instead of {SHORT_ROUNDS}; write results/"
    )
    group.addoption(
        "--units", choices=("all", "eighth"), help="residual units of table, deep and wide; default: all with --full"
    )
    group.addoption("--max-autotune", action="store_true", help="let torch.compile's max-autotune take part as well")
    group.addoption("--bench-device", default="cpu", help="cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COMPARISONS] = {}


COMPARISONS = pytest.StashKey[dict[str, list[harness.Comparison]]]()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen = torch.device(request.config.getoption("--bench-device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("--bench-device=cuda, and torch sees no GPU")
    return chosen


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def deep(request: pytest.FixtureRequest, full: bool) -> bool:
    """Whether the deep workloads run with all of their residual units, or with an eighth of them."""
    chosen = request.config.getoption("--units")
    return full if chosen is None else chosen == "all"


@pytest.fixture(scope="session")
def autotune(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--max-autotune"))


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, benchmark: Any, device: torch.device, full: bool
) -> Callable[..., harness.Comparison]:
    """``harness.compare`` with this run's device and rounds; pytest-benchmark's own table shows the subject as well."""

    def run(
        case: dict[str, Any],
        variants: list[harness.Variant],
        inputs: list[Any],
        rounds: int = FULL_ROUNDS if full else SHORT_ROUNDS,
        **options: Any,
    ) -> harness.Comparison:
        suite = request.path.stem.removeprefix("bench_")
        comparison = harness.compare(suite, case, variants, inputs, rounds, device, **options)
        request.config.stash[COMPARISONS].setdefault(suite, []).append(comparison)
        for timing in comparison.timings:
            benchmark.extra_info[timing.name] = {
                "median": timing.median,
                "speedup": timing.speedup,
                "share": timing.share,
            }
        benchmark.group = suite
        turn = iter(range(1 << 62))
        benchmark.pedantic(
            lambda: variants[0].run(inputs[next(turn) % len(inputs)]), rounds=rounds, iterations=1, warmup_rounds=1
        )
        return comparison

    return run


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., harness.Comparison]:
    """Write down a comparison that the benchmark timed itself."""

    def run(case: dict[str, Any], timings: list[harness.Timing], **notes: Any) -> harness.Comparison:
        suite = request.path.stem.removeprefix("bench_")
        comparison = harness.Comparison(suite, case, timings, rounds=0, notes=notes)
        request.config.stash[COMPARISONS].setdefault(suite, []).append(comparison)
        return comparison

    return run


@pytest.fixture
def facts(record: Callable[..., harness.Comparison]) -> Callable[..., harness.Comparison]:
    """Write down figures that are no times: by implementation, a mapping of names to numbers."""
    return lambda case, figures: record(case, [], **figures)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for suite, comparisons in config.stash[COMPARISONS].items():
        terminalreporter.section(f"{suite}: interleaved, medians; 'x' is how many times the first is faster")
        for comparison in comparisons:
            case = " ".join(str(value) for value in comparison.case.values())
            bandwidth = comparison.copy_bandwidth
            terminalreporter.write_line(f"{case}" + (f"   (copy: {bandwidth / 1e9:.1f} GB/s)" if bandwidth else ""))
            for name, note in comparison.notes.items():
                terminalreporter.write_line(f"    {name:28} {note}")
            for timing in comparison.timings:
                share = f"{timing.share:7.0%} of copy bandwidth" if timing.share is not None else ""
                terminalreporter.write_line(
                    f"    {timing.name:28} {timing.median * 1e3:9.3f} ms  {timing.speedup or 0:6.2f} x {share}"
                )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--full"):
        chosen = torch.device(session.config.getoption("--bench-device"))
        for suite, comparisons in session.config.stash[COMPARISONS].items():
            harness.save(suite, comparisons, chosen)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Each case compiles for its own shapes and dtypes."""
    torch.compiler.reset()
