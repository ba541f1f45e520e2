"""Many mistakes in a configuration as one readable error."""

from collections.abc import Sequence

from hysparse_megatron.errors import ConfigError, Problem


def as_error(problems: Sequence[Problem]) -> ConfigError:
    """One error that lists every problem, with the columns aligned."""
    key_width = max(len(problem.key) for problem in problems) + 1
    got_width = min(max(len(problem.got) for problem in problems), 40) + 1
    lines = [f"{len(problems)} problem{'s' * (len(problems) > 1)} in the configuration:"]
    for problem in problems:
        key, got = f"{problem.key}:".ljust(key_width), f"{problem.got};".ljust(got_width)
        allowed = problem.allowed.replace("\n", "\n    ")
        lines.append(f"  {key} got {got} allowed {allowed}")
    return ConfigError("\n".join(lines), problems)
