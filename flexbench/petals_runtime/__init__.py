"""What every command that runs Petals itself needs: its imports, its requirement, its processes.

Nothing else in flexbench imports petals or hivemind, see `imports`.
"""
