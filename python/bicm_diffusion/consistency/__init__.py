"""Consistency training: its tables, its loss, and the levels that samplers visit."""

from bicm_diffusion.consistency.grid import (
    LevelTable,
    level_count,
    level_probabilities,
    partner_probabilities,
)
from bicm_diffusion.consistency.objective import BctLoss, Levels, bct_loss, draw_levels
from bicm_diffusion.consistency.schedules import PRESETS, ConsistencySchedule
from bicm_diffusion.schedules.karras import karras_levels

__all__ = [
    "PRESETS",
    "BctLoss",
    "ConsistencySchedule",
    "LevelTable",
    "Levels",
    "bct_loss",
    "draw_levels",
    "karras_levels",
    "level_count",
    "level_probabilities",
    "partner_probabilities",
]
