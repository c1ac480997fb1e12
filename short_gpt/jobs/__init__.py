"""What commands do, with one call: checkpoints and texts by their names in, results out.

Jobs print nothing. They return what they found as plain data with a ``to_dict`` where it is kept
as JSON, show progress bars, and tell a ``notify`` of what must be known before a long run starts.
"""

from short_gpt.jobs.answer import Answer
from short_gpt.jobs.calibrating import MIX, Apart, Calibrated, Crossed, calibrate
from short_gpt.jobs.calibration import Kinds, Ranked, Readings, calibrate_checkpoint
from short_gpt.jobs.calibration_rankings import WindowScores, agreement
from short_gpt.jobs.cases import CaseNames, LoraNames, Shares
from short_gpt.jobs.choice import (
    Choice,
    Chosen,
    MethodChoice,
    PerplexityLimit,
    chosen,
)
from short_gpt.jobs.comparing import Cases, Compared, compare
from short_gpt.jobs.comparison import compare_checkpoint
from short_gpt.jobs.comparison_cells import Comparison
from short_gpt.jobs.comparison_lora import DistillHealing, LoraHealing, LoraSettings
from short_gpt.jobs.conversion import convert
from short_gpt.jobs.demonstration import Demo, DemoRun, run_demo
from short_gpt.jobs.distilling import Distilling
from short_gpt.jobs.evaluation import FewShotTasks, Reading, Tasks, evaluate, perplexity_of
from short_gpt.jobs.healed import Healing
from short_gpt.jobs.healing import heal
from short_gpt.jobs.healing_settings import Learned, Settings
from short_gpt.jobs.inputs import (
    Cut,
    Opening,
    Running,
    Scoring,
    Streaming,
    StridedCut,
    TextSource,
)
from short_gpt.jobs.paper_order import Pair, PaperOrder, bear_out
from short_gpt.jobs.pruning import Pruned, Written, prune, prune_by
from short_gpt.jobs.published import PaperComparison, compare_with_paper, identify, published_scores
from short_gpt.jobs.ranking import Ranking, rank
from short_gpt.jobs.reproduction import Paper, Reproduced, reproduce
from short_gpt.jobs.rows import Agreement, Row
from short_gpt.jobs.saving import Saving, TimedSaving
from short_gpt.jobs.scores import Scores, read_scores

__all__ = [
    "MIX",
    "Agreement",
    "Answer",
    "Apart",
    "Calibrated",
    "CaseNames",
    "Cases",
    "Choice",
    "Chosen",
    "Compared",
    "Comparison",
    "Crossed",
    "Cut",
    "Demo",
    "DemoRun",
    "DistillHealing",
    "Distilling",
    "FewShotTasks",
    "Healing",
    "Kinds",
    "Learned",
    "LoraHealing",
    "LoraNames",
    "LoraSettings",
    "MethodChoice",
    "Opening",
    "Pair",
    "Paper",
    "PaperComparison",
    "PaperOrder",
    "PerplexityLimit",
    "Pruned",
    "Ranked",
    "Ranking",
    "Reading",
    "Readings",
    "Reproduced",
    "Row",
    "Running",
    "Saving",
    "Scores",
    "Scoring",
    "Settings",
    "Shares",
    "Streaming",
    "StridedCut",
    "Tasks",
    "TextSource",
    "TimedSaving",
    "WindowScores",
    "Written",
    "agreement",
    "bear_out",
    "calibrate",
    "calibrate_checkpoint",
    "chosen",
    "compare",
    "compare_checkpoint",
    "compare_with_paper",
    "convert",
    "evaluate",
    "heal",
    "identify",
    "perplexity_of",
    "prune",
    "prune_by",
    "published_scores",
    "rank",
    "read_scores",
    "reproduce",
    "run_demo",
]
