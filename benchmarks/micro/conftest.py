"""The runs' settings, the rates that the floors are made of, and the shape of the JSON."""

import time

import pytest

from benchmarks import cases, environment, rates

STARTED, RATES = pytest.StashKey[float](), pytest.StashKey[tuple]()
QUARTILES = ("min", "q1", "median", "q3", "max")


def pytest_addoption(parser):
    group = parser.getgroup("ecar benchmarks")
    group.addoption("--ecar-full", action="store_true", help="every size and batch")
    group.addoption("--ecar-seconds", type=float, default=1.0, help="of measuring for each row")
    group.addoption(
        "--ecar-minutes", type=float, default=None, help="rows that would begin later are left out"
    )


def pytest_configure(config):
    config.stash[STARTED] = time.monotonic()
    environment.keep_memory()


def pytest_collection_modifyitems(items):
    # What a call costs takes seconds, so that no run is too short for it.
    items.sort(key=lambda item: "overhead" not in item.nodeid)


@pytest.fixture(scope="session")
def seconds(pytestconfig) -> float:
    return pytestconfig.getoption("--ecar-seconds")


@pytest.fixture
def in_time(pytestconfig) -> None:
    minutes = pytestconfig.getoption("--ecar-minutes")
    if minutes is not None and time.monotonic() - pytestconfig.stash[STARTED] > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes are over")


@pytest.fixture(scope="session")
def measured_rates(pytestconfig, seconds):
    """Rates, and all that was tried, of this run."""
    found = rates.measure(seconds=2 * seconds)
    pytestconfig.stash[RATES] = found
    return found


@pytest.fixture(scope="session")
def arena():
    return cases.Arena(cases.ARENA_BYTES, cases.DTYPE)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Ours: the rows with their variants' times, and the rates. No raw samples, no host names."""
    rows = []
    for row in output_json["benchmarks"]:
        extra, stats = row["extra_info"], row["stats"]
        calls = extra.get("calls", 1)
        ours = {"rounds": stats["rounds"], **{key: stats[key] / calls for key in QUARTILES}}
        rows.append({**extra, "seconds": {**extra["seconds"], "ours": ours}})
    output_json.clear()
    output_json["rows"] = rows
    if RATES in config.stash:
        best, tried = config.stash[RATES]
        output_json["rates"] = {
            "bytes_per_second": best.bytes_per_second,
            "multiply_adds_per_second": best.multiply_adds_per_second,
            "tried": tried,
        }
