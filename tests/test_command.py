"""`compress-image` with bad input: one clear line, the documented exit code, nothing left behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hourglass.codec import Codec, container
from hourglass.codec.container import Front
from hourglass.codec.runtime import DEFAULT_MODEL

COMMAND = str(Path(sys.executable).with_name("compress-image"))


def run(*arguments: str | Path, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([COMMAND, *arguments], cwd=cwd, input=stdin, capture_output=True, check=False)


@pytest.fixture(scope="module")
def good(codec: Codec, parrots: Path) -> bytes:
    return codec.encode(parrots, quality=20)


def _flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 0x10
    return bytes(changed)


def _bad_files(good: bytes) -> dict[str, tuple[list[str], bytes | None, str]]:
    """name -> arguments before it, content (None: no such file), what the message must say."""
    stranger = container.write(Front("stranger-9", container.RGB, 8, 8, 50), [(container.CODE, bytes(8))])
    return {
        "missing.png": ([], None, "No such file or directory"),
        "missing.hgc": (["-d"], None, "No such file or directory"),
        "text.png": ([], b"just text\n", "no picture format that can be read"),
        "empty.jpg": ([], b"", "no picture format that can be read"),
        "cut.hgc": (["-d"], good[: len(good) // 2], "cut short"),
        "cut-header.hgc": (["-d"], good[:9], "cut short"),
        "magic.hgc": (["-d"], b"RIFF" + good[4:], "not a .hgc file"),
        "no-such-model.hgc": (["-d"], stranger, "no model 'stranger-9' is installed"),
        "flipped.hgc": (["-d"], _flipped(good, len(good) // 2), "damaged"),
        "flipped-header.hgc": (["-d"], _flipped(good, 7), "damaged"),
        "listed.hgc": (["-l"], _flipped(good, len(good) - 3), "damaged"),
    }


@pytest.mark.parametrize("remote", [False, True], ids=["embedded", "server"])
@pytest.mark.parametrize("name", list(_bad_files(b"x" * 20)))
def test_bad_input(name: str, remote: bool, good: bytes, address: str, tmp_path: Path) -> None:
    arguments, content, message = _bad_files(good)[name]
    if remote and "-l" not in arguments:
        arguments = ["--server", address, *arguments]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    done = run(*arguments, name, cwd=tmp_path)
    error = done.stderr.decode()
    assert done.returncode == 1
    assert done.stdout == b""
    assert error.count("\n") == 1
    assert error.startswith(f"compress-image: {name}: ")
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-q", "101", "p.png"], "101"),
        (["."], "'.' is no file name"),
        (["-q", "high", "p.png"], "high"),
        ([], "Missing argument"),
        (["--nonsense", "p.png"], "--nonsense"),
        (["--model", "no-such-model", "p.png"], "no model 'no-such-model' is installed; known models: "),
        (["-d", "p.hgc", "-o", "out.xyz"], "suffix '.xyz'"),
        (["-d", "--metrics", "p.hgc"], "--metrics"),
        (["-l", "-o", "x", "p.hgc"], "-l"),
        (["-o", "one.hgc", "p.png", "q.png"], "folder"),
        (["-o", "no/such/folder/", "p.png"], "no such folder"),
        (["p.png", "p.jpg"], "p.hgc"),
        (["-o", "p.png", "-f", "p.png"], "is the input itself"),
        (["--tls", "p.png"], "--tls goes with --server only"),
        (["--token-file", "p.png", "p.png"], "--token-file goes with --server only"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, parrots: Path, tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(parrots.read_bytes())
    before = sorted(tmp_path.iterdir())
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "p.png").read_bytes() == parrots.read_bytes()


def test_outputs_are_kept_unless_forced(parrots: Path, good: bytes, tmp_path: Path) -> None:
    out = tmp_path / "p.hgc"
    out.write_bytes(b"precious")
    done = run("-q", "20", parrots, "-o", out, cwd=tmp_path)
    assert done.returncode == 1
    assert b"exists already; give -f" in done.stderr
    assert out.read_bytes() == b"precious"
    assert run("-q", "20", "-f", parrots, "-o", out, cwd=tmp_path).returncode == 0
    assert out.read_bytes() == good


def test_one_bad_input_costs_only_itself(parrots: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(parrots.read_bytes())
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.png").write_bytes(parrots.read_bytes())
    (tmp_path / "out").mkdir()
    done = run("--json", "-o", "out", "a.png", "b.png", "c.png", cwd=tmp_path)
    assert done.returncode == 1
    assert [json.loads(line)["input"] for line in done.stdout.splitlines()] == ["a.png", "c.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.hgc", "c.hgc"]


def test_one_line_for_each_picture(parrots: Path, tmp_path: Path) -> None:
    done = run(parrots, "-o", "p.hgc", cwd=tmp_path)
    size = (tmp_path / "p.hgc").stat().st_size
    sizes = f"{parrots.stat().st_size} -> {size} bytes"
    line = rf".*parrots\.png -> p\.hgc: 768x512, {sizes}, [\d.]+:1, [\d.]+ bpp, [\d.]+ s\n"
    assert re.fullmatch(line, done.stdout.decode())
    assert done.stderr == b""


def test_list(good: bytes, tmp_path: Path, codec: Codec) -> None:
    (tmp_path / "p.hgc").write_bytes(good)
    assert f"p.hgc: 768x512, quality 20, model {DEFAULT_MODEL}, ".encode() in run("-l", "p.hgc", cwd=tmp_path).stdout
    row = json.loads(run("-l", "--json", "p.hgc", cwd=tmp_path).stdout)
    header = codec.read_header(good)
    assert (row["model"], row["quality"], row["bytes"]) == (header.model, header.quality, len(good))
    assert row["sections"] == [
        {"kind": s.kind, "name": "code", "bytes": s.length, "crc32": s.crc} for s in header.sections
    ]


def test_loss_is_said(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGBA", (20, 20), (255, 0, 0, 100)).save(tmp_path / "clear.png")
    done = run("clear.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    done = run("-d", "clear.hgc", "-o", "clear.jpg", cwd=tmp_path)
    assert done.returncode == 0
    assert b"compress-image: clear.hgc: warning: " in done.stderr
    assert b"no transparency" in done.stderr


def test_unwritable_output(parrots: Path, tmp_path: Path) -> None:
    done = run(parrots, "-o", "no/such/place.hgc", cwd=tmp_path)
    assert done.returncode == 1
    assert b"no/such/place.hgc: cannot be written: No such file or directory" in done.stderr


def test_an_input_may_be_a_pipe(parrots: Path, tmp_path: Path) -> None:
    done = run("/dev/stdin", "-q", "20", "-o", "out.hgc", cwd=tmp_path, stdin=parrots.read_bytes())
    assert done.returncode == 0
    assert (tmp_path / "out.hgc").is_file()


def test_a_device_is_not_replaced(parrots: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "null"
    fifo.symlink_to("/dev/null")
    assert run(parrots, "-fo", fifo, cwd=tmp_path).returncode == 0
    assert fifo.is_symlink()
    assert Path("/dev/null").is_char_device()


def test_server_away(parrots: Path, tmp_path: Path) -> None:
    done = run("--server", "127.0.0.1:1", parrots, "-o", "p.hgc", cwd=tmp_path)
    assert done.returncode == 1
    assert b"server 127.0.0.1:1 cannot be reached, or is going away: UNAVAILABLE" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_embedded_command_loads_no_more_than_it_needs(parrots: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['compress-image', sys.argv[1], '-o', sys.argv[2]]\n"
        "from hourglass.client.cli import main\n"
        "try: main()\n"
        "finally: assert not {'grpc', 'torch', 'onnx', 'numpy.ma'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, parrots, tmp_path / "p.hgc"], check=False)
    assert done.returncode == 0
