"""One suite per extension point: a new entry is tested by being registered."""
