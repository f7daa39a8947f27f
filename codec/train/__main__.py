"""Commands: `python -m hourglass.codec.train run FOLDER --out RUN`, then `... export RUN --id ID --zoo FOLDER`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
import torch

from hourglass.codec import errors, image, runtime
from hourglass.codec.train import export as exporting
from hourglass.codec.train import loop, run_command
from hourglass.codec.train.classic import SHAPES, Kind
from hourglass.codec.train.data import list_training, load_pieces
from hourglass.codec.train.network import Shape

_DEFAULTS = loop.Settings()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@click.group()
def main() -> None:
    """Train a model from a folder of pictures, and export it for the codec."""


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--tier", help="Only pictures whose row in FOLDER/index.csv has this tier.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, or auto.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all]")
@click.option(
    "--classic",
    type=click.Choice(get_args(Kind)),
    help="Train a classic model in place of the flagship: strided and transposed convolutions, or pooling.",
)
@click.option("--grey", is_flag=True, help="With --classic: a model of grey pictures, with one channel.")
@click.option("--latent", default=Shape.latent, show_default=True, help="Channels of the code.")
@click.option("--trunk", default=Shape.trunk, show_default=True, help="Channels at 1/8 resolution.")
@click.option("--core", type=click.IntRange(4), help="Those of them that the blocks see. [default: five eighths]")
@click.option(
    "--analysis-blocks",
    nargs=2,
    type=int,
    default=Shape.analysis_blocks,
    show_default=True,
    help="Residual blocks of the analysis at 1/8 and at 1/16 resolution.",
)
@click.option("--steps", default=_DEFAULTS.steps, show_default=True, help="Steps of the whole run.")
@click.option("--batch", default=_DEFAULTS.batch, show_default=True, help="Crops in a step.")
@click.option("--crop", default=_DEFAULTS.crop, show_default=True, help="Side of a crop in pixels, a multiple of 64.")
@click.option(
    "--prior-steps", default=_DEFAULTS.prior_steps, show_default=True, help="First steps, for the prior alone."
)
@click.option(
    "--post", type=click.IntRange(0), default=Shape.post, show_default=True, help="Channels of the post-filters."
)
@click.option("--posts", type=click.IntRange(1), default=Shape.posts, show_default=True, help="How many of these.")
@click.option("--post-steps", default=_DEFAULTS.post_steps, show_default=True, help="Steps of these alone, next.")
@click.option("--rate", default=_DEFAULTS.rate, show_default=True, help="Highest learning rate.")
@click.option(
    "--settle", default=_DEFAULTS.settle, show_default=True, help="Last part of the run with the encoder's choices."
)
@click.option("--precise", default=_DEFAULTS.precise, show_default=True, help="Last part of the run in float32.")
@click.option(
    "--weights", "start", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Weights to start from."
)
@click.option(
    "--noise",
    default=_DEFAULTS.noise,
    show_default=True,
    help="Denoising: largest deviation, in grey levels, of noise on what goes in; the target stays clean.",
)
@click.option("--seed", default=_DEFAULTS.seed, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Fuse operations by torch.compile: faster after minutes.")
@click.option(
    "--varied",
    default=_DEFAULTS.varied,
    show_default=True,
    help="Share of crops made smaller, and share made more colourful.",
)
def run(
    folder: Path,
    out: Path,
    tier: str | None,
    device: str,
    threads: int | None,
    classic: Kind | None,
    grey: bool,
    latent: int,
    trunk: int,
    core: int | None,
    analysis_blocks: tuple[int, int],
    post: int,
    posts: int,
    start: Path | None,
    compiled: bool,
    **settings: Any,
) -> None:
    """Train on the pictures in FOLDER. Started again with the same --out it goes on where it stopped."""
    if settings["crop"] % runtime.PADDING:
        raise errors.InvalidArgument(f"--crop is {settings['crop']}; expected a multiple of {runtime.PADDING}")
    if threads:
        torch.set_num_threads(threads)
    shape: loop.AnyShape
    if classic:
        shape = replace(SHAPES[classic], colours=1 if grey else 3)
        settings["prior_steps"] = 0
    elif grey:
        raise errors.InvalidArgument("--grey goes with --classic: the flagship has three channels")
    else:
        core = core or latent * 5 // 32 * 4
        shape = Shape(trunk, latent, core, analysis_blocks, post=post, posts=posts)
    loop.train(folder, out, loop.Settings(**settings), shape, tier, _device(device), start, compiled)


@main.command()
@click.argument("weights", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File of weights to write, for `export`.")
@click.option("--shares", help="Weight of each file, like 1,2,1. [default: all the same]")
def average(weights: tuple[Path, ...], out: Path, shares: str | None) -> None:
    """Average the weights of runs that began with the same ones (Wortsman et al., "Model soups", 2022).

    WEIGHTS: files of weights or checkpoints of one shape; all but the weights comes from the last of them.
    """
    try:
        numbers = [float(share) for share in shares.split(",")] if shares else [1.0] * len(weights)
    except ValueError as exc:
        raise errors.InvalidArgument(f"--shares is {shares!r}; expected numbers like 1,2,1") from exc
    exporting.average(weights, out, numbers)


@main.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--id", "model_id", required=True, help="Permanent id of the model, in every file that it writes.")
@click.option(
    "--pictures",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Training pictures, for the tables' statistics.",
)
@click.option("--tier", help="Only pictures whose row in index.csv has this tier.")
@click.option(
    "--measure",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Test pictures, for the manifest's figures; never trained on.",
)
@click.option("--zoo", default=runtime.ZOO, show_default="the package's", type=click.Path(path_type=Path))
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Also write the weights, without what training needs, here."
)
@click.option("--grey", help="Id of the classic model that codes grey pictures in this one's place.")
@click.option("--note", default="", help="Where the training pictures come from, for the manifest.")
def export(
    run: Path,
    model_id: str,
    pictures: Path,
    tier: str | None,
    measure: Path,
    zoo: Path,
    keep: Path | None,
    grey: str | None,
    note: str,
) -> None:
    """Export a model of the zoo from RUN: the folder of a run, or a file of weights."""
    net, values = exporting.load_checkpoint(run / "checkpoint.pt" if run.is_dir() else run)
    paths = list_training(pictures, tier)
    weights = exporting.halve(net)
    training = {
        "pictures": len(paths),
        "source": note or pictures.name + (f", tier {tier}" if tier else ""),
        "steps": values["step"],
        "seconds": round(values["seconds"]),
        "settings": values["settings"],
    }
    pieces = load_pieces(paths, 16, torch.device("cpu"))
    target = exporting.export(net, pieces, model_id, zoo, training, image.list_pictures(measure), grey)
    if keep:
        exporting.keep(weights, values, keep)
    size = sum(path.stat().st_size for path in target.iterdir())
    click.echo(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
