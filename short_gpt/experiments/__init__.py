"""Methods set side by side on one model, and layer lists set beside published ones."""

from short_gpt.experiments.calibration import Apart, Calibrated, calibrate
from short_gpt.experiments.compare import Cases, Compared, compare
from short_gpt.experiments.comparison import Comparison
from short_gpt.experiments.comparison_lora import DistillHealing, LoraHealing, LoraSettings
from short_gpt.experiments.paper_order import Pair, PaperOrder, bear_out
from short_gpt.experiments.published import (
    PaperComparison,
    compare_with_paper,
    identify,
    published_scores,
)
from short_gpt.experiments.rows import Agreement, Row

__all__ = [
    "Agreement",
    "Apart",
    "Calibrated",
    "Cases",
    "Compared",
    "Comparison",
    "DistillHealing",
    "LoraHealing",
    "LoraSettings",
    "Pair",
    "PaperComparison",
    "PaperOrder",
    "Row",
    "bear_out",
    "calibrate",
    "compare",
    "compare_with_paper",
    "identify",
    "published_scores",
]
