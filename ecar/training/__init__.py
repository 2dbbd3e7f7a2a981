"""Training E-CAR on accelerate: one process, many GPUs and many machines are the same code.

    from ecar import ECARConfig
    from ecar.training import TrainConfig, Trainer

    config = TrainConfig(model=ECARConfig.preset("digits"), dataset="digits", output_dir="runs/d",
                         steps=4000, batch_size=128, learning_rate=1e-3)
    Trainer(config).run()                                  # a new training
    Trainer.resume("runs/d").run()                         # go on after a kill, bit for bit
    Trainer.resume("runs/d", steps=8000).run()             # and further (constant schedule)
    Trainer.resume("runs/d", schedule="wsd", steps=9600, decay_steps=1600).run()      # and an end

``Trainer(config, dataset=..., decode=...)``: ``dataset`` (any map-style dataset of ([C, H, W]
float32, int label)) replaces ``config.dataset``; ``decode`` maps latents [B, C, H, W] to images
[B, 1 or 3, H', W'] in [-1, 1] for the sample sheets (a codec's ``decode``). ``run()`` returns a
``TrainResult(output_dir, step, losses, seconds, stopped_by)``: SIGINT and SIGTERM end it after the
step at hand, and a resume goes on from there. Bad values, a folder that already holds a
training, and state files that do not fit raise ValueError, TypeError or OSError with one line.

What a training leaves in ``output_dir``:

    config.json, model.safetensors   the EMA weights: ``ECAR.from_pretrained(output_dir)``
    train.json                       the TrainConfig
    log.csv                          one row per ``log_every`` steps (tensorboard/ too, if asked)
    validation.csv                   the averaged weights' loss on held-out images
    best/                            the checkpoint of which that is the least
    ema_*/                           the checkpoint of each further ``ema_decay``
    checkpoints/step_*/              the last ``keep_last`` checkpoints
    samples/step_*.png               sheets: a row per class, a column per seed
    state/state.safetensors          all that a resume needs
"""

from ecar.training.config import TrainConfig
from ecar.training.ema import EMA
from ecar.training.gradnorm import GradNorm
from ecar.training.trainer import DivergenceError, Trainer, TrainResult

__all__ = ["EMA", "DivergenceError", "GradNorm", "TrainConfig", "TrainResult", "Trainer"]
