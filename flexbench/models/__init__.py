"""Shapes of the model families, as data: no weights, no hub, no framework."""
