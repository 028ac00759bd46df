"""Policy gradients: samplers whose steps are Gaussian policies, recorded trajectories, and losses on them."""

from bicm_diffusion.policy.advantages import group_advantages
from bicm_diffusion.policy.losses import policy_loss
from bicm_diffusion.policy.rollout import recorded_log_prob, rollout, step_divergence
from bicm_diffusion.policy.tables import PolicyTable, cps_table, ddim_table, flow_grpo_table
from bicm_diffusion.policy.trajectory import Trajectory

__all__ = [
    "PolicyTable",
    "Trajectory",
    "cps_table",
    "ddim_table",
    "flow_grpo_table",
    "group_advantages",
    "policy_loss",
    "recorded_log_prob",
    "rollout",
    "step_divergence",
]
