"""`compress-image`: pictures to .hgc files and back. Every action is a thin call into the library."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Unpack, cast, get_args

import click

from hourglass import codec
from hourglass.codec import container, errors, image, metrics, strips
from hourglass.codec.decoding import KINDS
from hourglass.codec.formats import FORMATS, STRIP_WRITABLE
from hourglass.codec.runtime import DEFAULT_MODEL, model_ids, open_model
from hourglass.codec.settings import is_aimed, load

SUFFIX = ".hgc"
STREAM = "-"

LARGE = 1 << 24
"""Pixels of a picture above which it goes from file to file a few rows at a time, where its format allows that."""

_ROOMY = 1 << 21
"""Pixels of a picture above which writing it as a WebP or AVIF needs the memory that the models are in."""

LARGE_FILE = 1 << 20
"""Bytes that a file of so many pixels has at least, unless it is nearly empty."""

BAD_DATA = 1
USAGE = 2

_HELP = """Compress pictures to .hgc files, or decode them.

\b
  compress-image photo.jpg                  writes photo.hgc
  compress-image -q 70 -o archive/ *.png    many pictures, into a folder
  compress-image --target-size 40k a.png    the best picture in 40,000 bytes
  compress-image -d photo.hgc -o out.png    decodes; the suffix sets the format
  compress-image -d --region 0,0,512,512 photo.hgc -o corner.png
  compress-image -d --scale 1/8 photo.hgc -o thumbnail.jpg
  compress-image -l photo.hgc               checks a file and shows what is in it
  compress-image - < photo.jpg > photo.hgc  from stdin to stdout

Inputs are never changed or deleted, and existing outputs are kept unless -f is given. INPUT and OUTPUT may be - for
stdin and stdout; pictures on stdout are PNG.

Orientation is applied; colour profile, EXIF, XMP, IPTC and alpha are kept. What cannot be kept is said in a warning.

