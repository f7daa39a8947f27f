"""The prior gives the same integers whatever computes it, and so a file decodes to the same symbols everywhere."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from hourglass.codec import Codec, errors, exactness, image, runtime
from hourglass.codec.quantise import narrow, widen
from hourglass.codec.train.export import load_checkpoint
from hourglass.codec.train.graphs import PriorGraph, kmacs
from hourglass.codec.train.network import Block, BytewiseBlock, hats, unweave

MODEL = runtime.ZOO / runtime.DEFAULT_MODEL
PRIOR = MODEL / "prior.onnx"
WEIGHTS = Path(runtime.__file__).parent / "train" / "weights" / f"{runtime.DEFAULT_MODEL}.pt"
IMAGES = Path(__file__).parent / "images"

LEVELS = [
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
]
SHAPES = [(1, 1), (1, 7), (5, 2), (8, 12), (16, 16)]
"""Of tiles, in positions of the hyper-latent: 64 pixels a side each."""

Inputs = dict[str, NDArray[Any]]


def _inputs(shape: tuple[int, int], step: int, quality: float, seed: int = 0) -> Inputs:
    """What the runtime gives prior.onnx, with symbols far wilder than a picture's."""
    model = runtime.open_model(runtime.DEFAULT_MODEL)
    rng = np.random.default_rng([*shape, step, seed])
    height, width = shape
    units = model.units(quality, index := (step + height) % 3)
    channels = 4 * model.widths[index]
    z = rng.normal(0, rng.choice([1, 20, 3000]), (model.hyper.channels, height, width))
    known = rng.normal(0, 1, (channels, 4 * height, 4 * width)) * 2 ** rng.uniform(0, 16, (channels, 1, 1))
    captured: Inputs = {}

    def run(_file: str, inputs: Inputs) -> list[NDArray[Any]]:
        captured.update(inputs)
        return [np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1))]

    model._run = run  # type: ignore[method-assign]
    as_int16 = [np.clip(np.rint(values), -32768, 32767).astype(np.int16) for values in (z, known)]
    if step == runtime.HYPER_STEP:
        model.expect(as_int16[0], units)
        return captured
    features = model.no_features
    if step:  # what step 0 gives
        plain = _onnxruntime(LEVELS[0], 1)
        model.step(0, as_int16[0], as_int16[1], features, units)
        features = plain(captured)[2]
    model.step(step, as_int16[0], as_int16[1], features, units)
    return captured


