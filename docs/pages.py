"""A hook of mkdocs: pages of the site whose text lies outside of docs/."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "results.md": "benchmarks/RESULTS.md", "log.md": "LOG.md",
         "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add `PAGES` to the site's files."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links between files of the repository links between the site's pages."""
    folder = (REPOSITORY / PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    pages = {REPOSITORY / source: target for target, source in PAGES.items()}

    def on_site(match: re.Match[str]) -> str:
        path = (folder / match[1]).resolve()
        if path in pages:
            return f"]({pages[path]}"
        inside = path.is_relative_to(REPOSITORY / "docs")
        return f"]({path.relative_to(REPOSITORY / 'docs').as_posix() if inside else match[1]}"

    return re.sub(r"\]\(([\w./-]+\.md)", on_site, markdown)
