"""Times other libraries' blocks, plain and accelerated, and merges the rows into a file.

One image (batch 1) by blocks of the published sizes, with random weights, in inference; a row for
each block, type and number of threads. VAR and MAR draw with guidance, which doubles their batch:
VAR's row is all ten stages of one block with its cache, MAR's its whole MLP on the four tokens of
one AR step. PixArt's and the joint blocks' tokens are those of 512 pixels, the others' of 256.
"""

import copy
import functools
import itertools
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import commands, results, timing
from benchmarks.cases import VAR_SIDES
from benchmarks.copied import AdaLNSelfAttn, DiTBlock, SimpleMLPAdaLN
from benchmarks.results import duration, medians, table, times
from ecar_kernels import accelerate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]


class Model(NamedTuple):
    """A block, and its call, of which it makes the tensors: a function of (block, dtype)."""

    make: Callable[[], nn.Module]
    call: Callable[[Any, torch.dtype], Callable[[Any], object]]


def diffusers(name: str, heads: int, head_dim: int, **options: Any) -> Callable[[], nn.Module]:
    """Makes a block of diffusers: "module:class" in diffusers.models."""
    sizes = {"num_attention_heads": heads, "attention_head_dim": head_dim, "dim": heads * head_dim}
    return lambda: pkgutil.resolve_name(f"diffusers.models.{name}")(**sizes, **options)


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
    stages = [torch.randn(2, side * side, block.C, dtype=dtype) for side in VAR_SIDES]
    condition = torch.randn(2, block.C, dtype=dtype)

    def call(block: Any) -> None:
        block.attn.kv_caching(True)
        for x in stages:
            block(x, condition, None)
        block.attn.kv_caching(False)

    return call


dit = functools.partial(
    diffusers,
    "attention:BasicTransformerBlock",
    16,
    72,
    activation_fn="gelu-approximate",
    attention_bias=True,
    norm_elementwise_affine=False,
)
sd3 = functools.partial(diffusers, "attention:JointTransformerBlock", 24, 64)
SD3 = given(hidden_states=(1, 1024, 1536), encoder_hidden_states=(1, 154, 1536), temb=(1, 1536))
FLUX = {"hidden_states": (1, 256, 3072), "encoder_hidden_states": (1, 128, 3072), "temb": (1, 3072)}
MODELS = {
    "DiT-XL": Model(
        dit(norm_type="ada_norm_zero", num_embeds_ada_norm=1000),
        given(
            hidden_states=(1, 256, 1152),
            timestep=torch.tensor([500]),
            class_labels=torch.tensor([7]),
        ),
    ),
    "PixArt-XL": Model(
        dit(norm_type="ada_norm_single", cross_attention_dim=1152, norm_eps=1e-6),
        given(
            hidden_states=(1, 1024, 1152),
            encoder_hidden_states=(1, 120, 1152),
            timestep=(1, 6 * 1152),
        ),
    ),
    "SD3-medium": Model(sd3(), SD3),
    "SD3.5-medium": Model(sd3(qk_norm="rms_norm", use_dual_attention=True), SD3),
    "Flux": Model(
        diffusers("transformers.transformer_flux:FluxTransformerBlock", 24, 128), given(**FLUX)
    ),
    "Flux single": Model(
        diffusers("transformers.transformer_flux:FluxSingleTransformerBlock", 24, 128),
        given(**FLUX),
    ),
    "Qwen-Image": Model(
        diffusers("transformers.transformer_qwenimage:QwenImageTransformerBlock", 24, 128),
        given(**FLUX, encoder_hidden_states_mask=None),
    ),
    "DiT-XL, its own code": Model(lambda: DiTBlock(1152, 16), given(x=(1, 256, 1152), c=(1, 1152))),
    "VAR-d16": Model(lambda: AdaLNSelfAttn(1024, 16), by_stages),
    "MAR-B": Model(lambda: SimpleMLPAdaLN(16, 1024, 768, 6), given(x=(8, 16), t=(8,), c=(8, 768))),
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
def measure(case: Case, seconds: float) -> dict[str, list[Row]]:
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
            way: functools.partial(timing.seconds_of, functools.partial(call, block))
            for way, block in (("plain", plain), ("accelerated", fast))
        }
        taken = timing.rounds(turns, seconds, warm_up=True)
    finally:
        torch.set_num_threads(before)
    facts = {"class": type(plain).__name__, "served": report[0].served}
    return {"rows": [case._asdict() | facts | {"seconds": timing.summaries(taken)}]}


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
    said = dict.fromkeys(results.briefly(facts) for facts in record["runs"])
    return f"{table(list(found.values()))}\n\n{'; '.join(said)}."


def main(arguments: Sequence[str] | None = None) -> int:
    results.keep_memory()
    return commands.main(
        "integrations", __doc__, measure, {case.name: case for case in cases()}, render,
        seconds=3, same=_case, arguments=arguments,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
