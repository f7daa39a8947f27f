"""`compress-image`: pictures to .hgc files and back. Every action is a thin call into the library."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Unpack, cast, get_args

import click

from hourglass import codec
from hourglass.codec import container, errors, image, metrics
from hourglass.codec.runtime import DEFAULT_MODEL

SUFFIX = ".hgc"
STREAM = "-"

BAD_DATA = 1
USAGE = 2

_HELP = """Compress pictures to .hgc files, or decode them.

\b
  compress-image photo.jpg                  writes photo.hgc
  compress-image -q 70 -o archive/ *.png    many pictures, into a folder
  compress-image --target-size 40k a.png    the best picture in 40,000 bytes
  compress-image -d photo.hgc -o out.png    decodes; the suffix sets the format
  compress-image -l photo.hgc               shows what is in a file
  compress-image - < photo.jpg > photo.hgc  from stdin to stdout

Inputs are never changed or deleted, and existing outputs are kept unless -f is given. INPUT and OUTPUT may be - for
stdin and stdout; pictures on stdout are PNG.

Exit status: 0 all done; 1 an input is bad, an output cannot be written, or the server gave no answer (other inputs are
done all the same); 2 wrong usage.
"""


class Coder(Protocol):
    """What the command needs of `Codec` and `Client` alike."""

    def encode(self, image: image.ImageSource, **settings: Unpack[codec.Settings]) -> bytes: ...
    def decode(self, data: codec.FileSource) -> image.Pixels: ...


@dataclass(frozen=True)
class Options:
    """What the flags say, beside the files."""

    settings: codec.Settings
    force: bool
    metrics: bool


@dataclass(frozen=True)
class Report:
    """One input's outcome; the fields of --json. bpp and ratio (to raw 24-bit pixels) are those of the .hgc file."""

    input: str
    output: str
    model: str
    width: int
    height: int
    bytes_in: int
    bytes_out: int
    bpp: float
    ratio: float
    psnr: float | None
    ms_ssim: float | None
    seconds: float

    def __str__(self) -> str:
        parts = [
            f"{self.input} -> {self.output}: {self.width}x{self.height}",
            f"{self.bytes_in} -> {self.bytes_out} bytes",
            f"{self.ratio:.1f}:1",
            f"{self.bpp:.3f} bpp",
        ]
        if self.psnr is not None and self.ms_ssim is not None:
            parts += [f"PSNR {self.psnr:.2f} dB", f"MS-SSIM {self.ms_ssim:.4f}"]
        return ", ".join([*parts, f"{self.seconds:.2f} s"])


