"""``python -m horsehuman`` is the ``horsehuman`` command."""

from horsehuman.cli import main

if __name__ == "__main__":
    main()
