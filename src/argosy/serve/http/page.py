"""The chat page and the viewer of /openapi.json: files from a fixed table, read at the start.

Elsewhere: the files are in `serve/page`.
"""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from argosy.serve.http.failures import Refused

PAGE_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
    "woff2": "font/woff2",
}


async def page(request: Request) -> Response:
    """Show the chat page."""
    return _file(request, "index.html")


async def docs(request: Request) -> Response:
    """Show a reader of /openapi.json."""
    return _file(request, "docs.html")


async def favicon(request: Request) -> Response:
    """Show the page's icon, at the path where browsers look for it by default."""
    return _file(request, "icon.svg")


async def page_file(request: Request) -> Response:
    """Send a file of the chat page, from a fixed table."""
    return _file(request, request.path_params["name"])


def _file(request: Request, name: str) -> Response:
    found = request.app.state.page.get(name)
    if found is None:
        raise Refused(404, "there is no such file")
    return Response(found[0], media_type=found[1])


def read_page() -> dict[str, tuple[bytes, str]]:
    folder = files("argosy.serve").joinpath("page")
    found = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        kind = PAGE_TYPES.get(entry.name.rpartition(".")[2])
        if kind is not None:
            found[entry.name] = (entry.read_bytes(), kind)
    return found
