"""The workflows of .github/ call what exists, and support what pyproject.toml says we do."""

import re
import shlex
from pathlib import Path

import hypothesis
import pytest
import yaml

from tests.wheel import EXTRAS

ROOT = Path(__file__).parent.parent
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text("utf-8"))
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
OLDEST_PYTHON = re.search(r'^requires-python = ">=([\d.]+)"', PYPROJECT, re.MULTILINE)[1]
OLDEST_TORCH = re.search(r'^    "torch>=([\d.]+)"', PYPROJECT, re.MULTILINE)[1] + ".0"
DEFAULT_TORCH = re.search(r"^TORCH \?= torch==([\d.]+)$", MAKEFILE, re.MULTILINE)[1]


def steps(name: str) -> list[dict]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def commands(name: str) -> list[list[str]]:
    """The words of each line that a workflow's steps run, its expressions one word each."""
    lines = "\n".join(step["run"] for step in steps(name) if "run" in step).splitlines()
    return [shlex.split(re.sub(r"\$\{\{.*?\}\}", "EXPRESSION", line)) for line in lines]


def versions(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def tried(name: str, job: str) -> set[tuple[str, str]]:
    """The pairs of Python and torch in a job's matrix."""
    matrix = WORKFLOWS[name]["jobs"][job]["strategy"]["matrix"]
    if "include" in matrix:
        return {(entry["python"], entry["torch"]) for entry in matrix["include"]}
    return {(python, torch) for python in matrix["python"] for torch in matrix["torch"]}


def test_every_workflow_is_known_here():
    assert set(WORKFLOWS) == {"ci", "gpu", "wheels"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_make_targets_and_variables_exist(name):
    for words in commands(name):
        if words[0] != "make":
            continue
        assignments = [word.partition("=")[0] for word in words[1:] if "=" in word]
        (target,) = [word for word in words[1:] if "=" not in word]
        assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), f"make {target}"
        for variable in assignments:
            assert re.search(rf"\$\({variable}\)", MAKEFILE), f"make {target} {variable}=..."


@pytest.mark.parametrize("name", WORKFLOWS)
def test_scripts_and_modules_exist(name):
    for words in commands(name):
        if not re.fullmatch(r"python3?", words[0]):
            continue
        if "-m" in words:
            module = words[words.index("-m") + 1]
            found = [ROOT.joinpath(*module.split(".")).with_suffix(".py")]
            assert module == "pytest" or found[0].is_file(), f"python -m {module}"
        for path in (word for word in words[1:] if "/" in word or word.endswith(".py")):
            assert (ROOT / path).exists(), f"{name} runs {path}"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_of_a_major_version_and_may_only_read(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    used = [step["uses"] for step in steps(name) if "uses" in step]
    assert used
    for action in used:
        # actionlint has no action of its own, only the image that its author publishes.
        assert re.fullmatch(r"actions/[\w-]+@v\d+|docker://rhysd/actionlint:[\d.]+", action), action


def test_the_matrix_begins_at_the_oldest_supported_and_has_the_default():
    pairs = tried("ci", "test")
    assert (OLDEST_PYTHON, OLDEST_TORCH) in pairs
    assert min(versions(python) for python, _ in pairs) == versions(OLDEST_PYTHON)
    assert min(versions(torch) for _, torch in pairs) == versions(OLDEST_TORCH)
    assert DEFAULT_TORCH in {torch for _, torch in pairs}
    gate = WORKFLOWS["ci"]["jobs"]["compile-gate"]["env"]["TORCH"]
    assert gate.split()[0] == f"torch=={DEFAULT_TORCH}"


def test_ci_run_tries_the_ends_of_the_matrix():
    pairs = tried("ci", "test")
    said = re.search(r"PAIRS='([^']+)'", (ROOT / ".ci" / "run").read_text("utf-8"))[1]
    oldest, newest = (tuple(pair.split(":")) for pair in said.split())
    assert oldest == (OLDEST_PYTHON, OLDEST_TORCH)
    assert newest == (max((python for python, _ in pairs), key=versions), "newest")


def test_the_readme_claims_what_the_matrix_tests():
    pairs = tried("ci", "test")
    pythons = sorted({versions(python) for python, _ in pairs})
    torches = sorted({versions(torch)[:2] for _, torch in pairs})
    ends = [f"{major}.{minor}" for major, minor in (*pythons[:: len(pythons) - 1],)]
    ends += [f"{major}.{minor}" for major, minor in (*torches[:: len(torches) - 1],)]
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert "with Python {} to {} and torch {} to {}.".format(*ends) in readme


def test_wheels_are_built_with_the_oldest_and_tried_with_the_newest_too():
    build = WORKFLOWS["wheels"]["jobs"]["build"]
    assert build["env"]["TORCH"].split()[0] == f"torch=={OLDEST_TORCH}"
    (make,) = [words for words in commands("wheels") if words[0] == "make"]
    tag = "cp" + OLDEST_PYTHON.replace(".", "")
    assert f"PYTHON=/opt/python/{tag}-{tag}/bin/python" in make
    pairs = tried("ci", "test")
    ends = [
        {key(pairs, key=lambda pair: versions(pair[i]))[i] for key in (min, max)} for i in (0, 1)
    ]
    smoke = WORKFLOWS["wheels"]["jobs"]["smoke"]["strategy"]["matrix"]
    assert [set(smoke["python"]), set(smoke["torch"])] == ends
    assert set(smoke["arch"]) == {entry["arch"] for entry in build["strategy"]["matrix"]["include"]}


def test_the_extras_that_are_tried_are_the_users():
    """By the workflow as by `make matrix EXTRAS=--extras`: all that the commands need."""
    (install,) = [step["run"] for step in steps("wheels") if "dist/*.whl)[" in step.get("run", "")]
    assert f"[{EXTRAS}]" in install and install.endswith(" peft")
    assert "$(EXTRAS)" in re.search(r"^matrix:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    extras = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))
    ours = {"bench", "runtimes", "test", "docs", "dev", "all"}
    # Inception's weights are not at hand; flash-attn and xformers need a GPU.
    assert known - ours - set(EXTRAS.split(",")) == {"inception", "attention"}


def test_the_quick_tests_exist():
    """What make test-fast runs, and the profile of Hypothesis that it asks for."""
    recipe = re.search(r"^test-fast:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    paths = re.findall(r"\btests/[\w/.]+", recipe)
    assert {"tests/ecar", "tests/ecar_kernels"} < set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
    profile = re.search(r"--hypothesis-profile (\w+)", recipe)[1]
    hypothesis.settings.get_profile(profile)  # raises where there is none of this name


def test_a_wheel_without_its_tag_fails_the_build():
    """The recipe looks for py3-none and the platform in the name of what auditwheel wrote."""
    recipe = re.search(r"^wheel:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    assert re.search(r"ls dist/\*-py3-none-.*PLATFORM.*\|\| \\\n.*exit 1", recipe)
    (make,) = [words for words in commands("wheels") if words[0] == "make"]
    assert "PLATFORM=manylinux_2_28_EXPRESSION" in make


def test_the_gpu_runs_the_checks_and_then_its_tests():
    runs = [" ".join(words) for words in commands("gpu")]
    check = next(i for i, line in enumerate(runs) if line.startswith("make gpu-check"))
    assert "python3 -m pytest -m gpu tests" in runs[check:]
    (job,) = WORKFLOWS["gpu"]["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"]
    (upload,) = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert upload["if"] == "always()"
    assert job["env"]["OUT"].endswith(upload["with"]["path"])
