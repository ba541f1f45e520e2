"""A hand-made model that can do nothing but look things up in its context."""

import re
from collections import Counter

from hysparse_megatron.evaluation.tasks import NUM_FREQUENT


def copy_from(prompt: str) -> str:
    """What it says after a prompt of any task."""
    if found := re.search(r"The secret number of (\w+) is$", prompt):
        return re.findall(rf"secret number of {found[1]} is (\d+)", prompt)[0]
    if found := re.search(r"secret numbers of (\w+) are$", prompt):
        return ", ".join(re.findall(rf"secret numbers of {found[1]} is (\d+)", prompt))
    if found := re.search(r"variables that hold (\d+) are VAR$", prompt):
        holders = re.findall(rf"VAR (\w+) = {found[1]}", prompt)
        for name in holders:
            holders += re.findall(rf"VAR (\w+) = VAR {name}\.", prompt)
        return " ".join(holders)
    listed = prompt.partition(".")[0].split()
    return " ".join(word for word, _ in Counter(listed).most_common(NUM_FREQUENT))
