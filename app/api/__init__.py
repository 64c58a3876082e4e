"""The HTTP door, a file per section of the contract: parse, call one use case, answer."""
