"""Makes pytest-benchmark's JSON small and complete: our environment, no raw samples."""

from benchmarks import environment

KEPT = ("rounds", "iterations", "min", "q1", "median", "q3", "max")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(environment.describe())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    commit = output_json["commit_info"]
    rows = [
        {
            "name": row["name"],
            **(row["params"] or {}),
            **row["extra_info"],
            "seconds": {key: row["stats"][key] for key in KEPT},
        }
        for row in output_json["benchmarks"]
    ]
    environment_info = output_json["machine_info"]
    output_json.clear()
    output_json.update(
        environment=environment_info,
        commit={"id": commit.get("id"), "dirty": commit.get("dirty")},
        benchmarks=rows,
    )