Exit status: 0 all done; 1 an input is bad (with --salvage: something of it is lost), an output cannot be written, or
the server gave no answer (other inputs are done all the same); 2 wrong usage.
"""


class Coder(Protocol):
    """What the command needs of `Codec` and `Client` alike."""

    def encode(self, image: image.ImageSource, **settings: Unpack[codec.Settings]) -> bytes: ...
    def decode_picture(self, data: codec.FileSource, **view: Unpack[codec.View]) -> codec.Picture: ...


@dataclass(frozen=True)
class Options:
    """What the flags say, beside the files."""

    settings: codec.Settings
    view: codec.View
    force: bool
    metrics: bool


@dataclass(frozen=True)
class Report:
    """One input's outcome; the fields of --json. bpp and ratio (to raw pixels) are those of the .hgc file.

    width, height: of the whole picture. lossless: whether it is stored without loss. location_share: of the code's bits
    those of its location map, 0 to 1; None where the model has none. damage: what could not be salvaged.
    """

    input: str
    output: str
    model: str
    width: int
    height: int
    bytes_in: int
    bytes_out: int
    bpp: float
    ratio: float
    lossless: bool
    psnr: float | None
    ms_ssim: float | None
    seconds: float
    location_share: float | None = None
    damage: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            f"{self.input} -> {self.output}: {self.width}x{self.height}",
            f"{self.bytes_in} -> {self.bytes_out} bytes",
            f"{self.ratio:.1f}:1",
            f"{self.bpp:.3f} bpp",
            *["lossless"] * self.lossless,
            *_locations(self.location_share),
        ]
        if self.psnr is not None and self.ms_ssim is not None:
            parts += [f"PSNR {self.psnr:.2f} dB", f"MS-SSIM {self.ms_ssim:.4f}"]
        return ", ".join([*parts, f"{self.seconds:.2f} s"])


class _Region(click.ParamType[tuple[int, int, int, int]]):
    """X,Y,WIDTH,HEIGHT."""

    name = "X,Y,W,H"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int, int, int]:
        try:
            x, y, width, height = map(int, value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no region; expected X,Y,WIDTH,HEIGHT in pixels", param, ctx)
        return x, y, width, height


class _Scale(click.ParamType[int]):
    """1/N, or N."""

    name = "1/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if (text := str(value).removeprefix("1/")) not in map(str, codec.SCALES):
            self.fail(f"{value!r} is no scale; expected one of 1/2, 1/4, 1/8", param, ctx)
        return int(text)


_FILE = click.Path(exists=True, dir_okay=False, readable=True)


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
@click.option("--metadata", type=click.Choice(get_args(image.Keep)), help="What to keep of it.  [default: all]")
@click.option("--srgb", is_flag=True, default=None, help="Convert colours to sRGB, and drop the profile.")
@click.option("--frame", type=click.IntRange(0), metavar="N", help="Frame of an animation, page of a document, from 0.")
@click.option(
    "--no-grey-model",
    "grey_model",
    flag_value=False,
    default=None,
    help="Code grey pictures with the model itself, not its counterpart for these.",
)
@click.option("--no-fallback", "fallback", flag_value=False, default=None, help="Never store a picture losslessly.")
@click.option("-d", "--decode", "action", flag_value="decode", help="Decode .hgc files; to .png unless -o says else.")
@click.option("-l", "--list", "action", flag_value="list", help="Check .hgc files and show their headers.")
@click.option("--region", type=_Region(), help="Decode this rectangle alone, in pixels.")
@click.option("--scale", type=_Scale(), help="Decode at 1/2, 1/4 or 1/8 of the size.")
@click.option("--salvage", is_flag=True, default=None, help="Decode what is not damaged, mark the rest, exit with 1.")
@click.option("-f", "--force", is_flag=True, help="Overwrite outputs; write binary data to a terminal.")
@click.option("--metrics", is_flag=True, help="Also decode the file again and print its PSNR and MS-SSIM.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each input.")
@click.option("--model", metavar="ID", help=f"Model that encodes.  [default: {DEFAULT_MODEL}; with --server, its own]")
@click.option("--server", metavar="HOST:PORT", help="Let this hourglass-server do the work, by gRPC.")
@click.option("--tls", is_flag=True, help="Encrypt, and trust the authorities that this system trusts.")
@click.option("--ca", type=_FILE, envvar="HOURGLASS_CLIENT_CA", show_envvar=True, help="Encrypt, and trust these; PEM.")
@click.option("--cert", type=_FILE, envvar="HOURGLASS_CLIENT_CERT", show_envvar=True, help="Own certificate; PEM.")
@click.option("--key", type=_FILE, envvar="HOURGLASS_CLIENT_KEY", show_envvar=True, help="Its private key; PEM.")
@click.option("--server-name", metavar="NAME", help="Name in the server's certificate, if not that of its address.")
@click.option(
    "--token-file",
    type=_FILE,
    envvar="HOURGLASS_CLIENT_TOKEN_FILE",
    show_envvar=True,
    help="File with the bearer token, and nothing else.",
)
@click.version_option(package_name="hourglass-codec", prog_name="compress-image")
def main(
    inputs: tuple[str, ...],
    output: str | None,
    action: str | None,
    as_json: bool,
    model: str | None,
    server: str | None,
    tls: bool,
    ca: str | None,
    cert: str | None,
    key: str | None,
    server_name: str | None,
    token_file: str | None,
    force: bool,
    metrics: bool,
    **given: Any,
) -> None:
    if server is None:
        _check_no_server()
    access = _Access(tls, ca, cert, key, server_name, token_file)
    given = {name: value for name, value in given.items() if value is not None}
    view = cast("codec.View", {name: given.pop(name) for name in codec.View.__annotations__ if name in given})
    settings = cast("codec.Settings", given)
    chosen = Options(settings, view, force, metrics)
    for name in ["metrics"] * metrics + list(settings):
        if action:
            no = "no-" if name in ("fallback", "grey_model") else ""
            raise click.UsageError(f"--{no}{name.replace('_', '-')} goes with encoding only")
    for name in view:
        if action != "decode":
            raise click.UsageError(f"--{name} goes with decoding, -d, only")
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
        with _coder(model, server, access) as coder:
            work = partial(_decode if action == "decode" else _encode, coder, chosen)
            status = _each(targets, work, as_json)
    except (errors.InvalidArgument, errors.UnknownModelError) as exc:
        raise click.UsageError(str(exc)) from exc
    sys.exit(status)


@dataclass(frozen=True)
class _Access:
    """How to know a server, and be known."""

    tls: bool
    ca: str | None
    cert: str | None
    key: str | None
    server_name: str | None
    token_file: str | None

    @property
    def encrypted(self) -> bool:
        """Whether anything that is given means TLS."""
        return self.tls or any((self.ca, self.cert, self.key, self.server_name))

    def token(self) -> str | None:
        """Raises `InvalidArgument` for a file that has not one token alone, `OSError`."""
        if self.token_file is None:
            return None
        words = Path(self.token_file).read_bytes().split()
        if len(words) != 1 or not words[0].isascii():
            raise errors.InvalidArgument(
                f"--token-file {self.token_file} has {len(words)} words; expected one, the token that the server has "
                "behind NAME:, of ASCII characters"
            )
        return words[0].decode()


def _check_no_server() -> None:
    """Refuse flags that only a server has a use for; variables may stand for other commands."""
    context = click.get_current_context()
    for name in [one.name for one in fields(_Access)]:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --server only")


@contextlib.contextmanager
def _coder(model: str | None, server: str | None, access: _Access) -> Iterator[Coder]:
    if server is None:
        yield codec.Codec(model or DEFAULT_MODEL)
        return
    from hourglass.client.remote import Client, Tls  # grpc is loaded only when it is wanted

    tls = Tls(access.ca, access.cert, access.key, access.server_name) if access.encrypted else None
    with Client(server, model=model, tls=tls, token=access.token()) as client:
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
            for damage in getattr(report, "damage", []):
                status = _complain(name, damage, max(status, BAD_DATA))
            text = json.dumps(asdict(report)) if as_json else str(report)
            click.echo(text, err=STREAM in targets.values())
    return status


def _complain(name: str, message: str, status: int) -> int:
    said = message.removeprefix(f"{name} ")  # "a.png: a.png is cut short" would say it twice
    click.echo(f"compress-image: {'stdin' if name == STREAM else name}: {said}", err=True)
    return status


def _encode(coder: Coder, options: Options, name: str, target: str) -> Report:
    _check_target(name, target, options.force)
    started = time.perf_counter()
    if (rows := _rows(coder, options, name, target)) is not None:
        with rows, _whole(target) as file:
            assert isinstance(coder, codec.Codec)
            _warn(rows.losses)
            coder.encode_strips(rows, file, **options.settings)
        seconds, source = time.perf_counter() - started, Path(name).stat().st_size
        return _report(name, target, target, (source, Path(target).stat().st_size), (None, None), seconds)
    regular = name != STREAM and Path(name).is_file()
    content = name if regular else _read(name)  # a pipe can be read once only
    with _quietly():
        data = coder.encode(content, **options.settings)
    seconds = time.perf_counter() - started
    psnr = ms_ssim = None
    if options.metrics:
        psnr, ms_ssim = _distortion(content, coder.decode_picture(data), options.settings)
    _write(target, data)
    source = Path(name).stat().st_size if regular else len(content)
    return _report(name, target, data, (source, len(data)), (psnr, ms_ssim), seconds)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what C libraries write to stderr: libtiff has lines of its own for a broken file, beside our error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _rows(coder: Coder, options: Options, name: str, target: str) -> strips.Strips | None:
    """The input, to be read a few rows at a time, if it is too large to be held in memory lightly and can be so
    read.
    """
    needs_all = is_aimed(options.settings) or options.metrics or {"srgb", "frame"} & options.settings.keys()
    if not isinstance(coder, codec.Codec) or STREAM in (name, target) or needs_all:
        return None
    if Path(name).stat().st_size < LARGE_FILE:  # not worth loading libvips
        return None
    keep = options.settings.get("metadata", "all")
    rows = strips.open_strips(name, coder.limits, keep=keep)
    if rows is None or rows.width * rows.height > LARGE:
        return rows
    rows.close()
    return None


def _distortion(content: str | bytes, decoded: codec.Picture, settings: codec.Settings) -> tuple[float, float]:
    """PSNR and MS-SSIM of what is seen: where there is alpha, of both pictures on white."""
    pair = [image.seen(picture) for picture in (load(content, None, settings), decoded)]
    return metrics.psnr(*pair), metrics.ms_ssim(*pair)


def _decode(coder: Coder, options: Options, name: str, target: str) -> Report:
    _check_target(name, target, options.force)
    started = time.perf_counter()
    format = _picture_format(target)
    if _is_streamed(coder, options, name, target, format):
        assert isinstance(coder, codec.Codec)
        _decode_streamed(coder, name, target, format)
        sizes = Path(name).stat().st_size, Path(target).stat().st_size
        return _report(name, target, name, sizes, (None, None), time.perf_counter() - started)
    data = _read(name)
    decoded = [coder.decode_picture(data, **options.view)]
    damage, pixels = decoded[0].losses, decoded[0].width * decoded[0].height
    if isinstance(coder, codec.Codec) and pixels > (_ROOMY if format in ("WEBP", "AVIF") else LARGE):
        coder.unload()  # writing takes memory too
    picture, losses = image.save(decoded.pop(), format)  # nothing here holds the pixels meanwhile
    _warn(losses)
    seconds = time.perf_counter() - started
    _write(target, picture)
    report = _report(name, target, data, (len(data), len(picture)), (None, None), seconds)
    return replace(report, damage=list(damage))


def _decode_streamed(coder: codec.Codec, name: str, target: str, format: str) -> None:
    put: Callable[[strips.StripWriter, Any], None]
    made: tuple[container.Header, codec.Metadata, Iterator[Any]]
    if FORMATS[format].by_parts:
        made, put = coder.decode_parts(name), lambda writer, part: writer.put(*part)
    else:
        made, put = coder.decode_strips(name), lambda writer, rows: writer.write(rows)
    header, metadata, parts = made
    with _whole(target) as file:
        grey = header.colour == container.GREY
        with strips.StripWriter(file, format, header.width, header.height, grey, metadata) as writer:
            for part in parts:
                put(writer, part)
                del part  # the next one would be made beside it


def _is_streamed(coder: Coder, options: Options, name: str, target: str, format: str) -> bool:
    """Whether a file is decoded a few rows at a time, because it is large and all that it asks for can be done so."""
    if not isinstance(coder, codec.Codec) or STREAM in (name, target) or options.view:
        return False
    if format not in STRIP_WRITABLE:
        return False
    header = container.read_header(name, coder.limits)
    plain = not header.lossless and not header.numbers(container.ALPHA)
    return plain and header.width * header.height > LARGE


def _warn(losses: Iterable[str]) -> None:
    for loss in losses:
        warnings.warn(loss, errors.LossWarning, stacklevel=2)


def _report(
    name: str,
    target: str,
    data: codec.FileSource,
    sizes: tuple[int, int],
    quality: tuple[float | None, float | None],
    seconds: float,
) -> Report:
    header = container.read_header(data)
    length = Path(data).stat().st_size if isinstance(data, str) else len(cast("bytes", data))
    bpp = metrics.bpp(length, header.width, header.height)
    ratio = metrics.compression_ratio(length, header.width, header.height)
    return Report(
        name,
        target,
        header.model,
        header.width,
        header.height,
        *sizes,
        bpp,
        ratio,
        header.lossless,
        *quality,
        round(seconds, 4),
        _location_share(data, header),
    )


def _location_share(data: codec.FileSource, header: codec.Header) -> float | None:
    """Of a file's symbols the share of bits that say where max pooling found its values; None where there are none."""
    if header.lossless or header.model not in model_ids():
        return None
    if "l" not in {rule.name for rule in open_model(header.model).tensors}:
        return None
    bits = codec.Codec(header.model).tensor_bits(data)
    return bits["l"] / sum(bits.values())


