"""Which text chooses the layers: rankings of several, and each one's choice judged on all."""

from short_gpt.experiments.calibration.rankings import Agreement, WindowScores, agreement
from short_gpt.experiments.calibration.run import Apart, Calibrated, calibrate
from short_gpt.experiments.calibration.trust import (
    CHECKED,
    MIX,
    SHARE,
    Crossed,
    Trust,
    trust,
)

__all__ = [
    "CHECKED",
    "MIX",
    "SHARE",
    "Agreement",
    "Apart",
    "Calibrated",
    "Crossed",
    "Trust",
    "WindowScores",
    "agreement",
    "calibrate",
    "trust",
]
