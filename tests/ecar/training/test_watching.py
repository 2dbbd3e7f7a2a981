"""What a training says, measures and keeps while it runs, and how a signal ends it."""

import json
import os
import re
import signal
import threading

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from ecar.config import ECARConfig
from ecar.data import InMemoryDataset
from ecar.model import ECAR
from ecar.training import Trainer
from ecar.training.progress import Progress, Signals, _duration
from ecar.training.validation import Validation


def trainer(config, **options):
    return Trainer(config, progress=False, **options)


def rows(path):
    header, *lines = path.read_text().splitlines()
    return [
        dict(zip(header.split(","), map(float, line.split(",")), strict=True)) for line in lines
    ]


def test_validation_is_the_loss_on_held_out_images(make_config, images, tmp_path):
    config = make_config(validate_every=2, steps=5)
    instance = trainer(config, dataset=images, held_out=images)
    instance.run()
    measured = rows(tmp_path / "run" / "validation.csv")
    assert [row["step"] for row in measured] == [2, 4, 5]
    assert [row["images"] for row in measured] == [16, 32, 40]
    losses = Validation(images, config).losses(instance.averaged)
    assert [measured[-1]["loss_1"], measured[-1]["loss_2"]] == pytest.approx(losses, rel=1e-5)
    assert measured[-1]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_validation_draws_its_own_numbers_and_always_the_same(make_config, images, tiny):
    model = ECAR(tiny)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = make_config()
    once, again = (Validation(images, config).losses(model) for _ in range(2))
    assert once == again
    assert once != Validation(images, config.replace(seed=config.seed + 1)).losses(model)
    few = Validation(images, config.replace(validation_images=3))
    assert len(few) == 3
    assert torch.equal(few.latents, torch.stack([images[row][0] for row in (0, 10, 19)]))


