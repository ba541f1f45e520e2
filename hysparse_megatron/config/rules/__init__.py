"""Rules of a configuration, by section: each yields the problems it finds."""
