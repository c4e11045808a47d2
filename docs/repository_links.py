"""mkdocs hook: pages may link to any file of the repository, as on a code host.

A link such as `../configs/sdxl_dmpo.py` leaves docs/. The site gets a copy of the file, and the
link is rewritten to the copy. `README.md` is the site's home. Links of a copied page
are resolved the same way.
"""

import os
import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def _linked(page: pathlib.Path) -> dict[str, str]:
    """Maps each link of a page to the path in the site of the file that it names."""
    found: dict[str, str] = {}
    for match in _LINK.finditer(page.read_text("utf-8")):
        target = pathlib.Path(os.path.normpath(page.parent / match["path"]))
        if target == ROOT / "README.md":
            found[match["path"]] = "index.md"
        elif target.is_relative_to(DOCS):
            found[match["path"]] = str(target.relative_to(DOCS))
        elif target.is_relative_to(ROOT) and target.is_file():
            found[match["path"]] = str(target.relative_to(ROOT))
    return found


def on_files(files: Files, config: Any) -> Files:
    """Adds the files outside docs/ that pages link to, and those that these link to."""
    pages = [pathlib.Path(file.abs_src_path) for file in files.documentation_pages()]
    while pages:
        page = pages.pop()
        for name in sorted(set(_linked(page).values())):
            path = ROOT / name
            if files.get_file_from_path(name) or not path.is_file():
                continue
            files.append(File.generated(config, name, abs_src_path=str(path)))
            if path.suffix == ".md":
                pages.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links to the files' places in the site."""
    linked = _linked(pathlib.Path(page.file.abs_src_path))
    here = os.path.dirname(page.file.src_uri)

    def rewrite(match: re.Match[str]) -> str:
        name = linked.get(match["path"])
        path = match["path"] if name is None else os.path.relpath(name, here or ".")
        return path + (match["anchor"] or "")

    return _LINK.sub(rewrite, markdown)
