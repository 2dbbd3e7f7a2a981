import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ecar_kernels
from ecar import ECARConfig, stages
from ecar.model import ECAR
from ecar.sampling import sample
from ecar_kernels.flow_block.packing import PackedWeight
from tests.support.modules import accelerated
from tests.support.native import needs_native

from .conftest import tiny_config


def training_inputs(config, rows=4):
    labels = torch.randint(config.num_classes + 1, (rows,))
    latents, noise = (torch.randn(rows, *config.latent_shape) for _ in range(2))
    return latents, labels, noise, torch.rand(rows, config.num_stages)


def test_losses_are_the_mean_squared_errors_of_the_velocities():
    """A new model's velocity is zero, so each loss is the mean square of the target."""
    model = ECAR(tiny_config(stage_sides=(4, 8, 16)))
    latents, labels, noise, tau = training_inputs(model.config)
    expected = [
        (end - start).square().mean() for start, end in stages.end_points(latents, noise, 3)
    ]
    losses = model(latents, labels, noise, tau)
    assert torch.allclose(losses, torch.stack(expected), rtol=1e-6)


def test_a_perfect_velocity_has_no_loss(model):
    latents, labels, noise, tau = training_inputs(model.config)
    points = iter(stages.end_points(latents, noise, 2))

    def perfect(x, time, token_map):
        start, end = next(points)
        return end - start

    for head in model.heads:
        head.forward = perfect
    assert torch.count_nonzero(model(latents, labels, noise, tau)) == 0