@click.command(help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--output", metavar="OUTPUT", help="File to write, or an existing folder.")
@click.option(
    "-q",
    "--quality",
    type=click.FloatRange(0, 100),
    help=f"0 (smallest) to 100 (best).  [default: {codec.DEFAULT_QUALITY:g}]",
)
@click.option("--target-size", metavar="SIZE", help="Largest file wanted: bytes, 40k, 1.5M, or 5% of the input.")
@click.option("--target-bpp", type=float, metavar="BPP", help="The same in bits per pixel.")
@click.option("--target-psnr", type=float, metavar="DB", help="Least PSNR wanted, in dB over RGB.")
@click.option(
    "--effort",
    type=click.Choice(get_args(codec.Effort)),
    help="How hard to look for the smallest file.  [default: default]",
)
@click.option("-d", "--decode", "action", flag_value="decode", help="Decode .hgc files; to .png unless -o says else.")
@click.option("-l", "--list", "action", flag_value="list", help="Check .hgc files and show their headers.")
@click.option("-f", "--force", is_flag=True, help="Overwrite outputs; write binary data to a terminal.")
@click.option("--metrics", is_flag=True, help="Also decode the file again and print its PSNR and MS-SSIM.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each input.")
@click.option("--model", metavar="ID", help=f"Model that encodes.  [default: {DEFAULT_MODEL}; with --server, its own]")
@click.option("--server", metavar="HOST:PORT", help="Let this hourglass-server do the work, by gRPC.")
@click.version_option(package_name="hourglass-codec", prog_name="compress-image")
def main(
    inputs: tuple[str, ...],
    output: str | None,
    action: str | None,
    as_json: bool,
    model: str | None,
    server: str | None,
    force: bool,
    metrics: bool,
    **given: Any,
) -> None:
    settings = cast("codec.Settings", {name: value for name, value in given.items() if value is not None})
    chosen = Options(settings, force, metrics)
    for name in ["metrics"] * metrics + list(settings):
        if action:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with encoding only")
    if action == "list":
        if output is not None:
            raise click.UsageError("-l prints the header: it goes without -o")
        sys.exit(_each(dict.fromkeys(inputs, ""), _list, as_json))
    try:
        codec.check_settings(settings)
    except errors.InvalidArgument as exc:
        raise click.UsageError(str(exc)) from exc
    targets = _targets(inputs, output, ".png" if action == "decode" else SUFFIX)
    try:
        if action == "decode":
            for target in targets.values():
                _picture_format(target)
        with _coder(model, server) as coder:
            work = partial(_decode if action == "decode" else _encode, coder, chosen)
            status = _each(targets, work, as_json)
    except (errors.InvalidArgument, errors.UnknownModelError) as exc:
        raise click.UsageError(str(exc)) from exc
    sys.exit(status)


@contextlib.contextmanager
def _coder(model: str | None, server: str | None) -> Iterator[Coder]:
    if server is None:
        yield codec.Codec(model or DEFAULT_MODEL)
        return
    from hourglass.client.remote import Client  # grpc is loaded only when it is wanted

    with Client(server, model=model) as client:
        yield client


def _targets(inputs: tuple[str, ...], output: str | None, suffix: str) -> dict[str, str]:
    """Input -> output of each; refuses what would write two results to one place."""
    folder = output is not None and (Path(output).is_dir() or output.endswith("/"))
    if folder and not Path(str(output)).is_dir():
        raise click.UsageError(f"-o {output}: there is no such folder")
    if output is not None and not folder and len(inputs) > 1:
        raise click.UsageError(f"-o {output}: {len(inputs)} inputs need an existing folder to go to")
    targets: dict[str, str] = {}
    for name in inputs:
        if output is not None and not folder:
            target = output
        elif name == STREAM:
            target = STREAM
        else:
            if not Path(name).name:
                raise click.UsageError(f"{name!r} is no file name")
            path = Path(name).with_suffix(suffix)
            target = str(Path(str(output)) / path.name if folder else path)
        if name in targets or target in targets.values():
            raise click.UsageError(f"{name}: another input is written to {target} too; do them one by one, with -o")
        targets[name] = target
    return targets


def _each(targets: dict[str, str], work: Callable[[str, str], Any], as_json: bool) -> int:
    """Do `work` on each input and print what it returns; a bad one is reported and the others go on."""
    status = 0
    for name, target in targets.items():
        try:
            with warnings.catch_warnings(record=True) as losses:
                warnings.simplefilter("always", errors.LossWarning)
                report = work(name, target)
        except errors.InvalidArgument as exc:
            status = _complain(name, str(exc), USAGE)
        except errors.HourglassError as exc:
            status = _complain(name, str(exc), max(status, BAD_DATA))
        except OSError as exc:
            other = f"{exc.filename}: " if exc.filename not in (None, name) else ""
            status = _complain(name, f"{other}{exc.strerror or exc}", max(status, BAD_DATA))
        else:
            for loss in (w for w in losses if issubclass(w.category, errors.LossWarning)):  # not Pillow's own
                _complain(name, f"warning: {loss.message}", status)
            text = json.dumps(asdict(report)) if as_json else str(report)
            click.echo(text, err=STREAM in targets.values())
    return status


def _complain(name: str, message: str, status: int) -> int:
    click.echo(f"compress-image: {'stdin' if name == STREAM else name}: {message}", err=True)
    return status


def _encode(coder: Coder, options: Options, name: str, target: str) -> Report:
    _check_target(name, target, options.force)
    content = _read(name)
    started = time.perf_counter()
    data = coder.encode(content, **options.settings)
    seconds = time.perf_counter() - started
    psnr = ms_ssim = None
    if options.metrics:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.LossWarning)  # said while encoding
            original = image.read(content)
        decoded = coder.decode(data)
        psnr, ms_ssim = metrics.psnr(original, decoded), metrics.ms_ssim(original, decoded)
    _write(target, data)
    return _report(name, target, data, (len(content), len(data)), (psnr, ms_ssim), seconds)


