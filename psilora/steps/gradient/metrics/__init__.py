"""The metrics of a gradient step: statistics, running averages, and what they are raised to."""
