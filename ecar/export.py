"""A pipeline's networks as programs for other runtimes: torch.export, ONNX and AOTInductor.

Two programs for each stage, of plain PyTorch ops, with any number of images:

    begin   what a stage computes once: the AR transformer over its tokens, with the keys and values
            of the stages before in and of all out, and the flow head's modulation
    step    one step of the flow head: velocity, guidance, and the solver's update

What lies between them (noise, the jump to the next stage) is arithmetic of a few lines;
examples/draw_onnx.py is the whole of it in NumPy. export.json holds the numbers that it needs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ecar import stages
from ecar.checkpoint import merge_settings
from ecar.codec import AutoencoderKLCodec
from ecar.config import ECARConfig
from ecar.files import atomic_folder, naming, write_json
from ecar.flow import FlowHead
from ecar.model import ECAR
from ecar.pipeline import ECARPipeline
from ecar.sampling.guidance import Guidance, split_steps
from ecar.sampling.solver import place_steps, solver_class
from ecar.transformer import KVCache
from ecar_kernels import Accelerated, __version__, registry, use_backend
from ecar_kernels.acceleration import PUBLIC
from ecar_kernels.testing import judge_functions

__all__ = ["EXPORT_FILE", "FORMATS", "Begin", "Step", "export"]

FORMATS = ("torch", "onnx", "aoti")
EXPORT_FILE = "export.json"
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Dimensions that a program leaves open, by their names in ONNX.
OPEN = {name: torch.export.Dim(name) for name in ("images", "rows", "times")}
OPEN["guided"] = torch.export.Dim("guided", max=2)
Shapes = tuple[dict[int, str] | None, ...]  # of each input, the open dimensions


class _ExplicitCache(KVCache):
    """Keys and values of the stages before, [layers, R, N, H, D] or None, and of this one."""

    def __init__(
        self, config: ECARConfig, stage: int, keys: Tensor | None, values: Tensor | None
    ) -> None:
        self.stage_tokens, self.stages = config.stage_tokens, stage - 1
        self.bound = None
        self._before = None if keys is None or values is None else (keys, values)
        self.written: list[tuple[Tensor, Tensor]] = []

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._before is not None:
            keys, values = self._before
            key = torch.cat([keys[layer], key], dim=1)
            value = torch.cat([values[layer], value], dim=1)
        self.written.append((key, value))
        return key, value


class _Network(nn.Module):
    """Args:
    model: as written; it is not changed, and its weights are shared.
    stage: counted from 1.
    """

    parts: tuple[str, ...]  # of the stage's flow head
    outputs: tuple[str, ...]  # their names in ONNX

    def __init__(self, model: ECAR, stage: int) -> None:
        super().__init__()
        self.config, self.stage = model.config, stage
        self.head = _by_torch(cast("FlowHead", model.heads[stage - 1]))
        for name in self.head._modules.keys() - set(self.parts):
            delattr(self.head, name)  # whose weights a program would hold for nothing


class Begin(_Network):
    """What a stage computes once."""

    parts = ("condition", "time", "modulation")
    outputs = ("modulation", "step_modulation", "all_keys", "all_values")

    def __init__(self, model: ECAR, stage: int) -> None:
        super().__init__(model, stage)
        self.ar = _by_torch(model.ar)

    def forward(
        self,
        source: Tensor,
        times: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """R rows: the images, then, with guidance, the same of the null class.

        Args:
            source: the classes, int64 [R], at the first stage; at others the end state of the
                stage before, [R, C, h, w].
            times: global times of the stage's steps [T].
            keys, values: of the stages before [layers, R, N, H, D]; none at the first.

        Returns:
            The modulation's part of the tokens [R, n, P], that of the times [T, P], and the keys
            and values with this stage's.
        """
        ar, cache = self.ar, _ExplicitCache(self.config, self.stage, keys, values)
        if self.stage == 1:
            tokens = ar.embed_class(source)
        else:
            tokens = ar.embed_end(source.to(ar.positions.dtype), self.stage)
        modulation = self.head.spatial_modulation(ar.stage(tokens, cache))
        all_keys, all_values = map(torch.stack, zip(*cache.written, strict=True))
        return modulation, self.head.step_modulation(times).squeeze(1), all_keys, all_values

    def example(self, images: int = 2, guided: int = 2) -> tuple[Tensor, ...]:
        """Random arguments of ``forward``, for as many images and 1 row of each, or 2."""
        config, device, rows = self.config, self.ar.positions.device, images * guided
        times = torch.rand(3 * images, device=device)
        if self.stage == 1:
            return torch.randint(config.num_classes + 1, (rows,), device=device), times
        before = sum(config.stage_tokens[: self.stage - 1])
        kept = (config.ar_layers, rows, before, config.heads, config.head_dim)
        end = torch.randn(rows, *config.stage_shape(self.stage - 1), device=device)
        return end, times, torch.randn(kept, device=device), torch.randn(kept, device=device)

    def shapes(self) -> Shapes:
        """The open dimensions of ``forward``'s arguments."""
        shapes: Shapes = ({0: "rows"}, {0: "times"}, {1: "rows"}, {1: "rows"})
        return shapes[:2] if self.stage == 1 else shapes


