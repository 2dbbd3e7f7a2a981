"""Models wrapped by DDP and FSDP draw and train as plain ones do, accelerated before or after."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ecar import ECAR, ECARConfig, sample
from ecar_kernels import accelerate

CONFIG = ECARConfig.preset("digits")


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    place = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> ECAR:
    torch.manual_seed(0)
    made = ECAR(CONFIG).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return made


def blocks_sharded(of: ECAR) -> ECAR:
    for block in (*of.ar.blocks, *(block for head in of.heads for block in head.blocks)):
        fully_shard(block)
    return of


def all_sharded(of: ECAR) -> ECAR:
    return fully_shard(blocks_sharded(of))


def unsharded(of: ECAR) -> ECAR:
    for module in all_sharded(of).modules():
        if hasattr(module, "unshard"):
            module.unshard()
    return of


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "FSDP": lambda of: FullyShardedDataParallel(of, device_id=torch.device("cpu")),
    "fully_shard": all_sharded,
    "fully_shard of the blocks": blocks_sharded,
}


def wrapped(wrapper, order: str):
    made = model()
    if order == "before":
        accelerate(made)
    made = wrapper(made)
    if order == "after":
        accelerate(made)
    return made


@pytest.mark.parametrize("order", ["never", "before", "after"])
@pytest.mark.parametrize("wrapper", [DistributedDataParallel, blocks_sharded, unsharded])
def test_draws_as_a_plain_model(wrapper, order):
    inputs = {"class_labels": torch.tensor([1, 2]), "seeds": torch.tensor([3, 4])}
    settings = {"steps": 6, "guidance_scale": 1.5}
    made = wrapped(wrapper, order)
    drawn = sample(getattr(made, "module", made), **inputs, **settings).latents
    torch.testing.assert_close(
        drawn, sample(model(), **inputs, **settings).latents, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("order", ["never", "before", "after"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_trains_as_a_plain_model(wrapper, order):
    """Two steps, so that the second one's weights are the first one's update."""
    shape = CONFIG.stage_shape(CONFIG.num_stages)
    latents, noise = torch.randn(2, 4, *shape).unbind()
    batch = (latents, torch.tensor([1, 2, 3, 4]), noise, torch.rand(4, CONFIG.num_stages))

    def losses(of) -> list[float]:
        optimizer, found = torch.optim.SGD(of.parameters(), lr=0.1), []
        for _ in range(2):
            loss = of(*batch)
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.mean().item())
        return found

    expected = losses(model())
    assert expected[0] != expected[1]
    assert losses(wrapped(WRAPPERS[wrapper], order)) == pytest.approx(expected, rel=1e-5)
