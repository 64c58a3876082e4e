"""One verb a file, its whole story. No use case calls another."""
