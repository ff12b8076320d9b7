"""What each command does: one life cycle of a run, and one file a command."""
