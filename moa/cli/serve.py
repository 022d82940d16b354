"""`moa serve`: reads the options and starts the server. Heavy modules are imported inside the command."""

import os
from pathlib import Path
from typing import Annotated

import typer

from moa.cli.app import opened
from moa.core.errors import NothingReleased, RegistryError, UsageError


def serve(
    host: Annotated[str, typer.Option(help="Address to listen at; any but a loopback address needs a key.",
                                      metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = a free one, which is printed.")] = 8000,
    key_file: Annotated[Path | None, typer.Option(
        help="File with the key that clients must send as a bearer; MOA_API_KEY by default.", metavar="FILE",
        exists=True, dir_okay=False)] = None,
    poll: Annotated[float, typer.Option(min=0.1, help="Seconds between two look-ups of the champion.")] = 5.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests decoded together.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=1, help="Most requests that wait; more are refused with 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 1024,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 2048,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest request, in bytes.")] = 262_144,
    max_connections: Annotated[int, typer.Option(
        min=1, help="Most connections at once; beyond, the one that waits longest for its client is closed.")] = 1000,
    keep_alive: Annotated[float, typer.Option(
        min=0, help="Seconds that a connection may idle between requests; more than a proxy in front keeps it.",
        metavar="SECONDS")] = 5.0,
    backend: Annotated[str | None, typer.Option(
        help="OpenAI-compatible server that decodes, with the adapters of `moa export DIR --format vllm`; "
             "this server then only routes.", metavar="URL")] = None,
    backend_key_file: Annotated[Path | None, typer.Option(
        help="File with the key that the backend asks for.", metavar="FILE", exists=True, dir_okay=False)] = None,
    backend_base: Annotated[str | None, typer.Option(
        help="The backend's name of the base; read from its list of models by default.", metavar="NAME")] = None,
    keep_prompts: Annotated[int | None, typer.Option(
        min=0, help="Megabytes of prompts that are kept for `moa drift` in .moa/evidence, without personal data; 0 = "
                    "none; drift.keep of params.yaml by default.", metavar="MB")] = None,
) -> None:
    """Serve the champion as an OpenAI server, and every champion after it, until Ctrl-C."""
    if backend is None and (backend_key_file or backend_base):
        raise UsageError("--backend-key-file and --backend-base need --backend: give its URL, too.")
    key = _key(key_file)   # before `opened` changes the current folder: the paths may be relative
    backend_key = _key(backend_key_file) if backend_key_file else None
    workspace, config = opened()
    from moa.core.config import NO_DOMAIN
    from moa.serving.batcher import Limits
    from moa.serving.connections import ConnectionLimits
    from moa.serving.server import serve as run
    from moa.serving.state import Settings

    settings = Settings(host=host, port=port, key=key, poll=poll, body_bytes=max_body, prompt_tokens=max_prompt_tokens,
                        max_tokens=max_tokens, limits=Limits(rows=max_batch, waiting=max_waiting),
                        backend=backend, backend_key=backend_key, backend_base=backend_base,
                        keep=config.drift.keep if keep_prompts is None else keep_prompts,
                        bounds=ConnectionLimits(connections=max_connections, idle_seconds=keep_alive))
    try:
        run(workspace, config, settings)
    except RegistryError:
        if not config.domains:   # a workspace without domains has no releases
            raise NothingReleased(NO_DOMAIN) from None
        raise


def _key(file: Path | None) -> str | None:
    """The key in `file`, or without a file that of MOA_API_KEY, if it is set. Raises UsageError for a malformed key."""
    name = "MOA_API_KEY" if file is None else str(file)
    try:
        key = os.environ.get("MOA_API_KEY") if file is None else file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        raise UsageError(f"{name} cannot be read as text.") from None
    if key is not None and (not key or not key.isprintable() or not key.isascii() or " " in key):
        raise UsageError(f"{name} holds no key: a key is one word of printable ASCII.")
    return key
