"""`python -m app.cli`: how the stack starts its own children, whatever lies on the PATH."""

from app.cli import main

main()
