"""What mypy sees of the packages from outside: the ops' own signatures, and the lazy names.

`make lint` runs mypy on the packages themselves.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ecar_kernels.registry import RECORDS

ROOT = Path(__file__).parent.parent
INIT = (ROOT / "ecar_kernels" / "__init__.py").read_text("utf-8")

pytestmark = pytest.mark.slow


@pytest.fixture
def mypy(tmp_path):
    pytest.importorskip("mypy")

    def run(source: str) -> list[str]:
        """What mypy says of the lines of a program."""
        program = tmp_path / "program.py"
        program.write_text(source, "utf-8")
        command = [sys.executable, "-m", "mypy", "--no-error-summary", str(program)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode < 2 and not done.stderr, done.stdout + done.stderr
        mark = f"{program}:"
        return [line[len(mark) :] for line in done.stdout.splitlines() if line.startswith(mark)]

    return run


def test_wrong_programs_are_refused(mypy):
    """Every op that ecar_kernels/__init__.py imports by name (a new one need not be) is called with
    a string for its first tensor and without the others, and by a name that it does not have."""
    wrong = {}
    imports = [node for node in ast.parse(INIT).body if isinstance(node, ast.ImportFrom)]
    imported = [alias.name for node in imports for alias in node.names]
    ops = [RECORDS[name] for name in imported if name in RECORDS]
    assert ops
    for record in ops:
        name, leading = record.name, record.arguments[0].name
        # What a step returns depends on an argument.
        overloaded = any(argument.name == "return_velocity" for argument in record.arguments)
        codes = {"call-overload"} if overloaded else {"call-arg"}
        wrong[f"ecar_kernels.{name}({leading}='a string')"] = codes | (
            set() if overloaded else {"arg-type"}
        )
        wrong[f"ecar_kernels.{name}(no_such_argument=1)"] = codes
        wrong[f"ecar_kernels.{name}.no_such_attribute"] = {"attr-defined"}
    wrong |= {
        "ecar_kernels.no_such_op": {"attr-defined"},
        "ecar.no_such_name": {"attr-defined"},
        "ecar.sample('a model')": {"call-arg", "arg-type"},
        "ecar.ECARConfig(no_such_size=1)": {"call-arg"},
        "ecar.sampler.no_such_name": {"attr-defined"},
        "ecar.evaluation.no_such_name": {"attr-defined"},
        "ecar.evaluation.evaluate('a folder')": {"call-arg"},
    }
    lines = ["import ecar, ecar.evaluation, ecar.sampler, ecar_kernels", *wrong]
    found: dict[int, set[str]] = {}
    for line in mypy("\n".join(lines)):
        number, code = re.match(r"(\d+): (?:error: .*\[([\w-]+)\]$)?", line).groups()
        if code is not None:
            found.setdefault(int(number), set()).add(code)
    assert found == {
        number: wrong[line] for number, line in enumerate(lines, start=1) if line in wrong
    }


RIGHT = """
import torch
from torch import Tensor, nn

import ecar
import ecar.sampler
import ecar_kernels
from ecar.pipeline import ECARPipelineOutput

x, wide = torch.zeros(1, 4, 8), torch.zeros(1, 1, 8)
y: Tensor = ecar_kernels.adaln(x, wide, wide, step_shift=wide, eps=1e-5)
z: tuple[Tensor, Tensor] = ecar_kernels.gated_residual_adaln(x, x, wide, wide, wide)
image = torch.zeros(1, 4, 8, 8)
moved: Tensor = ecar_kernels.euler_step(image, image, 0.1, previous=image, ratio=torch.tensor(1.0))
moved, v = ecar_kernels.euler_step(image, image, 0.1, return_velocity=True)

pipe = ecar.ECARPipeline.from_pretrained("checkpoints/digits")
output: ECARPipelineOutput = pipe([1, 2], seeds=0)
pair: tuple = pipe("three", return_dict=False)
ends: list[Tensor] | None = ecar.sample(pipe.model, torch.tensor([1]), seeds=y).stage_ends
same = ecar.sampler.split_steps(8, 4) == ecar.split_steps(8, 4)


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ecar_kernels.gated_residual(x, x, x)


@ecar_kernels.accelerates(Block)
class FastBlock(ecar_kernels.Accelerated, Block):
    uses = ("gated_residual",)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops(x).gated_residual(x, x, x)


served: nn.Sequential = ecar_kernels.restore(nn.Sequential(Block()))
print(ecar_kernels.accelerate(served)[0].served)
"""


def test_a_right_program_is_accepted(mypy):
    assert mypy(RIGHT) == []
