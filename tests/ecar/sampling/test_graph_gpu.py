"""The sampler's CUDA graphs on a GPU: the stand-in's tests (test_graph.py) on the real thing."""

import pytest
import torch

from ecar.sampling import SOLVERS, release_graphs, sample, stage, why_not_graphs
from ecar.sampling.graph import graphs_of

from .support import LABELS, SEEDS, draw
from .test_graph import close, plain, reads_a_value_back


@pytest.fixture
def gpu_model(make_model):
    """Wide enough for every kernel's tiles, and for stages of several of them."""
    torch.manual_seed(0)
    return make_model(stage_sides=(8, 16, 32), channels=4, width=128, heads=2).cuda()


@pytest.mark.gpu
class TestGraphs:
    @pytest.mark.parametrize(
        "options", [{}, {"guidance_scale": 2.5}, {"solver": "heun"}, {"solver": "ab2"}]
    )
    def test_the_same_seed_is_the_same_image_as_on_the_cpu(self, gpu_model, options):
        """The bound is the one the design promises, 1e-4 in float32, of the image's scale."""
        found = draw(gpu_model, steps=12, tf32=False, **options)
        assert found.why_not_graph is None
        expected = draw(gpu_model.cpu(), steps=12, **options).latents
        error = (found.latents.cpu() - expected).abs().max()
        assert error < 1e-4 * max(1.0, expected.abs().max().item())

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_a_replay_is_the_eager_run(self, gpu_model, solver):
        for scale in (1.0, 2.0, 3.5):
            for seeds, grid in ((SEEDS, 1.0), ((1, 2, 3), 1.5), (SEEDS, 2.0)):
                options = {"seeds": seeds, "guidance_scale": scale, "solver": solver, "grid": grid}
                found = draw(gpu_model, graphs=True, **options).latents
                assert close(found, plain(gpu_model, **options))
        assert len(graphs_of(gpu_model)) == 2  # with guidance and without

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_twice_the_same_bits_also_after_another_shape(self, gpu_model, dtype):
        gpu_model.to(dtype)
        expected = draw(gpu_model, graphs=True).latents
        draw(gpu_model, (1,), (2,), graphs=True)
        draw(gpu_model, steps=[2, 3, 5], guidance_scale=2.0, graphs=True)
        assert torch.equal(draw(gpu_model, graphs=True).latents, expected)

    @pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.5}])
    def test_batch_composition_changes_no_image(self, gpu_model, options):
        batch = draw(gpu_model, tf32=False, **options).latents
        for row, (label, seed) in enumerate(zip(LABELS, SEEDS, strict=True)):
            alone = draw(gpu_model, (label,), (seed,), tf32=False, **options).latents[0]
            assert (alone - batch[row]).abs().max() < 1e-4 * max(1.0, batch.abs().max().item())

    def test_weights_loaded_in_place_and_moved(self, gpu_model, make_model):
        draw(gpu_model, graphs=True)
        other = make_model(stage_sides=(8, 16, 32), channels=4, width=128, heads=2)
        gpu_model.load_state_dict(other.state_dict())
        assert close(draw(gpu_model, graphs=True).latents, plain(gpu_model))
        gpu_model.to(torch.bfloat16)
        found, eager = draw(gpu_model, graphs=True).latents, plain(gpu_model)
        assert (found - eager).norm() < 0.01 * eager.norm()

    def test_two_streams_take_turns(self, gpu_model):
        pairs = [((3,), (seed,)) for seed in range(6)]
        expected = [draw(gpu_model, *pair, graphs=True).latents for pair in pairs]
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        found = []
        for index, pair in enumerate(pairs):
            with torch.cuda.stream(streams[index % 2]):
                found.append(draw(gpu_model, *pair, graphs=True).latents)
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, expected))

    def test_out_of_memory_and_on(self, gpu_model):
        expected = draw(gpu_model, graphs=True).latents
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
        try:
            many = torch.arange(4096) % 10
            with pytest.raises(torch.OutOfMemoryError, match="draw fewer at a time"):
                sample(gpu_model, many, seeds=many, steps=6)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.equal(draw(gpu_model, graphs=True).latents, expected)

    def test_a_capture_that_fails_leaves_the_process_well(self, gpu_model, monkeypatch):
        expected = draw(gpu_model, graphs=True, guidance_scale=2.0).latents
        with monkeypatch.context() as patch:
            patch.setattr(stage, "initial_noise", reads_a_value_back)
            output = draw(gpu_model, steps=4, guidance_scale=2.0)
            assert "the capture failed" in output.why_not_graph
            assert close(output.latents, plain(gpu_model, steps=4, guidance_scale=2.0))
        assert torch.equal(draw(gpu_model, graphs=True, guidance_scale=2.0).latents, expected)

    def test_under_the_callers_own_capture_and_autocast(self, gpu_model):
        with torch.autocast("cuda", torch.bfloat16):
            assert "autocast" in why_not_graphs(gpu_model)
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            torch.ones(1, device="cuda")
            assert "being captured" in why_not_graphs(gpu_model)

    def test_memory_does_not_grow(self, gpu_model):
        draw(gpu_model, graphs=True)
        before = torch.cuda.memory_allocated()
        for seed in range(5):
            draw(gpu_model, seeds=(seed, 1, 2), graphs=True)
        assert torch.cuda.memory_allocated() == before
        release_graphs(gpu_model)
        assert torch.cuda.memory_allocated() < before
