"""Consistency training and sampling: tables, the levels of a batch, and sampling schedules."""

from bicm_diffusion.consistency.grid import (
    LevelTable,
    level_count,
    level_probabilities,
    partner_probabilities,
)
from bicm_diffusion.consistency.levels import Levels, draw_levels
from bicm_diffusion.consistency.schedules import PRESETS, ConsistencySchedule
from bicm_diffusion.schedules.karras import karras_levels

__all__ = [
    "PRESETS",
    "ConsistencySchedule",
    "LevelTable",
    "Levels",
    "draw_levels",
    "karras_levels",
    "level_count",
    "level_probabilities",
    "partner_probabilities",
]
