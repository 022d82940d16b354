"""`moa`, whose server's worker a test can hold, so that no test needs an answer to be slow or quick.

    python held_server.py serve --port 0

While the file that MOA_TEST_HOLD names is there, no batch is begun; one that would begin makes the file with `.begun`
at its end. MOA_TEST_BOUNDS, a JSON object, has other deadlines of connections than a server's own.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moa.cli import main
from moa.serving import active_release, connections
from moa.serving.batcher import Job

HOLD = Path(os.environ["MOA_TEST_HOLD"])
BEGUN = HOLD.with_name(f"{HOLD.name}.begun")
Work = Callable[[Sequence[Job]], Any]


def held(work: Work) -> Work:
    def wait(jobs: Sequence[Job]) -> Any:
        if HOLD.exists():
            BEGUN.touch()
            while HOLD.exists():
                time.sleep(0.005)
            BEGUN.unlink(missing_ok=True)
        return work(jobs)

    return wait


active_release.generate_answers = held(active_release.generate_answers)
active_release.route_requests = held(active_release.route_requests)
connections.ConnectionLimits = partial(   # type: ignore[misc, assignment]
    connections.ConnectionLimits, **json.loads(os.environ.get("MOA_TEST_BOUNDS", "{}")))
main.main()
