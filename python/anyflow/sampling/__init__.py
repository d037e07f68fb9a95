"""Any-step sampling of stock pipelines."""

from .context import any_step
from .scheduler import AnyStepScheduler

__all__ = ["AnyStepScheduler", "any_step"]
