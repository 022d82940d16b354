"""The documents as a site: the links between its pages lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

from tests.tiny import REPOSITORY

HREF = re.compile(r'(?:href|src)="([^"#?]+)[^"]*"')


def test_every_link_within_the_site_has_its_page(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", tmp_path],
                   cwd=REPOSITORY, check=True, capture_output=True, env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""})
    pages = [path for path in tmp_path.rglob("*.html") if path.name != "404.html"]   # which may be at any address
    links = {(page, link) for page in pages for link in HREF.findall(page.read_text(encoding="utf-8"))
             if ":" not in link and not link.startswith("//")}
    assert (tmp_path / "index.html", "reference.html") in links
    lost = {f"{page.name}: {link}" for page, link in links if not (page.parent / unquote(link)).exists()}
    assert not lost
