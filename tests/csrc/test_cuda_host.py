"""The CUDA kernels and their launches on the host: accuracy, layouts, what is launched."""

import pytest
import torch

from ecar_kernels.flow_boundary.reference import flow_boundary
from ecar_kernels.flow_step import reference
from ecar_kernels.registry import KERNEL_DTYPES
from tests.support.accuracy import assert_accurate, tensors
from tests.support.cuda_host import BOUNDARY, DETAILS, EULER, NOISE, SEEDS, STREAM, boundary, laid

MOST_BLOCKS = 2**31 - 1
KINDS = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}

# Shape, layouts of x, velocity and details; whether 16-byte accesses are taken in float32 and in
# 16 bits: by euler_step plain and guided, by the jump from seeds, from details.
LAYOUTS = [
    ((2, 3, 4, 16), "dense", "dense", "dense", "11 11 11 11"),
    ((2, 3, 4, 4), "dense", "dense", "dense", "11 11 10 10"),  # merged into one row, or not
    ((2, 3, 4, 12), "aligned", "dense", "dense", "10 10 10 10"),
    ((3, 2, 5, 7), "dense", "dense", "dense", "11 00 00 00"),  # the other half is unaligned
    ((1, 1, 1, 21), "dense", "dense", "dense", "11 00 00 00"),
    ((1, 2, 1, 24), "dense", "dense", "dense", "11 11 11 11"),
    ((2, 3, 4, 16), "padded", "dense", "dense", "00 00 00 00"),
    ((2, 3, 4, 16), "dense", "padded", "dense", "00 00 00 00"),
    ((2, 3, 4, 16), "dense", "dense", "padded", "11 11 11 00"),
    *(
        ((2, 3, 4, 16), x, velocity, "dense", "00 00 00 00")
        for odd in ("ragged", "apart")
        for x, velocity in ((odd, "dense"), ("dense", odd))
    ),
    ((2, 3, 4, 16), "dense", "dense", "ragged", "11 11 11 00"),
    ((1, 3, 4, 16), "apart", "dense", "apart", "11 11 11 11"),  # one image lies on its own
    ((2, 3, 4, 16), "offset", "dense", "dense", "00 00 00 00"),
    ((2, 3, 4, 16), "dense", "offset", "dense", "00 00 00 00"),
    ((2, 3, 4, 16), "dense", "dense", "offset", "11 11 11 00"),
    ((2, 3, 4, 16), "aligned", "aligned", "aligned", "11 11 11 11"),
    ((2, 3, 4, 16), "swapped", "aligned", "swapped", "11 11 11 11"),
    ((2, 3, 2, 5), "swapped", "swapped", "dense", "00 00 00 00"),
    ((2, 3, 4, 16), "expanded", "dense", "expanded", "11 11 11 11"),
    ((0, 3, 4, 16), "dense", "dense", "dense", ""),
    ((2, 0, 4, 16), "dense", "dense", "dense", ""),
    ((2, 3, 0, 16), "dense", "dense", "dense", ""),
    ((2, 3, 4, 0), "dense", "dense", "dense", ""),
]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape, of_x, of_velocity, of_details, wide", LAYOUTS)
def test_flow_step(host, shape, of_x, of_velocity, of_details, wide, guided, dtype):
    x = laid(shape, dtype, of_x)
    velocity = laid((shape[0] * (1 + guided), *shape[1:]), dtype, of_velocity)
    call = {"x": x, "velocity": velocity, "dt": 0.125, "guidance_scale": 1.5 if guided else 1.0}
    before = x.clone(), velocity.clone()

    def launched(name: str, entry: int) -> None:
        if not wide:
            assert host.launched == []
            return
        (launch,) = host.launched
        vector = ("false", "true")[int(wide.split()[entry][dtype != torch.float32])]
        assert launch.kernel == f"{name} {KINDS[dtype]} {vector}"
        assert (launch.threads, launch.shared, launch.device, launch.stream) == (128, 0, 0, STREAM)

    assert host.euler_step(**call).equal(reference.euler_step(**call))
    launched("euler", int(guided))
    for given in (False, True):
        noise = (
            {"details": laid((*shape[:2], 3, *shape[2:]), dtype, of_details)}
            if given
            else {"seeds": torch.randint(-(2**63), 2**63 - 1, (2 * shape[0],))[::2]}
        )
        assert_accurate(
            host.upsample_renoise_euler,
            reference.upsample_renoise_euler,
            call | noise | {"time": 1 / 3, "stage": 2},
        )
        launched("upsample_renoise", 2 + given)
        if wide:
            units = shape[0] * shape[1] * shape[2] * -(-shape[3] * dtype.itemsize // 16)
            assert host.launched[0].blocks == -(-units // 128)
    assert x.equal(before[0]) and velocity.equal(before[1])


# Shape, layouts of x and of the velocity before; whether 16-byte accesses are taken in float32 and
# in 16 bits, by euler_step and by the jump.
HISTORIES = [
    ((2, 3, 4, 16), "dense", "dense", "11 11"),
    ((2, 3, 4, 4), "dense", "dense", "11 10"),  # merged into one row, or not
    ((2, 3, 4, 4), "dense", "aligned", "10 10"),  # not merged where one of them has gaps
    ((2, 3, 4, 16), "aligned", "aligned", "11 11"),
    ((2, 3, 4, 16), "dense", "padded", "00 00"),
    ((2, 3, 4, 16), "dense", "offset", "00 00"),
    ((2, 3, 4, 16), "dense", "apart", "00 00"),
    ((2, 3, 4, 16), "dense", "swapped", "11 11"),
    ((2, 3, 4, 16), "swapped", "expanded", "11 11"),
    ((1, 1, 1, 21), "dense", "dense", "11 00"),
    ((0, 3, 4, 16), "dense", "dense", ""),
    ((2, 3, 4, 0), "dense", "dense", ""),
]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("shape, of_x, of_previous, wide", HISTORIES)
def test_flow_step_with_a_history(host, shape, of_x, of_previous, wide, guided, dtype):
    """In the same single launch; with either half of it too, and of ratio 0 an Euler step."""
    euler = {
        "x": laid(shape, dtype, of_x),
        "velocity": laid((shape[0] * (1 + guided), *shape[1:]), dtype, "dense"),
        "dt": 0.125,
        "guidance_scale": 1.5 if guided else 1.0,
    }
    history = {"previous": laid(shape, dtype, of_previous), "ratio": 0.7}
    jump = {"time": 1 / 3, "stage": 2, "seeds": torch.arange(shape[0])}
    for name, more, column in (("euler_step", {}, 0), ("upsample_renoise_euler", jump, 1)):
        run, plain = getattr(host, name), getattr(reference, name)
        for its in (history, {}, history | {"return_velocity": True}, {"return_velocity": True}):
            call = euler | more | its
            if more:
                assert_accurate(run, plain, call)
            else:
                results = tensors(run(**call)), tensors(plain(**call))
                assert all(a.equal(b) for a, b in zip(*results, strict=True))
            if "previous" in its:
                assert len(host.launched) == bool(wide)
            if "previous" in its and wide:
                vector = ("false", "true")[int(wide.split()[column][dtype != torch.float32])]
                if guided and (shape[0] * shape[1] * shape[2] * shape[3] * dtype.itemsize) % 16:
                    vector = "false"  # the other half is unaligned
                assert host.launched[0].kernel.endswith(vector)
        of_ratio_0 = run(**euler | more | history | {"ratio": 0, "return_velocity": True})
        expected = run(**euler | more | {"return_velocity": True})
        assert all(a.equal(b) for a, b in zip(of_ratio_0, expected, strict=True))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "images, shape, wide",
    [
        (3, (4, 8, 8), "11"),
        (3, (1, 2, 2), "10"),
        (3, (3, 5, 7), "00"),
        (1, (3, 5, 7), "11"),
        (1, (1, 1, 1), "11"),
        (0, (4, 8, 8), ""),
        (2, (4, 0, 8), ""),
    ],
)
def test_initial_noise(host, images, shape, wide, dtype):
    for step in (1, 2):
        seeds = torch.randint(-(2**63), 2**63 - 1, (step * images,))[::step]
        plain = reference.initial_noise(seeds, shape, device="cpu", dtype=dtype)
        found = host.initial_noise(seeds, shape, dtype)
        allowed = 2e-6 + torch.finfo(dtype).eps * plain.double().abs()
        assert found.dtype == dtype and found.shape == plain.shape
        assert ((found.double() - plain.double()).abs() <= allowed).all()
        vector = wide and ("false", "true")[int(wide[dtype != torch.float32])]
        units = images * -(-plain[:1].numel() * dtype.itemsize // 16)
        assert [(x.kernel, x.blocks) for x in host.launched] == (
            [(f"initial_noise {KINDS[dtype]} {vector}", -(-units // 128))] if wide else []
        )


def boundary_reference(scale_, **call):
    return flow_boundary(scale=scale_, **call)


@pytest.mark.parametrize(
    "dtype, wide_state",
    [(torch.float32, False), *((dtype, wide) for dtype in KERNEL_DTYPES[1:] for wide in (0, 1))],
)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("group", [1, 4])
def test_flow_boundary(host, group, history, guided, dtype, wide_state):
    """Both sizes of a block; weights of every alignment."""
    few = {"batch": 2, "tokens": 5}
    cases = [
        few | {"channels": c, "outputs": p, "offset": offset}
        for c, p, offset in (
            (520, 16, False),
            (72, 12, False),
            (70, 5, False),
            (72, 16, True),
            (1, 1, False),
        )
    ]
    if group == 4:
        cases = [{"batch": 4, "tokens": 257, "channels": 72, "outputs": 12}]
    for case in cases:
        batch = case["batch"]
        call = boundary(dtype, guided=guided, wide_state=wide_state, history=history, **case)
        kept = []

        def run(kept=kept, **call):
            kept.append(host.flow_boundary(**call))
            return kept[0]

        assert_accurate(run, boundary_reference, call)
        (launch,) = host.launched
        state = "float" if wide_state else KINDS[dtype]
        assert launch.kernel == f"flow_boundary {KINDS[dtype]} {state} {group} {1 + guided}"
        groups = batch * -(-case["tokens"] // group)
        slices = max(1, min(128 // groups, -(-case["channels"] // 256)))
        assert launch.blocks == groups * slices and launch.threads == 256
        # The order of a sum depends on neither the batch nor the group.
        one = {
            name: value[1::batch]
            for name, value in call.items()
            if name in ("x", "state", "shift", "scale_", "step_scale", "previous")
        }
        alone = host.flow_boundary(**call | one)
        assert host.launched[0].kernel.split()[3] == "1"
        assert all(a[1::batch].equal(b) for a, b in zip(kept[0], alone, strict=True))
        if history:
            *results, velocity = host.flow_boundary(**call | {"ratio": 0.0})
            euler = {n: x for n, x in call.items() if n not in ("previous", "ratio")}
            expected = host.flow_boundary(**euler)
            assert all(a.equal(b) for a, b in zip((*results, velocity), expected, strict=True))
            del euler["return_velocity"]
            plain = host.flow_boundary(**euler)
            assert all(a.equal(b) for a, b in zip(results, plain, strict=True))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "batch, tokens, channels", [(2, 5, 520), (1, 3, 1), (8, 5, 70), (4, 257, 72)]
)
def test_flow_boundary_with_statistics(host, batch, tokens, channels, guided, dtype):
    """Of the rows as they are stored, for every 32 channels; the rest is as without. The last part
    has fewer, a block several tokens, or a slice of the channels."""
    call = boundary(
        dtype, guided=guided, batch=batch, tokens=tokens, channels=channels, outputs=5, history=True
    )
    call["positions"] += 1000
    state, embedded, statistics, velocity = host.flow_boundary_chained(**call)
    assert len(host.launched) == 1
    plain = host.flow_boundary(**call)
    assert all(a.equal(b) for a, b in zip((state, embedded, velocity), plain, strict=True))
    parts = embedded.double().split(32, -1)
    assert statistics.shape == (*embedded.shape[:2], 3, len(parts))
    assert statistics.dtype == torch.float32
    own, rest, square = statistics.double().unbind(2)
    for index, part in enumerate(parts):
        mean = part.mean(-1)
        exact = (part - mean[..., None]).square().sum(-1)
        assert (own[..., index] + rest[..., index] - mean).abs().max() < 1e-5
        assert ((square[..., index] - exact).abs() < 1e-5 * exact + 1e-6).all()


@pytest.mark.parametrize("sizes", [(0, 5, 8, 4), (2, 0, 8, 4), (2, 5, 8, 0)])
def test_flow_boundary_of_nothing(host, sizes):
    batch, tokens, channels, outputs = sizes
    call = boundary(
        torch.float32, guided=True, batch=batch, tokens=tokens, channels=channels, outputs=outputs
    )
    assert_accurate(host.flow_boundary, boundary_reference, call)
    assert len(host.launched) == (1 if batch and tokens else 0)


def zeros(*shape, dtype=torch.bfloat16):
    """Of any size in little memory."""
    return torch.zeros(shape[-1:], dtype=dtype).expand(shape)


def wide_boundary(images, tokens, channels, outputs, guided):
    rows = zeros(images * (1 + guided), tokens, channels)
    weight, embed, positions = (
        torch.zeros(shape, dtype=torch.bfloat16)
        for shape in ((outputs, channels), (channels, outputs), (tokens, channels))
    )
    return (
        rows,
        zeros(images, tokens, outputs),
        rows,
        rows,
        weight,
        zeros(outputs),
        embed,
        zeros(channels),
        positions,
        0.1,
        None,
        None,
        1.0,
        0.0,
        1e-6,
    )


# A call, then blocks, threads and bytes of shared memory of its launch; no blocks: it is refused.
UNIT = 8  # bfloat16s of 16 bytes
EDGES = [
    (EULER, (zeros(1, 1, 1, 128 * UNIT),) * 2, 1, 128, 0),
    (EULER, (zeros(1, 1, 1, 128 * UNIT + 1),) * 2, 2, 128, 0),
    (EULER, (zeros(128, 2**20, 1, 1),) * 2, 2**20, 128, 0),
    (EULER, (zeros(128, MOST_BLOCKS, 1, 1),) * 2, MOST_BLOCKS, 128, 0),
    (EULER, (zeros(128, MOST_BLOCKS + 1, 1, 1),) * 2, None, 128, 0),
    (EULER, (zeros(128, 2**32 + 1, 1, 1),) * 2, None, 128, 0),  # 1 in 32 bits
    (SEEDS, (zeros(128, MOST_BLOCKS, 1, 1),) * 2, MOST_BLOCKS, 128, 0),
    (SEEDS, (zeros(128, MOST_BLOCKS + 1, 1, 1),) * 2, None, 128, 0),
    (DETAILS, (zeros(128, MOST_BLOCKS, 1, 1),) * 2, MOST_BLOCKS, 128, 0),
    (NOISE, (1, 128 * UNIT), 1, 128, 0),
    (NOISE, (1, 128 * UNIT + 1), 2, 128, 0),
    (NOISE, (MOST_BLOCKS, 128 * UNIT), MOST_BLOCKS, 128, 0),
    (NOISE, (MOST_BLOCKS, 128 * UNIT + 1), None, 128, 0),
    # Four tokens a block from 1,024 on, where shared memory allows it.
    (BOUNDARY, (1, 1023, 72, 16, False), 1023, 256, 4 * (72 + 48) + 64),
    (BOUNDARY, (1, 1024, 72, 16, False), 256, 256, 16 * (72 + 48) + 256),
    (BOUNDARY, (1024, 1, 72, 16, True), 1024, 256, 32 * (72 + 48) + 256),
    (BOUNDARY, (1, 1024, 3008, 16, False), 256, 256, 48 << 10),
    (BOUNDARY, (1, 1024, 3009, 16, False), 256, 256, (48 << 10) + 16),
    (BOUNDARY, (1, 1024, 6080, 16, False), 256, 256, 96 << 10),
    (BOUNDARY, (1, 1024, 6081, 16, False), 1024, 256, 4 * (6081 + 48) + 64),
    (BOUNDARY, (1, 1024, 3016, 16, True), 256, 256, 96 << 10),
    (BOUNDARY, (1, 1024, 3017, 16, True), 1024, 256, 8 * (3017 + 48) + 64),
    # About 128 blocks of few tokens, each with 256 channels or more to embed.
    (BOUNDARY, (1, 16, 8192, 64, True), 128, 256, 8 * (8192 + 96) + 256),
    (BOUNDARY, (1, 16, 768, 16, False), 48, 256, 4 * (768 + 48) + 64),
    (BOUNDARY, (2, 64, 768, 16, False), 128, 256, 4 * (768 + 48) + 64),
    (BOUNDARY, (1, 64, 768, 16, False), 128, 256, 4 * (768 + 48) + 64),
    (BOUNDARY, (MOST_BLOCKS, 4, 8, 4, False), MOST_BLOCKS, 256, 16 * (8 + 36) + 64),
    (BOUNDARY, (MOST_BLOCKS + 1, 4, 8, 4, False), None, 256, 0),
    (BOUNDARY, (2**32 + 1, 4, 8, 4, False), None, 256, 0),
]


@pytest.mark.parametrize(
    "op, sizes, blocks, threads, shared",
    EDGES,
    ids=[f"{op}-{i}" for i, (op, *_) in enumerate(EDGES)],
)
def test_launches_at_the_edges_of_each_choice(host, op, sizes, blocks, threads, shared):
    host.set(dry=True)
    if op == EULER:
        call = (*sizes, 0.1, 1.0, 0.0)
    elif op == SEEDS:
        call = (*sizes, 0.1, 1.0, 0.0, 0.5, 2, torch.zeros(1, dtype=torch.int64).expand(128))
    elif op == DETAILS:
        shape = sizes[0].shape
        call = (*sizes, 0.1, 1.0, 0.0, 0.5, zeros(*shape[:2], 3, *shape[2:]))
    elif op == NOISE:
        call = (torch.zeros(1, dtype=torch.int64).expand(sizes[0]), sizes[1], 1, 1, torch.bfloat16)
    else:
        call = wide_boundary(*sizes)
    if blocks is None:
        with pytest.raises(RuntimeError, match="the CUDA launch failed: error 9"):
            host.call(op, *call)
        return
    host.call(op, *call)
    assert [(x.blocks, x.threads, x.shared) for x in host.launched] == [(blocks, threads, shared)]


def test_a_chip_with_less_shared_memory(host):
    """The attribute is refused; the next call does not hear of it."""
    host.set(shared=48 << 10)
    big, small = (wide_boundary(1, 16, channels, 64, True) for channels in (8192, 72))
    with pytest.raises(RuntimeError, match="flow_boundary: the CUDA launch failed: error 1"):
        host.call(BOUNDARY, *big)
    host.call(BOUNDARY, *small)
    host.set()
    for device in (0, 1):  # it is asked for on each
        host.call(BOUNDARY, *big, device=device)
