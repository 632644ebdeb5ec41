"""A process that sends one channel's messages with Apprise, so that a channel has an environment that is its own.

Apprise's plug-ins know only the environment's proxy, and not all of their calls have a deadline: this process is ended.
Each line of the standard input is an address, a title and a body as JSON; the answer is null, or why it was refused.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from functools import cache
from typing import Any

from apprise import Apprise, AppriseAsset, NotifyFormat, OverflowMode

# What Apprise logs may show an address; its results have the reasons, too.
logging.getLogger("apprise").propagate = False
logging.getLogger("apprise").addHandler(logging.NullHandler())


@cache
def open_service(url: str) -> Any:
    """Return Apprise's service for an address, None if it does not know one."""
    # No pictures of Apprise's, from a host that may be blocked.
    asset = AppriseAsset(app_id="bourse-stream", image_url_mask="", image_url_logo="", async_mode=False)
    service = Apprise.instantiate(url, asset=asset)
    if service is not None:
        service.overflow_mode = OverflowMode.SPLIT
        service.request_rate_per_sec = min(service.request_rate_per_sec, 1.0)
    return service


def main() -> None:
    """Answer until the input ends, as it does when the consumer ends, however it ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        url, title, body = json.loads(line)
        apprise = Apprise()
        apprise.add(open_service(url))
        result = apprise.notify(body, title, body_format=NotifyFormat.TEXT)
        logs = [entry.message for service in result.results for entry in service.logs()]
        reason = None if result else " ".join(logs[-1:]) or "Apprise gives no reason"
        print(json.dumps(reason), file=answers, flush=True)


if __name__ == "__main__":
    main()
