"""`idem up` and what goes with it: real servers from packages, children that are watched, a demo, a benchmark."""
