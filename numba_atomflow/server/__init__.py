"""`numba-atomflow serve`: an HTTP server that speaks OpenAI's protocol, for one engine with one stream of tokens.

`app` has the routes, `stream` the queue and the thread that generates, `fields` what requests may contain. Needs the
extra `serve` (Starlette, uvicorn, pydantic, prometheus-client), which is imported with the modules of this package.
"""
