"""A flow block, a head's step and an image of E-CAR-S by what a user might run instead.

PyTorch eager and torch.compile (freezing, max-autotune), OpenVINO and ONNX Runtime, next to
ecar_kernels; and diffusers' DiT-B/2 by all but the last. Random weights, batch 1, no guidance, 30
steps an image. OpenVINO and ONNX Runtime run ONNX files that are made once from the plain modules
(those of `ecar export`, with fixed shapes) and kept in build/runtimes; OpenVINO computes in
bfloat16 by its precision hint. int8 are weights compressed by nncf, with OpenVINO's dynamic
quantization of activations, and ONNX Runtime's quantize_dynamic. A step is that of the sampler, by
ab2, with its update and, in E-CAR's, the embedding of the next step's tokens.

All ways take turns of some calls, the first of them not timed; figures are medians of turns. error:
root mean square of the difference to eager float32, over that of its result. What is not installed
(`pip install 'ecar[runtimes]'`), or can't run, says why.
"""

import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import commands, models, peers, results, timing
from benchmarks.paper import dit
from benchmarks.results import duration, medians, table, times
from ecar import ECARConfig, ECARPipeline, sample
from ecar.export import EXPORT_FILE, Begin, Step, describe
from ecar.flow import NORM_EPS
from ecar.transformer import patchify, unpatchify
from ecar_kernels import BoundFlowStep, FlowBlock, accelerate, use_backend
from examples.draw_onnx import Drawer

FILES = results.ROOT / "build" / "runtimes"
SIZE, PEER = "S", "B"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": None}
OURS = "ecar_kernels"
TURN = 0.1  # seconds of a way's turn, at least one call
COMPILE = {"freezing": True, "max_autotune": True}
Arrays = Sequence[Any]  # arrays, or tensors that nobody looks into
Run = Callable[..., Arrays]
Call = Callable[[], Any]
Load = Callable[[nn.Module, Path, str], Run]
TOKENS = ECARConfig.preset(SIZE).stage_tokens


class Block(nn.Module):
    """A flow block as sampling calls it: x [1, n, C], its modulation [1, n, 6 C] and the step's."""

    def __init__(self, block: FlowBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, modulation: Tensor, step_modulation: Tensor) -> tuple[Tensor]:
        spatial, step = modulation.chunk(6, -1), step_modulation.chunk(6, -1)
        return (self.block.infer(x, spatial, step),)


class DiT(nn.Module):
    """A network call of diffusers' DiT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> tuple[Tensor]:
        return (self.model(x, timestep=time, class_labels=label).sample,)


def of_torch(module: Callable) -> Run:
    """As a function of arrays and tensors; what the loop around the programs reads is arrays."""

    def run(*inputs: Any) -> Arrays:
        with torch.no_grad(), use_backend("reference"):
            found = module(*map(torch.as_tensor, inputs))
        return [x.numpy() if x.dtype == torch.float32 else x for x in found]

    return run


def of_type(module: nn.Module, dtype: str) -> nn.Module:
    if dtype == "int8":
        raise NotImplementedError("PyTorch has int8 by torchao, which is not compared here")
    return module if dtype == "float32" else copy.deepcopy(module).to(DTYPES[dtype])


def eager(module: nn.Module, file: Path, dtype: str) -> Run:
    return of_torch(of_type(module, dtype))


def compiled(module: nn.Module, file: Path, dtype: str) -> Run:
    if isinstance(module, Begin):
        raise NotImplementedError("an image compiles for minutes; benchmarks.end_to_end has it")
    return of_torch(torch.compile(of_type(module, dtype), dynamic=False, options=COMPILE))


def openvino(module: nn.Module, file: Path, dtype: str) -> Run:
    import openvino as ov

    core = ov.Core()
    model, hint = core.read_model(file), {"PERFORMANCE_HINT": "LATENCY"}
    if dtype == "int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    else:
        hint["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    hint["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    program = core.compile_model(model, "CPU", hint)
    return lambda *inputs: list(program(list(inputs), share_inputs=True).values())


def onnxruntime(module: nn.Module, file: Path, dtype: str) -> Run:
    import onnxruntime as ort

    if dtype == "bfloat16":
        raise NotImplementedError("it has no bfloat16 on a CPU")
    if dtype == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        plain, file = file, file.with_suffix(".int8.onnx")
        if not file.exists():
            quantize_dynamic(plain, file, weight_type=QuantType.QInt8, per_channel=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))


RUNTIMES: dict[str, Load] = {
    "eager": eager,
    "torch.compile": compiled,
    "OpenVINO": openvino,
    "ONNX Runtime": onnxruntime,
}


def exported(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> Path:
    """The module's ONNX file of these inputs' shapes; absent where it can't be made."""
    file = FILES / f"{name}.onnx"
    if not file.exists() and not peers.why_not(lambda: __import__("onnxscript")):
        FILES.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), use_backend("reference"):
            program = torch.export.export(module, inputs)
            torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    return file


