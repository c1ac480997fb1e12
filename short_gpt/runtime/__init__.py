"""What every run needs: errors, progress bars, states on disk, digests, replicas, memory plans."""

from typing import TYPE_CHECKING

from llama import lazy

if TYPE_CHECKING:
    from short_gpt.runtime.digest import weights_digest
    from short_gpt.runtime.errors import (
        USER_ERRORS,
        MissingPackageError,
        NotFiniteError,
        ShortGPTError,
    )
    from short_gpt.runtime.state import (
        StateFile,
        environment,
        machine,
        read_record,
        versions,
        write_record,
    )
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["USER_ERRORS", "MissingPackageError", "NotFiniteError", "ShortGPTError", "StateFile"]
__all__ += ["environment", "machine", "read_record", "versions", "weights_digest", "write_record"]
