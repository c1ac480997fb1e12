"""What the commands do, as functions: names of checkpoints and texts in, results out.

Jobs print nothing. They return plain data, with a ``to_dict`` if it is kept as JSON, show progress
bars, and call a ``notify`` with what must be known before a long run starts.
"""

from typing import TYPE_CHECKING

from llama import lazy

if TYPE_CHECKING:
    from short_gpt.checkpoints.scores import ChosenLayers, SavedScores, chosen
    from short_gpt.jobs.api import (
        compare_checkpoint,
        convert,
        demo,
        evaluate,
        generate,
        heal,
        prune,
        rank,
        reproduce,
        shrink,
    )
    from short_gpt.jobs.comparing import ComparisonResult, Row, compare
    from short_gpt.jobs.healing import HealingResult
    from short_gpt.jobs.pruning import PruneResult
    from short_gpt.jobs.ranking import Ranking
    from short_gpt.jobs.reproduction import (
        PaperComparison,
        ReproductionResult,
        compare_with_paper,
        identify,
    )
    from short_gpt.jobs.saving import NotUploadedError
    from short_gpt.jobs.shrink_result import ShrinkResult, StateReport
else:
    __getattr__, __dir__ = lazy(__name__)


__all__ = ["ChosenLayers", "ComparisonResult", "HealingResult", "NotUploadedError"]
__all__ += ["PaperComparison", "PruneResult", "Ranking", "ReproductionResult", "Row"]
__all__ += ["SavedScores", "ShrinkResult", "StateReport", "chosen", "compare"]
__all__ += ["compare_checkpoint", "compare_with_paper", "convert", "demo", "evaluate", "generate"]
__all__ += ["heal", "identify", "prune", "rank", "reproduce"]
__all__ += ["shrink"]
