"""The training loop, on accelerate."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ecar.data import LatentDataset, load_dataset
from ecar.data.base import check_dataset
from ecar.files import check_output_folder
from ecar.model import ECAR
from ecar.training import state as states
from ecar.training.batches import Batch, Batches
from ecar.training.config import TrainConfig
from ecar.training.ema import EMA
from ecar.training.gradnorm import GradNorm
from ecar.training.log import Log
from ecar.training.sheet import write_sheet

try:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        DistributedType,
        GradientAccumulationPlugin,
    )
except ImportError as error:
    raise ImportError("training needs accelerate: pip install 'ecar[train]'") from error

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


class Trainer:
    """Trains one model; every process of a distributed run makes one and calls ``run``.

    Args:
        config: what to train, and how.
        dataset: used in place of ``config.dataset``; map-style, of (float32 [C, H, W], int): images
            in [-1, 1], or with ``decode`` latents of any range; labels from 0 to num_classes - 1.
        decode: latents -> images in [-1, 1] for the sample sheets, needed unless the latents
            are pixels of 1 or 3 channels or ``sample_every`` is 0.
        resume: go on from the state in ``config.output_dir``.
        progress: show a progress bar on the main process.

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
        self.accelerator = _accelerator(config)
        self.device = self.accelerator.device
        self.batches = self._batches(dataset)
        self._build(fresh=not resume)
        if resume:
            self._load(header)

    @classmethod
    def resume(
        cls,
        output_dir: str,
        *,
        dataset: Dataset | None = None,
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
        return cls(config, dataset=dataset, decode=decode, resume=True, progress=progress)

    def run(self) -> TrainResult:
        """Train up to ``config.steps``, then write everything once more.

        Raises:
            DivergenceError: naming the step whose loss or gradient was not finite.
        """
        config, main = self.config, self.accelerator.is_main_process
        log = None
        if main:
            self.output.mkdir(parents=True, exist_ok=True)
            check_output_folder(self.output)
            config.to_json(self.output / "train.json")
            log = Log(self.output, self._columns(), kind=config.log, step=self.step)
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            disable=not (main and self.progress),
        )
        last: dict[str, float] = {}
        self._mark = time.perf_counter()
        with bar:
            for parts in self.batches.steps(self.step, config.steps):
                self._train_step(parts)
                self.step += 1
                bar.update()
                ended = self.step == config.steps
                due = [
                    ended or (bool(every) and self.step % every == 0)
                    for every in (config.log_every, config.save_every, config.sample_every)
                ]
                if not any(due):
                    continue
                self._settle()
                if due[0]:
                    last = self._row()
                    bar.set_postfix_str(
                        f"loss {last['loss']:.4f}, {last['images_per_second']:.0f} images/s"
                    )
                    if log is not None:
                        log.write(last)
                if due[1]:
                    self._save()
                if due[2] and config.sample_every and main:
                    write_sheet(
                        self.averaged,
                        config,
                        self.output / "samples" / f"step_{self.step:07d}.png",
                        self.decode,
                    )
                self.accelerator.wait_for_everyone()
                self._mark = time.perf_counter()
        if log is not None:
            log.close()
        losses = [last[f"loss_{s}"] for s in range(1, config.model.num_stages + 1)] if last else []
        return TrainResult(self.output, self.step, losses, self.seconds)

    def _batches(self, dataset: Dataset | None) -> Batches:
        config, model = self.config, self.config.model
        if dataset is None:
            size: dict[str, Any] = (
                {}
                if config.dataset == "latents"
                else {"image_size": model.latent_shape[1], "channels": model.channels}
            )
            dataset = load_dataset(
                config.dataset,
                root=config.data_root,
                skip_broken=config.skip_broken,
                background=config.background,
                **size,
            )
        classes = getattr(dataset, "num_classes", model.num_classes)
        if classes != model.num_classes:
            raise ValueError(
                f"argument 'dataset': expected {model.num_classes} classes for this model, got "
                f"{classes}"
            )
        # Where nothing decodes them, items of 1 or 3 channels are pictures.
        pixels = self.decode is None and model.channels in (1, 3)
        labels = check_dataset(
            dataset,
            model.latent_shape,
            model.num_classes,
            name="dataset",
            pixels=pixels and not isinstance(dataset, LatentDataset),
        )
        if labels is not None and len(unseen := set(range(classes)) - set(labels.tolist())):
            warnings.warn(
                f"{len(unseen)} of {classes} classes have no image in the training data, such as "
                f"class {min(unseen)}: the model will not learn them",
                stacklevel=4,
            )
        return Batches(
            dataset,
            seed=config.seed,
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation,
            stages=model.num_stages,
            shape=model.latent_shape,
            label_dropout=cast("float", config.label_dropout),
            null_class=model.null_class,
            flip=config.flip,
            workers=config.num_workers,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def _build(self, *, fresh: bool) -> None:
        config = self.config
        if config.init_from is None or not fresh:
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                model = ECAR(config.model)
        else:
            model = ECAR.from_pretrained(config.init_from)
            if model.config != config.model:
                raise ValueError(
                    f"argument 'init_from': {config.init_from} holds another configuration, "
                    f"{model.config}"
                )
        model.to(self.device)
        self.ema = EMA(model, config.ema_decay)
        model.train()
        model.set_gradient_checkpointing(config.gradient_checkpointing)
        if config.compile:
            model.compile_regions()
        if config.tf32:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        names, parameters = zip(*model.named_parameters(), strict=True)
        self.names = list(names)
        optimizer = torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.raw_model, self.raw_optimizer = model, optimizer
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        stages = config.model.num_stages
        self.gradnorm = None
        if config.stage_weights == "gradnorm":
            self.gradnorm = GradNorm(
                stages,
                alpha=config.gradnorm_alpha,
                learning_rate=config.gradnorm_lr,
                device=self.device,
            )
        else:
            self.fixed_weights = torch.tensor(config.stage_weights, device=self.device)
        # Of each step since the last log row: losses [S], weights [S], gradient norm.
        self.history = torch.empty(0, 2 * stages + 1)
        self._pending: list[Tensor] = []
        self._interval = 0.0

    @property
    def averaged(self) -> ECAR:
        """The model with the moving averages of the weights."""
        return cast("ECAR", self.ema.module)

    @property
    def weights(self) -> Tensor:
        """The stages' weights, float32 [S]."""
        return self.fixed_weights if self.gradnorm is None else self.gradnorm.weights

    def _train_step(self, parts: list[Batch]) -> None:
        """One optimizer step. Nothing here waits for the GPU, but fp16's loss scale."""
        accelerator, weights = self.accelerator, self.weights
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
                if self.gradnorm is None:
                    stage_losses = self.model(*arguments)
                else:
                    stage_losses, shared = self.model(*arguments, return_shared=True)
                accelerator.backward((weights * stage_losses).sum() / len(parts))
            losses = losses + stage_losses.detach() / len(parts)
            if self.gradnorm is not None:
                gradients = gradients + shared.stage_gradients()
        losses = accelerator.reduce(losses, "mean")
        clip = self.config.grad_clip
        norm = accelerator.clip_grad_norm_(
            self.raw_model.parameters(), float("inf") if clip is None else clip
        )
        self.optimizer.step()
        if self.gradnorm is not None:
            gradients = accelerator.reduce(gradients, "mean")
            norms = torch.linalg.vector_norm(gradients.flatten(1), dim=1) / (weights * scale)
            self.gradnorm.update(losses, norms)
        self.ema.update_parameters(self.raw_model)
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

    def _columns(self) -> list[str]:
        stages = range(1, self.config.model.num_stages + 1)
        return [
            "step",
            "images",
            "lr",
            "loss",
            *(f"loss_{s}" for s in stages),
            *(f"weight_{s}" for s in stages),
            "grad_norm",
            "images_per_second",
            "seconds",
        ]

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
            *self.weights.tolist(),
            norms[torch.isfinite(norms)].mean().item(),
            count * batch / self._interval,
            self.seconds,
        ]
        self.history = self.history[:0]
        self._interval = 0.0
        return dict(zip(self._columns(), values, strict=True))

    def _tensors(self) -> dict[str, Tensor]:
        """All that the state file holds."""
        tensors = {f"model/{k}": v for k, v in self.raw_model.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.module.state_dict().items()}
        tensors |= states.adamw_tensors(self.raw_optimizer, self.names)
        if self.gradnorm is not None:
            tensors |= {f"gradnorm/{k}": v for k, v in self.gradnorm.state_dict().items()}
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

    def _load(self, header: dict[str, Any]) -> None:
        tensors = states.read_state(self.state_path)
        states.check_tensors(self.state_path, tensors, self._tensors())

        def group(name: str) -> dict[str, Tensor]:
            prefix = f"{name}/"
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.raw_model.load_state_dict(group("model"))
        self.ema.module.load_state_dict(group("ema"))
        states.load_adamw(self.raw_optimizer, self.names, tensors)
        if self.gradnorm is not None:
            self.gradnorm.load_state_dict(group("gradnorm"))
        if self.accelerator.scaler and header["scaler"]:
            self.accelerator.scaler.load_state_dict(header["scaler"])
        self.history = tensors["history"].clone()
        self.step, self.seconds = header["step"], header["seconds"]
        self._interval = header["interval"]
        self.ema.n_averaged.fill_(self.step + 1)


def _accelerator(config: TrainConfig) -> Accelerator:
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    if config.mixed_precision == "fp16" and (cpu or not torch.cuda.is_available()):
        raise ValueError("argument 'mixed_precision': 'fp16' needs CUDA; use 'bf16' or 'no'")
    # accelerate holds device and precision process-wide: a second training may want others. A
    # process group, once there, stays.
    alone = not PartialState._shared_state or PartialState().distributed_type == DistributedType.NO
    AcceleratorState._reset_state(reset_partial_state=alone)
    return Accelerator(
        cpu=cpu,
        mixed_precision=config.mixed_precision,
        # Accumulation is the loop's: accelerate's would follow an environment variable.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
