"""The experiments of Sharma & Vu (arXiv 2606.24898).

    python -m train.paper sweep      train the nine conditions with several seeds, and put them side by side
    python -m train.paper claims     judge every claim of the paper by the runs of a sweep, on one page
    python -m train.paper frontier   perplexity against speed at K = 1..4

Each has its options after --help. Given again, a command takes up what it has done already.
"""

import shlex
import sys
from collections.abc import Sequence

from train.interrupt import Interrupted, Interruptions
from train.output import lasting_output
from train.paper import frontier, judging, sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's).

    Returns the exit code: the command's; 2 after one line on stderr if the input is bad; 128 + n if signal n stopped
    it.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    with lasting_output(), Interruptions().installed() as interruptions:
        try:
            match words:
                case ["sweep", *options]:
                    return sweep.run(options, interruptions)
                case ["claims", *options]:
                    return judging.run(options)
                case ["frontier", *options]:
                    return frontier.run(options, interruptions)
                case ["-h" | "--help"]:
                    print(__doc__)
                    return 0
            got = shlex.join(words)
            raise ValueError(f"the command must be sweep, claims or frontier, before its options. Got {got!r}.")
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except Interrupted as interrupted:
            print(f"\nstopped. To continue:\n  {shlex.join([sys.executable, '-m', 'train.paper', *words])}")
            return 128 + interrupted.signum


if __name__ == "__main__":
    sys.exit(main())
