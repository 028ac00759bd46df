"""One training loop: any dataset and loss, several processes, averaged weights, bit-exact resume."""

from bicm_diffusion.train.batches import keyed_order
from bicm_diffusion.train.checkpoints import saved_step
from bicm_diffusion.train.logs import scalar_log
from bicm_diffusion.train.optimizers import make_optimizer
from bicm_diffusion.train.options import TrainingOptions
from bicm_diffusion.train.trainer import Step, Trainer, train

__all__ = [
    "Step",
    "Trainer",
    "TrainingOptions",
    "keyed_order",
    "make_optimizer",
    "saved_step",
    "scalar_log",
    "train",
]
