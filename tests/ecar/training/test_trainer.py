"""The training loop in one process."""

import functools
import platform
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from ecar.config import ECARConfig
from ecar.model import ECAR
from ecar.training import DivergenceError, TrainConfig, Trainer


def trainer(config, **options):
    return Trainer(config, progress=False, **options)


def gradients(instance):
    return [parameter.grad for parameter in instance.raw_model.parameters()]


def one_step(instance, *, weights_moved=True):
    """Run one step and return the gradients that the optimizer saw."""
    if weights_moved:  # away from adaLN-zero, where most gradients vanish
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in instance.raw_model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    (parts,) = instance.batches.steps(0, 1)
    instance._train_step(parts)
    return gradients(instance)


def test_learns_digits_and_leaves_its_files(make_config, read_log, tiny):
    config = make_config(
        steps=120,
        batch_size=32,
        learning_rate=3e-3,
        log_every=20,
        sample_every=60,
        sample_rows=3,
        sample_columns=2,
        sample_steps=4,
    )
    result = trainer(config).run()
    log = read_log(config.output_dir)
    assert log["step"] == [20, 40, 60, 80, 100, 120]
    assert log["images"][-1] == 120 * 32
    assert log["loss"][-1] < 0.6 * log["loss"][0]
    assert result.step == 120
    assert result.losses == pytest.approx([log["loss_1"][-1], log["loss_2"][-1]], rel=1e-5)
    for row in zip(log["weight_1"], log["weight_2"], strict=True):
        assert sum(row) == pytest.approx(2, abs=1e-4)
    assert min(log["images_per_second"]) > 0 and log["seconds"] == sorted(log["seconds"])
    assert TrainConfig.from_json(result.output_dir / "train.json") == config
    assert ECAR.from_pretrained(result.output_dir).config == tiny
    sheets = sorted(path.name for path in (result.output_dir / "samples").iterdir())
    assert sheets == ["step_0000060.png", "step_0000120.png"]
    with Image.open(result.output_dir / "samples" / sheets[0]) as sheet:
        assert sheet.height > sheet.width  # 3 rows, 2 columns


def test_the_checkpoint_is_the_average(make_config):
    instance = trainer(make_config())
    instance.run()
    saved = ECAR.from_pretrained(instance.output).state_dict()
    averaged, raw = instance.averaged.state_dict(), instance.raw_model.state_dict()
    assert all(torch.equal(saved[name], averaged[name]) for name in saved)
    assert any(not torch.equal(saved[name], raw[name]) for name in saved)


def test_same_seed_same_training(make_config, images, tmp_path):
    runs = []
    for name in ("one", "two"):
        instance = trainer(make_config(output_dir=str(tmp_path / name)), dataset=images)
        torch.manual_seed(len(runs))  # the process's own generator decides nothing
        instance.run()
        runs.append(instance.raw_model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("stage_weights", ["gradnorm", "uncertainty", (0.5, 2.0)])
def test_accumulation_equals_the_big_batch(make_config, images, read_log, tmp_path, stage_weights):
    logs = []
    for parts in (1, 4):
        config = make_config(
            gradient_accumulation=parts,
            output_dir=str(tmp_path / str(parts)),
            stage_weights=stage_weights,
        )
        trainer(config, dataset=images).run()
        logs.append(read_log(config.output_dir))
    for name in ("loss_1", "loss_2", "weight_1", "weight_2", "grad_norm"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-5, abs=1e-5)
    if isinstance(stage_weights, tuple):
        assert set(logs[0]["weight_1"]) == {0.5} and set(logs[0]["weight_2"]) == {2.0}


def test_checkpointing_gives_the_same_gradients(make_config, images):
    plain = one_step(trainer(make_config(), dataset=images))
    instance = trainer(make_config(gradient_checkpointing=True), dataset=images)
    assert instance.raw_model.ar.gradient_checkpointing
    for one, other in zip(plain, one_step(instance), strict=True):
        torch.testing.assert_close(other, one)


def test_compile_changes_nothing_beyond_rounding(make_config, images, monkeypatch):
    plain = one_step(trainer(make_config(), dataset=images))
    # The graphs are traced and run op by op: no C++ compiler's minutes in a test.
    monkeypatch.setattr(
        ECAR, "compile_regions", functools.partialmethod(ECAR.compile_regions, backend="eager")
    )
    torch.compiler.reset()
    instance = trainer(make_config(compile=True), dataset=images)
    compiled = one_step(instance)
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert list(instance.raw_model.state_dict()) == list(instance.averaged.state_dict())


def test_gradients_are_clipped(make_config, images):
    instance = trainer(make_config(grad_clip=1e-3), dataset=images)
    one_step(instance)
    norm = torch.stack([gradient.norm() for gradient in gradients(instance)]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert instance._pending[0][-1] > 1e-3  # the log has the norm before clipping
    free = trainer(make_config(grad_clip=None), dataset=images)
    one_step(free)
    norm = torch.stack([gradient.norm() for gradient in gradients(free)]).norm()
    assert norm.item() == pytest.approx(free._pending[0][-1].item(), rel=1e-5)


def test_bf16_trains(make_config, read_log):
    config = make_config(
        steps=40, batch_size=16, learning_rate=3e-3, log_every=10, mixed_precision="bf16"
    )
    instance = trainer(config)
    instance.run()
    log = read_log(config.output_dir)
    assert log["loss"][-1] < 0.8 * log["loss"][0]
    assert all(p.dtype == torch.float32 for p in instance.raw_model.parameters())


def test_bf16_gradients_are_those_of_float32_rounded(make_config, images):
    exact = one_step(trainer(make_config(), dataset=images))
    rough = one_step(trainer(make_config(mixed_precision="bf16"), dataset=images))
    flat, other = (torch.cat([g.flatten() for g in grads]) for grads in (exact, rough))
    assert not torch.equal(flat, other)
    # bf16 keeps 8 bits: rounding of 2^-9 at each of some tens of ops, not a wrong gradient.
    assert (flat - other).norm() < 0.05 * flat.norm()


def test_tensorboard_beside_csv(make_config, images):
    config = make_config(log="tensorboard")
    trainer(config, dataset=images).run()
    folder = trainer(config.replace(output_dir=config.output_dir + "2"), dataset=images).output
    assert not folder.exists()  # a Trainer that has not run leaves nothing
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = events.EventAccumulator(config.output_dir + "/tensorboard")
    run.Reload()
    assert [event.step for event in run.Scalars("loss")] == [1, 2, 3, 4]


def test_starts_from_given_weights(make_config, images, tmp_path, tiny):
    model = ECAR(tiny)
    model.save_pretrained(tmp_path / "given")
    instance = trainer(make_config(init_from=str(tmp_path / "given")), dataset=images)
    ours, given = instance.raw_model.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], given[name]) for name in given)
    with pytest.raises(ValueError, match=r"argument 'init_from': .* holds another configuration"):
        trainer(
            make_config(
                init_from=str(tmp_path / "given"), model=ECARConfig.preset("digits", width=32)
            )
        )


