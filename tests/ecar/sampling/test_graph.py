"""The sampler's CUDA graphs: what they are kept by, when they are dropped, what is said.

On the CPU a tape stands in for the graph (tape.py); the tests marked gpu have real ones.
"""

import copy
import gc
import logging
import threading
import weakref

import pytest
import torch

from ecar.sampling import (
    SOLVERS,
    graph,
    loop,
    release_graphs,
    sample,
    sampler,
    stage,
    why_not_graphs,
)
from ecar.sampling.cpu import CpuEngine
from ecar.sampling.stage import Inputs
from ecar_kernels import accelerate, initial_noise, use_backend

from .support import LABELS, SEEDS, TapeRecorder, composed_boundary, draw


def plain(model, *arguments, **options):
    return draw(model, *arguments, graphs=False, **options).latents


@pytest.fixture
def tape(monkeypatch):
    """Graphs are to be had on the CPU; counts the captures."""
    monkeypatch.setattr(graph, "device_reason", lambda device: None)
    monkeypatch.setattr(graph, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(CpuEngine, "serves", lambda *settings: False)
    monkeypatch.setattr(TapeRecorder, "captured", 0)
    monkeypatch.setattr(TapeRecorder, "failures", [])
    return TapeRecorder


def reads_a_value_back(*arguments, **options):
    noise = initial_noise(*arguments, **options)
    noise.sum().item()
    return noise


def close(found, expected):
    """Equal but for the order of roundings, which guidance amplifies: the design's bound."""
    return (found - expected).abs().max() < 1e-4 * expected.abs().max()


class TestReplay:
    def test_other_classes_and_seeds_are_other_data(self, model, tape):
        draw(model)
        for labels, seeds in (((0, 1, 2), SEEDS), (LABELS, (-1, 0, 2**62)), (LABELS, SEEDS)):
            output = draw(model, labels, seeds)
            assert output.why_not_graph is None
            assert torch.equal(output.latents, plain(model, labels, seeds))
        assert tape.captured == 1

    @pytest.fixture(params=["fused", "composed", None])
    def layout(self, request, monkeypatch):
        """The state in tokens, by the kernel and by other ops, or an image."""
        if request.param != "fused":
            op = composed_boundary if request.param else None
            monkeypatch.setattr("ecar.sampling.plain.boundary_op", lambda *settings: op)

    @pytest.mark.parametrize("solver", SOLVERS)
    @pytest.mark.parametrize(
        "options", [{}, {"guidance_schedule": "linear"}, {"guidance_interval": (0.1, 0.6)}]
    )
    def test_other_guidance_scales_are_other_data(self, model, tape, layout, solver, options):
        options = {"solver": solver, "grid": 1.5} | options
        for scale in (2.0, 3.5, 1.25):
            found = draw(model, guidance_scale=scale, **options).latents
            assert close(found, plain(model, guidance_scale=scale, **options))
        assert tape.captured == 1

    @pytest.mark.parametrize("solver", SOLVERS)
    @pytest.mark.parametrize("scale", [1.0, 2.0])
    def test_another_grid_is_other_data(self, model, tape, layout, solver, scale):
        """Of as many steps, of which as many are guided; and another scale and seeds with it."""
        own = ((0.0, 0.3, 0.5), (0.0, 0.2, 0.9))
        for grid, seeds in ((1.0, SEEDS), (2.0, (1, 2, 3)), (own, SEEDS), (0.5, SEEDS)):
            options = {"grid": grid, "guidance_scale": scale, "solver": solver, "seeds": seeds}
            output = draw(model, **options)
            assert output.why_not_graph is None
            assert close(output.latents, plain(model, **options))
            scale += scale > 1
        assert tape.captured == 1

    def test_a_bfloat16_model(self, model, tape):
        model.to(torch.bfloat16)
        assert torch.equal(draw(model).latents, plain(model))

    def test_nothing_but_the_buffers_reaches_a_replay(self, model, tape, monkeypatch):
        """The stand-in is strict: it replays what it was captured with."""
        before = draw(model, guidance_scale=2.0).latents
        monkeypatch.setattr(Inputs, "load", lambda self, *data: None)
        found = draw(model, (0, 0, 0), (1, 2, 3), guidance_scale=5.0).latents
        assert torch.equal(found, before)

    def test_what_was_drawn_stays_as_it_was(self, model, tape):
        first = draw(model, return_stage_ends=True)
        kept = copy.deepcopy(first.stage_ends)
        draw(model, seeds=(1, 2, 3))
        assert all(map(torch.equal, first.stage_ends, kept))

    def test_a_graph_is_right_after_another_shape_was_captured(self, model, tape):
        expected = draw(model).latents
        draw(model, (1,), (2,))
        draw(model, steps=4)
        assert torch.equal(draw(model).latents, expected)
        assert tape.captured == 3

    def test_no_state_of_it_can_be_replaced(self, model, tape):
        draw(model)
        (engine,) = graph.graphs_of(model)._graphs.values()
        with pytest.raises(RuntimeError, match="no state can be replaced"):
            loop.run(engine, (3, 3), callback=lambda i: i.latents + 1 if i.stage == 2 else None)

    def test_an_empty_batch(self, model, tape):
        empty = torch.empty(0, dtype=torch.int64)
        assert sample(model, empty, seeds=empty, steps=4).latents.shape == (0, 1, 8, 8)

    def test_buffers_made_in_inference_mode_serve_outside(self, model, tape):
        with torch.inference_mode():
            first = draw(model).latents
        assert torch.equal(draw(model).latents, first)
        assert tape.captured == 1

    def test_the_bar_is_full(self, model, tape, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        draw(model, progress=True)
        assert "6/6" in capsys.readouterr().err


class TestKeys:
    @pytest.mark.parametrize(
        "changed",
        [
            {"labels": (3, 7), "seeds": (1, 2)},
            {"steps": [2, 4]},
            {"solver": "heun"},
            {"solver": "ab2"},
            {"guidance_scale": 2.0},
            {"tf32": True},
        ],
    )
    def test_what_is_baked_in_is_captured_for_itself(self, model, tape, changed):
        draw(model)
        output = draw(model, **changed)
        assert tape.captured == 2
        assert close(output.latents, plain(model, **changed))

    def test_the_pattern_of_guided_steps_and_the_backend(self, model, tape, monkeypatch):
        draw(model, guidance_scale=2.0)
        draw(model, guidance_scale=2.0, guidance_interval=(0.3, 1.0))
        draw(model, guidance_scale=2.0, guidance_schedule="linear")  # stage 1 is not guided
        assert tape.captured == 3
        draw(model, guidance_scale=2.0, guidance_interval=(0.3, 1.0), grid=0.3)  # more steps
        assert tape.captured == 4
        monkeypatch.setattr(graph, "active_backend", lambda: "another")
        draw(model, guidance_scale=2.0)
        assert tape.captured == 5

    def test_another_model_has_graphs_of_its_own(self, make_model, tape):
        models = make_model(), make_model()
        for model in (*models, *models):
            assert torch.equal(draw(model).latents, plain(model))
        assert tape.captured == 2

    def test_the_least_recently_used_is_dropped(self, model, tape):
        cache = graph.graphs_of(model)
        cache.limit = 2
        for steps in (2, 3, 2, 4, 2):  # 3 goes when 4 comes
            draw(model, steps=steps)
        assert (tape.captured, len(cache)) == (3, 2)
        draw(model, steps=3)
        assert (tape.captured, len(cache)) == (4, 2)


class TestWeights:
    def test_values_written_in_place_are_seen(self, model, tape):
        draw(model)
        # Not a linear layer's: the CPU's kernels keep packed copies of those.
        torch.nn.init.normal_(model.ar.class_embedding.weight)
        assert torch.equal(draw(model).latents, plain(model))
        assert tape.captured == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.to(torch.float64).to(torch.float32),
            lambda model: setattr(model.ar.norm, "weight", torch.nn.Parameter(torch.rand(32))),
            lambda model: setattr(model.heads[0], "blocks", copy.deepcopy(model.heads[1].blocks)),
            lambda model: accelerate(model),
        ],
        ids=["to", "a parameter", "a module", "accelerate"],
    )
    def test_other_storage_or_code_drops_the_graphs(self, model, tape, change):
        draw(model)
        change(model)
        assert torch.equal(draw(model).latents, plain(model))
        assert (tape.captured, len(graph.graphs_of(model))) == (2, 1)

    def test_hooks_are_called_so_there_is_no_graph(self, model, tape):
        draw(model)
        called = []
        handle = model.ar.norm.register_forward_hook(lambda *_: called.append(1))
        assert "LayerNorm: it has forward hooks" in draw(model).why_not_graph
        assert len(called) == 2
        handle.remove()
        assert draw(model).why_not_graph is None

    def test_graphs_do_not_keep_the_model_alive(self, make_model, tape):
        model = make_model()
        draw(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None

    def test_release(self, model, tape):
        draw(model)
        release_graphs(model)
        assert len(graph.graphs_of(model)) == 0
        draw(model)
        assert tape.captured == 2


class TestFailures:
    def test_a_failed_capture_is_told_and_not_tried_again(self, model, tape, caplog):
        expected = draw(model, steps=4).latents
        tape.failures = [RuntimeError("operation not permitted\nand a long trace")]
        output = draw(model)
        assert output.why_not_graph == "the capture failed: operation not permitted"
        assert torch.equal(output.latents, plain(model))
        assert draw(model).why_not_graph == output.why_not_graph
        assert tape.captured == 1
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert torch.equal(draw(model, steps=4).latents, expected)  # captured anew
        release_graphs(model)
        assert draw(model).why_not_graph is None

    def test_code_that_no_stream_captures(self, model, tape, monkeypatch):
        monkeypatch.setattr(stage, "initial_noise", reads_a_value_back)
        output = draw(model)
        assert "not permitted when stream is capturing" in output.why_not_graph
        assert torch.equal(output.latents, plain(model))

    def test_what_broke_the_capture_is_named_not_what_ended_it(self, model, tape):
        """torch.cuda.graph raises anew where the error has spoilt the capture."""
        for cause, said in (
            (RuntimeError("the cause"), "the capture failed: the cause"),
            (torch.OutOfMemoryError("CUDA out of memory"), graph.OUT_OF_MEMORY),
        ):
            error = RuntimeError("operation failed due to a previous error during capture")
            error.__context__ = cause
            tape.failures = [error] * 2
            assert draw(model).why_not_graph == said
            release_graphs(model)

    def test_the_reference_copies_masks_to_the_device(self, model, tape):
        with use_backend("reference"):
            output = draw(model)
            assert "not permitted when stream is capturing" in output.why_not_graph
            assert torch.equal(output.latents, plain(model))

    def test_out_of_memory_drops_the_other_graphs_and_tries_again(self, model, tape):
        draw(model)
        tape.failures = [torch.OutOfMemoryError("CUDA out of memory")]
        assert draw(model, steps=4).why_not_graph is None
        assert len(graph.graphs_of(model)) == 1

    def test_out_of_memory_twice_samples_without_and_may_do_better_later(self, model, tape):
        tape.failures = [torch.OutOfMemoryError("CUDA out of memory")] * 2
        output = draw(model)
        assert output.why_not_graph == graph.OUT_OF_MEMORY
        assert torch.equal(output.latents, plain(model))
        assert draw(model).why_not_graph is None

    def test_out_of_memory_without_a_graph_says_what_to_do(self, model, monkeypatch):
        def run(*arguments, **options):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        monkeypatch.setattr(loop, "run", run)
        with pytest.raises(torch.OutOfMemoryError, match=r"3 images with 6 steps.*draw fewer"):
            draw(model)
        monkeypatch.undo()
        draw(model)

    def test_true_raises_where_auto_falls_back(self, model, tape):
        assert draw(model, graphs=True).why_not_graph is None
        tape.failures = [RuntimeError("no")]
        with pytest.raises(RuntimeError, match=r"'graphs'.*the capture failed: no"):
            draw(model, steps=4, graphs=True)

    def test_threads_take_turns(self, model, tape):
        expected = {seed: draw(model, (3,), (seed,)).latents for seed in range(4)}
        found = {}
        threads = [
            threading.Thread(
                target=lambda seed=seed: found.update({seed: draw(model, (3,), (seed,)).latents})
            )
            for seed in expected
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[seed], expected[seed]) for seed in expected)


class TestReasons:
    def test_the_cpu(self, model, caplog, monkeypatch):
        monkeypatch.setattr(sampler, "_said", set())
        caplog.set_level(logging.INFO, "ecar")
        assert "need a CUDA device, the model is on cpu" in why_not_graphs(model)
        assert draw(model).why_not_graph == why_not_graphs(model)
        draw(model)
        assert len(caplog.records) == 1  # said once
        with pytest.raises(RuntimeError, match=r"'graphs'.*need a CUDA device"):
            draw(model, graphs=True)

    def test_a_callback_and_false(self, model, tape):
        assert "callback" in draw(model, callback=lambda info: None).why_not_graph
        assert "callback" in why_not_graphs(model, callback=print)
        assert draw(model, graphs=False).why_not_graph == "graphs=False"
        assert tape.captured == 0

    @pytest.mark.parametrize("options", [{"graphs": "yes"}, {"tf32": "high"}])
    def test_a_bad_argument_is_named(self, model, options):
        with pytest.raises(ValueError, match=f"'{next(iter(options))}'"):
            draw(model, **options)