class Step(_Network):
    """One step of a stage's flow: x + dt ((1 + r/2) v - (r/2) v'), Euler's method where r = 0."""

    parts = ("embed", "blocks", "output")
    outputs = ("state", "velocity")

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        step_modulation: Tensor,
        dt: Tensor,
        ratio: Tensor,
        previous: Tensor,
        guidance_scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """B images, and G = 1, or 2 with guidance.

        Args:
            x: the state [B, C, h, w].
            modulation: of ``Begin``, [G, B, n, P], the images' first.
            step_modulation: of ``Begin``, that of the step's time [P].
            dt: the step's length within the stage, 0-dim.
            ratio: r, of that to the length of the step before, 0-dim; 0 at a stage's first step.
            previous: v', the velocity of the step before [B, C, h, w]; anything finite with r = 0.
            guidance_scale: w of v_u + w (v_c - v_u), 0-dim; of no effect with G = 1.

        Returns:
            The state after the step and the velocity v, [B, C, h, w] each.
        """
        head, (guided, images) = self.head, modulation.shape[:2]
        velocity = head.velocity(
            x.to(modulation.dtype).expand(guided, *x.shape).flatten(0, 1),
            modulation.flatten(0, 1).chunk(head.parts, dim=-1),
            step_modulation.view(1, 1, -1).chunk(head.parts, dim=-1),
        ).unflatten(0, (guided, images))
        velocity = velocity.to(x.dtype)
        v = velocity[-1] + guidance_scale * (velocity[0] - velocity[-1])
        return x + dt * ((1 + ratio / 2) * v - ratio / 2 * previous), v

    def example(self, images: int = 2, guided: int = 2) -> tuple[Tensor, ...]:
        """Random arguments of ``forward``, for as many images and 1 row of each, or 2."""
        config, device = self.config, self.head.positions.device
        shape, parts = config.stage_shape(self.stage), self.head.parts * config.width
        x, previous = torch.randn(2, images, *shape, device=device).unbind(0)
        tokens = config.stage_tokens[self.stage - 1]
        modulation = torch.randn(guided, images, tokens, parts, device=device)
        dt, ratio, scale = torch.rand(3, device=device).unbind(0)
        return x, modulation, torch.randn(parts, device=device), dt, ratio, previous, 1 + scale

    def shapes(self) -> Shapes:
        """The open dimensions of ``forward``'s arguments."""
        return {0: "images"}, {0: "guided", 1: "images"}, None, None, None, {0: "images"}, None


def export(
    pipe: ECARPipeline, folder: str | os.PathLike[str], *, format: str = "torch", **settings: Any
) -> list[Path]:
    """Write the programs of every stage, and export.json, into ``folder``.

    Every program is loaded again and judged, for one image and for three with guidance, by the
    accuracy rule of the kernels: its error against float64 is at most twice PyTorch's.

    Args:
        pipe: in float32; where the programs of "aoti" shall run.
        folder: made if needed.
        format: "torch" (a program of ``torch.export.load``), "onnx", or "aoti" (compiled by
            AOTInductor, for ``torch._inductor.aoti_load_package`` or C++).
        settings: of a call of the pipeline: ``num_inference_steps``, ``guidance_scale``,
            ``guidance_schedule``, ``guidance_interval``, ``solver`` ("euler" or "ab2") and
            ``grid``. They are in export.json; the programs serve all.

    Returns:
        The files written.

    Raises:
        TypeError, ValueError: naming the argument.
        ImportError: naming what to install.
        OSError: naming the file that can't be written; or there is no C++ compiler for "aoti".
        RuntimeError: a program's results are not right.
    """
    if not isinstance(pipe, ECARPipeline):
        raise TypeError(f"argument 'pipe': expected an ECARPipeline, got {type(pipe).__name__}")
    if format not in FORMATS:
        raise ValueError(f"argument 'format': expected one of {', '.join(FORMATS)}, got {format!r}")
    model = pipe.model
    if model.dtype != torch.float32:
        raise ValueError(f"argument 'pipe': expected weights in float32, got {model.dtype}")
    if not model.config.ar_layers:
        raise ValueError("argument 'pipe': expected a model with AR layers, got one without")
    if any(isinstance(module, Accelerated) for module in model.modules()):
        raise ValueError(
            "argument 'pipe': expected a model as written, got one that `accelerate` changed; "
            "ecar_kernels.restore(pipe.model) undoes it"
        )
    described = describe(pipe, format, settings)
    convert, load = {"torch": _torch, "onnx": _onnx, "aoti": _aoti}[format]()
    names = []
    with atomic_folder(folder) as scratch, use_backend("reference"), torch.no_grad(), _quiet():
        for number, row in enumerate(described["stages"], start=1):
            module: Begin | Step
            for name, module in (("begin", Begin(model, number)), ("step", Step(model, number))):
                names.append(row[name])
                convert(module, scratch / row[name])
                run = load(scratch / row[name])
                for images, guided in ((1, 1), (3, 2)):
                    _judge(run, module, images, guided, row[name])
        write_json(scratch / EXPORT_FILE, described)
    return [Path(folder) / name for name in (*names, EXPORT_FILE)]


