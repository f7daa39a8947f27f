"""The three uses of a code in small, on the digits themselves: a short training, and what it has to reach already."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.metrics import normalized_mutual_info_score
from threadpoolctl import threadpool_limits

from hourglass.codec import errors, image
from hourglass.codec.train import digits
from hourglass.codec.train.digits import FEATURE, SAMPLE, Autoencoder, Digits

BENCH = Path(__file__).parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> Digits:
    return digits.load()


@pytest.fixture(scope="module")
def feature(data: Digits) -> Autoencoder:
    return digits.train(data.pictures, FEATURE, 32, 200, 0)


@pytest.fixture(scope="module")
def generator(data: Digits) -> Autoencoder:
    return digits.train(data.pictures, SAMPLE, 16, 120, 0)


def test_parts_are_apart(data: Digits) -> None:
    assert data.pictures.shape == (1297, 8, 8)
    assert data.test_pictures.shape == (500, 8, 8)
    assert (data.pictures.min(), data.pictures.max()) == (0, 1)
    learnt = {picture.tobytes() for picture in data.pictures}
    assert not any(picture.tobytes() in learnt for picture in data.test_pictures)
    assert np.bincount(data.test_labels).min() >= 48


def test_labels_are_drawn_evenly(data: Digits) -> None:
    places = data.drawn(100, 3)
    assert len(set(places.tolist())) == 100
    assert set(np.bincount(data.labels[places]).tolist()) <= {9, 10, 11}
    assert set(places.tolist()) == set(data.drawn(100, 3).tolist()) != set(data.drawn(100, 4).tolist())
    for count in (19, 1297):
        with pytest.raises(errors.InvalidArgument, match=f"{count} labels; expected 20 to 1287"):
            data.drawn(count, 0)
    said: list[str] = []
    with pytest.raises(errors.InvalidArgument, match="3 labels; expected 20 to 1287"):
        digits.measure(digits.Settings(labels=(50, 3)), said.append)
    assert not said  # before any training


def test_decoder_mirrors_encoder() -> None:
    net, x = Autoencoder(7), torch.rand(3, 1, 8, 8)
    sizes: list[list[torch.Size]] = []
    for half in (net.encoder, net.decoder):
        sizes.append([x.shape])
        for layer in half:
            x = layer(x)
            if x.shape != sizes[-1][-1]:
                sizes[-1].append(x.shape)
    assert sizes[0] == sizes[1][::-1]
    assert sizes[0][-1] == (3, 7, 1, 1)
    assert 0 < float(x.detach().min()) < float(x.detach().max()) < 1


def test_training_is_repeatable(data: Digits) -> None:
    first, second, other = (digits.train(data.pictures, FEATURE, 16, 5, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(weights, second[name]) for name, weights in first.items())
    assert not torch.equal(first["encoder.0.weight"], other["encoder.0.weight"])


def test_training_learns(data: Digits, generator: Autoencoder) -> None:
    back = generator.decode(generator.encode(data.test_pictures))
    error, of_mean = (np.square(part - data.test_pictures).mean() for part in (back, data.pictures.mean(0)))
    assert error < 0.3 * of_mean


def test_distortions_are_small(data: Digits) -> None:
    """A distorted digit is another picture with nearly the same ink, and most similar to digits of its own class."""
    x = torch.from_numpy(data.pictures[:400])[:, None]
    changed = digits.distorted(x, torch.Generator().manual_seed(0))
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    assert float(changed.sum() / x.sum()) == pytest.approx(1, abs=0.1)  # some leaves at the edges
    apart = torch.cdist(changed.flatten(1), x.flatten(1))
    assert float(apart.diagonal().min()) > 0
    assert float(apart.diagonal().mean()) < 0.7 * float(apart.mean())
    assert (data.labels[apart.argmin(1).numpy()] == data.labels[:400]).mean() > 0.8


def test_disagreement() -> None:
    """Least for two equal codes of independent numbers with deviation 1; codes that are all the same cost most."""
    a = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    a = (a - a.mean(0)) / a.std(0)
    best = float(digits.disagreement(a, a))
    assert best == pytest.approx(0, abs=0.01)
    assert float(digits.disagreement(a, a + 0.5)) == pytest.approx(best + 0.25, abs=1e-3)
    assert float(digits.disagreement(a * 0, a * 0)) == pytest.approx(2 * 0.99)
    alike = a[:, :1].expand(-1, 8)
    assert float(digits.disagreement(alike, alike)) == pytest.approx(2 * 0.04 * 7, rel=0.01)


def test_few_labels_on_the_code_beat_raw_pixels(data: Digits, feature: Autoencoder) -> None:
    codes, others = feature.encode(data.pictures), feature.encode(data.test_pictures)
    raw = digits.accuracy(data, digits.flat(data.pictures), digits.flat(data.test_pictures), 100, [0, 1])
    linear = digits.accuracy(data, codes, others, 100, [0, 1])
    head = digits.accuracy(data, codes, others, 100, [0, 1], digits.connected)
    assert 0.8 < np.mean(raw) < np.mean(linear) - 0.03
    assert np.mean(head) > np.mean(raw) + 0.02
    shuffled = Digits(data.pictures, np.roll(data.labels, 1), data.test_pictures, data.test_labels)
    assert digits.accuracy(shuffled, codes, others, 100, [0])[0] < 0.4  # with wrong labels it is near chance


def test_clusters_and_their_decoded_centres(data: Digits, feature: Autoencoder) -> None:
    """Clusters agree with classes more than those of pixels; a decoded centre looks like its own members."""
    codes = feature.encode(data.test_pictures)
    found, centres = digits.clusters(codes, 0)
    of_pixels, _ = digits.clusters(digits.flat(data.test_pictures), 0)
    agreement, plain = (normalized_mutual_info_score(data.test_labels, part) for part in (found, of_pixels))
    assert agreement > plain + 0.03
    assert digits.purity(found, data.test_labels) > digits.purity(of_pixels, data.test_labels)
    pictures = feature.decode(centres)
    means = np.stack([data.test_pictures[found == cluster].mean(0) for cluster in range(10)])
    apart = np.square(pictures[:, None] - means[None]).mean((2, 3))
    assert (apart.argmin(1) == np.arange(10)).all()


def test_purity() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert digits.purity(np.array([5, 5, 3, 3, 4, 4]), labels) == 1
    assert digits.purity(np.zeros(6, np.int64), labels) == pytest.approx(1 / 3)


def test_samples_of_the_mixture_are_nearest(data: Digits, feature: Autoencoder, generator: Autoencoder) -> None:
    settings = digits.Settings(parts=20)
    rows, pictures = digits.measure_samples(data, generator, feature, settings, lambda _: None)
    distances = [row["frechet"] for row in rows]
    floor, _, mixture, independent, noise = distances
    assert floor < mixture < 0.75 * independent
    assert independent < noise
    assert all(part.shape == (1297, 8, 8) for part in pictures.values())


def test_frechet_distance_is_its_formula() -> None:
    random = np.random.default_rng(2)
    a, b = (random.normal(size=(300, 5)) @ random.normal(size=(5, 5)) for _ in range(2))
    b = b + 0.5
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert digits.frechet(a, b) == pytest.approx(expected, rel=1e-5)
    assert digits.frechet(a, a) == pytest.approx(0, abs=1e-5)
    assert digits.frechet(a, a + 2) == pytest.approx(20, rel=1e-5)


def test_nearest(data: Digits) -> None:
    assert digits.nearest(data.pictures[:5], data.pictures) == 0
    black, white = np.zeros((2, 8, 8), np.float32), np.ones((1, 8, 8), np.float32)
    assert digits.nearest(black, np.concatenate([white, white / 4])) == pytest.approx(0.25)


def test_interpolation_goes_from_one_to_the_other(data: Digits, generator: Autoencoder) -> None:
    pair = data.test_pictures[:2]
    row = digits.interpolated(generator, pair[0], pair[1], 7)
    ends = generator.decode(generator.encode(pair))
    assert np.allclose(row[[0, -1]], ends, atol=1e-5)
    steps = np.square(np.diff(row, axis=0)).mean((1, 2))
    assert steps.max() < 0.5 * np.square(ends[0] - ends[1]).mean()
    to_end = np.square(row - ends[1]).mean((1, 2))
    assert (np.diff(to_end) < 0).all()


def test_sheet() -> None:
    pictures = np.zeros((3, 8, 8), np.float32)
    pictures[1, 0, 7] = 1
    drawn = digits.sheet(pictures, 2, enlarged=2)
    assert drawn.shape == (36, 36)
    assert np.argwhere(drawn == 255).tolist() == [[1, 33], [1, 34], [2, 33], [2, 34]]


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "small.json"
    command = [sys.executable, "-m", "hourglass.codec.train.digits", "--out", str(out)]
    small = ["--steps", "10", "--networks", "1", "--draws", "1", "--labels", "50", "--machine", "a test"]
    done = subprocess.run(command + small, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["machine"] == "a test"
    assert len(results["classification"]) == 6
    for name, shape in {"centres": (50, 500), "samples": (300, 1000), "interpolation": (200, 450)}.items():
        assert image.read(tmp_path / f"small-{name}.png").shape == (*shape, 3)


def test_committed_results_hold() -> None:
    """What is claimed, in the results that the README shows."""
    results = json.loads((BENCH / "digits.json").read_text())
    mean = {(row["features"], row["labels"]): row["mean"] for row in results["classification"]}
    assert mean["feature", 100] >= mean["raw pixels", 100] + 3
    for labels in results["settings"]["labels"]:
        assert mean["feature", labels] > max(mean["raw pixels", labels], mean["PCA", labels])
    groups = {row["features"]: row for row in results["clusters"]}
    assert groups["feature"]["nmi"]["mean"] > groups["raw pixels"]["nmi"]["mean"]
    distance = {row["pictures"]: row["frechet"] for row in results["generation"]}
    assert distance["codes from the mixture"] < distance["codes with mean and deviation of each number"]
