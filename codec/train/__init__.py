"""Training: networks, data, loop, export. The only part that needs torch: `pip install hourglass-codec[train]`.

python -m hourglass.codec.train run PICTURES --out runs/a
python -m hourglass.codec.train export runs/a --id my-model-1 --pictures PICTURES --measure TEST_PICTURES
"""

import sys

import click

from hourglass.codec.errors import HourglassError


def run_command(command: click.Command) -> None:
    """Run a command of this package with the process's arguments; an error of ours is a message and exit code 1."""
    try:
        command(standalone_mode=True)
    except HourglassError as exc:
        click.echo(f"error: {exc}", err=True)
        sys.exit(1)
