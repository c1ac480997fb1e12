"""What commands do, with one call: checkpoints and texts by their names in, results out.

Jobs print nothing. They return plain data with a ``to_dict`` where it is kept as JSON, show
progress bars, and call a ``notify`` with what must be known before a long run starts. Settings
import torch inside functions alone, so that the help appears at once.
"""

from typing import TYPE_CHECKING

from llama.lazy import lazy

if TYPE_CHECKING:
    from short_gpt.jobs.calibration import (
        MIX,
        Apart,
        Calibrated,
        Crossed,
        WindowScores,
        agreement,
        calibrate,
        calibrate_checkpoint,
    )
    from short_gpt.jobs.cases import (
        Agreement,
        Cases,
        Kinds,
        LoraSettings,
        Ranked,
        Readings,
        Row,
        Shares,
    )
    from short_gpt.jobs.comparing import Compared, Comparison, compare
    from short_gpt.jobs.comparison import DistillHealing, LoraHealing, compare_checkpoint
    from short_gpt.jobs.conversion import convert
    from short_gpt.jobs.dial import Dial, Shrinking
    from short_gpt.jobs.evaluation import evaluate, perplexity_of, write_samples
    from short_gpt.jobs.healing import Healing, heal
    from short_gpt.jobs.inputs import Cut, Reading, Running, Tasks, TextSource
    from short_gpt.jobs.pruning import Pruned, prune
    from short_gpt.jobs.ranking import Ranking, rank
    from short_gpt.jobs.reproduction import (
        Pair,
        PaperComparison,
        PaperOrder,
        Reproduced,
        compare_with_paper,
        identify,
        paper_order,
        published_scores,
        reproduce,
    )
    from short_gpt.jobs.saving import Conversion, Hub, Saving
    from short_gpt.jobs.scores import Chosen, Scores, chosen, read_scores
    from short_gpt.jobs.settings import Answer, Choice, HealingWindows, Settings, Written
    from short_gpt.jobs.shrinking import Look, Shrunk, shrink
    from short_gpt.wrappers.options import OpenOptions
else:
    __getattr__, __dir__ = lazy(__name__)


__all__ = ["MIX", "Agreement", "Answer", "Apart", "Calibrated", "Cases", "Choice", "Chosen"]
__all__ += ["Compared", "Comparison", "Conversion", "Crossed", "Cut", "Dial", "DistillHealing"]
__all__ += ["Healing", "HealingWindows", "Hub", "Kinds", "Look", "LoraHealing", "LoraSettings"]
__all__ += ["OpenOptions", "Pair", "PaperComparison", "PaperOrder", "Pruned", "Ranked", "Ranking"]
__all__ += ["Reading", "Readings", "Reproduced", "Row", "Running", "Saving", "Scores", "Settings"]
__all__ += ["Shares", "Shrinking", "Shrunk", "Tasks", "TextSource", "WindowScores", "Written"]
__all__ += ["agreement", "calibrate", "calibrate_checkpoint", "chosen", "compare", "paper_order"]
__all__ += ["compare_checkpoint", "compare_with_paper", "convert", "evaluate", "heal", "identify"]
__all__ += ["perplexity_of", "prune", "published_scores", "rank", "read_scores"]
__all__ += ["reproduce", "shrink", "write_samples"]