def _locations(share: float | None) -> list[str]:
    return [] if share is None else [f"locations {share:.0%} of the code"]


@dataclass(frozen=True)
class Listing:
    """One file's header; the fields of -l --json. Sections: kind, bytes, CRC-32. location_share: see `Report`."""

    input: str
    version: int
    model: str
    width: int
    height: int
    quality: float
    bytes: int
    bpp: float
    ratio: float
    grey: bool
    lossless: bool
    sections: list[dict[str, int | str]]
    location_share: float | None

    def __str__(self) -> str:
        how = "lossless" if self.lossless else f"quality {self.quality:g}, model {self.model}"
        parts: dict[str, list[int]] = {}
        for section in self.sections:
            parts.setdefault(str(section["name"]), []).append(int(section["bytes"]))
        shares = (f"{len(p)} x {name} {sum(p)}" if len(p) > 1 else f"{name} {sum(p)}" for name, p in parts.items())
        return (
            f"{self.input}: {self.width}x{self.height}{' grey' * self.grey}, {how}, {self.bytes} bytes, "
            f"{self.ratio:.1f}:1, {self.bpp:.3f} bpp, format version {self.version}, "
            + ", ".join([*_locations(self.location_share), f"bytes of {', '.join(shares)}"])
        )


_NAMES = {
    container.CODE: "code",
    container.ALPHA: "alpha",
    container.LOSSLESS: "picture",
    **{kind: name for name, kind in KINDS.items()},
}


