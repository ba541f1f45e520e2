"""A study: models, seeds and a token budget, run in portions on whatever GPUs there are."""
