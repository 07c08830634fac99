"""`python -m tamba`: the same as the command `tamba`."""

from tamba.cli import main

if __name__ == "__main__":
    main()
