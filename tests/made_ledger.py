"""train.py that also writes down what it trains on, to compare with the ledger.

`python tests/made_ledger.py FILE --key=value ...`: a line in FILE-<rank> for every step, before it
is made: the step and, per row of this process's batch, its source and a hash of its tokens.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import train

if __name__ == "__main__":
    made, trained = train.step, Path(f"{sys.argv[1]}-{os.environ.get('RANK', 0)}")

    def step(state, tokens, source):  # type: ignore[no-untyped-def]
        names = [state.order.names[i] for i in source.tolist()]
        hashes = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in tokens]
        line = {"step": state.step + 1, "rows": list(zip(names, hashes, strict=True))}
        with trained.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return made(state, tokens, source)

    train.step = step
    train.signals.listen()
    train.cli.run(lambda argv: train.main(argv[1:]))
