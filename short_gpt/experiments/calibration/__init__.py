"""Which text chooses the layers: rankings of several, and each one's choice judged on all."""

from short_gpt.experiments.calibration.rankings import Agreement, WindowScores, agreement
from short_gpt.experiments.calibration.run import MIX, Apart, Calibrated, Crossed, calibrate

__all__ = [
    "MIX",
    "Agreement",
    "Apart",
    "Calibrated",
    "Crossed",
    "WindowScores",
    "agreement",
    "calibrate",
]
