"""The pages of docs/: what is made from files is up to date, and their examples run."""

import importlib
import itertools
import re

import pytest
import torch

import ecar
import ecar.training
import ecar_kernels
from ecar import ECAR, ECARConfig
from ecar_kernels.registry import OPS
from tools.update_docs import ROOT, contract, pages, updated

PAGES = {str(path.relative_to(ROOT)): path for path in pages()}
EXAMPLES = [
    pytest.param(block, id=f"{name}-{index}")
    for name, path in PAGES.items()
    if name.startswith("docs/")
    for index, block in enumerate(
        re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize("name", PAGES)
def test_what_is_made_from_files_is_up_to_date(name):
    text = PAGES[name].read_text("utf-8")
    assert updated(text) == text, "run: python -m tools.update_docs"


def test_a_stale_page_is_seen():
    page = "<!-- contract: adaln -->\nold\n<!-- end of contract -->"
    assert contract("adaln") in updated(page)
    with pytest.raises(KeyError, match="unheard-of"):
        updated("<!-- figures: unheard-of -->\n<!-- end of figures -->")


def test_every_op_has_a_page_and_a_line():
    index = PAGES["docs/ops/README.md"].read_text("utf-8")
    listed = re.findall(r"^\| \[`(\w+)`\]\(\1\.md\)", index, re.MULTILINE)
    assert sorted(listed) == sorted(OPS)
    for op in OPS:
        assert f"<!-- contract: {op} -->" in PAGES[f"docs/ops/{op}.md"].read_text("utf-8")


def test_every_page_is_in_the_index():
    index = PAGES["docs/README.md"].read_text("utf-8")
    for name in PAGES:
        if re.fullmatch(r"docs/[\w-]+\.md", name) and name != "docs/README.md":
            assert f"]({name.removeprefix('docs/')})" in index, f"{name} is not in docs/README.md"


def test_every_public_name_is_in_the_api():
    """By a name that the site's builder, which imports nothing, can follow to its code; the ops
    by the files that hold them (tools/site_pages.py)."""
    listed = set()
    for page in ("docs/api/ecar.md", "docs/api/ecar_kernels.md"):
        for name in re.findall(r"^::: ([\w.]+)$", PAGES[page].read_text("utf-8"), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), f"{page}: {name}"
            listed.add(name)
    for package in (ecar, ecar.training, ecar_kernels):
        for name in set(package.__all__) - {"__version__", *OPS}:
            places = [place for place in listed if place.endswith(f".{name}")]
            assert places, f"{package.__name__}.{name} is in no page of docs/api"
            found = importlib.import_module(places[0].rpartition(".")[0])
            assert getattr(found, name) is getattr(package, name)


def test_the_share_of_scores_that_a_mask_throws_away():
    """As the page of stage_attention has it, of E-CAR's stages and of VAR's."""

    def share(stages):
        seen = sum(n * end for n, end in zip(stages, itertools.accumulate(stages), strict=True))
        return f"{1 - seen / sum(stages) ** 2:.0%}".replace("%", " %")

    text = PAGES["docs/ops/stage_attention.md"].read_text("utf-8")
    assert re.findall(r"\d+ %", text) == [
        share(ECARConfig.preset("S").stage_tokens),
        share([side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]),
    ]


@pytest.fixture
def somebodys_folder(tmp_path, monkeypatch):
    """What the examples read: a checkpoint, a VAE and a folder of images, all tiny."""
    from diffusers import AutoencoderKL
    from PIL import Image

    config = ECARConfig(
        stage_sides=(8, 16, 32),
        channels=1,
        num_classes=10,
        width=16,
        heads=2,
        ar_layers=1,
        flow_blocks=1,
    )
    ECAR(config).save_pretrained(tmp_path / "checkpoints" / "digits")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "sdxl-vae")
    for bird in ("robin", "wren"):
        (tmp_path / "birds" / "train" / bird).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "birds" / "train" / bird / "1.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("somebodys_folder")
@pytest.mark.parametrize("block", EXAMPLES)
def test_example_runs(block):
    before = torch.get_num_threads()
    exec(compile(block, "docs", "exec"), {})
    assert torch.get_num_threads() == before


def test_every_page_is_in_the_sites_navigation():
    """`make docs`, which fails where one is missing, needs the site's generator."""
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    missing = [page.name for page in ROOT.glob("docs/*.md") if f" {page.name}\n" not in nav]
    assert not missing