def test_loss_draws_from_the_generator(model):
    latents, _, _, _ = training_inputs(model.config)
    labels = torch.randint(10, (4,))
    first, again, other = (
        model.loss(latents, labels, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_label_dropout_reaches_the_null_class(make_model):
    """With nearly all labels dropped, the losses do not depend on them."""
    model = make_model(class_dropout=0.999999)
    latents, _, _, _ = training_inputs(model.config)
    losses = [
        model.loss(latents, torch.full((4,), label), generator=torch.Generator().manual_seed(1))
        for label in (2, 8)
    ]
    assert torch.equal(*losses)


def test_shared_gradients_are_those_of_autograd(make_model):
    """All stages' gradients from one backward of the weighted sum."""
    model = make_model(stage_sides=(4, 8, 16)).train()
    inputs = training_inputs(model.config)
    losses, shared = model(*inputs, return_shared=True)
    weights = torch.tensor([0.5, 2.0, 0.25])
    (weights * losses).sum().backward(retain_graph=True)
    found = shared.stage_gradients() / weights.view(-1, 1, 1)
    weight = model.ar.last_mlp_output.weight
    expected = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
    for ours, autograd in zip(found, expected, strict=True):
        assert (ours - autograd).abs().max() < 1e-5 * autograd.abs().max()


@pytest.mark.parametrize("accelerated", [False, True])
def test_hooks_on_any_module_see_it_train(make_model, accelerated):
    model = make_model(stage_sides=(4, 8, 16)).train()
    if accelerated:
        ecar_kernels.accelerate(model)
    inputs = training_inputs(model.config)
    expected = model(*inputs)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            continue
        seen = []
        hook = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        losses = model(*inputs)
        hook.remove()
        assert seen, type(module).__name__
        torch.testing.assert_close(losses, expected)


def test_shared_gradients_need_the_last_block_as_written(make_model):
    model = make_model().train()
    model.ar.blocks[-1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="inside the last AR block: it has forward hooks"):
        model(*training_inputs(model.config), return_shared=True)


def test_shared_gradients_need_the_backward(make_model):
    model = make_model().train()
    _, shared = model(*training_inputs(model.config), return_shared=True)
    with pytest.raises(ValueError, match="after the losses' backward"):
        shared.stage_gradients()


@pytest.mark.slow
def test_compiled_training_forward_equals_eager(make_model):
    model = make_model(ar_layers=1, flow_blocks=1)
    inputs = training_inputs(model.config)
    eager = model(*inputs)
    compiled = torch.compile(model, fullgraph=True)(*inputs)
    assert torch.allclose(eager, compiled, rtol=1e-5)


@pytest.mark.slow
def test_compiled_flow_step_equals_eager(model):
    from ecar_kernels import euler_step

    head = model.heads[1]
    x = torch.randn(3, *model.config.stage_shape(2))

    def step(x, spatial, time):
        return euler_step(x, head.velocity(x, spatial, time), 0.125)

    with torch.no_grad():
        spatial = head.spatial_parts(torch.randn(3, 16, model.config.width))
        time = head.step_parts(torch.tensor([0.6]))[0]
        eager = step(x, spatial, time)
        compiled = torch.compile(step, fullgraph=True)(x, spatial, time)
    assert (eager - compiled).abs().max() < 1e-5


def test_compiled_regions_train_the_same(make_model):
    model = make_model().train()
    inputs = training_inputs(model.config)
    eager = model(*inputs)
    model.compile_regions(backend="aot_eager", fullgraph=True)
    losses, _ = model(*inputs, return_shared=True)
    assert torch.allclose(eager, losses, rtol=1e-5)


def test_exported_training_forward_equals_eager(model):
    inputs = training_inputs(model.config)
    exported = torch.export.export(model, inputs)
    assert torch.allclose(model(*inputs), exported.module()(*inputs), rtol=1e-5)


def test_exported_flow_step_equals_eager(model):
    head = model.heads[1]

    class Velocity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, x, spatial, step):
            return self.head.velocity(x, spatial, step)

    with torch.no_grad():
        inputs = (
            torch.randn(3, *model.config.stage_shape(2)),
            head.spatial_parts(torch.randn(3, 16, model.config.width)),
            head.step_parts(torch.tensor([0.6]))[0],
        )
        exported = torch.export.export(Velocity(), inputs)
        assert (head.velocity(*inputs) - exported.module()(*inputs)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_follows_the_float32_one(model, dtype):
    inputs = training_inputs(model.config)
    expected = model(*inputs)
    model.to(dtype)
    latents, labels, noise, tau = inputs
    losses = model(latents.to(dtype), labels, noise.to(dtype), tau)
    assert losses.dtype == torch.float32
    # Relative rounding of one weight or activation, added up over a few layers.
    assert torch.allclose(losses, expected, rtol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"latents": torch.zeros(2, 1, 4, 4)}, ValueError, r"'latents'.*\[B, 1, 8, 8\]"),
        ({"latents": torch.zeros(2, 1, 8, 8, dtype=torch.int64)}, TypeError, "'latents'"),
        ({"labels": torch.tensor([1, 10])}, ValueError, "'labels'.*0 to 9, got 10"),
        ({"labels": torch.tensor([-1, 1])}, ValueError, "'labels'.*got -1"),
        ({"labels": torch.tensor([1])}, ValueError, r"'labels'.*\[2\]"),
        ({"labels": torch.tensor([1.0, 2.0])}, TypeError, "'labels'.*int64"),
    ],
)
def test_loss_names_a_bad_argument(model, change, error, words):
    arguments = {"latents": torch.zeros(2, 1, 8, 8), "labels": torch.tensor([1, 2]), **change}
    with pytest.raises(error, match=words):
        model.loss(**arguments)


