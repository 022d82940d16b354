"""A hook of mkdocs: pages of the site whose text lies outside of docs/."""

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
