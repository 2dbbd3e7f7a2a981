"""Times other libraries' blocks, plain and accelerated, and merges the rows into a file.

One image (batch 1) by blocks of the published sizes, with random weights, in inference; a row for
each block, type and number of threads. VAR and MAR draw with guidance, which doubles their batch:
VAR's row is all ten stages of one block with its cache, MAR's its whole MLP on the four tokens of
one AR step. PixArt's and the joint blocks' tokens are those of 512 pixels, the others' of 256.
"""

import copy
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import results, timing
from benchmarks.copied import AdaLNSelfAttn, DiTBlock, SimpleMLPAdaLN
from benchmarks.results import duration, medians, table, times
from ecar_kernels import accelerate

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # VAR's stages
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]


class Model(NamedTuple):
    """A block, and its call, of which it makes the tensors: a function of (block, dtype)."""

    kind: str
    make: Callable[[], nn.Module]
    call: Callable[[Any, torch.dtype], Callable[[Any], object]]


def diffusers(kind: str, module: str, **options: Any) -> Callable[[], nn.Module]:
    """Makes a block of a class of diffusers."""

    def make() -> nn.Module:
        found = __import__(f"diffusers.models.{module}", fromlist=[kind])
        return getattr(found, kind)(**options)

    return make


def basic(heads: int, head_dim: int, **options: Any) -> Callable[[], nn.Module]:
    return diffusers(
        "BasicTransformerBlock",
        "attention",
        dim=heads * head_dim,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_elementwise_affine=False,
        **options,
    )


def joint(kind: str, module: str, heads: int, head_dim: int, **options: Any) -> Callable:
    return diffusers(
        kind,
        module,
        dim=heads * head_dim,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        **options,
    )


def given(**shapes: Any) -> Callable[[Any, torch.dtype], Callable[[Any], object]]:
    """Calls with random tensors of these shapes; other values as they are."""

    def prepare(block: Any, dtype: torch.dtype) -> Callable[[Any], object]:
        tensors = {
            name: torch.randn(shape, dtype=dtype) if isinstance(shape, tuple) else shape
            for name, shape in shapes.items()
        }
        return lambda block: block(**tensors)

    return prepare


def by_stages(block: Any, dtype: torch.dtype) -> Callable[[Any], object]:
    """VAR's ten stages, one image with guidance."""
    stages = [torch.randn(2, side * side, block.C, dtype=dtype) for side in SIDES]
    condition = torch.randn(2, block.C, dtype=dtype)

    def call(block: Any) -> None:
        block.attn.kv_caching(True)
        for x in stages:
            block(x, condition, None)
        block.attn.kv_caching(False)

    return call


DIFFUSERS = "transformers.transformer_"
STREAMS = {"hidden_states": (1, 1024, 1536), "temb": (1, 1536)}
FLUX = {"hidden_states": (1, 256, 3072), "encoder_hidden_states": (1, 128, 3072), "temb": (1, 3072)}
MODELS = {
    "DiT-XL": Model(
        "BasicTransformerBlock",
        basic(16, 72, norm_type="ada_norm_zero", num_embeds_ada_norm=1000),
        given(
            hidden_states=(1, 256, 1152),
            timestep=torch.tensor([500]),
            class_labels=torch.tensor([7]),
        ),
    ),
    "PixArt-XL": Model(
        "BasicTransformerBlock",
        basic(16, 72, norm_type="ada_norm_single", cross_attention_dim=1152, norm_eps=1e-6),
        given(
            hidden_states=(1, 1024, 1152),
            encoder_hidden_states=(1, 120, 1152),
            timestep=(1, 6 * 1152),
        ),
    ),
    "SD3-medium": Model(
        "JointTransformerBlock",
        joint("JointTransformerBlock", "attention", 24, 64),
        given(**STREAMS, encoder_hidden_states=(1, 154, 1536)),
    ),
    "SD3.5-medium": Model(
        "JointTransformerBlock",
        joint(
            "JointTransformerBlock",
            "attention",
            24,
            64,
            qk_norm="rms_norm",
            use_dual_attention=True,
        ),
        given(**STREAMS, encoder_hidden_states=(1, 154, 1536)),
    ),
    "Flux": Model(
        "FluxTransformerBlock",
        joint("FluxTransformerBlock", f"{DIFFUSERS}flux", 24, 128),
        given(**FLUX),
    ),
    "Flux single": Model(
        "FluxSingleTransformerBlock",
        joint("FluxSingleTransformerBlock", f"{DIFFUSERS}flux", 24, 128),
        given(**FLUX),
    ),
    "Qwen-Image": Model(
        "QwenImageTransformerBlock",
        joint("QwenImageTransformerBlock", f"{DIFFUSERS}qwenimage", 24, 128),
        given(**FLUX, encoder_hidden_states_mask=None),
    ),
    "DiT-XL, its own code": Model(
        "DiTBlock", lambda: DiTBlock(1152, 16), given(x=(1, 256, 1152), c=(1, 1152))
    ),
    "VAR-d16": Model("AdaLNSelfAttn", lambda: AdaLNSelfAttn(1024, 16), by_stages),
    "MAR-B": Model(
        "SimpleMLPAdaLN",
        lambda: SimpleMLPAdaLN(16, 1024, 768, 6),
        given(x=(8, 16), t=(8,), c=(8, 768)),
    ),
}


