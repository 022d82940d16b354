"""Swagger UI at /docs: a page that shows the OpenAPI document, and sends requests.

Its files are those of the package fastapi_swagger. The page's policy lets it ask this server alone.
"""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

SCRIPT, STYLE, ICON = "swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"
TYPES = {SCRIPT: "text/javascript", STYLE: "text/css", ICON: "image/png"}
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
          "img-src 'self' data:")


def add_page(app: FastAPI, dependencies: Sequence[Any]) -> None:
    """Add the page and its files to the application, with these dependencies of their routes."""

    @app.get("/docs", include_in_schema=False, dependencies=dependencies)
    async def docs() -> HTMLResponse:
        page = get_swagger_ui_html(   # addresses relative to the page's own: a proxy may put a prefix before all paths
            openapi_url="openapi.json", title=app.title, swagger_js_url=f"docs/{SCRIPT}",
            swagger_css_url=f"docs/{STYLE}", swagger_favicon_url=f"docs/{ICON}",
            swagger_ui_parameters={"validatorUrl": None})   # by default another host validates the document
        page.headers["Content-Security-Policy"] = POLICY
        return page

    @app.get("/docs/{name}", include_in_schema=False, dependencies=dependencies)
    def docs_file(name: str) -> Response:
        if name not in TYPES:
            raise HTTPException(404)
        return Response((files("fastapi_swagger") / "resources" / name).read_bytes(), media_type=TYPES[name])
