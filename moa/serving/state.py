"""The state that a server's request handlers share: settings, the release that serves, the batcher, the counters."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moa.serving.batcher import Batcher, Limits
from moa.serving.connections import ConnectionLimits
from moa.serving.metrics import Metrics
from moa.serving.upstream import UpstreamServer

if TYPE_CHECKING:   # importing it loads torch
    from moa.serving.active_release import ReleaseWatcher


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server: address, keys and limits."""

    host: str = "127.0.0.1"
    port: int = 8000                  # 0 = a free one
    key: str | None = None            # bearer key that requests must carry; None = no key is required
    poll: float = 5.0                 # seconds between two look-ups of the champion
    body_bytes: int = 262_144         # largest request body
    prompt_tokens: int = 2048         # longest prompt
    max_tokens: int = 1024            # longest answer that a request may ask for
    limits: Limits = field(default_factory=Limits)   # of batches
    backend: str | None = None        # address of the server that decodes; None = this one decodes
    backend_key: str | None = None    # bearer key for the backend
    backend_base: str | None = None   # the backend's name of the base; None = the backend is asked
    keep: int = 0                     # megabytes of prompts that are logged; 0 = none
    bounds: ConnectionLimits = field(default_factory=ConnectionLimits)   # of connections


@dataclass(frozen=True)
class ServerState:
    """The parts of a running server that handlers use."""

    settings: Settings
    releases: "ReleaseWatcher"
    batcher: Batcher
    metrics: Metrics
    backend: UpstreamServer | None = None
