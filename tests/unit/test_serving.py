"""The server that `make demo` and others start ends with whoever started it."""

from __future__ import annotations

import os
import signal

import pytest

from tools.serving import ended_in_order


def test_sigterm_ends_the_block_and_is_as_before_behind_it() -> None:
    before, cleaned = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as ended:
        try:
            with ended_in_order():
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
        finally:
            cleaned.append(True)
    assert ended.value.code == 128 + signal.SIGTERM
    assert cleaned and signal.getsignal(signal.SIGTERM) is before
