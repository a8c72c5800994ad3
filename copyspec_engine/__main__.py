"""`python -m copyspec_engine` is the `copyspec` command."""

from copyspec_engine.cli.main import main

if __name__ == "__main__":
    main()
