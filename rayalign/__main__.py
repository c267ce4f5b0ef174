"""`python -m rayalign VERB --flag value ...`, where the command `rayalign` is not on the path."""

from rayalign.main import main

if __name__ == "__main__":
    main(prog="python -m rayalign")
