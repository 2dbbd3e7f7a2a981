"""The training loop, on accelerate."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ecar.model import ECAR
from ecar.training import state as states
from ecar.training.batches import Batch, Batches
from ecar.training.build import (
    describe,
    held_out_data,
    initial_model,
    keep_freed_memory,
    make_accelerator,
    make_balance,
    make_optimizer,
    training_data,
)
from ecar.training.config import TrainConfig
from ecar.training.ema import EMA
from ecar.training.gradnorm import GradNorm
from ecar.training.log import Log, columns, open_log
from ecar.training.progress import Ending, Progress
from ecar.training.sheet import write_sheet
from ecar.training.validation import Validation

__all__ = ["DivergenceError", "TrainResult", "Trainer"]


class DivergenceError(ValueError):
    """A loss or a gradient is not finite; the files of the last save are as they were."""


@dataclass(frozen=True)
class TrainResult:
    """What a training came to."""

    output_dir: Path
    step: int
    losses: list[float]  # of each stage, mean over the steps of the last log row
    seconds: float  # spent in steps, over all resumes
    stopped_by: signal.Signals | None = None  # SIGINT or SIGTERM, where it ended before its steps


class Trainer:
    """Trains one model; every process of a distributed run makes one and calls ``run``.

    Args:
        config: what to train, and how.
        dataset: used in place of ``config.dataset``; map-style, of (float32 [C, H, W], int): images
            in [-1, 1], or with ``decode`` latents of any range; labels from 0 to num_classes - 1.
        held_out: likewise, for the validation loss; a ``dataset`` that is given has none else.
        decode: latents -> images in [-1, 1] for the sample sheets, needed unless the latents
            are pixels of 1 or 3 channels or ``sample_every`` is 0.
        resume: go on from the state in ``config.output_dir``.
        progress: let the main process say what is trained and how far it is: a bar on a terminal,
            a line a minute elsewhere.

    Raises:
        TypeError, ValueError: naming the argument, or the state file and what differs.
        OSError: data missing; the output not writable; a training already there, or no state to
            resume.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        dataset: Dataset | None = None,
        held_out: Dataset | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> None:
        if not isinstance(config, TrainConfig):
            raise TypeError(f"argument 'config': expected a TrainConfig, got {config!r}")
        self.config, self.decode, self.progress = config, decode, progress
        self.output = Path(config.output_dir)
        self.state_path = states.state_path(self.output)
        self.step, self.seconds = 0, 0.0
        header: dict[str, Any] = {}
        if resume:
            saved, header = states.read_header(self.state_path)
            states.check_same_training(self.state_path, saved, config, header["step"])
        elif self.state_path.exists():
            raise FileExistsError(
                f"{self.output}: already holds a training; resume it, or choose another folder"
            )
        if config.sample_every and decode is None and config.model.channels not in (1, 3):
            raise ValueError(
                f"argument 'decode': latents of {config.model.channels} channels need one for "
                "the sample sheets; or set sample_every to 0"
            )
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.batches = Batches(
            training_data(config, dataset, decode),
            seed=config.seed,
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation,
            stages=config.model.num_stages,
            shape=config.model.latent_shape,
            label_dropout=cast("float", config.label_dropout),
            null_class=config.model.null_class,
            flip=config.flip,
            workers=config.num_workers,
            tau=config.tau,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.validation: Validation | None = None
        measures = config.validate_every and self.accelerator.is_main_process
        if measures and (dataset is None or held_out is not None):
            held_out = held_out_data(config, held_out, decode)
            self.validation = None if held_out is None else Validation(held_out, config)
        self.origin = self._build(fresh=not resume)
        if resume:
            self._load(header)
            self.origin = f"step {self.step:,} of {self.state_path}"

    @classmethod
    def resume(
        cls,
        output_dir: str,
        *,
        dataset: Dataset | None = None,
        held_out: Dataset | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        progress: bool = True,
        **changes: Any,
    ) -> Trainer:
        """The training in ``output_dir``, ready to go on; ``changes`` to its TrainConfig.

        The learning rate's schedule may change for the steps to come: ``steps`` may grow where it
        is constant, and "constant" may become "wsd". Nothing else that decides weights may.
        """
        saved, _ = states.read_header(states.state_path(output_dir))
        config = saved.replace(output_dir=str(output_dir), **changes)
        return cls(
            config, dataset=dataset, held_out=held_out, decode=decode, resume=True,
            progress=progress,
        )  # fmt: skip

    def run(self, seconds: float | None = None) -> TrainResult:
        """Train up to ``config.steps``, then write everything once more.

        SIGINT and SIGTERM end it after the step at hand, saved as at a ``save_every``.

        Args:
            seconds: ends likewise after so long.

        Raises:
            DivergenceError: naming the step whose loss or gradient was not finite.
            TypeError, ValueError: ``seconds`` is no positive number.
        """
        config, main = self.config, self.accelerator.is_main_process
        log = open_log(config, self.step, validates=self.validation is not None) if main else None
        visible, timed = main and self.progress, Ending(self.accelerator, seconds)
        progress = Progress(config.steps, self.step, visible=visible, seconds=seconds)
        for line in self.header() if main else ():
            progress.say(line)
        last: dict[str, float] = {}
        stopped = False
        self._mark = time.perf_counter()
        with contextlib.closing(progress), timed as ending:
            for parts in self.batches.steps(self.step, config.steps):
                self._train_step(parts)
                self.step += 1
                progress.advance()
                ended = self.step == config.steps
                stopped = ending.due(self.step) and not ended
                row, save, sample, validate = (
                    ended or (bool(every) and self.step % every == 0)
                    for every in (
                        config.log_every,
                        config.save_every,
                        config.sample_every,
                        config.validate_every,
                    )
                )
                if not (row or save or sample or validate or stopped):
                    continue
                self._settle()
                if row:
                    last = self._row()
                    progress.show(last, config.batch_size)
                    if log is not None:
                        log.write(last)
                if save or stopped:
                    self._save()
                if log is not None and not stopped:
                    self._look(log, sample and bool(config.sample_every), validate)
                self.accelerator.wait_for_everyone()
                self._mark = time.perf_counter()
                if stopped:
                    break
        if log is not None:
            log.close()
        losses = [last[f"loss_{s}"] for s in range(1, config.model.num_stages + 1)] if last else []
        number = ending.signal if stopped else None
        return TrainResult(self.output, self.step, losses, self.seconds, number)

    def header(self) -> list[str]:
        """What is trained, on what, where, and from where it goes on, in some lines."""
        held_out = 0 if self.validation is None else len(self.validation)
        images = len(cast("Sized", self.batches.dataset))
        processes = self.accelerator.num_processes
        return describe(self.raw_model, self.config, images, held_out, processes, self.origin)

    def _look(self, log: Log, sample: bool, validate: bool) -> None:
        """Measure the held-out loss, and draw a sheet, where they are due."""
        if validate and self.validation:
            row = self.validation.row(self.averages)
            images = self.step * self.config.batch_size
            if log.validated({"step": self.step, "images": images, **row}):
                states.keep_checkpoint(self.averaged, self.output, "best")
        if sample:
            path = self.output / "samples" / f"step_{self.step:07d}.png"
            classes = getattr(self.batches.dataset, "class_names", None)
            sheet = write_sheet(self.averaged, self.config, path, self.decode, classes)
            log.sheet(sheet, self.step)

    def _build(self, *, fresh: bool) -> str:
        """The model, its average and its optimizer; says what the weights are."""
        config = self.config
        model, origin = initial_model(config if fresh else config.replace(init_from=None))
        model.to(self.device)
        self.emas = {name: EMA(model, decay) for name, decay in config.averages.items()}
        model.train()
        model.set_gradient_checkpointing(config.gradient_checkpointing)
        if config.compile:
            model.compile_regions()
        if config.tf32:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        names, parameters = zip(*model.named_parameters(), strict=True)
        self.names = list(names)
        optimizer = make_optimizer(config, parameters)
        self.raw_model, self.raw_optimizer = model, optimizer
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        stages = config.model.num_stages
        self.balance = make_balance(config, self.device)
        # Of each step since the last log row: losses [S], weights [S], gradient norm.
        self.history = torch.empty(0, 2 * stages + 1)
        self._pending: list[Tensor] = []
        self._interval = 0.0
        return origin

    @property
    def averages(self) -> dict[str, ECAR]:
        """The models with the moving averages of the weights, by ``config.averages``' names."""
        return {name: cast("ECAR", ema.module) for name, ema in self.emas.items()}

    @property
    def averaged(self) -> ECAR:
        """The first of them."""
        return self.averages["ema"]

    def _train_step(self, parts: list[Batch]) -> None:
        """One optimizer step. Nothing here waits for the GPU, but fp16's loss scale."""
        accelerator, balance = self.accelerator, self.balance
        weights, gradnorm = balance.weights, isinstance(balance, GradNorm)
        for group in self.raw_optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
        losses = gradients = 0.0
        for index, part in enumerate(parts, start=1):
            part = part.to(self.device)
            arguments = (part.latents, part.labels, part.noise, part.tau)
            # DDP averages gradients once, in the last part's backward.
            with (
                contextlib.nullcontext() if index == len(parts) else accelerator.no_sync(self.model)
            ):
                if gradnorm:
                    stage_losses, shared = self.model(*arguments, return_shared=True)
                else:
                    stage_losses = self.model(*arguments)
                accelerator.backward((weights * stage_losses).sum() / len(parts))
            losses = losses + stage_losses.detach() / len(parts)
            if gradnorm:
                gradients = gradients + shared.stage_gradients()
        losses = accelerator.reduce(losses, "mean")
        clip = self.config.grad_clip
        norm = accelerator.clip_grad_norm_(
            self.raw_model.parameters(), float("inf") if clip is None else clip
        )
        self.optimizer.step()
        if isinstance(balance, GradNorm):
            gradients = accelerator.reduce(gradients, "mean")
            norms = torch.linalg.vector_norm(gradients.flatten(1), dim=1) / (weights * scale)
            balance.update(losses, norms)
        else:
            balance.update(losses)
        for ema in self.emas.values():
            ema.update_parameters(self.raw_model)
        self._pending.append(torch.cat([losses, weights, norm.float().reshape(1)]))

    def _settle(self) -> None:
        """Bring the pending steps to the host, stop the clock, and refuse what is not finite."""
        if self._pending:
            self.history = torch.cat([self.history, torch.stack(self._pending).cpu()])
            self._pending.clear()
        elapsed = time.perf_counter() - self._mark
        self.seconds += elapsed
        self._interval += elapsed
        stages = self.config.model.num_stages
        # Under fp16 a gradient that overflows is skipped, and the loss scale lowered.
        checked = self.history[:, :stages] if self.accelerator.scaler else self.history
        bad = (~torch.isfinite(checked)).any(dim=1).nonzero().flatten()
        if len(bad):
            step = self.step - len(self.history) + int(bad[0]) + 1
            values = self.history[bad[0]].tolist()
            kept = "kept as it was" if self.state_path.exists() else "none yet"
            raise DivergenceError(
                f"step {step}: loss or gradient not finite (stage losses {values[:stages]}, "
                f"gradient norm {values[-1]}); state file {self.state_path}: {kept}"
            )

    def _row(self) -> dict[str, float]:
        """The log row of the steps since the last one: means, but the weights as they stand."""
        stages, count = self.config.model.num_stages, len(self.history)
        losses = self.history[:, :stages].mean(dim=0)
        norms = self.history[:, -1]
        batch = self.config.batch_size
        values = [
            self.step,
            self.step * batch,
            self.config.learning_rate_at(self.step - 1),
            losses.mean().item(),
            *losses.tolist(),
            *self.balance.weights.tolist(),
            norms[torch.isfinite(norms)].mean().item(),
            count * batch / self._interval,
            self.seconds,
        ]
        self.history = self.history[:0]
        self._interval = 0.0
        return dict(zip(columns(stages), values, strict=True))

    def _tensors(self) -> dict[str, Tensor]:
        """All that the state file holds."""
        tensors = {f"model/{k}": v for k, v in self.raw_model.state_dict().items()}
        for name, average in self.averages.items():
            tensors |= {f"{name}/{k}": v for k, v in average.state_dict().items()}
        tensors |= states.adamw_tensors(self.raw_optimizer, self.names)
        tensors |= {f"{self.balance.name}/{k}": v for k, v in self.balance.state_dict().items()}
        return {**tensors, "history": self.history}

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        header = {
            "step": self.step,
            "seconds": self.seconds,
            "interval": self._interval,
            "scaler": scaler.state_dict() if scaler else None,
        }
        states.write_state(self.state_path, self._tensors(), self.config, header)
        self.averaged.save_pretrained(self.output)
        for name in list(self.averages)[1:]:
            states.keep_checkpoint(self.averages[name], self.output, name)
        if self.config.keep_last:
            folder = f"checkpoints/step_{self.step:07d}"
            states.keep_checkpoint(self.averaged, self.output, folder)
            states.prune(self.output, self.config.keep_last)

    def _load(self, header: dict[str, Any]) -> None:
        tensors = states.read_state(self.state_path)
        states.check_tensors(self.state_path, tensors, self._tensors())

        def group(name: str) -> dict[str, Tensor]:
            prefix = f"{name}/"
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.raw_model.load_state_dict(group("model"))
        for name, ema in self.emas.items():
            ema.module.load_state_dict(group(name))
            ema.n_averaged.fill_(header["step"] + 1)
        states.load_adamw(self.raw_optimizer, self.names, tensors)
        self.balance.load_state_dict(group(self.balance.name))
        if self.accelerator.scaler and header["scaler"]:
            self.accelerator.scaler.load_state_dict(header["scaler"])
        self.history = tensors["history"].clone()
        self.step, self.seconds = header["step"], header["seconds"]
        self._interval = header["interval"]
