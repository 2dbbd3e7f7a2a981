"""A pipeline's model served by `ecar_kernels.accelerate`."""

import torch

from ecar.pipeline import ECARPipeline
from ecar_kernels import use_backend

from .conftest import tiny_model


def test_a_loaded_pipeline_is_accelerated_for_the_backend_in_force(tmp_path):
    ECARPipeline(tiny_model()).save_pretrained(tmp_path)
    pipe = ECARPipeline.from_pretrained(tmp_path)
    plain = ECARPipeline.from_pretrained(tmp_path, accelerate=False)
    call = {"num_inference_steps": 4, "seeds": [3], "output_type": "latent", "progress": False}
    images = plain([1], **call).images
    torch.testing.assert_close(pipe([1], **call).images, images, rtol=1e-4, atol=1e-4)
    assert "Accelerated" in repr(pipe.model) and "Accelerated" not in repr(plain.model)
    with use_backend("reference"):
        expected = plain([1], **call).images
        torch.testing.assert_close(pipe([1], **call).images, expected, rtol=1e-4, atol=1e-4)
        assert "adaln_linear: reference" in repr(pipe.model)
    pipe.to(torch.float64).to(torch.float32)
    torch.testing.assert_close(pipe([1], **call).images, images, rtol=1e-4, atol=1e-4)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(pipe.model.state_dict()[name], weight), name


def test_a_model_that_is_given_is_left_as_it_is():
    model = tiny_model()
    ECARPipeline(model)([1], num_inference_steps=2, output_type="latent", progress=False)
    assert "Accelerated" not in repr(model)