def _onnxruntime(level: Any, threads: int) -> Callable[[Inputs], list[NDArray[Any]]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(PRIOR, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


@pytest.fixture(scope="module")
def torch_prior() -> PriorGraph:
    net, _ = load_checkpoint(WEIGHTS)
    return PriorGraph(net.prior)


def _torch(prior: PriorGraph, inputs: Inputs, dtype: torch.dtype) -> list[NDArray[Any]]:
    """The layers know nothing of widths: they get zeros for the channels that are not there."""
    model = runtime.open_model(runtime.DEFAULT_MODEL)
    if int(inputs["step"]) == runtime.HYPER_STEP:
        tensors = {name: torch.from_numpy(inputs[name]).to(dtype) for name in inputs if name not in ("step", "width")}
        level, mean = prior.to(dtype)(runtime.HYPER_STEP, tensors)
        return [level.numpy().astype(np.uint8), mean.numpy().astype(np.int16)]
    count = model.widths[int(inputs["width"])]
    wide = dict(inputs, known=widen(inputs["known"][0], model.latent.channels)[None])
    wide |= {name: widen(inputs[name], model.latent.channels) for name in ("mean_unit", "level_offset")}
    tensors = {name: torch.from_numpy(wide[name]).to(dtype) for name in inputs if name not in ("step", "width")}
    results = prior.to(dtype)(int(inputs["step"]), tensors)
    level, mean = (torch.from_numpy(narrow(result[0].numpy(), count))[None] for result in results)
    return [level.numpy().astype(np.uint8), mean.numpy().astype(np.int16)]


@pytest.fixture(scope="module")
def reference() -> list[tuple[Inputs, list[NDArray[Any]]]]:
    """Inputs for every step and tile shape, and what onnxruntime makes of them without any optimisation."""
    plain = _onnxruntime(LEVELS[0], 1)
    model = runtime.open_model(runtime.DEFAULT_MODEL)
    assert isinstance(model, runtime.Hyperprior)
    steps = [*range(4), *[runtime.HYPER_STEP] * model.contextual]
    cases = [_inputs(shape, step, quality) for shape, quality in zip(SHAPES, (0, 33.3, 50, 87.65, 100), strict=True)
             for step in steps]  # fmt: skip
    return [(case, plain(case)) for case in cases]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", LEVELS, ids=["none", "basic", "extended", "all"])
def test_onnxruntime(level: Any, threads: int, reference: list[tuple[Inputs, list[NDArray[Any]]]]) -> None:
    """Every optimisation level, one and two threads, every step and tile shape: bit for bit."""
    evaluate = _onnxruntime(level, threads)
    for inputs, expected in reference:
        for result, wanted in zip(evaluate(inputs), expected, strict=True):
            assert np.array_equal(result, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorch(
    dtype: torch.dtype, torch_prior: PriorGraph, reference: list[tuple[Inputs, list[NDArray[Any]]]]
) -> None:
    """The trained layers, from the committed weights, are the shipped graph: bit for bit."""
    for inputs, expected in reference:
        for result, wanted in zip(_torch(torch_prior, inputs, dtype), expected[:2], strict=True):
            assert np.array_equal(result, wanted)


def test_numpy(reference: list[tuple[Inputs, list[NDArray[Any]]]]) -> None:
    """onnx's reference evaluator, which is NumPy throughout."""
    evaluator = ReferenceEvaluator(str(PRIOR))
    for inputs, expected in reference[:15]:
        results = evaluator.run(None, inputs)
        for result, wanted in zip(results, expected, strict=True):
            assert np.array_equal(np.asarray(result), wanted)


def test_results_are_not_constant(reference: list[tuple[Inputs, list[NDArray[Any]]]]) -> None:
    """The comparisons above compare something."""
    for _, (level, mean, _) in reference[5:]:
        assert len(np.unique(level)) > 10
        assert len(np.unique(mean)) > 20


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", LEVELS, ids=["none", "basic", "extended", "all"])
def test_file_decodes_alike(level: Any, threads: int, monkeypatch: pytest.MonkeyPatch, codec: Codec) -> None:
    """A file of the default setting decodes to equal symbols under every other one, and the other way round."""
    picture = image.read(IMAGES / "motocross.png")[:200, :330]
    file = codec.encode(picture, quality=60)
    make, made = ort.InferenceSession, []

    def session(data: bytes, options: Any, **rest: Any) -> Any:
        options.graph_optimization_level = level
        made.append(options.intra_op_num_threads)
        return make(data, options, **rest)

    monkeypatch.setattr(ort, "InferenceSession", session)
    other = Codec(threads=threads)
    assert other.unpack(file) == codec.unpack(file)
    assert codec.unpack(other.encode(picture, quality=30)) == other.analyse(picture, quality=30)
    assert made == [threads] * 2  # prior and encoder


def test_bounds_are_in_the_manifest_and_below_the_limit() -> None:
    manifest = json.loads((MODEL / "manifest.json").read_text())
    bounds = exactness.bounds(PRIOR.read_bytes())
    assert bounds == manifest["exactness"]
    assert max(max(values) for values in bounds.values()) < 2**24


def test_bounds_hold(reference: list[tuple[Inputs, list[NDArray[Any]]]]) -> None:
    """The proof's numbers, against what a convolution of the graph really reaches on wild inputs."""
    model = onnx.load(PRIOR)
    branch = _hyper_synthesis(model)
    del branch.output[:], model.graph.initializer[:]
    branch.output.append(onnx.helper.make_tensor_value_info("hyper.widen.z", onnx.TensorProto.FLOAT, None))
    branch.input.extend(entry for entry in model.graph.input if entry.name in ("z", "hyper_unit", "quality"))
    model.graph.CopyFrom(branch)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    bounds = np.array(exactness.bounds(PRIOR.read_bytes())["hyper.widen.z"])
    constants = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in _hyper_synthesis(onnx.load(PRIOR)).initializer
    }
    nodes = {node.output[0]: node for node in branch.node}
    scale = constants[nodes[nodes["hyper.widen.z"].input[1]].input[1]].reshape(-1, 1, 1)
    for inputs, _ in reference:
        given = {name: inputs[name] for name in ("z", "hyper_unit", "quality")}
        (accumulator,) = session.run(["hyper.widen.z"], given)
        integers = accumulator[0] / scale
        assert (abs(integers).max((1, 2)) <= bounds).all()
        assert (integers == np.rint(integers)).all()


def test_decoder_works_on_bytes_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes but for some that lie between two: the same picture, as near to what was encoded."""
    net, _ = load_checkpoint(WEIGHTS)
    picture = image.read(IMAGES / "motocross.png")[:128, :192]
    x = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        quality = torch.tensor([50.0])
        y_hat, _, inverse = net.entropy(net.analysis(x / 255), quality, "settle")
        latent, weights = y_hat * inverse, hats(quality, net.shape.anchors)
        wanted = (net.synthesis(latent, weights)[0].permute(1, 2, 0).numpy() * 255).round()
        for name in ("forward", "active"):
            monkeypatch.setattr(BytewiseBlock, name, getattr(Block, name))
        in_float = (net.synthesis(latent, weights)[0].permute(1, 2, 0).numpy() * 255).round()
    core, rest = unweave(latent, net.shape.core)
    patch = runtime.Patch(core.numpy(), rest.numpy(), (0, 8, 0, 12), 50.0)
    decoded = runtime.open_model(runtime.DEFAULT_MODEL).synthesise(patch).astype(np.float32)
    of_bytes, of_floats, of_decoded = (np.square(pixels - picture).mean() for pixels in (wanted, in_float, decoded))
    assert of_decoded == pytest.approx(of_bytes, rel=0.01)
    assert of_floats != pytest.approx(of_bytes, rel=1e-4)
    assert np.abs(decoded - wanted).mean() < 0.5
    operators = [node.op_type for node in onnx.load(MODEL / "decoder.onnx").graph.node]
    parts = list(net.synthesis.fine)
    assert operators.count("MatMulIntegerToFloat") == len(parts)
    seen, expanded = (sum(getattr(part, name, None) is not None for part in parts) for name in ("log_seen", "expand"))
    assert operators.count("QLinearConv") == seen + expanded + (3 if len(net.synthesis.posts) == 1 else 0)


def _changed(folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A zoo with the default model, prior.onnx changed and its checksum mended."""

    def change_file(path: Path) -> None:
        model = onnx.load(path)
        change(model)
        onnx.save(model, path)

    return _with_changed(folder, "prior.onnx", change_file)


def _with_changed(folder: Path, name: str, change: Callable[[Path], None]) -> Path:
    """A zoo with the default model, one of its files changed and the checksum mended."""
    copy = folder / MODEL.name
    shutil.copytree(MODEL, copy)
    change(copy / name)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256((copy / name).read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _hyper_synthesis(model: onnx.ModelProto) -> onnx.GraphProto:
    branches = (attribute.g for node in model.graph.node for attribute in node.attribute if attribute.HasField("g"))
    return next(graph for graph in branches if graph.name == "branchhyper.")


def _weights(model: onnx.ModelProto, name: str, array: NDArray[Any]) -> None:
    """Replace the weights of a convolution of the hyper-synthesis."""
    graph = _hyper_synthesis(model)
    (node,) = (node for node in graph.node if node.name == name)
    (scaled,) = (scaled for scaled in graph.node if scaled.output[0] == node.input[1])
    (cast,) = (cast for cast in graph.node if cast.output[0] == scaled.input[0])
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == cast.input[0])
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (np.full((512, 64, 1, 1), 2**20, np.int32), r"hyper\.widen2 may reach"),
        (np.full((512, 64, 1, 1), 0.5, np.float32), "may not keep what it casts"),
        (np.ones((512, 64, 1, 1), np.int8), "not as exact as its manifest says"),
    ],
)
def test_inexact_model_is_refused(fill: NDArray[Any], message: str, tmp_path: Path) -> None:
    zoo = _changed(tmp_path, lambda model: _weights(model, "hyper.widen2", fill))
    with pytest.raises(errors.ModelError, match=message):
        Codec(zoo=zoo).encode(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("latent_exponent", np.full((11, 512), -15361, np.int32)),
        ("scale_shift", np.full((11, 4, 512), 15361, np.int16)),
        ("mantissa", np.full(256, 512, np.uint16)),
    ],
)
def test_units_beyond_the_proof_are_refused(name: str, values: NDArray[Any], tmp_path: Path) -> None:
    def change(path: Path) -> None:
        with np.load(path) as arrays:
            np.savez(path, allow_pickle=False, **{**arrays, name: values})

    zoo = _with_changed(tmp_path, "tables.npz", change)
    with pytest.raises(errors.ModelError, match=r"has units that prior\.onnx is not exact for"):
        Codec(zoo=zoo).encode(np.zeros((8, 8, 3), np.uint8))


