"""What every command shares. Nothing in here knows a command."""
