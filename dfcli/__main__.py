"""`python -m dfcli` is the same program as `df`."""

from dfcli.cli.app import main

if __name__ == "__main__":
    main()