def test_unknown_operator_is_refused(tmp_path: Path) -> None:
    def sigmoid(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Floor").op_type = "Sigmoid"

    with pytest.raises(errors.ModelError, match="operator Sigmoid is not known to be exact"):
        Codec(zoo=_changed(tmp_path, sigmoid)).encode(np.zeros((8, 8, 3), np.uint8))


def _node(model: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    return next(node for node in _hyper_synthesis(model).node if node.op_type == operator)


def _fraction_cast(model: onnx.ModelProto) -> None:
    _node(model, "Cast").attribute[0].i = onnx.TensorProto.FLOAT16


def _odd_clip(model: onnx.ModelProto) -> None:
    graph = _hyper_synthesis(model)
    bound = next(tensor for tensor in graph.initializer if tensor.name == _node(model, "Clip").input[2])
    bound.CopyFrom(onnx.numpy_helper.from_array(np.array(0.5, np.float32), bound.name))


def _late_clip(model: onnx.ModelProto) -> None:
    """What the first layer gets may be so large that its sums are not exact."""
    graph = _hyper_synthesis(model)
    bound = next(tensor for tensor in graph.initializer if tensor.name == _node(model, "Clip").input[2])
    bound.CopyFrom(onnx.numpy_helper.from_array(np.array(2**20, np.float32), bound.name))


def _scale_of(model: onnx.ModelProto, operand: int) -> onnx.TensorProto:
    """The powers of two that the weights (1) or the bias (2) of a convolution are multiplied by."""
    graph = _hyper_synthesis(model)
    (node,) = (node for node in graph.node if node.name == "hyper.widen2")
    (scaled,) = (scaled for scaled in graph.node if scaled.output[0] == node.input[operand])
    return next(tensor for tensor in graph.initializer if tensor.name == scaled.input[1])


def _change_scale(factor: float, *operands: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for operand in operands:
            tensor = _scale_of(model, operand)
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * factor, tensor.name))

    return change


def _shallow_clip(model: onnx.ModelProto) -> None:
    """The output `level` may be negative, which a cast to uint8 does not keep."""
    (cast,) = (node for node in model.graph.node if node.output[0] == "level")
    (clip,) = (node for node in model.graph.node if node.output[0] == cast.input[0])
    bound = next(tensor for tensor in model.graph.initializer if tensor.name == clip.input[1])
    bound.CopyFrom(onnx.numpy_helper.from_array(np.array(-63, np.float32), bound.name))


def _no_clip(model: onnx.ModelProto) -> None:
    """An offset of any size is added to what comes straight from a convolution."""
    graph = _hyper_synthesis(model)
    next(node for node in graph.node if node.op_type == "Add" and "hyper.widen.z" in node.input).input[1] = "hyper_unit"


def _long_product(model: onnx.ModelProto) -> None:
    """A factor of 24 bits, after one of 9."""
    (product,) = (node for node in model.graph.node if node.op_type == "Mul" and node.input[1] == "mean_unit")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2**20 + 1, np.float32), "odd"))
    product.input[0] = "odd"


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _of_bytes(operand: int, value: Any) -> Callable[[onnx.ModelProto], None]:
    """Replace an input of the first convolution of bytes: by what `value` makes of it."""

    def change(model: onnx.ModelProto) -> None:
        graph, node = next(
            (graph, node) for graph in _graphs(model.graph) for node in graph.node if node.op_type == "QLinearConv"
        )
        (tensor,) = (tensor for tensor in graph.initializer if tensor.name == node.input[operand])
        tensor.CopyFrom(onnx.numpy_helper.from_array(value(onnx.numpy_helper.to_array(tensor)), tensor.name))

    return change


