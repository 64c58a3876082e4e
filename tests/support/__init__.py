"""What several tests need: real servers on free ports."""
