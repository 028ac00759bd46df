"""Consistency training: its tables, its loss, and the levels that samplers visit."""

from bicm_diffusion.consistency.grid import (
    LevelTable,
    discretization,
    level_probabilities,
    partner_probabilities,
)
from bicm_diffusion.consistency.objective import BctLoss, Levels, bct_loss, draw_levels
from bicm_diffusion.consistency.schedules import PRESETS, ConsistencySchedule

__all__ = [
    "PRESETS",
    "BctLoss",
    "ConsistencySchedule",
    "LevelTable",
    "Levels",
    "bct_loss",
    "discretization",
    "draw_levels",
    "level_probabilities",
    "partner_probabilities",
]
