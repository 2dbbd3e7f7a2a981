"""The README's examples run, its numbers are the committed ones, and what it names exists."""

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.results import duration
from ecar import ECAR, ECARConfig
from ecar_kernels import registry

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "data/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("checkpoints/*/README.md"))),
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md"))),
)
README = (ROOT / "README.md").read_text("utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def in_a_folder_with_a_checkpoint(tmp_path, monkeypatch):
    """A tiny random model where the examples look for the real one."""
    config = ECARConfig(
        stage_sides=(8, 16, 32),
        channels=1,
        num_classes=10,
        width=16,
        heads=2,
        ar_layers=1,
        flow_blocks=1,
    )
    ECAR(config).save_pretrained(tmp_path / "checkpoints" / "digits")
    monkeypatch.chdir(tmp_path)


def test_there_are_examples():
    assert len(PYTHON_BLOCKS) == 3


@pytest.mark.usefixtures("in_a_folder_with_a_checkpoint")
@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=["pipeline", "ops", "accelerate"])
def test_python_example_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_matrix_of_backends_is_the_registry_s():
    """Of the ops that it names; and every backend serves the dtypes that it says."""
    table = README.partition("## What runs where")[2].partition("\n\n")[2].partition("\n\n")[0]
    head, _, *lines = [line.strip("|").split("|") for line in table.splitlines()]
    names = re.findall(r"`(\w+)`", " ".join(head))
    libraries = [name for *_, cell, _ in lines for name in re.findall(r"`(\w+)`", cell)]
    assert sorted([*names, *libraries]) == sorted(registry.BACKENDS)
    for ops, *cells, its_libraries, backward in lines:
        served = {name for name, cell in zip(names, cells, strict=True) if "yes" in cell}
        served |= set(re.findall(r"`(\w+)`", its_libraries))
        for op in re.findall(r"`(\w+)`", ops):
            found = registry.IMPLEMENTATIONS[op]
            assert served == set(found), op
            assert ("yes" in backward) == (registry.RECORDS[op].gradients == "all"), op
            for name, implementation in found.items():
                dtypes = (torch.bfloat16, torch.float16)
                if name == "reference":
                    dtypes = (*registry.KERNEL_DTYPES, torch.float64)
                elif name not in libraries or name == "sdpa":
                    dtypes = registry.KERNEL_DTYPES
                on_a_gpu = implementation.dtypes_on.get("cuda", implementation.dtypes)
                assert set(on_a_gpu) == set(dtypes), f"{op} by {name}"


def result(name: str, device: str = "amd-epyc-family-25-model-17") -> dict:
    file = ROOT / "benchmarks" / "results" / device / f"{name}.json"
    return json.loads(file.read_text("utf-8"))


def test_numbers_are_those_of_the_committed_results():
    record = result("end_to_end", "amd-epyc-family-26-model-2")
    assert record["runs"][0]["device"] == "AMD EPYC (family 26, model 2)"
    assert record["runs"][0]["cores"] == record["runs"][0]["threads"] == 2
    by_name = {(row["model"], sum(row["steps"]), row["dtype"]): row for row in record["protocols"]}
    said = re.findall(
        r"^\| (?:diffusers' )?(\S+) \| (\d+).*?\| (\S+) G \| (.+?) \| (.+?) \|$", README, re.M
    )
    assert len(said) == 3
    for model, steps, work, *times in said:
        for dtype, seconds in zip(("float32", "bfloat16"), times, strict=True):
            row = by_name[model, int(steps), dtype]
            assert f"{row['multiply_adds'] * 1e-9:,.0f}" == work
            assert duration(row["seconds"]["median"]) == seconds
        if steps == "250":
            assert row["timed_steps_of_a_stage"] == 4


def test_speed_ups_of_the_examples_are_those_of_the_committed_results():
    text = (ROOT / "docs" / "own-model.md").read_text("utf-8").partition("## Complete examples")[2]
    expected = [result(name)["speedup"] for name in ("example-dit", "example-var")]
    assert re.findall(r"\b([\d.]+)x\b", text) == [f"{ratio:#.3g}" for ratio in expected]


def test_checkpoints_are_as_good_as_they_were_evaluated():
    said = re.findall(r"`checkpoints/(\w+)`.*?([\d.]+) %", README, re.DOTALL)
    for name, percent in said:
        file = ROOT / "checkpoints" / name / "evaluation.json"
        accuracy = json.loads(file.read_text("utf-8"))["metrics"]["label_accuracy"]
        assert f"{accuracy:.2%}" == f"{percent}%", name
    assert [name for name, _ in said] == ["emoji", "digits", "mnist"]


def test_commands_exist():
    """The README names each `ecar X`, a subcommand that explains itself."""
    from ecar.cli import COMMANDS, main

    assert set(re.findall(r"`ecar (\w+)`", README)) == set(COMMANDS)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_what_the_pages_write_is_ignored():
    """Into the folder that they are called in: git status stays clean."""
    outputs = set()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = "".join(re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
        for command in re.findall(r"\b(?:ecar|python -m) [\w.]+ (?:\\\n|.)*", blocks):
            flags = "output|out|npz|neighbours|picture|save-classifier"
            outputs |= set(re.findall(rf"--(?:{flags}) ([^\s/]+)", command))
    outputs |= {"demo.png", "demo-strip.png", "samples.png"}
    assert {"birds.png", "latents", "runs", "evaluation.json", "seven.npy", "images"} <= outputs
    for output in outputs:
        path = output if "." in output else f"{output}/"
        command = ["git", "-C", str(ROOT), "check-ignore", "--quiet", path]
        assert subprocess.run(command).returncode == 0, f"{output} is not in .gitignore"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_the_layout_answers_where_things_are():
    """Each file that CONTRIBUTING.md gives for a question exists and has the name given."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Layout")[2]
    rows = re.findall(r"^\| ([^|]+\?) \| ([^|]+) \| `([^|`]+)` \|$", text, re.MULTILINE)
    assert len(rows) >= 10 and len(rows) == text.count("? |")
    for question, files, name in rows:
        paths = re.findall(r"`([^`]+)`", files)
        assert paths, question
        for path in paths:
            assert name in (ROOT / path).read_text("utf-8"), f"{question} {path} has no {name!r}"
    for folders in re.findall(r"^\| (`[^|?]*/`) \|", text, re.MULTILINE):
        for folder in re.findall(r"`([^`]+)`", folders):
            assert (ROOT / folder).is_dir(), folder


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        for target in re.findall(r"^make (\w[\w-]*)|`make (\w[\w-]*)`", text, re.MULTILINE):
            name = "".join(target)
            assert re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE), f"make {name}"


def commands(pattern: str) -> set[str]:
    """What shell blocks and code spans of all pages call, by a pattern of its one group."""
    found = set()
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
        spans = "\n".join(
            re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        )
        blocks = "\n".join(
            block
            for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
            if language in ("", "sh")
        )
        found.update(re.findall(pattern, f"{spans}\n{blocks}", re.MULTILINE))
    return found


def test_modules_that_pages_run_exist():
    modules = commands(r"(?:^|[ /])python -m ([\w.]+)")
    assert {"benchmarks.report", "examples.accelerate_var", "tools.update_docs"} <= modules
    for module in modules:
        assert importlib.util.find_spec(module) is not None, f"python -m {module}"


def test_options_that_pages_give_exist(capsys):
    from ecar.cli import COMMANDS, main

    launched = r"(?:(?:torchrun|accelerate launch) .* -m )?"
    calls = {
        call.partition("#")[0].strip()
        for call in commands(rf"^(?:\$ )?{launched}ecar ((?:{'|'.join(COMMANDS)})\b.*)$")
    }
    assert len(calls) > 8
    for call in calls:
        command, *words = shlex.split(call)
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = set(re.findall(r"--[\w-]+(?:\.\w+)?", capsys.readouterr().out))
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= known, f"ecar {call}: no {used - known}"


def test_makefile_calls_options_that_exist(capsys):
    """Every `ecar` command of the Makefile uses only options that --help shows."""
    from ecar.cli import main

    makefile = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", " ")
    calls = re.findall(r"^\t\$\(BIN\)/ecar (.+)$", makefile, re.MULTILINE)
    assert calls
    for call in calls:
        command, *arguments = shlex.split(call)
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        used = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert used <= known, f"ecar {command}: no {used - known}"
