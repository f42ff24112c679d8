"""Choosing a policy: FlexGen's cost model (arXiv 2303.06865, section 4.3), with our own times.

`calibration` runs a few of the model's own layers through the engine, `memory` knows what a policy
takes, `linear` solves for the placement of one batch size, `simulation` plays the engine's schedule
through with the measured times, and `search` puts them together.
"""