def _no_byte(model: onnx.ModelProto) -> None:
    """The features may be what no byte is."""
    cast = next(node for node in model.graph.node if node.op_type == "Cast" and node.attribute[0].i == 2)
    (clip,) = (node for node in model.graph.node if node.output[0] == cast.input[0])
    bound = next(tensor for tensor in model.graph.initializer if tensor.name == clip.input[2])
    bound.CopyFrom(onnx.numpy_helper.from_array(np.array(256, np.float32), bound.name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_of_bytes(3, lambda w: np.where(np.arange(w.shape[1])[:, None, None] == 5, 65, w).astype(np.int8)),
         "has weights up to 65; exact up to 64 only"),
        (_of_bytes(4, lambda scale: scale * np.float32(1.5)), "by other than a power of two for each row"),
        (_of_bytes(4, lambda scale: scale[:1]), "by other than a power of two for each row"),
        (_of_bytes(1, lambda scale: scale * np.float32(2)), "scales or shifts its bytes"),
        (_of_bytes(7, lambda zero: zero + np.uint8(1)), "scales or shifts its bytes"),
        (_of_bytes(8, lambda bias: bias + np.int32(2**24)), "may reach .*; exact below"),
        (_no_byte, "may not keep what it casts"),
    ],
)  # fmt: skip
def test_faults_of_bytes_are_refused(change: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match=message):
        Codec(zoo=_changed(tmp_path, change)).encode(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change_scale(1.5, 1, 2), "scales constants by other than a power of two"),
        (_change_scale(2.0**90, 1, 2), "scales constants by other than a power of two"),
        (_change_scale(2, 1), "weights and bias of hyper.widen2 are in different units"),
        (_shallow_clip, "may not keep what it casts"),
        (_no_clip, "the sum .* may reach"),
        (_long_product, "may need more than 24 bits"),
        (_fraction_cast, "may not keep what it casts"),
        (_odd_clip, "clips to"),
        (_late_clip, "may reach"),
    ],
)
def test_subtler_faults_are_refused(change: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match=message):
        Codec(zoo=_changed(tmp_path, change)).encode(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("data", [b"", b"\x08", b"\x3a\xff\xff\xff\x7f", bytes(range(256))])
def test_no_graph_is_refused(data: bytes) -> None:
    with pytest.raises(errors.ModelError, match=r"prior\.onnx"):
        exactness.bounds(data)


def test_cost() -> None:
    """Counted from the ONNX files: what decodes within 12, what encodes within 30 kMAC for each pixel."""
    counted = kmacs(MODEL)
    manifest = json.loads((MODEL / "manifest.json").read_text())
    assert counted == manifest["kmac_per_pixel"]
    assert 5 < counted["synthesis"] + counted["prior"] <= 12
    assert 5 < counted["analysis"] + counted["prior"] <= 30
