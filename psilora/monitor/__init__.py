"""What an optimizer counts, measures and warns about."""