def _list(name: str, _: str) -> Listing:
    source = _read(name) if name == STREAM else name
    with container.Reader(source) as reader:
        header = reader.header
        reader.check_length()
        for number in range(len(header.sections)):
            reader.payload(number)
        return Listing(
            name,
            header.version,
            header.model,
            header.width,
            header.height,
            header.quality,
            reader.size,
            metrics.bpp(reader.size, header.width, header.height),
            metrics.compression_ratio(reader.size, header.width, header.height),
            header.colour == container.GREY,
            header.lossless,
            [
                {"kind": s.kind, "name": _NAMES.get(s.kind, "unknown"), "bytes": s.length, "crc32": s.crc}
                for s in header.sections
            ],
            _location_share(source, header),
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
    if target == STREAM:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():  # a device or a pipe: to rename onto it would replace it
        path.write_bytes(data)
        return
    with _whole(target) as file:
        file.write(data)


@contextlib.contextmanager
def _whole(target: str) -> Iterator[BinaryIO]:
    """A file to write that appears whole or not at all: a temporary one beside the target, then renamed."""
    path = Path(os.path.realpath(target))
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as exc:
        if exc.filename not in (None, str(temporary)):
            raise
        raise OSError(exc.errno, f"cannot be written: {exc.strerror}", target) from exc
    finally:
        temporary.unlink(missing_ok=True)
