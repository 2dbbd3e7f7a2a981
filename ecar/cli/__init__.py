"""The command line: a module for each of COMMANDS.

Each subcommand is a module with ``add_arguments(parser)``, ``run(arguments)``, ``EXAMPLES``, and
``FLAGS``: the flags of what the library's messages call by an argument's name. It is imported
when it is asked for, so that `ecar --help` needs no torch.
"""

from __future__ import annotations

import difflib
import dis
import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from types import TracebackType

from ecar.cli.parser import Parser, UsageError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "sample": "draw images, or a sheet of them, from a checkpoint",
    "train": "train on digits, MNIST, images in files, or cached latents",
    "cache": "encode a data set's images by a VAE, to train on the latents",
    "evaluate": "measure a checkpoint's samples against a data set",
    "steps": "find the solver and steps that draw a checkpoint's images best",
    "info": "count the tokens, parameters and multiply-adds of a preset or checkpoint",
    "gallery": "open a page on this machine, to draw by class, seed, calls and guidance",
    "export": "write a checkpoint's networks for other runtimes: torch.export, ONNX, AOTInductor",
    "tune": "measure the launch settings of this machine's GPU",
}
OUR_PACKAGES = ("ecar", "ecar_kernels")
# How often a thread of GNU's OpenMP looks for work before it sleeps, and where a user may say so.
# By default it is 300,000 times, about a millisecond: where other processes keep the cores busy, it
# looks in the time that the thread needs that it waits for, and an image of E-CAR-S takes 1.8 times
# as long on two threads as on one; with this, 0.7 times. Nothing is lost on an idle machine, where
# sleeping at once costs 3 %. Measured by benchmarks/busy.py.
SPINS, SPIN_VARIABLES = "3000", ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what a user did wrong is one line on stderr.

    Returns:
        The exit code: 0; 2 for bad input; 130 after Ctrl-C, 143 where SIGTERM ended a training.
        Internal errors keep their traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "torch" not in sys.modules and not any(map(os.environ.get, SPIN_VARIABLES)):
        os.environ["GOMP_SPINCOUNT"] = SPINS  # is read when torch is imported
    flags: dict[str, str] = {}
    known: set[str] = set()
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"ecar: warning: {_line(message, flags)}\n"
    try:
        command, rest = _command(argv)
        module = importlib.import_module(f"ecar.cli.{command}")
        flags = module.FLAGS
        parser = Parser(prog=f"ecar {command}", description=module.__doc__, epilog=module.EXAMPLES)
        module.add_arguments(parser)
        known.update(parser.flags)
        typed = parser.typed(rest)
        flags = {name: typed.get(flag, flag) for name, flag in flags.items()} | typed
        code = module.run(parser.parse_args(rest))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("ecar: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone, as in `ecar info .. | head`; the interpreter's last flush would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Exception as error:
        if _is_out_of_memory(error):
            smaller = "; a smaller --batch-size needs less" if "--batch-size" in known else ""
            reason = str(error).partition("\n")[0] or type(error).__name__
            print(f"ecar: error: out of memory{smaller} ({reason})", file=sys.stderr)
            return 2
        if not _is_the_users(error):
            raise
        print(f"ecar: error: {_line(error, flags)}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = plain
    return code or 0


def _command(argv: list[str]) -> tuple[str, list[str]]:
    """The subcommand and its arguments."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="ecar",
        usage="ecar COMMAND ...",
        description="E-CAR: image generation by stages.",
        epilog=f"commands:\n{listing}\n\n`ecar COMMAND --help` explains each, with examples.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and end")
    if argv and not argv[0].startswith("-"):
        if argv[0] not in COMMANDS:
            close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            known = f"near it: {close[0]}" if close else f"commands are {', '.join(COMMANDS)}"
            raise UsageError(f"no command {argv[0]!r}; {known}")
        return argv[0], argv[1:]
    if parser.parse_args(argv).version:
        from ecar_kernels import __version__

        print(f"ecar {__version__}")
        raise SystemExit(0)
    raise UsageError(f"a command is needed: {', '.join(COMMANDS)}; see `ecar --help`")


def _is_the_users(error: Exception) -> bool:
    """Whether the error says what the user did wrong, rather than what we did."""
    if isinstance(error, (UsageError, OSError, FloatingPointError)):
        return True
    if isinstance(error, ImportError):
        return "pip install" in str(error)
    if isinstance(error, (TypeError, ValueError)):
        return _raised_by_us(error.__traceback__)
    if isinstance(error, RuntimeError):
        from ecar_kernels import BackendUnavailableError

        return isinstance(error, BackendUnavailableError)
    return False


def _is_out_of_memory(error: Exception) -> bool:
    """Python's, numpy's, and torch's on any device."""
    if isinstance(error, RuntimeError) and "torch" in sys.modules:
        import torch

        return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError)


def _raised_by_us(traceback: TracebackType | None) -> bool:
    """Whether a raise statement of ours is its origin; an operation that fails is an accident."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    ours = frame.f_globals.get("__name__", "").partition(".")[0] in OUR_PACKAGES
    return ours and dis.opname[frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"


def _line(error: Exception, flags: dict[str, str]) -> str:
    """The message as one line, with arguments named as they are typed."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{os.fspath(error.filename)}: {error.strerror}"
    message = " ".join(message.split())
    message = re.sub(r"argument '(\w+)'", lambda name: flags.get(name[1], name[0]), message)
    return re.sub(r"^--[\w.-]+", lambda flag: flags.get(flag[0], flag[0]), message)
