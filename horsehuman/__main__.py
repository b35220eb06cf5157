"""Run the ``horsehuman`` command with ``python -m horsehuman``."""

from horsehuman.cli import main

if __name__ == "__main__":
    main()
