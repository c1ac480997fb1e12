"""What the commands do, as functions: names of checkpoints and texts in, results out.

Jobs print nothing. They return plain data, with a ``to_dict`` if it is kept as JSON, show progress
bars, and call a ``notify`` with what must be known before a long run starts. Settings import torch
only inside functions, so that the help appears immediately.
"""

from typing import TYPE_CHECKING

from llama.lazy import lazy

if TYPE_CHECKING:
    from short_gpt.checkpoints.scores import ChosenLayers, SavedScores, chosen
    from short_gpt.jobs.cases import (
        Cases,
        Row,
        Shares,
    )
    from short_gpt.jobs.comparing import ComparisonResult, compare, compare_checkpoint
    from short_gpt.jobs.conversion import convert
    from short_gpt.jobs.dial import Dial, Shrinking
    from short_gpt.jobs.evaluation import evaluate, write_samples
    from short_gpt.jobs.healing import HealingResult, heal
    from short_gpt.jobs.inputs import Cut, Reading, Running, Tasks, TextSource
    from short_gpt.jobs.pruning import PruneResult, prune
    from short_gpt.jobs.ranking import Ranking, rank
    from short_gpt.jobs.reproduction import (
        Pair,
        PaperComparison,
        PaperOrder,
        ReproductionResult,
        compare_with_paper,
        identify,
        paper_order,
        published_scores,
        reproduce,
    )
    from short_gpt.jobs.saving import Conversion, Hub, Saving
    from short_gpt.jobs.settings import Answer, Choice, HealingWindows, PruneOutput, Settings
    from short_gpt.jobs.shrinking import ShrinkResult, StateReport, shrink
    from short_gpt.wrappers.options import OpenOptions
else:
    __getattr__, __dir__ = lazy(__name__)


__all__ = ["Answer", "Cases", "Choice", "ChosenLayers", "ComparisonResult"]
__all__ += ["Conversion", "Cut", "Dial", "HealingResult", "HealingWindows", "Hub"]
__all__ += ["OpenOptions", "Pair"]
__all__ += ["PaperComparison", "PaperOrder", "PruneOutput", "PruneResult", "Ranking", "Reading"]
__all__ += ["ReproductionResult", "Row", "Running", "SavedScores", "Saving", "Settings", "Shares"]
__all__ += ["ShrinkResult", "Shrinking", "StateReport", "Tasks", "TextSource", "chosen", "compare"]
__all__ += ["compare_checkpoint", "compare_with_paper", "convert", "evaluate", "heal", "identify"]
__all__ += ["paper_order", "prune", "published_scores", "rank", "reproduce"]
__all__ += ["shrink", "write_samples"]