def test_validation_changes_no_weight(make_config, images, tmp_path):
    runs = []
    for name, every in (("with", 1), ("without", 0)):
        config = make_config(output_dir=str(tmp_path / name), validate_every=every)
        instance = trainer(config, dataset=images, held_out=images)
        instance.run()
        runs.append(instance.raw_model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not (tmp_path / "without" / "validation.csv").exists()
    assert not (tmp_path / "without" / "best").exists()


def test_a_data_set_of_ones_own_is_not_measured_on_another(make_config, images, tmp_path):
    trainer(make_config(validate_every=1), dataset=images).run()
    assert not (tmp_path / "run" / "validation.csv").exists()


def test_wrong_held_out_images_are_named(make_config, images):
    wide = TensorDataset(torch.zeros(3, 1, 9, 9), torch.zeros(3).long())
    with pytest.raises(ValueError, match="argument 'held_out': expected items of shape"):
        trainer(make_config(), dataset=images, held_out=wide)


def test_the_best_checkpoint_is_kept(make_config, images, tmp_path, monkeypatch):
    """The second of three is the best; a resumed training knows that it was."""
    losses = iter([[2.0, 2.0], [1.0, 1.0], [3.0, 3.0], [1.5, 1.5], [0.5, 0.5]])
    monkeypatch.setattr(Validation, "losses", lambda *_: next(losses))
    config = make_config(validate_every=1, save_every=1, steps=3, keep_last=10)
    trainer(config, dataset=images, held_out=images).run()
    output = tmp_path / "run"

    def weights(folder):
        return ECAR.from_pretrained(folder).state_dict()

    def same(one, other):
        return all(torch.equal(one[name], other[name]) for name in one)

    best = weights(output / "best")
    assert same(best, weights(output / "checkpoints" / "step_0000002"))
    assert not same(best, weights(output))
    for steps, kept in ((4, "step_0000002"), (5, "step_0000005")):
        Trainer.resume(
            str(output), steps=steps, dataset=images, held_out=images, progress=False
        ).run()
        assert same(weights(output / "best"), weights(output / "checkpoints" / kept))


def test_each_average_is_a_checkpoint_and_is_measured(make_config, images, tmp_path):
    (tmp_path / "run").mkdir()
    settings = {"codec": "identity", "class_names": None, "defaults": {"guidance_scale": 3.0}}
    (tmp_path / "run" / "pipeline.json").write_text(json.dumps(settings))
    config = make_config(ema_decay=(0.4, 0.0), validate_every=2)
    instance = trainer(config, dataset=images, held_out=images)
    instance.run()
    short = ECAR.from_pretrained(tmp_path / "run" / "ema_0.0").state_dict()
    assert (tmp_path / "run" / "ema_0.0" / "pipeline.json").exists()
    long, raw = (
        model.state_dict() for model in (ECAR.from_pretrained(tmp_path / "run"), instance.raw_model)
    )
    assert all(torch.equal(short[name], raw[name]) for name in raw)  # of decay 0: the weights
    assert any(not torch.equal(long[name], raw[name]) for name in raw)
    measured = rows(tmp_path / "run" / "validation.csv")
    assert list(measured[0]) == ["step", "images", "loss", "loss_1", "loss_2", "ema_0.0"]
    losses = instance.validation.losses(instance.averages["ema_0.0"])
    assert measured[-1]["ema_0.0"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert measured[-1]["ema_0.0"] != measured[-1]["loss"]


def test_the_last_checkpoints_are_kept(make_config, images, tmp_path):
    (tmp_path / "run").mkdir()
    settings = {"codec": "identity", "class_names": None, "defaults": {"guidance_scale": 3.0}}
    (tmp_path / "run" / "pipeline.json").write_text(json.dumps(settings))
    trainer(make_config(save_every=1, steps=4, keep_last=2), dataset=images).run()
    kept = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["step_0000003", "step_0000004"]
    names = {path.name for path in (kept / "step_0000003").iterdir()}
    assert names >= {"config.json", "model.safetensors", "pipeline.json"}
    # None are kept from now on, which is no reason to remove those.
    changes = {"steps": 5, "keep_last": 0, "dataset": images, "progress": False}
    Trainer.resume(str(tmp_path / "run"), **changes).run()
    assert len(list(kept.iterdir())) == 2


def test_sheets_and_validation_are_in_tensorboard(make_config, images, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(
        log="tensorboard", sample_every=2, sample_rows=2, sample_columns=2, validate_every=4
    )
    trainer(config, dataset=images, held_out=images).run()
    run = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    run.Reload()
    assert [event.step for event in run.Images("samples")] == [2, 4]
    assert [event.step for event in run.Scalars("validation/loss")] == [4]


def test_the_header_says_what_is_trained(make_config, images, tmp_path, capsys):
    config = make_config(steps=2)
    Trainer(config, dataset=images, held_out=images).run()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("model: 0.0 M parameters, 2 stages up to 1 x 8 x 8, 10 classes")
    assert "data: 20 training images of digits, 20 for validation" in lines
    assert any(
        re.match("run: 1 x cpu with [0-9]+ threads?, mixed precision no, ops by ", line)
        for line in lines
    )
    assert f"from: fresh weights of seed {config.seed}" in lines
    assert lines[-1].startswith("step 2 of 2: loss ") and lines[-1].endswith("images/s, 0:00 left")
    Trainer.resume(str(tmp_path / "run"), steps=3, dataset=images).run()
    state = tmp_path / "run" / "state" / "state.safetensors"
    assert f"from: step 2 of {state}" in capsys.readouterr().err.splitlines()


def test_other_classes_get_embeddings_of_their_own(make_config, tmp_path, tiny, images):
    images = TensorDataset(images.tensors[0], torch.arange(20) % 12)
    given = ECAR(tiny)
    given.save_pretrained(tmp_path / "given")
    model = ECARConfig.from_dict({**tiny.to_dict(), "num_classes": 10 + 2, "class_dropout": 0.2})
    instance = trainer(make_config(model=model, init_from=str(tmp_path / "given")), dataset=images)
    assert "embeddings of 12 classes in place of its 10" in instance.origin
    fresh = trainer(make_config(model=model, output_dir=str(tmp_path / "x")), dataset=images)
    new, old, seeds = (m.state_dict() for m in (instance.raw_model, given, fresh.raw_model))
    name = "ar.class_embedding.weight"
    assert torch.equal(new[name][12], old[name][10])
    assert torch.equal(new[name][:12], seeds[name][:12])
    assert all(torch.equal(new[key], old[key]) for key in old if key != name)


@pytest.mark.parametrize("classes", [10, 12])
def test_more_flow_blocks_begin_as_the_identity(make_config, tmp_path, tiny, images, classes):
    given = ECAR(tiny)
    for head in given.heads:  # zero in a model that is not trained
        torch.nn.init.normal_(head.modulation.weight)
        torch.nn.init.normal_(head.modulation.bias)
        torch.nn.init.normal_(head.output.weight)
    given.save_pretrained(tmp_path / "given")
    sizes = {**tiny.to_dict(), "num_classes": classes, "flow_blocks": tiny.flow_blocks + 2}
    config = make_config(model=ECARConfig.from_dict(sizes), init_from=str(tmp_path / "given"))
    instance = trainer(config, dataset=images)
    assert "and 2 more flow blocks in each head, which begin as the identity" in instance.origin
    latents = images.tensors[0]
    noise, tau = torch.randn_like(latents), torch.rand(len(latents), tiny.num_stages)
    losses = [
        model(latents, torch.full((len(latents),), model.config.null_class), noise, tau)
        for model in (given, instance.raw_model)
    ]
    torch.testing.assert_close(*losses)
    assert all(len(head.blocks) == 3 for head in instance.raw_model.heads)
    losses[1].sum().backward()
    moved = instance.raw_model.heads[0].modulation.weight.grad.view(20, -1).any(dim=1)
    assert moved[6:18].any() and moved[18:].all()  # the new blocks learn

    instance.raw_model.save_pretrained(tmp_path / "grown")
    with pytest.raises(ValueError, match="holds another configuration"):
        trainer(make_config(init_from=str(tmp_path / "grown")), dataset=images)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_rest_is_as_if_there_had_been_none(
    make_config, images, tmp_path, kind
):
    whole = trainer(make_config(output_dir=str(tmp_path / "whole"), log_every=2), dataset=images)
    whole.run()
    instance = trainer(make_config(log_every=2, save_every=100), dataset=images)
    step = instance._train_step

    def signalled(parts):
        if instance.step == 2:
            os.kill(os.getpid(), kind)
        step(parts)

    instance._train_step = signalled
    before = signal.getsignal(kind)
    result = instance.run()
    assert (result.step, result.stopped_by) == (3, kind)
    assert signal.getsignal(kind) is before
    resumed = Trainer.resume(str(tmp_path / "run"), dataset=images, progress=False)
    assert resumed.step == 3
    assert resumed.run().stopped_by is None
    for name, tensor in whole._tensors().items():
        assert torch.equal(resumed._tensors()[name], tensor), name


def test_it_ends_after_so_long(make_config, images, tmp_path):
    result = trainer(make_config(steps=10**6, save_every=10**6), dataset=images).run(0.5)
    assert result.stopped_by is None and 0 < result.step < 10**6
    resumed = Trainer.resume(str(tmp_path / "run"), dataset=images, progress=False)
    assert resumed.step == result.step
    for seconds, error in ((0, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="argument 'seconds': expected a number"):
            resumed.run(seconds)


def test_a_second_signal_has_its_usual_effect():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signals_stay_ignored_and_threads_have_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

    def elsewhere():
        with Signals() as signals:
            seen.append(signals.received)

    seen = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [None]


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("ecar.training.progress._BETWEEN", 3600)
    progress = Progress(1000, 0, visible=True)
    for _ in range(3):
        progress.advance()
        progress.show({"loss": 0.5, "images_per_second": 32.0}, 64)
    progress.close()
    assert capsys.readouterr().err == "step 1 of 1,000: loss 0.5000, 32 images/s, 33:18 left\n"
    timed = Progress(10**9, 0, visible=True, seconds=99.9)
    timed.show({"loss": 0.5, "images_per_second": 32.0}, 64)
    assert re.search(r"images/s, 1:(3[0-9]|40) left$", capsys.readouterr().err.strip())
    Progress(1000, 0, visible=False).say("nothing")
    assert capsys.readouterr().err == ""


def test_durations():
    times = {0.2: "0:00", 61: "1:01", 3723: "1:02:03", 2 * 86400 + 3840: "2 d 01:04"}
    assert {seconds: _duration(seconds) for seconds in times} == times


@pytest.mark.parametrize("kept", [True, False])
def test_small_folders_are_decoded_once(make_config, tmp_path, monkeypatch, kept):
    """And the training is the same, bit for bit, as of one that reads the files each time."""
    for label in range(10):
        for split in ("train", "test"):
            place = tmp_path / "data" / split / str(label)
            place.mkdir(parents=True)
            pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / "x.png")
    config = make_config(dataset="folder", data_root=str(tmp_path / "data"), validate_every=4)
    small = trainer(config)
    assert isinstance(small.batches.dataset, InMemoryDataset)
    small.run()
    assert len(rows(tmp_path / "run" / "validation.csv")) == 1
    monkeypatch.setattr("ecar.training.build._KEPT", 64 * 10 if kept else 64 * 10 - 1)
    large = trainer(config.replace(output_dir=str(tmp_path / "large")))
    assert isinstance(large.batches.dataset, InMemoryDataset) is kept
    large.run()
    for name, tensor in small._tensors().items():
        assert torch.equal(large._tensors()[name], tensor), name
