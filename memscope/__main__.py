"""The entry point: `memscope`, which is the same as `python -m memscope`."""

from __future__ import annotations

from memscope.interrupts import end_on_interrupt

__all__ = ["main"]


def main() -> None:
    """Run the command line `memscope`; Ctrl-C ends it from here on, imports included."""
    end_on_interrupt()
    from memscope.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