class Work:
    """A case by every way: calls without arguments, all of one result; or why there is none."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype = name, dtype
        self.calls: dict[str, Call] = {}
        self.absent: dict[str, str] = {}
        self.exact: Any = None  # float32 by eager

    def add(self, way: str, make: Callable[[], Call]) -> None:
        made: list[Call] = []
        reason = peers.why_not(lambda: (made.append(make()), made[0]()))
        if reason is None:
            self.calls[way] = made[0]
        else:
            self.absent[way] = reason

    def add_runtimes(
        self,
        module: nn.Module,
        inputs: Sequence[Tensor],
        network: Sequence[int],
        names: Sequence[str] | None = None,
    ) -> None:
        """Of a case that is one program. network: inputs that have the weights' type in PyTorch."""
        file, arrays = exported(module, tuple(inputs), self.name), [x.numpy() for x in inputs]
        dtype = DTYPES[self.dtype] or torch.float32
        cast = [x.to(dtype) if i in network else x for i, x in enumerate(inputs)]
        for way in RUNTIMES if names is None else names:
            load = RUNTIMES[way]
            given = cast if load in (eager, compiled) else arrays
            self.add(way, lambda load=load, given=given: self._first(load, module, file, given))
        self.exact = eager(module, file, "float32")(*inputs)[0]

    def _first(self, load: Load, module: nn.Module, file: Path, inputs: Arrays) -> Call:
        run = load(module, file, self.dtype)
        return lambda: run(*inputs)[0]

    def error(self, way: str) -> float:
        found, exact = (torch.as_tensor(x).double() for x in (self.calls[way](), self.exact))
        return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()

    def measured(self, seconds: float) -> dict[str, Any]:
        """A row of the results: all ways in turns for so long."""
        ways = {way: functools.partial(turn, call) for way, call in self.calls.items()}
        return {
            "name": f"{self.name}-{self.dtype}",
            "errors": {way: self.error(way) for way in self.calls},
            "seconds": timing.summaries(timing.rounds(ways, seconds)),
            "absent": self.absent,
        }


def accelerated(model: nn.Module, dtype: str) -> Any:
    if dtype == "int8":
        raise NotImplementedError("it has no int8")
    model = copy.deepcopy(model).to(DTYPES[dtype])
    accelerate(model)
    return model


def block(work: Work, stage: int) -> None:
    config = ECARConfig.preset(SIZE)
    model = models.random_model(config).heads[stage - 1].blocks[0]
    tokens, width = config.stage_tokens[stage - 1], config.width
    shapes = ((1, tokens, width), (1, tokens, 6 * width), (1, 1, 6 * width))
    inputs = tuple(torch.randn(shape) for shape in shapes)
    work.add_runtimes(Block(model), inputs, network=(0, 1, 2))

    def ours() -> Call:
        own = Block(accelerated(model, work.dtype))
        given = [x.to(DTYPES[work.dtype]) for x in inputs]
        return lambda: own(*given)[0]

    work.add(OURS, ours)


def step(work: Work, stage: int) -> None:
    model = models.random_model(ECARConfig.preset(SIZE))
    inputs = list(Step(model, stage).example(1, 1))
    inputs[4], inputs[6] = torch.tensor(0.0), torch.tensor(1.0)  # no history, no guidance
    work.add_runtimes(Step(model, stage), inputs, network=(1, 2))

    def ours() -> Call:
        head, dtype = accelerated(model, work.dtype).heads[stage - 1], DTYPES[work.dtype]
        x, modulation, own, dt = inputs[:4]
        patches, config = patchify(x, head.patch_size), model.config
        tokens, shape = config.stage_tokens[stage - 1], config.stage_shape(stage)
        bound = BoundFlowStep(
            batch=1, rows=1, tokens=tokens, width=config.width, hidden=config.mlp_width,
            values=patches.shape[-1], dtype=dtype,
        )  # fmt: skip
        layers = (head.blocks, head.output, head.embed, head.positions)
        bound.bind(*layers, modulation[0].to(dtype), eps=NORM_EPS)
        for _ in range(2):  # the first of them embeds the second's tokens
            bound.add(own.view(1, 1, -1).to(dtype), rows=1, dt=float(dt))
        embedded = head.embed_tokens(x.to(dtype))

        def call() -> Tensor:
            bound.state.copy_(patches)
            bound.stream.copy_(embedded)
            bound.run(0)
            return unpatchify(bound.state, head.patch_size, shape)

        return call

    work.add(OURS, ours)


