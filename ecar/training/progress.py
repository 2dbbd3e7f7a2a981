"""What a training says while it runs, and how it is told to end."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Ending", "Progress", "Signals"]

_ASK_EVERY = 10  # steps between asking the other processes whether one is to end
_BETWEEN = 60.0  # seconds between lines where there is no terminal


class Progress:
    """A bar on a terminal; elsewhere, as in a log file, a line a minute at most.

    Args:
        total, begin: steps in all, and done already.
        visible: False says nothing.
        seconds: after so many from now it ends, if not before; None: not by time.
    """

    def __init__(
        self, total: int, begin: int, *, visible: bool, seconds: float | None = None
    ) -> None:
        self.total, self.step = total, begin
        self._deadline = float("inf") if seconds is None else time.monotonic() + seconds
        terminal = sys.stderr.isatty()
        self._lines = visible and not terminal
        self._said = 0.0
        self._bar = tqdm(
            total=total, initial=begin, unit="step", dynamic_ncols=True,
            disable=not (visible and terminal),
        )  # fmt: skip

    def advance(self) -> None:
        """One more step is done."""
        self.step += 1
        self._bar.update()

    def show(self, row: Mapping[str, float], batch_size: int) -> None:
        """A row of the log: its loss, its images per second, and the time that is left."""
        rate = row["images_per_second"]
        text = f"loss {row['loss']:.4f}, {rate:.0f} images/s"
        self._bar.set_postfix_str(text)
        now, ended = time.monotonic(), self.step == self.total
        if self._lines and (ended or not self._said or now - self._said >= _BETWEEN):
            self._said = now
            left = min((self.total - self.step) * batch_size / rate, max(self._deadline - now, 0))
            self.say(f"step {self.step:,} of {self.total:,}: {text}, {_duration(left)} left")

    def say(self, text: str) -> None:
        """A line above the bar, or among the lines."""
        if self._lines:
            print(text, file=sys.stderr, flush=True)
        elif not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def _duration(seconds: float) -> str:
    """Such as 2 d 03:04, 3:04:05 or 4:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


class Signals:
    """A block in which SIGINT and SIGTERM are noted; a second one has its usual effect.

    Outside the main thread, where Python has no signals, nothing is noted.

    Attributes:
        received: the signal that came, or None.
    """

    _KINDS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for kind in self._KINDS:
                before = signal.getsignal(kind)
                if before != signal.SIG_IGN:  # as where nohup or a shell's & says so
                    self._before[kind] = before
                    signal.signal(kind, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for kind, before in self._before.items():
            signal.signal(kind, before)
        self._before.clear()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()


class Ending(Signals):
    """`Signals`, or so many seconds, end a training: in all processes at the same step.

    Args:
        seconds: from now; None: as long as it takes.

    Attributes:
        signal: what ended it, once `due` says so; None where the time was over.

    Raises:
        TypeError, ValueError: ``seconds`` is no positive number.
    """

    _SIGNALLED = 1000.0  # more than processes whose time is over

    def __init__(self, accelerator: Accelerator, seconds: float | None) -> None:
        super().__init__()
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float, type(None))):
            raise TypeError(f"argument 'seconds': expected a number or None, got {seconds!r}")
        if seconds is not None and not seconds > 0:
            raise ValueError(f"argument 'seconds': expected a number above 0, got {seconds}")
        self._accelerator = accelerator
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self.signal: signal.Signals | None = None

    def __enter__(self) -> Ending:
        super().__enter__()
        return self

    def due(self, step: int) -> bool:
        """Whether to end after this step; several processes ask each other now and then."""
        several = self._accelerator.num_processes > 1
        if several and step % _ASK_EVERY:
            return False
        late = self._deadline is not None and time.monotonic() >= self._deadline
        flag = self._SIGNALLED if self.received is not None else float(late)
        if several:
            asked = torch.tensor(flag, device=self._accelerator.device)
            flag = float(self._accelerator.reduce(asked, "sum"))
        if flag >= self._SIGNALLED:  # another process's, perhaps
            self.signal = self.received or signal.SIGTERM
        return flag > 0
