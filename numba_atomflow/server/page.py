"""The chat page: files of this package, served as they are, under a policy that allows them and nothing else."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).with_name("static")
_TYPES = {
    "index.html": "text/html",
    "chat.css": "text/css",
    "api.js": "text/javascript",
    "chat.js": "text/javascript",
    "markdown.js": "text/javascript",
    "settings.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
PATHS = frozenset({"/", *(f"/page/{name}" for name in _TYPES if name != "index.html")})

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """A route for each of `PATHS`; the files are read now."""
    contents = {name: (_FOLDER / name).read_bytes() for name in _TYPES}

    async def serve(request: Request) -> Response:
        name = request.scope["path"].removeprefix("/page/").removeprefix("/") or "index.html"
        return Response(contents[name], headers=_HEADERS, media_type=_TYPES[name])

    return [Route(path, serve, methods=["GET"]) for path in sorted(PATHS)]
