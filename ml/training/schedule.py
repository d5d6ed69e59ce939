"""The learning rate as a function of the step, so that resuming needs no scheduler state."""


def learning_rate_at(step: int, *, peak: float, num_warmup_steps: int, num_steps: int) -> float:
    """Linear rise to the peak, then linear fall towards zero after the last step.

    Args:
        step: counted from 0.
    """
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    return peak * (num_steps - step) / max(num_steps - num_warmup_steps, 1)
