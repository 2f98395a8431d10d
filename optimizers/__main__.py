"""``python -m optimizers``: the command line, or one line that says what to install."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exit with 2 where the packages it needs are not installed."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"the command line needs {error.name}, which is not installed; "
            'run `pip install "optimizer-zoo[harness]"`.',
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    from optimizers.cli import app

    app(prog_name="optimizers")


if __name__ == "__main__":
    main()
