"""The house rules: who may import whom, what is packaged, that generated code is fresh and documents are true."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import onnx
import pytest
from click.testing import CliRunner

from hourglass import codec
from hourglass.client import cli
from hourglass.codec import errors, image
from hourglass.codec.runtime import ZOO, model_ids, open_model
from hourglass.codec.train import __main__ as train
from hourglass.codec.train import digits
from hourglass.server import main as server
from hourglass.server.servicer import SERVICE

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "hourglass.codec": ROOT / "codec",
    "hourglass.v1": ROOT / "proto" / "hourglass" / "v1",
    "hourglass.server": ROOT / "server",
    "hourglass.client": ROOT / "client",
}
TRAIN = "hourglass.codec.train"
GRAPHS = (
    *("encoder.onnx", "prior.onnx", "decoder.onnx", "gradient.onnx"),
    *(f"reduced-{scale}.onnx" for scale in (2, 4, 8)),
)

MAY_IMPORT = {
    "hourglass.codec": {"hourglass.codec"},
    "hourglass.v1": {"hourglass.codec", "hourglass.v1"},
    "hourglass.server": {"hourglass.codec", "hourglass.v1", "hourglass.server"},
    "hourglass.client": {"hourglass.codec", "hourglass.v1", "hourglass.client"},
}
ONLY_IN = {
    "torch": re.compile(r"codec/train/"),
    "onnx": re.compile(r"codec/train/"),
    "tqdm": re.compile(r"codec/train/"),
    "sklearn": re.compile(r"codec/train/digits\.py"),
    "PIL": re.compile(r"codec/(image|lossless|reader|strips)\.py"),
    "pyvips": re.compile(r"codec/vips\.py"),
    "onnxruntime": re.compile(r"codec/(runtime|train/graphs)\.py"),
    "constriction": re.compile(r"codec/entropy\.py"),
    "grpc": re.compile(r"(server|client|proto)/"),
}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", list(FOLDERS))
def test_import_rule(package: str) -> None:
    files = sorted(FOLDERS[package].rglob("*.py"))
    assert files
    for path in files:
        place = path.relative_to(ROOT).as_posix()
        for name in _imports(path):
            if name.startswith("hourglass."):
                assert ".".join(name.split(".")[:2]) in MAY_IMPORT[package], f"{place} imports {name}"
                assert not name.startswith(TRAIN) or place.startswith("codec/train/"), f"{place} imports {name}"
            rule = ONLY_IN.get(name.split(".")[0])
            assert rule is None or rule.match(place), f"{place} imports {name}"


def test_import_loads_nothing_heavy() -> None:
    program = "import hourglass.codec, sys; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.split()
    )
    assert "hourglass.codec" in loaded
    assert not {"torch", "grpc", "onnx", "onnxruntime", "PIL.Image", "google.protobuf"} & loaded


def test_bare_import_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", "import codec"], cwd=ROOT, capture_output=True, check=False, text=True)
    assert done.returncode == 1
    assert "import hourglass.codec, not codec" in done.stderr


def test_packages_are_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join([package, *path.parent.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for path in folder.rglob("__init__.py")
    }
    assert set(settings["packages"]) == found


def test_types_see_the_whole_tree() -> None:
    for package, folder in FOLDERS.items():
        link = ROOT / ".types" / "hourglass" / package.split(".")[1]
        assert link.resolve() == folder
        assert (folder / "py.typed").exists()


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    subprocess.run([ROOT / "proto" / "generate.sh", tmp_path], check=True, env=environment)
    made = sorted((tmp_path / "hourglass" / "v1").iterdir())
    assert len(made) == 3
    for path in made:
        assert path.read_text() == (FOLDERS["hourglass.v1"] / path.name).read_text(), (
            f"run proto/generate.sh: {path.name}"
        )


def test_public_names() -> None:
    expected = """Code Codec DEFAULT_QUALITY Distortion Effort FileSource Header HourglassError ImageSource Keep Limits
                  Metadata ModelInfo Picture Pixels Region SCALES Section Settings TensorRule View check_settings decode
                  encode errors metrics parse_size read_header watch"""
    assert set(codec.__all__) == set(expected.split())
    assert all(hasattr(codec, name) for name in codec.__all__)


def test_error_tree_is_drawn() -> None:
    for name in errors.__all__:
        assert re.search(rf"\b{name}\b", errors.__doc__ or "")
        kind = getattr(errors, name)
        assert issubclass(kind, errors.HourglassError) or name == "LossWarning"


@pytest.mark.parametrize("model_id", model_ids())
def test_model_is_what_its_manifest_says(model_id: str) -> None:
    manifest = json.loads((ZOO / model_id / "manifest.json").read_text())
    files = {path.name for path in (ZOO / model_id).iterdir()} - {"manifest.json"}
    assert manifest["id"] == model_id
    graphs = GRAPHS if manifest.get("family", "hyperprior") == "hyperprior" else {"encoder.onnx", "decoder.onnx"}
    assert set(manifest["sha256"]) == files == {*graphs, "tables.npz"}
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((ZOO / model_id / name).read_bytes()).hexdigest() == digest
    for name in graphs:
        onnx.checker.check_model(onnx.load(ZOO / model_id / name), full_check=True)
    rates = [row["bpp"] for row in manifest["measured"]]
    assert rates == sorted(rates)
    assert manifest["training"]["steps"] > 0


def test_nothing_is_told_to_anybody(tmp_path: Path) -> None:
    """onnxruntime would write an id of this machine below HOME, for its telemetry; where it cannot, it says so."""
    program = "from hourglass.codec import Codec; Codec().warm_up()"
    unset = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environment, "HOME": str(tmp_path)}, capture_output=True, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert list(tmp_path.iterdir()) == []


def test_damaged_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in (ZOO / codec.Codec().model).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "encoder.onnx").write_bytes(b"\0" + (folder / "encoder.onnx").read_bytes()[1:])
    with pytest.raises(errors.ModelError, match=r"encoder\.onnx of model 'broken' has sha256 \w+, its manifest says"):
        codec.Codec("broken", zoo=tmp_path).encode(ROOT / "tests" / "images" / "motocross.png")
    (folder / "tables.npz").unlink()
    with pytest.raises(errors.ModelError, match=r"lacks tables\.npz"):
        _ = open_model("broken", tmp_path).tables
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(errors.ModelError, match="unusable manifest"):
        open_model("broken", tmp_path)


def test_graphs_opened_ahead_fail_where_they_are_needed(tmp_path: Path, parrots: Path) -> None:
    """Errors of the thread that opens them reach the caller, whose next try begins anew."""
    folder = tmp_path / codec.Codec().model
    shutil.copytree(ZOO / folder.name, folder)
    own = codec.Codec(zoo=tmp_path)
    data = codec.Codec().encode(parrots, quality=20)
    for graph, work in (
        ("prior.onnx", lambda: own.encode(parrots, quality=20)),
        ("decoder.onnx", lambda: own.decode(data)),
    ):
        own.unload()
        (folder / graph).rename(folder / "away")
        with pytest.raises(errors.ModelError, match=f"lacks {graph}"):
            work()
        (folder / "away").rename(folder / graph)
        assert len(work())
    assert own.encode(parrots, quality=20) == data


README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", README))))
def test_readme_examples_run(number: int, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.findall(r"```python\n(.*?)```", README, re.S)[number]
    photo = ROOT / "tests" / "images" / "parrots.png"
    (tmp_path / "photo.jpg").write_bytes(image.write(image.read(photo), "JPEG"))
    monkeypatch.chdir(tmp_path)
    block = block.replace("127.0.0.1:50051", address)
    exec(compile(block, f"README example {number}", "exec"), {})


def test_readme_flags_exist() -> None:
    """Every flag that the README names is one of the commands'."""
    programs: list[tuple[click.Command, list[str]]] = [(cli.main, []), (server.main, []), (digits.main, [])]
    programs += [(train.main, [sub]) for sub in ("run", "export")]
    helps = "".join(CliRunner().invoke(main, [*sub, "--help"], catch_exceptions=False).output for main, sub in programs)
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    lines = [
        line
        for line in shell.splitlines()
        if re.search(r"compress-image|hourglass-server|hourglass\.codec\.train", line)
    ]
    flags = {flag for line in lines for flag in re.findall(r"(?<!\S)--[a-z-]+", line)}
    assert flags
    assert {flag for flag in flags if flag not in helps} == set()


