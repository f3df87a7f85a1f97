"""`python -m memscope`: the same as the `memscope` command."""

from memscope.cli.main import main

if __name__ == "__main__":
    main()
