"""A command of ours that begins later: `warm FILE MODULE ARGUMENT…`.

It imports the module at once, which takes a second, waits until the file has variables of its environment, as JSON,
and then is `bourse ARGUMENT…`.
"""

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

POLL_SECONDS = 0.02

if __name__ == "__main__":
    from bourse_cli.root import main

    begin, module = Path(sys.argv.pop(1)), sys.argv.pop(1)
    import_module(module)
    while not begin.exists():
        time.sleep(POLL_SECONDS)
    os.environ.update(json.loads(begin.read_text("utf-8")))
    main()
