"""Batches as functions of (seed, step, row): the same over ranks, loaders and restarts."""

import math

import pytest
import torch

from ecar.data import load_dataset
from ecar.training.batches import Batches, Order, draw

SHAPE = (1, 8, 8)


def make(dataset, seed, **fields):
    values = {
        "batch_size": 12,
        "accumulation": 1,
        "stages": 2,
        "shape": SHAPE,
        "label_dropout": 0.3,
        "null_class": 10,
        "flip": True,
        "workers": 0,
    }
    return Batches(dataset, seed=seed, **{**values, **fields})


def joined(parts):
    return [
        torch.cat([getattr(part, name) for part in parts])
        for name in ("latents", "labels", "noise", "tau")
    ]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (3, 2), (1, 4)])
def test_ranks_and_parts_make_up_one_global_batch(seed, world, accumulation):
    digits = load_dataset("digits")
    whole = list(make(digits, seed).steps(0, 3))
    shares = [
        list(make(digits, seed, rank=rank, world=world, accumulation=accumulation).steps(0, 3))
        for rank in range(world)
    ]
    for step in range(3):
        assert all(len(share[step]) == accumulation for share in shares)
        parts = [part for share in shares for part in share[step]]
        for one, many in zip(joined(whole[step]), joined(parts), strict=True):
            assert torch.equal(one, many)


def test_a_step_needs_no_steps_before_it(seed):
    digits = load_dataset("digits")
    unbroken = list(make(digits, seed).steps(0, 6))
    (alone,) = make(digits, seed).steps(5, 6)
    for one, other in zip(joined(unbroken[5]), joined(alone), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_what_memory_gives(seed, workers):
    digits = load_dataset("digits")
    loaded = torch.utils.data.TensorDataset(*digits.tensors())
    for one, other in zip(
        make(digits, seed).steps(2, 5), make(loaded, seed, workers=workers).steps(2, 5), strict=True
    ):
        for left, right in zip(joined(one), joined(other), strict=True):
            assert torch.equal(left, right)


def test_each_epoch_sees_every_image_once(seed):
    order = Order(seed, 7)
    epochs = [order.indices(7 * epoch, 7 * epoch + 7).tolist() for epoch in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    across = Order(seed, 7).indices(5, 23).tolist()
    assert across == [index for epoch in epochs for index in epoch][5:23]


def test_draws_differ_by_seed_step_and_row(seed):
    one = draw(seed, 3, range(4), SHAPE, 2)
    for other in (draw(seed + 1, 3, range(4), SHAPE, 2), draw(seed, 4, range(4), SHAPE, 2)):
        assert not (one.noise == other.noise).any()
        assert not (one.tau == other.tau).any()
    assert not torch.equal(one.noise[0], one.noise[1])
    shifted = draw(seed, 3, range(2, 4), SHAPE, 2)
    assert torch.equal(one.noise[2:], shifted.noise)
    assert torch.equal(one.tau[2:], shifted.tau)


def test_draws_have_their_distributions(seed):
    """Means and variances within 5 standard errors: a wrong alarm in about 1 of 10^6 runs."""
    draws = draw(seed, 0, range(2000), SHAPE, 3)
    noise, tau = draws.noise.double(), draws.tau.double()
    count = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(count)
    assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs((noise[:-1] * noise[1:]).mean()) < 5 / math.sqrt(count)
    assert tau.min() >= 0 and tau.max() <= 1
    assert abs(tau.mean() - 0.5) < 5 * math.sqrt(1 / 12 / tau.numel())
    for uniform in (draws.dropout, draws.flip):
        share = (uniform < 0.5).double().mean()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(2000)


def test_logit_normal_times_are_the_sigmoid_of_a_normal(seed):
    """Mean and variance within 5 standard errors; all else as with uniform times."""
    digits = load_dataset("digits")
    sizes = {"batch_size": 1000, "stages": 3}
    ((plain,),) = make(digits, seed, **sizes).steps(0, 1)
    ((batch,),) = make(digits, seed, tau="logit-normal", **sizes).steps(0, 1)
    for name in ("latents", "labels", "noise"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    tau = batch.tau.double()
    assert torch.equal(plain.tau.argsort(dim=0), batch.tau.argsort(dim=0))
    assert tau.min() >= 0 and tau.max() <= 1
    normal = tau.logit()
    assert abs(normal.mean()) < 5 / math.sqrt(3000)
    assert abs(normal.square().mean() - 1) < 5 * math.sqrt(2 / 3000)


def test_labels_drop_and_images_mirror(seed):
    digits = load_dataset("digits")
    images, labels = digits.tensors()
    plain = make(digits, seed, label_dropout=0.0, flip=False)
    index = torch.from_numpy(plain.row_indices(0))
    ((batch,),) = plain.steps(0, 1)
    assert torch.equal(batch.latents, images[index])
    assert torch.equal(batch.labels, labels[index])
    ((batch,),) = make(digits, seed, label_dropout=1.0).steps(0, 1)
    assert (batch.labels == 10).all()
    draws = draw(seed, 0, range(12), SHAPE, 2)
    for row in range(12):
        original = images[index[row]]
        mirrored = original.flip(-1) if draws.flip[row] < 0.5 else original
        assert torch.equal(batch.latents[row], mirrored)


def test_unequal_shares_are_refused(seed):
    with pytest.raises(ValueError, match="'batch_size': expected a multiple of 5 processes x 2"):
        make(load_dataset("digits"), seed, world=5, accumulation=2)
