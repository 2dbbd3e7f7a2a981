"""Builds the distribution `ecar` (metadata: pyproject.toml).

The version is read, not imported: a build must not need torch.
"""

import re
from pathlib import Path

from setuptools import setup

VERSION_FILE = Path(__file__).parent / "ecar_kernels" / "version.py"


def read_version() -> str:
    match = re.search(r'^__version__ = "([^"]+)"$', VERSION_FILE.read_text("utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError(f'{VERSION_FILE}: expected a line __version__ = "..."')
    return match[1]


setup(version=read_version())
