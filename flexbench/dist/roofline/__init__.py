"""How close a run came to what its machine can do: ceilings, counted work, floors, their table.

Data flows one way: `ceilings` measures the machine, `counting` counts what a placement computes and
moves (pure), `floors` divides the one by the other (pure), `comparison` sets them beside what a run
took, and `table` shows that. Nothing here takes part in a run.
"""
