"""The recorder of CUDA graphs itself (ecar/sampling/graph.py), over a torch.cuda that writes
down its calls: streams, waits, captures, cleaning up after a failure; and attention's tables.
"""

import threading

import pytest
import torch

from ecar.config import ECARConfig
from ecar.model import ECAR
from ecar.sampling import release_graphs, sample, stage
from ecar.sampling.graph import graphs_of
from ecar_kernels import initial_noise, stage_attention
from ecar_kernels.stage_attention import tiles
from tools.fake_gpu import Launch

SMALL = {
    "stage_sides": (4, 8),
    "channels": 1,
    "num_classes": 10,
    "width": 32,
    "heads": 2,
    "ar_layers": 1,
    "flow_blocks": 1,
}


@pytest.fixture(params=["cuda:0", "cuda:1"])
def model(gpus, request):
    """On the current device, and on the other one."""
    with torch.device("meta"):
        made = ECAR(ECARConfig(**SMALL)).eval()
    return gpus.place(made, request.param)


def draw(model, seeds=(1, 2, 3), **options):
    return sample(
        model,
        torch.zeros(len(seeds), dtype=torch.int64),
        seeds=torch.tensor(seeds),
        steps=4,
        **options,
    )


def called(gpus, *names):
    """What was asked of torch.cuda, of these kinds: (name, arguments)."""
    return [entry for entry in gpus.log if isinstance(entry, tuple) and entry[0] in names]


def place(gpus, name, which=0):
    return gpus.log.index(called(gpus, name)[which])


def signature(launch):
    return launch.kind, launch.name, launch.grid, launch.num_warps


class TestRecorder:
    def test_a_capture_in_its_order(self, gpus, model):
        """A run on the recorder's stream between two waits, and then the same into the graph."""
        output = draw(model)
        assert output.why_not_graph is None
        index = model.device.index
        current = torch.cuda.default_stream(index)
        ((_, graph, stream, pool, mode),) = called(gpus, "capture_begin")
        assert (stream.device, mode) == (model.device, "thread_local") and stream != current
        assert pool is not None
        (_, waiting, waited), (_, back, other) = called(gpus, "wait_stream")
        assert (waiting, waited, back, other) == (stream, current, current, stream)
        begun, first, second = (
            place(gpus, "capture_begin"),
            place(gpus, "wait_stream"),
            place(gpus, "wait_stream", 1),
        )
        warm = [entry for entry in gpus.log[first:second] if isinstance(entry, Launch)]
        held = [
            entry
            for entry in gpus.log[begun : place(gpus, "capture_end")]
            if isinstance(entry, Launch)
        ]
        # Tables come by copies that are waited for, on a thread of their own.
        ran = {entry.stream for entry in (*warm, *held) if entry.kind != "copy"}
        assert ran == {stream.cuda_stream}
        assert {entry.device for entry in gpus.launches} == {index}
        assert all(entry.captured for entry in held) and held == graph.launches
        assert not any(entry.captured for entry in gpus.launches if entry not in held)
        assert {"triton", "c++", "aten"} == {entry.kind for entry in held}  # no copy is left
        # They begin early in the graph, too.
        assert {entry.dependent for entry in held if entry.kind == "triton"} == {True}
        expected = [entry for entry in map(signature, warm) if entry[0] != "copy"]
        assert list(map(signature, held)) == expected
        ((_, replayed, where),) = called(gpus, "replay")
        assert (replayed, where) == (graph, current)
        assert torch.cuda.current_device() == 0
        assert torch.cuda.current_stream(index) is current

    def test_a_replay_waits_for_the_one_before_and_launches_nothing_else(self, gpus, model):
        draw(model)
        gpus.clear()
        with torch.cuda.device(1 - model.device.index):
            mine = torch.cuda.Stream(model.device)
        with torch.cuda.stream(mine):
            assert draw(model, (4, 5, 6)).why_not_graph is None
        ((_, where, event),) = called(gpus, "wait_event")
        ((_, recorded, at),) = called(gpus, "record")
        assert (where, recorded, at) == (mine, event, mine)
        order = [place(gpus, name) for name in ("wait_event", "replay", "record")]
        assert order == sorted(order)
        kinds = [entry.kind for entry in gpus.launches]
        # Classes, seeds and numbers in; both stages' ends out.
        assert kinds == ["copy"] * 3 + ["aten"] * 2
        assert all(order[0] < gpus.log.index(entry) < order[2] for entry in gpus.launches)
        assert torch.cuda.current_stream(model.device) is not mine

    def test_another_grid_and_another_scale_are_data(self, gpus, model):
        draw(model, solver="ab2", guidance_scale=2.0)
        gpus.clear()
        assert draw(model, solver="ab2", guidance_scale=3.0, grid=1.5).why_not_graph is None
        assert not called(gpus, "capture_begin") and len(called(gpus, "replay")) == 1
        assert [entry.kind for entry in gpus.launches] == ["copy"] * 3 + ["aten"] * 2

    def test_threads_take_turns_on_streams_of_their_own(self, gpus, model):
        draw(model)
        gpus.clear()

        def run():
            with torch.cuda.stream(torch.cuda.Stream(model.device)):
                draw(model)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        turns = called(gpus, "wait_event", "replay", "record")
        assert [turn[0] for turn in turns] == ["wait_event", "replay", "record"] * 3
        streams = [turn[1] if turn[0] == "wait_event" else turn[2] for turn in turns]
        assert all(len(set(streams[i : i + 3])) == 1 for i in (0, 3, 6)) and len(set(streams)) == 3

    def test_graphs_are_dropped_when_nothing_runs(self, gpus, model):
        draw(model)
        gpus.clear()
        release_graphs(model)
        assert [entry[:2] for entry in called(gpus, "synchronize", "empty_cache")] == [
            ("synchronize", model.device.index),
            ("empty_cache",),
        ]


