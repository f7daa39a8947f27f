"""Programs that nobody here wrote use the service: buf lints and calls it, Node encodes a photograph.

They need `npm install --prefix tests/outside`, which .ci/run does where there is a node.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hourglass.codec import Codec, image, metrics

HERE = Path(__file__).parent
PROTO = HERE.parent / "proto"
BUF = HERE / "outside" / "node_modules" / ".bin" / "buf"

pytestmark = pytest.mark.skipif(
    not BUF.exists() or shutil.which("node") is None, reason="needs node and `npm install --prefix tests/outside`"
)


def buf_curl(address: str, method: str, request: object) -> subprocess.CompletedProcess[str]:
    url = f"http://{address}/hourglass.v1.CodecService/{method}"
    command = [BUF, "curl", "--http2-prior-knowledge", "--protocol", "grpc", "-d", "@-", url]
    return subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)


def test_buf_lint() -> None:
    done = subprocess.run([BUF, "lint"], cwd=PROTO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_buf_lists_models_by_reflection(address: str, codec: Codec) -> None:
    done = buf_curl(address, "ListModels", {})
    assert done.returncode == 0, done.stderr
    assert codec.model in [model["id"] for model in json.loads(done.stdout)["models"]]


def test_buf_encodes(address: str, parrots: Path, codec: Codec) -> None:
    request = {"imageFile": base64.b64encode(parrots.read_bytes()).decode(), "quality": 30}
    done = buf_curl(address, "Encode", request)
    assert done.returncode == 0, done.stderr
    assert base64.b64decode(json.loads(done.stdout)["file"]) == codec.encode(parrots, quality=30)


def test_buf_shows_errors(address: str) -> None:
    done = buf_curl(address, "Decode", {"file": "AAAA"})
    assert done.returncode != 0
    assert "invalid_argument" in done.stderr
    assert "not a .hgc file" in done.stderr


def test_node_encodes_and_the_command_decodes(address: str, parrots: Path, tmp_path: Path, codec: Codec) -> None:
    file, out = tmp_path / "node.hgc", tmp_path / "node.png"
    script = HERE / "outside" / "encode.mjs"
    command = ["node", script, address, PROTO, parrots, file, "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["width"], answer["height"], answer["bytes"]) == (768, 512, file.stat().st_size)
    assert answer["refused"]
    assert "not a .hgc file" in answer["why"]
    compress_image = Path(sys.executable).with_name("compress-image")
    subprocess.run([compress_image, "-d", file, "-o", out], check=True, capture_output=True)
    assert np.array_equal(image.read(out), codec.decode(codec.encode(parrots, quality=40)))
    assert answer["psnr"] == pytest.approx(metrics.psnr(image.read(parrots), image.read(out)))


def test_buf_asks_for_health(address: str) -> None:
    url = f"http://{address}/grpc.health.v1.Health/Check"
    command = [BUF, "curl", "--http2-prior-knowledge", "--protocol", "grpc", "-d", "{}", url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == {"status": "SERVING"}, done.stderr


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def test_buf_finds_nothing_broken() -> None:
    """The proto against that of the last commit: the one before, where this one is committed already."""
    folder = _git("rev-parse", "--path-format=absolute", "--git-common-dir")
    last = _git("rev-parse", "--verify", "HEAD" if _git("status", "--porcelain", "proto") else "HEAD~1")
    if not last:
        pytest.skip("there is no commit to compare with")
    command = [BUF, "breaking", "--against", f"{folder}#ref={last},subdir=proto"]
    done = subprocess.run(command, cwd=PROTO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_node_streams_and_batches(address: str, parrots: Path, tmp_path: Path, codec: Codec) -> None:
    """A streamed picture of 24 MB (HOURGLASS_TEST_MB for more), and a batch of 50 with 5 broken ones."""
    small = tmp_path / "small.png"
    small.write_bytes(image.write(image.read(parrots)[:96, :96], "PNG"))
    megabytes = os.environ.get("HOURGLASS_TEST_MB", "24")
    command = ["node", HERE / "outside" / "service.mjs", address, PROTO, small, megabytes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["digest"] == hashlib.sha256(codec.encode(small, quality=20)).hexdigest()
    assert answer["stream"]["bytes"] == answer["stream"]["said"] > 1000
    assert answer["stream"]["magic"] == "HGC"
    assert answer["batch"] == {
        "answers": 50,
        "digests": [answer["digest"]],
        "broken": sorted(f"p{number}" for number in range(3, 50, 10)),
        "codes": [3],
    }
