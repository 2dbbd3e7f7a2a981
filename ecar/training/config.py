"""TrainConfig: everything that decides a training, validated, JSON in and out."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from ecar.config import ECARConfig, near
from ecar.files import read_json, write_json
from ecar.images import parse_background
from ecar.sampling.guidance import DEFAULT_STEPS

__all__ = ["TrainConfig"]

_CHOICES = {
    "schedule": ("constant", "linear", "cosine", "wsd"),
    "tau": ("uniform", "logit-normal"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "device": ("auto", "cpu"),
    "log": ("csv", "tensorboard"),
}
# name: smallest value
_INTEGERS = {
    "steps": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "warmup_steps": 0,
    "decay_steps": 0,
    "seed": 0,
    "log_every": 1,
    "sample_every": 0,
    "save_every": 1,
    "keep_last": 0,
    "validate_every": 0,
    "validation_images": 1,
    "num_workers": 0,
    "sample_rows": 1,
    "sample_columns": 1,
    "sample_steps": 1,
}
# name: (lowest, lowest allowed, highest or None)
_NUMBERS = {
    "learning_rate": (0.0, False, None),
    "weight_decay": (0.0, True, None),
    "gradnorm_alpha": (0.0, True, None),
    "gradnorm_lr": (0.0, False, None),
    "grad_clip": (0.0, False, None),
    "label_dropout": (0.0, True, 1.0),
    "sample_guidance": (0.0, True, None),
}
_FLAGS = ("flip", "skip_broken", "tf32", "gradient_checkpointing", "compile")
# What a resumed training may change: none of these decides a weight, beyond rounding.
FREE_ON_RESUME = frozenset(
    {
        "output_dir",
        "data_root",
        "skip_broken",
        "num_workers",
        "device",
        "log",
        "log_every",
        "sample_every",
        "save_every",
        "keep_last",
        "validate_every",
        "validation_images",
        "sample_rows",
        "sample_columns",
        "sample_steps",
        "sample_guidance",
        "gradient_accumulation",
        "gradient_checkpointing",
        "compile",
        "tf32",
        "init_from",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how.

    Args:
        model: sizes of the model.
        output_dir: folder that the training writes.
        dataset: a name that ``ecar.data.load_dataset`` knows: "digits", "mnist", "emoji", "folder",
            "shards", "latents".
        data_root: where the data lies: a folder for "folder" and "latents", for "shards" one of tar
            files or a pattern such as "train-{000..099}.tar"; for "mnist" and "emoji" if not in one
            of the usual places.
        flip: mirror each image left to right with probability 1/2; not for "latents", where
            images are mirrored before they are encoded and cached.
        skip_broken: go on without files that are no images, in tar files too; say how many.
            Otherwise they are an error, which names them.
        background: colour under transparent images in files; such as white, black or #7f7f7f.
        steps: optimizer steps in all.
        batch_size: images of one optimizer step; over all processes and accumulation steps.
        gradient_accumulation: backward passes that one optimizer step is split into.
        learning_rate: AdamW's, after the warm-up.
        weight_decay, betas: AdamW's.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        schedule: "constant", "linear", "cosine" or "wsd"; after the warm-up. "linear" and "cosine"
            decay to 0 at ``steps``; "wsd" (warm-up, stable, decay) is constant, with a linear decay
            to 0 over the last ``decay_steps``. A training that is constant may be resumed as "wsd"
            when it is time to end it.
        decay_steps: steps of the decay of "wsd", at least 1; of the others 0.
        tau: times within a stage, "uniform" or "logit-normal"; the distribution that training
            images have them from, the second the sigmoid of a standard normal (Esser et al., 2024).
        ema_decay: decay of the weights' moving average; at step t it is
            min(ema_decay, (1 + t) / (10 + t)). With several, there are as many averages: the first
            is the checkpoint, that of a further decay 0.99 the checkpoint in ``ema_0.99``.
        label_dropout: share of labels replaced by the null class; None: the model's
            ``class_dropout``.
        stage_weights: "gradnorm", "uncertainty" or a weight of each stage; "gradnorm" not for a
            model without AR layers, and weights not negative.
        gradnorm_alpha: GradNorm's asymmetry.
        gradnorm_lr: step size of the stage weights; of GradNorm's, or of uncertainty's
            log-variances.
        grad_clip: largest global norm of the gradient; None: no clipping.
        mixed_precision: "no", "bf16" or "fp16" (CUDA only).
        tf32: let float32 matrix products use TF32 on CUDA.
        gradient_checkpointing: recompute blocks in the backward pass to save memory.
        compile: torch.compile each repeated block.
        seed: decides initial weights, the order of the data and all noise.
        num_workers: loader processes for data that is not in memory.
        device: "auto" (what accelerate finds) or "cpu".
        init_from: folder or hub name of a model to start from; None: fresh weights.
        log_every: steps between log rows.
        save_every: steps between saved states.
        keep_last: checkpoints to keep, of the last saves; in ``checkpoints/step_*``; 0: none.
        validate_every: steps between measuring the loss of held-out images; with the averaged
            weights, where the data set has such images; 0: never. The checkpoint with the least
            such loss is kept in ``best``.
        validation_images: held-out images to measure it on, at most.
        sample_every: steps between sample sheets; 0: none.
        sample_rows, sample_columns: classes and seeds of a sheet.
        sample_steps: solver steps of one sample, in all; at least one per stage. The solver and
            its grid are ``sample``'s defaults.
        sample_guidance: guidance scale of the sheets.
        log: "csv", or "tensorboard" for its event files as well.

    Raises:
        TypeError, ValueError: for an impossible value, named.
    """

    model: ECARConfig
    output_dir: str
    dataset: str = "digits"
    data_root: str | None = None
    flip: bool = False
    skip_broken: bool = False
    background: str = "white"
    steps: int = 100_000
    batch_size: int = 256
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    schedule: str = "constant"
    decay_steps: int = 0
    tau: str = "uniform"
    ema_decay: float | tuple[float, ...] = 0.9999
    label_dropout: float | None = None
    stage_weights: str | tuple[float, ...] = "gradnorm"
    gradnorm_alpha: float = 1.5
    gradnorm_lr: float = 1e-3
    grad_clip: float | None = 1.0
    mixed_precision: str = "no"
    tf32: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    num_workers: int = 4
    device: str = "auto"
    init_from: str | None = None
    log_every: int = 50
    save_every: int = 1000
    keep_last: int = 0
    validate_every: int = 1000
    validation_images: int = 512
    sample_every: int = 1000
    sample_rows: int = 10
    sample_columns: int = 8
    sample_steps: int = DEFAULT_STEPS
    sample_guidance: float = 2.0
    log: str = "csv"

    def __post_init__(self) -> None:
        if isinstance(self.model, dict):
            object.__setattr__(self, "model", ECARConfig.from_dict(self.model))
        if not isinstance(self.model, ECARConfig):
            raise _type("model", "an ECARConfig", self.model)
        if self.label_dropout is None:
            object.__setattr__(self, "label_dropout", self.model.class_dropout)
        for name in ("output_dir", "data_root", "init_from"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        for name in ("output_dir", "dataset"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise _type(name, "a string that is not empty", getattr(self, name))
        for name in ("data_root", "init_from"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise _type(name, "a string or None", getattr(self, name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _value(name, f"one of {', '.join(choices)}", getattr(self, name))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _type(name, "True or False", getattr(self, name))
        for name, least in _INTEGERS.items():
            _check_integer(name, getattr(self, name), least)
        for name, (lowest, inclusive, highest) in _NUMBERS.items():
            value = getattr(self, name)
            if name == "grad_clip" and value is None:
                continue
            _check_number(name, value, lowest, inclusive, highest)
        if not isinstance(self.background, str):
            raise _type("background", "a colour's name or #rrggbb", self.background)
        parse_background(self.background)
        if self.seed >= 2**63:
            raise _value("seed", "an integer below 2^63", self.seed)
        if self.flip and self.dataset == "latents":
            raise ValueError(
                "argument 'flip': expected False for dataset 'latents' (a mirrored latent is not "
                "the latent of the mirrored image; cache both instead), got True"
            )
        self._check_betas()
        self._check_ema_decay()
        self._check_stage_weights()
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                "argument 'gradient_accumulation': expected a divisor of batch_size "
                f"{self.batch_size}, got {self.gradient_accumulation}"
            )
        if self.schedule != "constant" and self.warmup_steps >= self.steps:
            raise _value("warmup_steps", f"fewer than steps {self.steps}", self.warmup_steps)
        if self.schedule == "wsd":
            most = self.steps - self.warmup_steps
            if not 1 <= self.decay_steps <= most:
                words = f"from 1 to steps - warmup_steps = {most} for schedule 'wsd'"
                raise _value("decay_steps", words, self.decay_steps)
        elif self.decay_steps:
            raise _value("decay_steps", f"0 for schedule {self.schedule!r}", self.decay_steps)
        if self.sample_every and self.sample_steps < self.model.num_stages:
            raise _value(
                "sample_steps",
                f"at least one per stage, {self.model.num_stages}",
                self.sample_steps,
            )

    def _check_betas(self) -> None:
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise _type("betas", "two numbers", self.betas)
        for index, beta in enumerate(self.betas):
            _check_number(f"betas[{index}]", beta, 0.0, True, 1.0)
            if beta == 1:
                raise _value(f"betas[{index}]", "a number below 1", beta)
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))

    def _check_ema_decay(self) -> None:
        if not isinstance(self.ema_decay, (tuple, list)):
            _check_number("ema_decay", self.ema_decay, 0.0, True, 1.0)
            return
        for index, decay in enumerate(self.ema_decay):
            _check_number(f"ema_decay[{index}]", decay, 0.0, True, 1.0)
        decays = tuple(float(decay) for decay in self.ema_decay)
        if not decays or len(set(decays)) < len(decays):
            raise _value("ema_decay", "a number, or several that differ", list(decays))
        object.__setattr__(self, "ema_decay", decays)

    def _check_stage_weights(self) -> None:
        weights, stages = self.stage_weights, self.model.num_stages
        if weights == "gradnorm" and not self.model.ar_layers:
            words = f"'uncertainty' or {stages} numbers for a model without AR layers"
            raise _value("stage_weights", words, weights)
        if weights in ("gradnorm", "uncertainty"):
            return
        words = f"'gradnorm', 'uncertainty' or {stages} numbers, one per stage"
        if isinstance(weights, str) or not isinstance(weights, (tuple, list)):
            raise _type("stage_weights", words, weights)
        if len(weights) != stages:
            raise _value("stage_weights", words, list(weights))
        for index, weight in enumerate(weights):
            _check_number(f"stage_weights[{index}]", weight, 0.0, True, None)
        if not any(weights):
            raise _value("stage_weights", "at least one above 0", list(weights))
        object.__setattr__(self, "stage_weights", tuple(float(weight) for weight in weights))

    @property
    def averages(self) -> dict[str, float]:
        """The decays of the moving averages by name: "ema", then "ema_DECAY" for each further."""
        first, *others = self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)
        return {"ema": first, **{f"ema_{decay}": decay for decay in others}}

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the step counted from 0: a function of nothing else."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "wsd":
            left = self.steps - step
            return self.learning_rate * min(1.0, left / self.decay_steps)
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def replace(self, **changes: Any) -> TrainConfig:
        """The same configuration with these fields changed."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values["model"] = self.model.to_dict()
        for name in ("betas", "ema_decay", "stage_weights"):
            if isinstance(values[name], tuple):
                values[name] = list(values[name])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The configuration with these fields; an unknown field is refused by name."""
        if not isinstance(values, dict):
            raise TypeError(f"training config: expected an object of fields, got {values!r}")
        known = [item.name for item in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"training config {name!r}: no such field; {near(name, known)}")
        for name in ("model", "output_dir"):
            if name not in values:
                raise ValueError(f"training config: field {name!r} is missing")
        return cls(**values)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the fields to ``path``, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a file that ``to_json`` wrote; ValueError names the path if it cannot be."""
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"training config file {os.fspath(path)}: {error}") from None


def _type(name: str, expected: str, got: object) -> TypeError:
    return TypeError(f"argument {name!r}: expected {expected}, got {got!r}")


def _value(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"argument {name!r}: expected {expected}, got {got!r}")


def _check_integer(name: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _type(name, "an integer", value)
    if value < lowest:
        raise _value(name, f"an integer of at least {lowest}", value)


def _check_number(
    name: str, value: object, lowest: float, inclusive: bool, highest: float | None
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _type(name, "a number", value)
    above = value >= lowest if inclusive else value > lowest
    if not math.isfinite(value) or not above or (highest is not None and value > highest):
        words = f"{'at least' if inclusive else 'above'} {lowest:g}"
        if highest is not None:
            words += f" and at most {highest:g}"
        raise _value(name, f"a finite number {words}", value)
