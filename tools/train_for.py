"""Train a checkpoint of this repository for a given time, and write it as it is committed.

    python -m tools.train_for --seconds 200 --output checkpoints/emoji      make gpu-train
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m tools.train_for --seconds 7200 --output out

Nobody knows beforehand how many steps a machine makes in that time. Four fifths of it go at a
constant learning rate; then a copy of the training decays for as many steps as the rest has time
for. Called again with the same --work, it goes on from before the decay. The checkpoint's weights
are float16, half the bytes.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from accelerate import PartialState

from ecar import ECAR, ECARConfig
from ecar.checkpoint import write_settings
from ecar.data import load_dataset
from ecar.files import atomic_folder, read_json, write_json
from ecar.training import TrainConfig, Trainer
from ecar.training.sheet import write_sheet
from ecar.training.state import read_header, state_path

DECAY = 0.2  # of the time
SPARE = 0.9  # of the time that is left are planned: starting again takes some
SETTINGS = {
    "learning_rate": 8e-4,
    "warmup_steps": 300,
    "ema_decay": 0.999,
    "mixed_precision": "bf16",
    "num_workers": 0,
    "log_every": 25,
    "save_every": 500,
    "sample_every": 0,
    "sample_columns": 6,
    "sample_guidance": 2.5,
}


def start(dataset: str, work: Path, batch_size: int, init_from: str | None) -> Trainer:
    """The training in that folder, or a new one."""
    if state_path(work).exists():
        return Trainer.resume(str(work))
    model = ECARConfig.preset(dataset)
    config = TrainConfig(
        model=model,
        output_dir=str(work),
        dataset=dataset,
        steps=10**9,
        batch_size=batch_size,
        stage_weights=(1.0,) * model.num_stages,
        sample_rows=model.num_classes,
        init_from=init_from,
        **SETTINGS,
    )
    return Trainer(config)


def train(trainer: Trainer, work: Path, seconds: float, begin: float) -> Path:
    """Train for that long since `begin`; the folder of the training that has decayed.

    Raises:
        KeyboardInterrupt: another signal ended it; it is saved.
    """
    first, spent = trainer.step, trainer.seconds
    left = seconds * (1 - DECAY) - (time.monotonic() - begin)
    if trainer.run(max(left, 1e-3)).stopped_by is not None:
        raise KeyboardInterrupt
    if trainer.step <= trainer.config.warmup_steps:
        raise SystemExit(
            f"{trainer.step} steps in {seconds:g} s, no more than the warm-up; call again"
        )
    trainer.accelerator.wait_for_everyone()
    done = work.with_name(work.name + "-decayed")
    if trainer.accelerator.is_main_process:
        shutil.rmtree(done, ignore_errors=True)
        shutil.copytree(work, done)
    trainer.accelerator.wait_for_everyone()
    # By the saved clock, which is the same in all processes.
    _, header = read_header(state_path(done))
    pace = (header["step"] - first) / (header["seconds"] - spent)
    decay = max(round(pace * seconds * DECAY * SPARE), 1)
    Trainer.resume(str(done), schedule="wsd", steps=trainer.step + decay, decay_steps=decay).run()
    return done


def export(done: Path, output: Path) -> None:
    """Write the checkpoint with its log and settings, and a sheet."""
    fields = read_json(done / "train.json")
    config = TrainConfig.from_dict(fields)
    names = load_dataset(config.dataset, split="test").class_names
    model = ECAR.from_pretrained(done)
    with atomic_folder(output) as scratch:
        ECAR.from_pretrained(done, dtype=torch.float16).save_pretrained(scratch)
        shutil.copy(done / "log.csv", scratch)
    write_json(output / "train.json", {**fields, "output_dir": f"runs/{config.dataset}"})
    write_settings(output, None, names, {"guidance_scale": float(config.sample_guidance)})
    write_sheet(model, config, output / "sheet.png", None, names)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, required=True, help="for all of it, or nearly")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, help="folder of the training: runs/DATASET")
    parser.add_argument("--dataset", choices=("digits", "mnist", "emoji"), default="emoji")
    size = 256 if torch.cuda.is_available() else 64
    parser.add_argument("--batch-size", type=int, default=size, help=f"default here: {size}")
    parser.add_argument("--init-from", help="checkpoint to start from, as `ecar train` takes it")
    arguments = parser.parse_args(argv)
    work = arguments.work or Path("runs") / arguments.dataset
    begin = time.monotonic()
    try:
        trainer = start(arguments.dataset, work, arguments.batch_size, arguments.init_from)
        done = train(trainer, work, arguments.seconds, begin)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; {work} is saved, and the same command goes on") from None
    if PartialState().is_main_process:
        export(done, arguments.output)
        print(arguments.output)


if __name__ == "__main__":
    main()
