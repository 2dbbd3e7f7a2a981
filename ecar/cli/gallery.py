"""`ecar gallery`: a page on this machine, to draw by class, seed, calls and guidance.

Each class is a row, in which the image appears from stage to stage, coarse to fine, as it is drawn.
The page is for this machine's browser alone unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import errno
import os
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

from PIL import Image
from torch import Tensor

from ecar.cli.parser import UsageError, add_checkpoint, add_device, port
from ecar.cli.runtime import chosen_backend, chosen_device, describe_backends
from ecar.images import make_sheet, to_pil
from ecar.pipeline import ECARPipeline
from ecar.sampling import split_steps

EXAMPLES = """\
examples:
  ecar gallery --checkpoint checkpoints/emoji
      open the address that it prints; Ctrl-C ends it
  ecar gallery --checkpoint runs/birds --port 8080 --host 0.0.0.0
      for other machines, too
"""
FLAGS = {
    "class_labels": "--checkpoint",
    "num_inference_steps": "--checkpoint",
    "guidance_scale": "--checkpoint",
}
SIDE = 128  # pixels of an image on the page, at least
AT_FIRST = 4  # classes that are chosen when the page opens
MOST_CALLS, MOST_GUIDANCE = 250, 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--port", type=port, default=7860, metavar="N", help="of the page (default: 7860)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="who may open it; 0.0.0.0 is everybody (default: 127.0.0.1)",
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    pipe = ECARPipeline.from_pretrained(arguments.checkpoint)
    pipe.to(chosen_device(arguments.device))
    with chosen_backend(arguments.backend):  # can it serve?
        describe_backends(pipe.model.config, pipe.device, pipe.dtype)
    page = make_page(pipe, arguments.checkpoint, arguments.backend)
    check_place(arguments.host, arguments.port)
    try:
        _, address, _ = page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--port: cannot use {arguments.port}, give another ({reason})") from None
    print(address, flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def check_place(host: str, number: int) -> None:
    """UsageError where no page can be opened there: gradio says of all that the port is taken."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, number, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
            raise UsageError(f"--host: no such address: {host!r} ({reason})") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(f"--host: {host} is not an address of this machine") from None
        raise UsageError(f"--port: cannot use {number}, give another ({reason})") from None


def make_page(pipe: ECARPipeline, title: str, backend: str | None = None) -> Any:
    """The page as gradio's Blocks, to be launched.

    Args:
        backend: of the kernels, while an image is drawn.

    Raises:
        ImportError: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the gallery needs gradio: pip install 'ecar[gallery]'") from error

    stages, settings = pipe.model.config.num_stages, pipe.defaults
    side = pipe.model.config.stage_sides[-1] * pipe.codec.downscale
    side *= max(1, SIDE // side)
    default = sum(split_steps(settings["num_inference_steps"], stages))
    names = pipe.class_names or [str(k) for k in range(pipe.model.config.num_classes)]
    choices = [(name, number) for number, name in enumerate(names)]

    def draw(
        classes: list[int], seed: float, calls: float, guidance: float
    ) -> Iterator[Image.Image]:
        if not classes:
            raise gradio.Error("choose at least one class", print_exception=False)
        steps = settings["num_inference_steps"] if calls == default else int(calls)
        labels = [names[number] for number in classes]
        try:
            for states in drawn_stages(pipe, classes, int(seed), steps, guidance, backend):
                yield sheet(states, labels, stages, side)
        except (TypeError, ValueError, FloatingPointError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title=f"E-CAR: {title}", analytics_enabled=False) as page:
        gradio.Markdown(f"# E-CAR: {title}")
        with gradio.Row():
            with gradio.Column(scale=1):
                inputs = [
                    gradio.Dropdown(
                        choices, value=list(range(len(names)))[:AT_FIRST], multiselect=True,
                        label="Classes",
                    ),
                    gradio.Number(0, precision=0, label="Seed"),
                    gradio.Slider(
                        stages, max(MOST_CALLS, default), value=default, step=1, label="Calls",
                    ),
                    gradio.Slider(
                        1.0, MOST_GUIDANCE, value=settings["guidance_scale"], step=0.1,
                        label="Guidance",
                    ),
                ]  # fmt: skip
                button = gradio.Button("Draw", variant="primary")
            with gradio.Column(scale=3):
                picture = gradio.Image(
                    label="Stages, coarse to fine", type="pil", format="png", interactive=False
                )
        button.click(draw, inputs, picture, api_name="draw")
    return page


class _Left(Exception):
    """The page is gone, and nobody looks."""


def drawn_stages(
    pipe: ECARPipeline,
    classes: list[int],
    seed: int,
    steps: Any,
    guidance: float,
    backend: str | None,
) -> Iterator[list[list[Image.Image]]]:
    """After each stage, the pictures in which the stages so far ended: one list for each stage.

    The sampler runs in a thread of its own and stops soon after the iterator is closed.
    """
    ends: queue.SimpleQueue[list[Image.Image] | Exception] = queue.SimpleQueue()
    stages, left = pipe.model.config.num_stages, threading.Event()
    last: tuple[int, Tensor] | None = None

    def step_done(_: Any, index: int, time: float, given: dict[str, Tensor]) -> None:
        nonlocal last
        if left.is_set():
            raise _Left
        stage = int(time * stages + 1e-6)
        if last is not None and last[0] < stage:
            ends.put(to_pil(pipe.codec.decode(last[1])))
        last = stage, given["latents"].clone()

    def draw() -> None:
        try:
            with chosen_backend(backend):
                output = pipe(
                    classes, steps, guidance, seeds=[seed] * len(classes),
                    callback_on_step_end=step_done, progress=False,
                )  # fmt: skip
            ends.put(output.images)
        except Exception as error:
            ends.put(error)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    found: list[list[Image.Image]] = []
    try:
        while len(found) < stages:
            end = ends.get()
            if isinstance(end, Exception):
                raise end
            found.append(end)
            yield found
    finally:
        left.set()
        thread.join()


def sheet(states: list[list[Image.Image]], names: list[str], stages: int, side: int) -> Image.Image:
    """A row for each class, a column for each stage; stages that are not drawn yet are dark."""
    rows, size = len(names), (side, side)
    columns = [
        [picture.resize(size, Image.Resampling.NEAREST) for picture in state] for state in states
    ]
    columns += [[Image.new(states[0][0].mode, size)] * rows] * (stages - len(states))
    pictures = [column[row] for row in range(rows) for column in columns]
    return make_sheet(pictures, rows, stages, names=names)