class Case(NamedTuple):
    model: str
    dtype: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.dtype}, {self.threads} threads"


def cases() -> list[Case]:
    threads = sorted({1, torch.get_num_threads()})
    return [Case(*each) for each in itertools.product(MODELS, DTYPES, threads)]


@torch.no_grad()
def measure(case: Case, seconds: float) -> Row:
    """A row: both ways' medians."""
    model, dtype = MODELS[case.model], DTYPES[case.dtype]
    plain = model.make().eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.02)
    plain = plain.to(dtype)
    call, fast = model.call(plain, dtype), copy.deepcopy(plain)
    report = accelerate(fast, keep_weights=False)
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        turns = {
            "plain": functools.partial(timing.seconds_of, lambda: call(plain)),
            "accelerated": functools.partial(timing.seconds_of, lambda: call(fast)),
        }
        taken = timing.rounds(turns, seconds, warm_up=True)
    finally:
        torch.set_num_threads(before)
    return {
        **case._asdict(),
        "class": model.kind,
        "served": report[0].served,
        "seconds": timing.summaries(taken),
    }


def _case(row: Row) -> Case:
    return Case(**{field: row[field] for field in Case._fields})


def render(record: dict[str, Any]) -> str:
    """How many times as fast each block is, by type and threads, and the times on one thread."""
    found: dict[str, dict[str, str]] = {}
    for row in sorted(record["rows"], key=lambda row: list(MODELS).index(row["model"])):
        seconds = medians(row)
        line = found.setdefault(row["model"], {"block": row["model"], "class": row["class"]})
        way = f"{row['dtype']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
        line[way] = (
            f"{duration(seconds['plain'])} -> {duration(seconds['accelerated'])}, "
            f"{times(seconds['plain'], seconds['accelerated'])}"
        )
    columns = dict.fromkeys(key for line in found.values() for key in line)
    lines = [{key: line.get(key, "-") for key in columns} for line in found.values()]
    said = dict.fromkeys(results.briefly(facts) for facts in record["runs"])
    return f"{table(lines)}\n\n{'; '.join(said)}."


def main(arguments: Sequence[str] | None = None) -> int:
    by_name = {case.name: case for case in cases()}
    options, found = results.chosen("integrations", __doc__, list(by_name), 3, arguments)
    if not found:
        return 0
    results.keep_memory()
    file, facts = results.path("integrations", options.results), results.describe()
    empty = {"kind": "integrations", "runs": [], "rows": []}
    for case in (by_name[name] for name in found):
        row = measure(case, options.seconds)
        before = results.read(file) if file.exists() else empty
        record = results.merged(before, facts, [row], _case)
        results.save(file, record)
        seconds = medians(row)
        print(f"{case.name}: {times(seconds['plain'], seconds['accelerated'])}", flush=True)
    print(f"\n{render(record)}\n\nmerged into {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
