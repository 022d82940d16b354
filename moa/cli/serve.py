"""`moa serve`: argv to the server; nothing else. Light to import, as moa/cli/main.py is."""

import os
from pathlib import Path
from typing import Annotated

import typer

from moa.cli.app import opened
from moa.core.errors import NothingReleased, RegistryError, UsageError


def serve(
    host: Annotated[str, typer.Option(help="Address to listen at; any but this machine's own needs a key.",
                                      metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = a free one, which is printed.")] = 8000,
    key_file: Annotated[Path | None, typer.Option(
        help="File with the key that callers must send as a bearer; MOA_API_KEY is read without it.", metavar="FILE",
        exists=True, dir_okay=False)] = None,
    poll: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the champion.")] = 5.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests decoded together.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=1, help="Most requests that wait; more are refused with 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 1024,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 2048,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest request, in bytes.")] = 262_144,
    max_connections: Annotated[int, typer.Option(
        min=1, help="Most connections at once; beyond, the one that waits longest for its client is closed.")] = 1000,
    keep_alive: Annotated[float, typer.Option(
        min=0, help="Seconds that a connection may idle between two requests; more than a proxy in front keeps it.",
        metavar="SECONDS")] = 5.0,
    backend: Annotated[str | None, typer.Option(
        help="OpenAI-compatible server that decodes, with the adapters of `moa export DIR --format vllm`; this one "
             "then only routes.", metavar="URL")] = None,
    backend_key_file: Annotated[Path | None, typer.Option(
        help="File with the key that the backend asks for.", metavar="FILE", exists=True, dir_okay=False)] = None,
    backend_base: Annotated[str | None, typer.Option(
        help="The backend's name of the base; without it the backend is asked.", metavar="NAME")] = None,
    keep_prompts: Annotated[int | None, typer.Option(
        min=0, help="Megabytes of prompts that are kept for `moa drift` in .moa/evidence, personal data replaced; 0 = "
                    "none. drift.keep of params.yaml without it.", metavar="MB")] = None,
) -> None:
    """Serve the champion as an OpenAI server, and every champion after it, until Ctrl-C."""
    if backend is None and (backend_key_file or backend_base):
        raise UsageError("--backend-key-file and --backend-base say something of a --backend: give its URL, too.")
    key = _key(key_file)   # before the workspace's folder becomes the current one
    backend_key = _key(backend_key_file) if backend_key_file else None
    workspace, config = opened()
    from moa.core.config import NO_DOMAIN
    from moa.serving.batcher import Limits
    from moa.serving.connections import ConnectionLimits
    from moa.serving.server import Settings
    from moa.serving.server import serve as run

    settings = Settings(host=host, port=port, key=key, poll=poll, body_bytes=max_body, prompt_tokens=max_prompt_tokens,
                        max_tokens=max_tokens, limits=Limits(rows=max_batch, waiting=max_waiting),
                        backend=backend, backend_key=backend_key, backend_base=backend_base,
                        keep=config.drift.keep if keep_prompts is None else keep_prompts,
                        bounds=ConnectionLimits(connections=max_connections, idle_seconds=keep_alive))
    try:
        run(workspace, config, settings)
    except RegistryError:
        if not config.domains:   # then nothing can have been released either
            raise NothingReleased(NO_DOMAIN) from None
        raise


def _key(file: Path | None) -> str | None:
    """The key of the file, else of MOA_API_KEY, else None. Raises UsageError for one that protects nothing."""
    name = "MOA_API_KEY" if file is None else str(file)
    try:
        key = os.environ.get("MOA_API_KEY") if file is None else file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        raise UsageError(f"{name} cannot be read as text.") from None
    if key is not None and (not key or not key.isprintable() or not key.isascii() or " " in key):
        raise UsageError(f"{name} holds no key: a key is one word of printable ASCII.")
    return key