def describe(pipe: ECARPipeline, format: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What export.json holds."""
    config, count = pipe.model.config, pipe.model.config.num_stages
    settings = merge_settings(pipe.defaults, settings, count)
    if not solver_class(settings["solver"]).fused:
        raise ValueError(
            f"argument 'solver': expected euler or ab2, got {settings['solver']!r}, whose steps "
            "are more than one velocity"
        )
    counts = split_steps(settings["num_inference_steps"], count, name="num_inference_steps")
    guidance = Guidance(*(settings[f"guidance_{x}"] for x in ("scale", "schedule", "interval")))
    scales, rows = guidance.scales(counts, settings["grid"]), []
    suffix = "onnx" if format == "onnx" else "pt2"
    for stage in range(1, count + 1):
        steps = place_steps(counts, stage, settings["grid"])
        solver = solver_class(settings["solver"])(steps)
        rows.append(
            {
                "begin": f"begin{stage}.{suffix}",
                "step": f"step{stage}.{suffix}",
                "shape": config.stage_shape(stage),
                "start_time": stages.start_time(stage, count),
                "times": [stages.global_time(stage, count, step.tau) for step in steps],
                "dt": [step.dt for step in steps],
                "ratio": [solver.ratio(index) for index in range(len(steps))],
                "guidance_scale": scales[stage - 1],
            }
        )
    codec: dict[str, Any] = {"kind": pipe.codec.kind}
    if isinstance(pipe.codec, AutoencoderKLCodec):
        shift, scale = pipe.codec.statistics()
        codec |= {"shift": shift.flatten().tolist(), "scale": scale.flatten().tolist()}
    return {
        "ecar": __version__,
        "format": format,
        "config": config.to_dict(),
        "class_names": pipe.class_names,
        "null_class": config.null_class,
        "codec": codec,
        "settings": settings,
        "stages": rows,
    }


def _by_torch(module: Any) -> Any:
    """A copy with the same weights whose attention is torch's own, without a mask, as other
    runtimes fuse it; the reference's, an oracle, has one."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    module = copy.deepcopy(module, memo=shared)
    attention = registry.IMPLEMENTATIONS["stage_attention"]["sdpa"].function
    ops = PUBLIC._replace(stage_attention=attention)
    for block in module.blocks:
        block.ops = lambda *_: ops
    return module


def _judge(
    run: Callable[..., Sequence[Tensor]], module: Begin | Step, images: int, guided: int, name: str
) -> None:
    draw = functools.partial(module.example, images, guided)
    for verdict in judge_functions(run, module, copy.deepcopy(module).double(), draw):
        if not verdict.ok:
            raise RuntimeError(f"{name}: the program's results are not right: {verdict}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block in which exporters keep their progress and their advice to themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _program(module: Begin | Step) -> torch.export.ExportedProgram:
    shapes = tuple(
        {axis: OPEN[name] for axis, name in shape.items()} if shape else None
        for shape in module.shapes()
    )
    return torch.export.export(module, module.example(), dynamic_shapes=shapes)


Convert = Callable[[Begin | Step, Path], object]  # into a file
Load = Callable[[Path], Callable[..., Sequence[Tensor]]]  # which is a function of the inputs


def _torch() -> tuple[Convert, Load]:
    def convert(module: Begin | Step, file: Path) -> None:
        with naming(file):
            torch.export.save(_program(module), file)

    return convert, lambda file: torch.export.load(file).module()


def _onnx() -> tuple[Convert, Load]:
    try:
        for package in ONNX_PACKAGES:
            importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"argument 'format': 'onnx' needs {', '.join(ONNX_PACKAGES)}: pip install 'ecar[onnx]'"
        ) from error
    import onnxruntime

    def convert(module: Begin | Step, file: Path) -> None:
        names: Any = {"output_names": module.outputs, "dynamic_shapes": module.shapes()}
        made: Any = torch.onnx.export(_program(module), dynamo=True, verbose=False, **names)
        with naming(file):
            made.save(file)

    def load(file: Path) -> Callable[..., Sequence[Tensor]]:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]

        def run(*inputs: Tensor) -> list[Tensor]:
            given = zip(names, inputs, strict=True)
            found = session.run(None, {name: x.cpu().numpy() for name, x in given})
            return [torch.from_numpy(x).to(inputs[0].device) for x in found]

        return run

    return convert, load


def _aoti() -> tuple[Convert, Load]:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(
            f"argument 'format': 'aoti' needs a C++ compiler ($CXX), and there is no {compiler!r}"
        )

    def convert(module: Begin | Step, file: Path) -> None:
        aoti_compile_and_package(_program(module), package_path=os.fspath(file))

    return convert, lambda file: aoti_load_package(os.fspath(file))
