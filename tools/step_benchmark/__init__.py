"""The parts of `hysparse benchmark step`."""
