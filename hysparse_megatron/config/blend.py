"""What `data.blend` says: datasets with weights."""


def num_datasets(blend: str | None) -> int:
    """How many datasets are open in a run; one without a blend."""
    return len(parse_blend(blend)) if blend else 1


def parse_blend(text: str) -> list[tuple[float, str]]:
    """`"0.7 data/web; 0.3 data/code"` -> weights and paths. ValueError says what is wrong."""
    parts = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        weight, _, path = part.partition(" ")
        try:
            value = float(weight)
        except ValueError:
            value = float("nan")
        if not 0 < value < float("inf") or not path.strip():
            raise ValueError(f"{part!r}: expected a positive weight and a path, like 0.7 data/web")
        parts.append((value, path.strip()))
    if not parts:
        raise ValueError("no dataset in it; expected like 0.7 data/web; 0.3 data/code")
    return parts
