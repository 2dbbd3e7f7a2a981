"""A hook of mkdocs.yml: pages from outside docs/, and links that work on GitHub and on the site.

A new op needs a page in docs/ops and nothing more: ops/*.md in the navigation are all of them, and
<!-- ops --> in the API is what each family's api.py holds.

Pages link to files of the repository, as GitHub shows them. A link to a page of the site is turned
into one within the site; what the site does not have is shown as text, or, where mkdocs.yml has
repo_url, links there.
"""

import posixpath
import re
from pathlib import Path

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
    "checkpoints/emoji/README.md": "project/emoji.md",
    "checkpoints/mnist/README.md": "project/mnist.md",
}
INSIDE = {site: path for path, site in OUTSIDE.items()}
OPS = "ops/*.md"
FAMILY = """::: ecar_kernels.{}.api
    options: {{filters: ["!^_", "!^check_"], show_root_heading: false, show_root_toc_entry: false}}
"""
CODE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\[\]]*|[^\[\]]*\[[^\[\]]*\]\([^()]*\))\]\(([^()\s#]+)(#[^()\s]*)?\)")
BRANCH = "blob/main"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    folder = Path(config.docs_dir)
    pages = [page.relative_to(folder).as_posix() for page in sorted(folder.glob(OPS))]
    for section in config.nav:
        for entries in section.values():
            if OPS in entries:
                place = entries.index(OPS)
                entries[place : place + 1] = [page for page in pages if page not in entries]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for path, site in OUTSIDE.items():
        files.append(File.generated(config, site, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    root = Path(config.config_file_path).parent
    families = [path.parent.name for path in sorted(root.glob("ecar_kernels/*/api.py"))]
    markdown = markdown.replace("<!-- ops -->", "\n".join(map(FAMILY.format, families)))
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