def test_saved_and_loaded(model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    loaded = ECAR.from_pretrained(folder)
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert list(tmp_path.iterdir()) == [folder]


def test_saving_again_keeps_the_readme(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("how", ["pushed", "saved and pushed"])
def test_push_to_hub_uploads_config_and_safetensors_only(model, monkeypatch, how, tmp_path):
    """The mixin's upload, with the network's end replaced."""
    from huggingface_hub import hub_mixin

    sent = {}

    class Api:
        def __init__(self, *args, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            sent[repo_id] = sorted(p.name for p in folder_path.iterdir())

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    if how == "pushed":
        model.push_to_hub("digits")
    else:
        model.save_pretrained(tmp_path / "digits", push_to_hub=True)
        assert (tmp_path / "digits" / "model.safetensors").is_file()
    assert sent == {"digits": ["README.md", "config.json", "model.safetensors"]}


class TestRefusedCheckpoints:
    @pytest.fixture
    def folder(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        return tmp_path

    def refused(self, folder, error, words):
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(error, match=words) as raised:
            ECAR.from_pretrained(folder)
        assert "\n" not in str(raised.value)
        assert before == {p.name: p.read_bytes() for p in folder.iterdir()}

    def test_cut_short(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.refused(folder, ValueError, r"model\.safetensors: not a safetensors file, or cut")

    def test_not_safetensors(self, folder):
        (folder / "model.safetensors").write_bytes(b"\x80\x04 a pickle")
        self.refused(folder, ValueError, r"model\.safetensors: not a safetensors file")

    def test_of_another_width(self, folder):
        tiny_config(width=64).to_json(folder / "config.json")
        self.refused(folder, ValueError, "of another configuration: tensor .* has shape")

    def test_of_more_layers(self, folder):
        tiny_config(ar_layers=3).to_json(folder / "config.json")
        self.refused(folder, ValueError, r"lacks tensor 'ar\.blocks\.2.* and \d+ more")

    def test_of_fewer_layers(self, folder):
        tiny_config(ar_layers=1).to_json(folder / "config.json")
        self.refused(folder, ValueError, r"unknown tensor 'ar\.blocks\.1")

    def test_not_finite(self, folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["ar.norm.weight"][3] = float("nan")
        save_file(tensors, path)
        self.refused(folder, ValueError, r"'ar\.norm\.weight' holds NaN")

    def test_config_of_something_else(self, folder):
        (folder / "config.json").write_text(json.dumps({"hidden_size": 3}))
        self.refused(folder, ValueError, "'hidden_size': no such field")

    def test_no_config(self, folder):
        (folder / "config.json").unlink()
        self.refused(folder, FileNotFoundError, r"no file config\.json")

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            ECAR.from_pretrained(tmp_path / "nowhere")

    def test_no_repository(self):
        with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*not had from the hub"):
            ECAR.from_pretrained("nobody/nothing")


class TestAccelerated:
    @staticmethod
    def draw(model, **options):
        labels, seeds = torch.tensor([1, 7]), torch.tensor([5, -6])
        return sample(
            model, labels, seeds=seeds, steps=[2, 3], guidance_scale=2.0, **options
        ).latents

    @pytest.mark.parametrize("keep", [True, False])
    def test_it_draws_the_same(self, model, keep):
        before, values = self.draw(model), {k: v.clone() for k, v in model.state_dict().items()}
        ecar_kernels.accelerate(model, keep_weights=keep)
        # Rounding alone, which a random model enlarges: 1.2e-4 of 3.4 off float64 has been seen,
        # not accelerated.
        assert (self.draw(model) - before).abs().max() < 1e-4 * before.abs().max()
        state = model.state_dict()
        assert list(state) == list(values)
        assert all(torch.equal(state[name], values[name]) for name in values)
        assert torch.equal(self.draw(ecar_kernels.restore(model)), before)

    def test_every_part_is_shown(self, model):
        text = str(accelerated(model, backend="reference"))
        for name in ("FlowHead", "FlowBlock", "StageBlock", "Linear"):
            assert f"Accelerated{name}(" in text

    def test_it_trains_the_same(self, model):
        inputs = training_inputs(model.config)
        gradients = []
        for _ in range(2):
            model.zero_grad()
            model(*inputs).sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
            ecar_kernels.accelerate(model, keep_weights=False)
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))

    def test_saved_while_packed(self, model, tmp_path):
        before = self.draw(model)
        accelerated(model, keep_weights=False).save_pretrained(tmp_path)
        assert torch.equal(self.draw(ECAR.from_pretrained(tmp_path)), before)


@needs_native
def test_sampling_leaves_weights_packed_alone():
    """A product that read one as a tensor would turn it back, and keep a second copy packed."""
    model = ECAR(ECARConfig.preset("digits")).eval()
    ecar_kernels.accelerate(model, keep_weights=False)

    def packed():
        return [name for name, p in model.named_parameters() if type(p) is PackedWeight
                and "packed" in vars(p)]  # fmt: skip

    before = packed()
    assert "heads.0.modulation.weight" in before
    zero = torch.zeros(1, dtype=torch.int64)
    for backend in ("auto", "cpp"):
        with ecar_kernels.use_backend(backend):
            sample(model, zero, seeds=zero, steps=[2, 2], guidance_scale=1.5)
        assert packed() == before