def _decode(coder: Coder, options: Options, name: str, target: str) -> Report:
    _check_target(name, target, options.force)
    data = _read(name)
    started = time.perf_counter()
    picture = image.write(coder.decode(data), _picture_format(target))
    seconds = time.perf_counter() - started
    _write(target, picture)
    return _report(name, target, data, (len(data), len(picture)), (None, None), seconds)


def _report(
    name: str,
    target: str,
    data: bytes,
    sizes: tuple[int, int],
    quality: tuple[float | None, float | None],
    seconds: float,
) -> Report:
    header = container.read_header(data)
    bpp = metrics.bpp(len(data), header.width, header.height)
    ratio = metrics.compression_ratio(len(data), header.width, header.height)
    return Report(
        name, target, header.model, header.width, header.height, *sizes, bpp, ratio, *quality, round(seconds, 4)
    )


@dataclass(frozen=True)
class Listing:
    """One file's header; the fields of -l --json. Sections: kind, bytes, CRC-32."""

    input: str
    version: int
    model: str
    width: int
    height: int
    quality: float
    bytes: int
    bpp: float
    ratio: float
    sections: list[dict[str, int]]

    def __str__(self) -> str:
        return (
            f"{self.input}: {self.width}x{self.height}, quality {self.quality:g}, model {self.model}, "
            f"{self.bytes} bytes, {self.ratio:.1f}:1, {self.bpp:.3f} bpp, format version {self.version}, "
            f"{len(self.sections)} section{'s' if len(self.sections) > 1 else ''}"
        )


def _list(name: str, _: str) -> Listing:
    data = _read(name)
    header, _sections = container.read(data)
    return Listing(
        name,
        header.version,
        header.model,
        header.width,
        header.height,
        header.quality,
        len(data),
        metrics.bpp(len(data), header.width, header.height),
        metrics.compression_ratio(len(data), header.width, header.height),
        [{"kind": s.kind, "bytes": s.length, "crc32": s.crc} for s in header.sections],
    )


def _picture_format(target: str) -> str:
    return "PNG" if target == STREAM else image.format_of(target)


def _read(name: str) -> bytes:
    return sys.stdin.buffer.read() if name == STREAM else Path(name).read_bytes()


def _check_target(name: str, target: str, force: bool) -> None:
    """Refuse, before any work, an output that must not be written."""
    if target == STREAM:
        if sys.stdout.isatty() and not force:
            raise errors.InvalidArgument("stdout is a terminal; redirect it, or give -o, or -f to write to it anyway")
        return
    path = Path(target)
    if name != STREAM and path.exists() and Path(name).exists() and path.samefile(name):
        raise errors.InvalidArgument(f"{target} is the input itself; give another -o")
    if path.is_file() and not force:
        raise FileExistsError(17, "exists already; give -f to overwrite it", target)


def _write(target: str, data: bytes) -> None:
    """Whole or not at all: to a temporary file beside the target, then renamed."""
    if target == STREAM:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():  # a device or a pipe: to rename onto it would replace it
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as exc:
        raise OSError(exc.errno, f"cannot be written: {exc.strerror}", target) from exc
    finally:
        temporary.unlink(missing_ok=True)
