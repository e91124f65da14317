"""``python -m analyses`` is the command ``surgery``."""

from analyses.cli import main

main()
