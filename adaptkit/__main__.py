"""Run the command line with ``python -m adaptkit``, and as the command ``adaptkit``.

Nothing is imported above, so that an interrupt during the imports ends as any other does.
"""


def run() -> None:
    """Import the command line and run it; see `adaptkit.cli.main` for the exit codes."""
    try:
        from adaptkit.cli import run as begin

        begin()
    except KeyboardInterrupt as stop:
        import os

        os.write(2, b"interrupted\n")
        os._exit(getattr(stop, "code", 130))


if __name__ == "__main__":
    run()