class TestFailures:
    @pytest.fixture(params=["read back", "wait", "copy"])
    def spoilt(self, request, monkeypatch, model):
        """A run that no stream captures."""

        def run(*arguments, **options):
            noise = initial_noise(*arguments, **options)
            if request.param == "read back":
                noise.sum().item()
            elif request.param == "wait":
                torch.cuda.synchronize()
            else:
                noise + torch.ones(3, 1, 1, 1).to(noise.device)
            return noise

        monkeypatch.setattr(stage, "initial_noise", run)

    def test_the_stream_and_the_pool_are_as_before(self, gpus, model, spoilt):
        output = draw(model)
        assert "not permitted when stream is capturing" in output.why_not_graph
        index = model.device.index
        assert torch.cuda.current_device() == 0
        assert torch.cuda.current_stream(index) is torch.cuda.default_stream(index)
        assert not torch.cuda.is_current_stream_capturing()
        ((_, _, _, pool, _),) = called(gpus, "capture_begin")
        assert called(gpus, "end_pool") == [("end_pool", index, pool)]
        ended = place(gpus, "end_pool")
        cleaned = [entry for entry in gpus.log[ended:] if isinstance(entry, tuple)]
        assert cleaned.index(("synchronize", index)) < cleaned.index(("empty_cache",))
        # The image is drawn all the same, on the caller's stream.
        after = [entry for entry in gpus.log[ended:] if isinstance(entry, Launch)]
        assert {entry.stream for entry in after} == {0} and len(after) > 10
        gpus.clear()
        assert draw(model).why_not_graph == output.why_not_graph
        assert not called(gpus, "capture_begin")

    def test_out_of_memory_makes_room_and_tries_again(self, gpus, model, monkeypatch):
        draw(model)
        failures = [None, torch.OutOfMemoryError("CUDA out of memory")]  # the warm-up, the capture

        def run(*arguments, **options):
            if failures and (failure := failures.pop(0)) is not None:
                raise failure
            return initial_noise(*arguments, **options)

        monkeypatch.setattr(stage, "initial_noise", run)
        gpus.clear()
        assert draw(model, (1,)).why_not_graph is None
        assert len(graphs_of(model)) == 1
        pools = [entry[3] for entry in called(gpus, "capture_begin")]
        assert len(pools) == 2 and pools[0] != pools[1]  # a pool that broke off is not used again


class TestTables:
    """Of attention's tiles: int32 on the device, made at the first call."""

    STAGES = (1, 4, 9, 16, 30)

    @pytest.fixture(autouse=True)
    def none_yet(self, monkeypatch):
        monkeypatch.setattr(tiles, "_tables", {})

    def attend(self):
        q = torch.empty(1, sum(self.STAGES), 2, 64, device="cuda:1", dtype=torch.bfloat16)
        stage_attention(q, q, q, self.STAGES)

    def captured(self, gpus):
        graph = torch.cuda.CUDAGraph()
        gpus.clear()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream("cuda:1")):
            self.attend()
        return [launch.kind for launch in graph.launches]

    def test_one_that_is_there_is_taken(self, gpus):
        self.attend()
        assert self.captured(gpus) == ["triton"]
        assert {table.device for table in tiles._tables.values()} == {torch.device("cuda:1")}

    def test_one_that_is_not_is_copied_by_the_graph_from_memory_that_stays(self, gpus):
        """A capture can make no memory that outlives it: the copy is a part of every replay, from a
        pinned source, which is kept and serves the next capture too."""
        assert self.captured(gpus) == self.captured(gpus) == ["copy", "triton"]
        (source,) = tiles._tables.values()
        assert source.is_pinned() and source.device.type == "cpu"
        self.attend()
        assert self.captured(gpus) == ["triton"]

    def test_the_sampler_captures_none(self, gpus):
        with torch.device("meta"):
            model = gpus.place(ECAR(ECARConfig(**SMALL)).eval(), "cuda:1")
        assert draw(model).why_not_graph is None
        assert not [entry for entry in gpus.launches if entry.captured and entry.kind == "copy"]
        assert all(table.device == model.device for table in tiles._tables.values())
