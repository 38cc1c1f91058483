"""The page to try things on, served at `/`: files of this folder, without a build step.

Everything it needs is here, so it works offline, and its content security policy can forbid the
rest: no script, style, font or image from elsewhere, nothing inline, no framing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response

FOLDER = Path(__file__).parent

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
"""Files of these kinds are served; no other file of the folder is."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}
"""Of every file; browsers ask again each time and mostly hear that nothing changed."""


def add_page(app: FastAPI) -> None:
    """Serves the page at `/` and its files below `/page/`; they are read once, here."""
    for route, path in _files().items():
        _add_file(app, route, path)


def page_paths() -> list[str]:
    """Where the page and its files are served."""
    return list(_files())


def _files() -> dict[str, Path]:
    files = {"/": FOLDER / "index.html"}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in TYPES and path.name != "index.html":
            files[f"/page/{path.relative_to(FOLDER).as_posix()}"] = path
    return files


def _add_file(app: FastAPI, route: str, path: Path) -> None:
    content = path.read_bytes()
    tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
    headers = {**HEADERS, "ETag": tag}

    @app.api_route(route, methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=TYPES[path.suffix], headers=headers)
