import sys

import pytest
from soak import Sample, drift, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def test_drift_compares_the_end_with_what_follows_the_start():
    flat = [Sample(seconds, 100 if seconds > 5 else 900, 50) for seconds in range(1, 101)]
    assert drift(flat) == drift(flat, "anonymous") == 0
    rising = [Sample(seconds, 1000 + seconds, 50) for seconds in range(1, 101)]
    assert drift(rising) == pytest.approx(1095.5 / 1015.5 - 1)
    assert drift(rising, "anonymous") == 0


def test_a_program_that_keeps_memory_is_seen():
    leak = "import time\nkept = []\nwhile True:\n    kept.append(b'x' * 200_000)\n    time.sleep(0.005)"
    assert drift(soak([sys.executable, "-c", leak], 2, 0.05), "anonymous") > 0.02


def test_a_program_that_ends_is_no_soak():
    with pytest.raises(RuntimeError, match=r"must go on for 5 s. It ended with 3"):
        soak([sys.executable, "-c", "raise SystemExit(3)"], 5, 0.1)
