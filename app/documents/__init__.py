"""What MongoDB holds, a file per noun: its shape, its indexes, and the questions asked of it."""
