"""What every run needs, of whatever it is a run.

`errors` are those that a user can mend, `progress` shows how far it is, `results` and `state` are
its files, `digest` tells contents apart, `replicas` shares windows among processes, `abort` ends
all of them with one message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama.lazy import lazy

if TYPE_CHECKING:
    from short_gpt.runtime.digest import weights_digest
    from short_gpt.runtime.errors import (
        USER_ERRORS,
        MissingPackageError,
        NotFiniteError,
        ShortGPTError,
    )
    from short_gpt.runtime.results import (
        environment,
        machine,
        read_record,
        versions,
        write_record,
    )
    from short_gpt.runtime.state import StateFile
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "USER_ERRORS",
    "MissingPackageError",
    "NotFiniteError",
    "ShortGPTError",
    "StateFile",
    "environment",
    "machine",
    "read_record",
    "versions",
    "weights_digest",
    "write_record",
]
