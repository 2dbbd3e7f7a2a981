"""Sampling: solver steps stage by stage, and the jump between stages (design.md, 3.4).

sampler.py   `sample`, what it checks and says, and which engine it takes
guidance.py  classifier-free guidance, how steps are split over stages, and the defaults
solver.py    the solvers' arithmetic, and where the steps of a stage lie
stage.py     what a run is told, in buffers, and what one stage needs
loop.py      the one loop over stages and steps, and the callback's protocol
plain.py     the engine that calls op after op, on any device
cpu.py       the engine of C++ calls bound ahead, on the CPU
graph.py     the engine that replays a CUDA graph, and the graphs that a model keeps
"""

from ecar.sampling.graph import release_graphs
from ecar.sampling.guidance import SCHEDULES, Guidance, split_steps
from ecar.sampling.loop import StepInfo
from ecar.sampling.sampler import SampleOutput, sample, why_not_graphs
from ecar.sampling.solver import SOLVERS

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "Guidance",
    "SampleOutput",
    "StepInfo",
    "release_graphs",
    "sample",
    "split_steps",
    "why_not_graphs",
]
