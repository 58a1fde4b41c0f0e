"""One step: its problems, what all processes know of them, their state, and the update of each kind of step."""
