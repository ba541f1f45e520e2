"""What several rules ask."""


def is_multiple(value: int, unit: int) -> bool:
    """Also true where either is no positive number: their bounds have said so already."""
    return value < 1 or unit < 1 or value % unit == 0
