"""How a command ends on several ranks when one of them fails: one message, and nobody waits."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist


def end_all(error: BaseException, *, line: str | None, code: int) -> NoReturn:
    """Ends this process, whatever its peers are waiting for; the launcher then ends them.

    Only the first rank that fails says why: the others fail alike, or because of it. Taking the
    process group apart would wait for peers, so nothing of the kind is done.

    Args:
        error: what ended the command.
        line: what to say on stderr; None shows the traceback.
        code: exit status.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not _first():
        time.sleep(2)  # a launcher that saw us end first could silence the one that speaks
    elif line is None and not lost(error):
        traceback.print_exception(error)
    else:
        reason = str(error).split("\n")[0]
        print(
            line or f"short-gpt: a rank was lost, or cannot be reached: {reason}", file=sys.stderr
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost(error: BaseException) -> bool:
    """Whether communication with the other ranks failed."""
    kinds = (dist.DistBackendError, dist.DistStoreError, dist.DistNetworkError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first() -> bool:
    """Whether no other rank has asked this before; True where they have no common store."""
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not launched and not dist.is_initialized():
        return True
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"short_gpt/end/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:
        return True
