"""Names that are the library's own."""

CRITIC = "anyflow_critic"  # the adapter of the fake score: on a network of the student's, never part of the student


def of_critic(name: str) -> bool:
    """Whether a parameter or buffer belongs to the critic's adapter, by its name in the model."""
    return CRITIC in name.split(".")
