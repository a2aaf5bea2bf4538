"""From encoded sequences to the arrays of a batch."""
