"""What the commands do, as functions: names of checkpoints and texts in, results out.

Jobs print nothing. They return plain data, with a ``to_dict`` if it is kept as JSON, show progress
bars, and call a ``notify`` with what must be known before a long run starts. Settings import torch
only inside functions, so that the help appears immediately.
"""

from typing import TYPE_CHECKING

from llama.lazy import lazy

if TYPE_CHECKING:
    from short_gpt.jobs.calibration import (
        MIX,
        CalibrationResult,
        CrossResult,
        SplitWindows,
        WindowScores,
        agreement,
        calibrate,
        calibrate_checkpoint,
    )
    from short_gpt.jobs.cases import (
        Cases,
        LoraOptions,
        MethodAgreement,
        Readings,
        Row,
        Shares,
        TextChoice,
        TextKinds,
    )
    from short_gpt.jobs.comparing import Comparison, ComparisonResult, compare
    from short_gpt.jobs.comparison import DistillHealing, LoraHealing, compare_checkpoint
    from short_gpt.jobs.conversion import convert
    from short_gpt.jobs.dial import Dial, Shrinking
    from short_gpt.jobs.evaluation import evaluate, perplexity_of, write_samples
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
    from short_gpt.jobs.scores import ChosenLayers, SavedScores, chosen, read_scores
    from short_gpt.jobs.settings import Answer, Choice, HealingWindows, PruneOutput, Settings
    from short_gpt.jobs.shrinking import ShrinkResult, StateReport, shrink
    from short_gpt.wrappers.options import OpenOptions
else:
    __getattr__, __dir__ = lazy(__name__)


__all__ = ["MIX", "Answer", "CalibrationResult", "Cases", "Choice", "ChosenLayers", "Comparison"]
__all__ += ["ComparisonResult", "Conversion", "CrossResult", "Cut", "Dial", "DistillHealing"]
__all__ += ["HealingResult", "HealingWindows", "Hub", "LoraHealing", "LoraOptions"]
__all__ += ["MethodAgreement", "OpenOptions", "Pair", "PaperComparison", "PaperOrder"]
__all__ += ["PruneOutput", "PruneResult", "Ranking", "Reading", "Readings", "ReproductionResult"]
__all__ += ["Row", "Running", "SavedScores", "Saving", "Settings", "Shares", "ShrinkResult"]
__all__ += ["Shrinking", "SplitWindows", "StateReport", "Tasks", "TextChoice", "TextKinds"]
__all__ += ["TextSource", "WindowScores", "agreement", "calibrate", "calibrate_checkpoint"]
__all__ += ["chosen", "compare", "compare_checkpoint", "compare_with_paper", "convert", "evaluate"]
__all__ += ["heal", "identify", "paper_order", "perplexity_of", "prune", "published_scores", "rank"]
__all__ += ["read_scores", "reproduce", "shrink", "write_samples"]
