"""The queue door: the same Runtime and use cases as the HTTP door, for jobs."""
