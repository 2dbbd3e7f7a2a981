"""argparse with errors of one line, and the types of arguments that commands share."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = [
    "Parser",
    "UsageError",
    "add_checkpoint",
    "add_device",
    "add_dtype",
    "add_guidance",
    "add_sampling",
    "class_list",
    "interval",
    "not_negative",
    "port",
    "positive",
    "seconds",
    "seed_list",
    "sheet_size",
    "step_list",
]


class UsageError(ValueError):
    """What the user typed cannot be; the message is one line."""


class Parser(argparse.ArgumentParser):
    """Help as written; an error is a UsageError instead of usage on stderr and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--[\w.-]+)[\w./-]*(?=: )", r"\1", message)
        raise UsageError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        for action in self._actions:
            given = getattr(parsed, action.dest, None)
            if given == "" or (isinstance(given, list) and "" in given):
                # An unset variable of the shell, say; as a path it would be the current folder.
                flag = next(iter(action.option_strings), action.dest)
                self.error(f"argument {flag}: expected {action.metavar or 'a value'}, got ''")
        return parsed

    @property
    def flags(self) -> list[str]:
        """All that it knows."""
        return list(self._option_string_actions)

    def typed(self, words: Sequence[str]) -> dict[str, str]:
        """Of each flag with several names, the one among these words."""
        given = {word.partition("=")[0] for word in words}
        found = {}
        for action in self._actions:
            for name in given.intersection(action.option_strings):
                found.update(dict.fromkeys(action.option_strings, name))
        return found

    def _meant(self, unknown: Sequence[str]) -> str:
        if unknown[-1].endswith(".tar"):
            return "; quote a pattern, as in --dataset 'shards/{000..099}.tar'"
        known = self.flags
        words = (word.partition("=")[0] for word in unknown if word.startswith("--"))
        close = [match for word in words for match in difflib.get_close_matches(word, known, n=2)]
        return f"; near it: {', '.join(close)}" if close else ""


class _Help(argparse.RawDescriptionHelpFormatter):
    """At most 100 columns."""

    def __init__(self, prog: str, **options: Any) -> None:
        columns = min(100, shutil.get_terminal_size((100, 24)).columns)
        super().__init__(prog, **{"width": columns, **options})


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def port(text: str) -> int:
    """The number of a TCP port."""
    number = positive(text)
    if number >= 2**16:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text!r}")
    return number


def seconds(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


def step_list(text: str) -> int | list[int] | str:
    """ "40" -> 40; "10,20,30" -> [10, 20, 30]; "paper" as it is."""
    if text == "paper":
        return text
    if not re.fullmatch(r"\d+(,\d+)*", text) or any(int(part) < 1 for part in text.split(",")):
        raise argparse.ArgumentTypeError(
            "expected a positive whole number, one for each stage such as 10,20,30, or paper, got "
            f"{text!r}"
        )
    steps = [int(part) for part in text.split(",")]
    return steps if "," in text else steps[0]


def seed_list(text: str) -> list[int]:
    """ "3,7-9" -> [3, 7, 8, 9]; seeds may be negative, ranges of them not."""
    seeds: list[int] = []
    for part in text.split(","):
        if bounds := _range(part):
            seeds.extend(bounds)
        elif re.fullmatch(r"-?\d+", part.strip()):
            seeds.append(int(part))
        else:
            raise argparse.ArgumentTypeError(
                f"expected whole numbers such as 0,1,5-9, got {part.strip()!r}"
            )
    return seeds


def class_list(text: str) -> list[int | str]:
    """ "3,7-9,cat" -> [3, 7, 8, 9, "cat"]: numbers, ranges and names."""
    classes: list[int | str] = []
    for part in (part.strip() for part in text.split(",")):
        if bounds := _range(part):
            classes.extend(bounds)
        elif re.fullmatch(r"-?\d+", part):
            classes.append(int(part))
        elif part:
            classes.append(part)
        else:
            raise argparse.ArgumentTypeError(
                f"expected class numbers or names such as 0,3-5,cat, got {text!r}"
            )
    return classes


def sheet_size(text: str) -> tuple[int, int]:
    """ "10x8" -> (10, 8)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS such as 10x8, got {text!r}")
    return int(match[1]), int(match[2])


def interval(text: str) -> tuple[float, float]:
    """ "0.1,0.8" -> (0.1, 0.8)."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected two numbers LOW,HIGH such as 0.1,0.8, got {text!r}"
        ) from None
    return low, high


def _range(text: str) -> range | None:
    """ "3-5" -> 3, 4, 5."""
    match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", text)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + 1_000_000:
        raise argparse.ArgumentTypeError(f"expected a range such as 3-5, got {text.strip()!r}")
    return range(first, last + 1)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How to sample; what is not given is the checkpoint's default."""
    group = parser.add_argument_group("sampling (by default as the checkpoint says)")
    group.add_argument(
        "--steps",
        type=step_list,
        metavar="N[,N..]|paper",
        help="network calls in all, or of each stage; paper: 250 even Euler steps",
    )
    group.add_argument(
        "--solver",
        choices=("euler", "heun", "ab2"),
        help="heun makes two calls a step, the others one",
    )
    group.add_argument(
        "--grid",
        type=float,
        metavar="P",
        help="a stage's N steps begin at (i / N)^P; above 1, close at its beginning",
    )
    _add_guidance(group)


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """How to guide; what is not given is the checkpoint's default."""
    _add_guidance(parser.add_argument_group("guidance (by default as the checkpoint says)"))


def _add_guidance(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--guidance", type=float, metavar="W", help="scale of classifier-free guidance; 1 is none"
    )
    group.add_argument(
        "--guidance-schedule",
        choices=("constant", "linear"),
        help="the same scale at all stages, or from 1 to W at the last",
    )
    group.add_argument(
        "--guidance-interval",
        type=interval,
        metavar="LOW,HIGH",
        help="times in 0..1 outside which there is no guidance",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint is loaded."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR|OWNER/NAME",
        help="a folder, or a repository of the Hugging Face hub",
    )


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    """In which format of numbers to sample."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default=default,
        help=f"of weights and calls; auto: bfloat16 where it is fast (default: {default})",
    )


def add_device(parser: argparse.ArgumentParser, *, backends: bool = True) -> None:
    """Where to run, and on which kernels."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, .. (default: auto, CUDA where there is one)",
    )
    if not backends:
        return
    group.add_argument(
        "--backend",
        choices=("auto", "reference", "cpp", "cuda", "sdpa", "triton", "native"),
        help="kernels (default: $ECAR_BACKEND, or auto: the best that can serve)",
    )
