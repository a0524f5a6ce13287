"""``python tests/resharding.py DIRECTORY``: runs that go on with another number of processes, and one that does not.

Prints, as JSON, the losses of each, and how far its weights are from those of a run of one process. DIRECTORY/four is
what four processes left that each had a share of the weights.
"""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from forked_runs import finish, rows_of, start, weights_of  # noqa: E402
from tiny_run import arguments  # noqa: E402

PROCESSES = (1, 2, 4, 1)


def program(directory: Path) -> None:
    argv = arguments(directory, "--batch-size", "8", "--dropout", "0", "--eval-tokens", "64")
    results, log = {}, directory / "log"
    finish(start([*argv, "--out", str(directory / "whole")], 1, log), log)
    whole = weights_of(directory / "whole")
    for shard in ("none", "fsdp2"):
        run, files = directory / shard, []
        shutil.rmtree(directory / "four", ignore_errors=True)
        for stage, processes in enumerate(PROCESSES, start=1):
            options = ["--resume", str(run)] if stage > 1 else [*argv, "--out", str(run)]
            options += ["--steps", str(2 * stage), "--shard", shard if processes > 1 else "none"]
            options += ["--save-every", "1", "--async-save" if shard == "fsdp2" else "--no-async-save"]
            finish(start(options, processes, log), log)
            if processes == 4:
                shutil.copytree(run, directory / "four")
            files.append(sorted(path.name for path in (run / "checkpoint").iterdir()))
        weights = weights_of(run)
        assert weights.keys() == whole.keys()
        results[shard] = {
            "losses": [row["loss"] for row in rows_of(run)],
            "expected": [row["loss"] for row in rows_of(directory / "whole")],
            "farthest weight": max(float((weights[name] - whole[name]).abs().max()) for name in whole),
            "files": files,
        }
    print(json.dumps(results))


if __name__ == "__main__":
    program(Path(sys.argv[1]))
