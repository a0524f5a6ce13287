import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from train.interrupt import SIGNALS, Interrupted, Interruptions

ROOT = Path(__file__).parents[1]
GRACE, ONE_PRESS = 0.5, 1  # instead of the product's seconds
# Minutes of native code, which lets other threads run and handles no signal.
PROGRAM = f"""
import hashlib
from train import interrupt
interrupt.GRACE, interrupt.ONE_PRESS = {GRACE}, {ONE_PRESS}
with interrupt.Interruptions().installed() as interruptions, interruptions.deferred():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_native_code(second):
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        try:
            process.send_signal(signal.SIGINT)
            time.sleep(2 * ONE_PRESS)
            assert process.poll() is None
            process.send_signal(second)
            assert process.wait(GRACE + 10) == 128 + second
        finally:
            process.kill()


def test_one_press_is_one_signal():
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(GRACE + 2)
        finally:
            process.kill()


def test_what_ends_by_itself_is_left_alone():
    handlers, threads = (
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        threading.active_count(),
    )
    for _ in range(2):
        with Interruptions().installed() as interruptions, interruptions.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            assert interruptions.pending == signal.SIGINT
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert signal.set_wakeup_fd(-1) == -1
    time.sleep(0.2)
    assert threading.active_count() == threads
