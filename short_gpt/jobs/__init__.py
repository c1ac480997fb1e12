"""What commands do, with one call: checkpoints and texts by their names in, results out.

Jobs print nothing. They return what they found as plain data with a ``to_dict`` where it is kept
as JSON, show progress bars, and tell a ``notify`` of what must be known before a long run starts.
"""

from short_gpt.jobs.answer import Answer
from short_gpt.jobs.calibration import Kinds, Ranked, Readings, calibrate_checkpoint
from short_gpt.jobs.cases import CaseNames, LoraNames, Shares
from short_gpt.jobs.choice import (
    Choice,
    Chosen,
    MethodChoice,
    PerplexityLimit,
    chosen,
)
from short_gpt.jobs.comparison import compare_checkpoint
from short_gpt.jobs.conversion import convert
from short_gpt.jobs.demonstration import Demo, DemoRun, run_demo
from short_gpt.jobs.distilling import Distilling
from short_gpt.jobs.drafting import Drafting, Drafts, draft
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
from short_gpt.jobs.pruning import Pruned, Written, prune, prune_by
from short_gpt.jobs.ranking import Ranking, rank
from short_gpt.jobs.reproduction import Paper, Reproduced, reproduce
from short_gpt.jobs.saving import Saving, TimedSaving
from short_gpt.jobs.scores import Scores, read_scores

__all__ = [
    "Answer",
    "CaseNames",
    "Choice",
    "Chosen",
    "Cut",
    "Demo",
    "DemoRun",
    "Distilling",
    "Drafting",
    "Drafts",
    "FewShotTasks",
    "Healing",
    "Kinds",
    "Learned",
    "LoraNames",
    "MethodChoice",
    "Opening",
    "Paper",
    "PerplexityLimit",
    "Pruned",
    "Ranked",
    "Ranking",
    "Reading",
    "Readings",
    "Reproduced",
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
    "Written",
    "calibrate_checkpoint",
    "chosen",
    "compare_checkpoint",
    "convert",
    "draft",
    "evaluate",
    "heal",
    "perplexity_of",
    "prune",
    "prune_by",
    "rank",
    "read_scores",
    "reproduce",
    "run_demo",
]