@pytest.mark.parametrize("save_every", [1, 100])
def test_divergence_names_the_step_and_writes_nothing(make_config, tiny, save_every):
    """One image is NaN. The step that meets it is named; earlier states stay."""
    latents = torch.zeros(32, *tiny.latent_shape)
    config = make_config(steps=4, log_every=100, save_every=save_every)
    spoiled = trainer(config, dataset=TensorDataset(latents, torch.zeros(32).long()))
    latents[int(spoiled.batches.row_indices(2)[0])] = float("nan")
    with pytest.raises(DivergenceError, match=r"step 3: loss or gradient not finite") as raised:
        spoiled.run()
    assert "\n" not in str(raised.value)
    if save_every == 1:
        mended = TensorDataset(torch.nan_to_num(latents), torch.zeros(32).long())
        assert Trainer.resume(config.output_dir, dataset=mended).step == 2
        ECAR.from_pretrained(config.output_dir)
    else:
        assert not spoiled.state_path.exists()
        assert not (spoiled.output / "model.safetensors").exists()


def test_refusals_before_anything_is_written(make_config, images, tmp_path, tiny):
    def refused(error, words, **options):
        fields = {k: v for k, v in options.items() if k != "dataset"}
        with pytest.raises(error, match=words) as raised:
            trainer(make_config(**fields), dataset=options.get("dataset", images))
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "run").exists()

    refused(
        ValueError,
        "'dataset': expected at least one image",
        dataset=TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)),
    )
    refused(
        ValueError,
        r"'dataset': expected items of shape \[1, 8, 8\] .* got \[1, 4, 4\]",
        dataset=TensorDataset(torch.zeros(3, 1, 4, 4), torch.zeros(3)),
    )
    refused(
        ValueError,
        "'dataset': expected 7 classes for this model, got 10",
        dataset=None,
        model=ECARConfig.preset("digits", num_classes=7),
    )
    refused(
        ValueError,
        "'decode': latents of 4 channels need one",
        sample_every=1,
        model=ECARConfig(stage_sides=(4, 8), width=16, heads=2),
    )
    if not torch.cuda.is_available():
        refused(ValueError, "'mixed_precision': 'fp16' needs CUDA", mixed_precision="fp16")
    refused(FileNotFoundError, "no such folder", init_from=str(tmp_path / "nowhere"))
    with pytest.raises(TypeError, match="argument 'config': expected a TrainConfig"):
        Trainer({"steps": 3})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file"):
        trainer(make_config(output_dir=str(tmp_path / "file" / "run")), dataset=images).run()


def test_a_folder_that_holds_a_training_is_refused(make_config, images):
    config = make_config()
    first = trainer(config, dataset=images)
    first.run()
    before = first.state_path.read_bytes()
    with pytest.raises(FileExistsError, match="already holds a training"):
        trainer(config, dataset=images)
    assert first.state_path.read_bytes() == before


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_the_gpu_resumes_bit_for_bit(make_config, tmp_path, precision):
    fields = {"batch_size": 32, "device": "auto", "mixed_precision": precision}
    whole = trainer(make_config(steps=8, output_dir=str(tmp_path / "whole"), **fields))
    whole.run()
    trainer(make_config(steps=4, **fields)).run()
    resumed = Trainer.resume(str(tmp_path / "run"), steps=8, progress=False)
    resumed.run()
    for name, tensor in whole._tensors().items():
        assert torch.equal(resumed._tensors()[name], tensor), name


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_a_step_frees_is_kept():
    """Asked for again, it is not filled with zeros by the kernel again, page by page."""
    program = """
import resource
import torch
from ecar.training.build import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 26, dtype=torch.uint8).fill_(1)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(20)))
keep_freed_memory()
print(min(faults() for _ in range(20)))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 10