def image(work: Work) -> None:
    model = models.random_model(ECARConfig.preset(SIZE))
    facts, label = describe(ECARPipeline(model), "onnx", {}), torch.zeros(1, dtype=torch.int64)
    FILES.mkdir(parents=True, exist_ok=True)
    (FILES / EXPORT_FILE).write_text(json.dumps(facts))
    programs = {}
    for stage, row in enumerate(facts["stages"], start=1):
        begin = Begin(model, stage)
        given = begin.example(1, 1)
        given = (given[0], torch.tensor(row["times"], dtype=torch.float32), *given[2:])
        for module, inputs in (
            (begin, given),
            (Step(model, stage), Step(model, stage).example(1, 1)),
        ):
            name = type(module).__name__.lower() + str(stage)
            programs[name] = module, exported(module, inputs, f"image-{name}")

    def drawing(load: Load, dtype: str) -> Call:
        def program(file: Path) -> Run:
            return load(*programs[file.name.partition(".")[0]], dtype)

        drawer = Drawer(FILES, program)
        return lambda: drawer.draw([0], [0])

    for way, load in RUNTIMES.items():
        work.add(way, lambda load=load: drawing(load, work.dtype))
    work.exact = drawing(eager, "float32")()

    def ours() -> Call:
        own = accelerated(model, work.dtype)
        return lambda: sample(own, label, seeds=label).latents

    work.add(OURS, ours)


def dit_call(
    work: Work, model: nn.Module | None = None, names: Sequence[str] | None = None
) -> None:
    """A network call of diffusers' DiT, of the peer's size if None, by all RUNTIMES or `names`."""
    model = model or dit.SIZES[PEER].build()
    side = model.config.sample_size
    inputs = (torch.randn(1, 4, side, side), torch.tensor([500]), torch.tensor([1]))
    work.add_runtimes(DiT(model), inputs, network=(0,), names=names)
    work.absent[OURS] = "examples/accelerate_dit.py has its block"


CASES: dict[str, Callable[[Work], None]] = {
    **{f"block-{n}": functools.partial(block, stage=s) for s, n in enumerate(TOKENS, 1)},
    **{f"step-{n}": functools.partial(step, stage=s) for s, n in enumerate(TOKENS, 1)},
    "image": image,
    f"DiT-{PEER}-call": dit_call,
}
NAMES = [f"{case}-{dtype}" for case in CASES for dtype in DTYPES]


def turn(call: Call) -> float:
    """Seconds of a call, the median over a way's turn; other ways' threads have gone to sleep."""
    call()
    found, end = [], time.perf_counter() + TURN
    while not found or time.perf_counter() < end:
        found.append(timing.seconds_of(call))
    return statistics.median(found)


@torch.no_grad()
def measure(name: str, seconds: float) -> dict[str, list]:
    case, _, dtype = name.rpartition("-")
    torch.manual_seed(0)  # the weights of the files that there are
    models.forget()
    work = Work(case, dtype)
    CASES[case](work)
    return {"rows": [work.measured(seconds)]}


def render(record: dict[str, Any]) -> str:
    reasons = {f"- {way}: {why}" for row in record["rows"] for way, why in row["absent"].items()}
    cells = table([_cells(row) for row in record["rows"]])
    return f"{cells}\n\n{chr(10).join(sorted(reasons))}".rstrip()


def _cells(row: dict[str, Any]) -> dict[str, str]:
    found = medians(row)
    ours, others = found.get(OURS), [found[way] for way in RUNTIMES if way in found]
    return {
        "case": row["name"],
        **{way: duration(found.get(way)) for way in (OURS, *RUNTIMES)},
        "best of others": times(min(others), ours) if ours and others else "-",
        **{
            f"error, {way}": f"{row['errors'][way]:.0e}" if way in row["errors"] else "-"
            for way in (OURS, *list(RUNTIMES)[-2:])
        },
    }


main = functools.partial(
    commands.main, "runtimes", __doc__, measure, NAMES, render, seconds=15, order=NAMES
)

if __name__ == "__main__":
    sys.exit(main())
