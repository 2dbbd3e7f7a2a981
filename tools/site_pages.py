"""A hook of mkdocs.yml: pages from outside docs/, and links that work on GitHub and on the site.

Pages link to files of the repository, as GitHub shows them. A link to a page of the site is turned
into one within the site; what the site does not have is shown as text, or, where mkdocs.yml has
repo_url, links there.
"""

import os
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Path in the repository -> path in the site.
OUTSIDE = {
    "README.md": "project/readme.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "checkpoints/classifiers/README.md": "project/classifiers.md",
    "checkpoints/digits/README.md": "project/digits.md",
    "checkpoints/mnist/README.md": "project/mnist.md",
}
INSIDE = {site: path for path, site in OUTSIDE.items()}
CODE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\[\]]*|[^\[\]]*\[[^\[\]]*\]\([^()]*\))\]\(([^()\s#]+)(#[^()\s]*)?\)")
BRANCH = "blob/main"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = os.path.dirname(config.config_file_path)
    for path, site in OUTSIDE.items():
        files.append(File.generated(config, site, abs_src_path=os.path.join(root, path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    folder = posixpath.dirname(INSIDE.get(here, f"docs/{here}"))

    def link(found: re.Match) -> str:
        text, target, anchor = found.groups(default="")
        text = LINK.sub(link, text)  # a picture in a link
        if "://" in target or target.startswith("mailto:"):
            return f"[{text}]({target}{anchor})"
        path = posixpath.normpath(posixpath.join(folder, target))
        site = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        found_file = files.get_file_from_path(site)
        if found_file is not None and found_file.inclusion.is_included():
            relative = posixpath.relpath(site, posixpath.dirname(here) or ".")
            return f"[{text}]({relative}{anchor})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/{BRANCH}/{path}{anchor})"
        return text

    parts = CODE.split(markdown)  # every other one is code
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)
