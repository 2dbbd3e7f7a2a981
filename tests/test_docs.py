"""The pages of docs/: what is made from files is up to date, and their examples run."""

import re

import pytest
import torch

from benchmarks import pictures
from benchmarks.pictures.__main__ import stray
from ecar import ECAR, ECARConfig
from ecar_kernels.registry import OPS
from tools.update_docs import ROOT, contract, pages, updated

PAGES = {str(path.relative_to(ROOT)): path for path in pages()}
EXAMPLES = [
    pytest.param(block, id=f"{name}-{index}")
    for name, path in PAGES.items() if name.startswith("docs/")
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text("utf-8"),
                                             re.DOTALL))
]


@pytest.mark.parametrize("name", PAGES)
def test_what_is_made_from_files_is_up_to_date(name):
    text = PAGES[name].read_text("utf-8")
    assert updated(text, PAGES[name]) == text, "run: python -m tools.update_docs"


def test_pictures_are_of_the_present_results():
    stale = [picture.name for picture in pictures.committed()
             if not picture.is_in(pictures.FOLDER)]
    assert not stale, "run: python -m tools.update_docs"
    assert not stray(), "pictures of no results; run: python -m tools.update_docs"


def test_a_stale_page_is_seen():
    page = "<!-- contract: adaln -->\nold\n<!-- end of contract -->"
    assert contract("adaln") in updated(page)
    for kind in ("figures", "pictures"):
        with pytest.raises(KeyError, match="unheard-of"):
            updated(f"<!-- {kind}: unheard-of -->\n<!-- end of {kind} -->")


def test_every_op_has_a_page_and_a_line():
    index = PAGES["docs/ops/README.md"].read_text("utf-8")
    listed = re.findall(r"^\| \[`(\w+)`\]\(\1\.md\)", index, re.MULTILINE)
    assert sorted(listed) == sorted(OPS)
    for op in OPS:
        assert f"<!-- contract: {op} -->" in PAGES[f"docs/ops/{op}.md"].read_text("utf-8")


@pytest.fixture
def somebodys_folder(tmp_path, monkeypatch):
    """What the examples read: a checkpoint, a VAE and a folder of images, all tiny."""
    from diffusers import AutoencoderKL
    from PIL import Image

    config = ECARConfig(stage_sides=(8, 16, 32), channels=1, num_classes=10, width=16, heads=2,
                        ar_layers=1, flow_blocks=1)
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