def test_readme_table_is_the_committed_measurement() -> None:
    program = "import json, readme; print(json.dumps(readme.tables()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "tests" / "bench", capture_output=True, check=True
    )
    tables: dict[str, list[str]] = json.loads(done.stdout)
    models = json.loads((ROOT / "tests" / "bench" / "family.json").read_text())
    expected = {
        "quality": 13,
        "rivals": 6,
        "effort": 5,
        "speed": 8,
        "digits-labels": 8,
        "digits-clusters": 6,
        "digits-samples": 7,
    }
    shown = [codec.Codec().model, *(name for name in model_ids() if name.startswith("classic-"))]
    expected["family"] = 2 + len(shown)
    expected["noise"] = 3 + sum(len(models["noise"].get(name, ())) for name in shown)
    assert {name: len(rows) for name, rows in tables.items()} == expected
    for name, rows in tables.items():
        assert "\n".join([f"<!-- {name} -->", *rows, f"<!-- /{name} -->"]) in README
    for name in ("rd", "rd-photos2", "effort", "speed"):
        results = json.loads((ROOT / "tests" / "bench" / f"{name}.json").read_text())
        assert results["date"] in README
        assert results["model"] == codec.Codec().model
    assert set(models["models"]) == set(model_ids())
    assert models["date"] in README


def test_server_name_is_the_service_of_the_proto() -> None:
    assert SERVICE.full_name == "hourglass.v1.CodecService"
