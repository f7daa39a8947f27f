"""What a code is good for besides storage: `python -m hourglass.codec.train.digits`, in a few minutes on one core.

An autoencoder in small, of the same blocks as the classic models, learns without labels from the handwritten digits
that come with scikit-learn (8x8 pixels, one channel). Then its code is put to three uses:

    classification    a linear classifier, or a fully connected head, on the code with few labels
    clustering        k-means on the codes; the decoder shows what a cluster is
    generation        a Gaussian mixture fitted to the codes; its samples are decoded

    x (B, 1, 8, 8) in [0, 1]
      -> convolution, ReLU, average pooling -> convolution with stride 2, ReLU -> convolution with stride 2
      = code z (B, D, 1, 1)
      -> deconvolution, ReLU -> deconvolution, ReLU, average unpooling -> convolution, sigmoid
      = x_hat (B, 1, 8, 8) in (0, 1)

The cost is the squared error at the decoder's output, and what a use asks for on top of it (`Cost`). Behind each inner
layer stands batch normalisation (Ioffe and Szegedy, 2015): after as many steps the codes are better for it. The 500
digits of the test split are seen by no autoencoder, classifier or mixture. Digits are passed as (N, 8, 8) float32 in
[0, 1], codes as (N, D) float32.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass.codec import errors, image
from hourglass.codec.train import run_command
from hourglass.codec.train.blocks import (
    AveragePooling,
    AverageUnpooling,
    Convolution,
    Deconvolution,
    squared_error,
)

Floats: TypeAlias = NDArray[np.float32]
Labels: TypeAlias = NDArray[np.int64]

SIDE = 8
CLASSES = 10
HELD_OUT = 500
"""Digits of the test split."""

RATE, BATCH = 2e-3, 128
"""Of the training: highest learning rate, digits in a step."""


@dataclass(frozen=True)
class Digits:
    """The digits of scikit-learn in two parts, always the same: 1297 to learn from and 500 to test with."""

    pictures: Floats  # (N, 8, 8) in [0, 1]
    labels: Labels  # (N,), 0 to 9; the autoencoder never sees them
    test_pictures: Floats
    test_labels: Labels

    def drawn(self, count: int, seed: int) -> NDArray[np.int64]:
        """Places of `count` digits that get their labels, the same number of each class but for one.

        Raises `InvalidArgument` for fewer than two of each class, which cross-validation needs, or more than there
        are.
        """
        most = len(self.labels) - CLASSES
        if not 2 * CLASSES <= count <= most:
            raise errors.InvalidArgument(f"{count} labels; expected {2 * CLASSES} to {most}")
        places: NDArray[np.int64] = train_test_split(
            np.arange(len(self.labels)), train_size=count, stratify=self.labels, random_state=seed
        )[0]
        return places


def load() -> Digits:
    """Read the digits from scikit-learn's own files and split them."""
    found = load_digits()
    pictures, labels = (found.images / 16).astype(np.float32), found.target.astype(np.int64)
    learn, test = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    return Digits(pictures[learn], labels[learn], pictures[test], labels[test])


class Autoencoder(nn.Module):
    """Encoder and decoder, each the mirror of the other; the code is D numbers."""

    def __init__(self, code: int, widths: tuple[int, int] = (32, 64)) -> None:
        super().__init__()
        outer, inner = widths
        self.encoder = nn.Sequential(
            *(Convolution(1, outer, 3), nn.BatchNorm2d(outer), nn.ReLU(), AveragePooling()),
            *(Convolution(outer, inner, 3, 2), nn.BatchNorm2d(inner), nn.ReLU()),
            Convolution(inner, code, 3, 2),
        )
        self.decoder = nn.Sequential(
            *(Deconvolution(code, inner, 3, 2), nn.BatchNorm2d(inner), nn.ReLU()),
            *(Deconvolution(inner, outer, 3, 2), nn.BatchNorm2d(outer), nn.ReLU()),
            *(AverageUnpooling(), Convolution(outer, 1, 3), nn.Sigmoid()),
        )

    @torch.no_grad()
    def encode(self, pictures: Floats) -> Floats:
        """(N, 8, 8) in [0, 1] -> codes (N, D)."""
        codes: Floats = self.encoder(torch.from_numpy(pictures)[:, None]).flatten(1).numpy()
        return codes

    @torch.no_grad()
    def decode(self, codes: Floats) -> Floats:
        """Codes (N, D) -> (N, 8, 8) in (0, 1)."""
        pictures: Floats = self.decoder(torch.from_numpy(codes)[..., None, None])[:, 0].numpy()
        return pictures


@dataclass(frozen=True)
class Cost:
    """What a network is trained for, beside the squared error."""

    distort: bool = False  # the input is `distorted`, the target is not: the code learns what stays
    consistency: float = 0.0  # weight of `disagreement` between the codes of two distortions of a digit
    noise: float = 0.0  # deviation of noise on the code before it is decoded: near codes are near pictures
    energy: float = 0.0  # weight of the code's squared length, which bounds it against the noise


FEATURE = Cost(distort=True, consistency=0.05)
"""For classification and clustering: what pictures of one digit have in common."""

SAMPLE = Cost(noise=0.1, energy=1e-4)
"""For generation: a code without holes, of the picture as it is (Ghosh et al., "From variational to deterministic
autoencoders", 2020, who fit the density of the codes afterwards too)."""


def distorted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each of (B, 1, 8, 8) turned by at most 12 degrees, moved by 0.6 pixels, scaled by 12 %, slanted, and bent.

    The bend is a field of displacements with a deviation of 0.35 pixels, smooth over a third of the picture (Simard,
    Steinkraus and Platt, "Best practices for convolutional neural networks", 2003).
    """
    count = len(x)

    def within(reach: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * reach

    angle, slant = within(math.radians(12)), within(0.12)
    wide, high = within(0.12).exp(), within(0.12).exp()
    pixel = 2 / SIDE  # in the coordinates of `affine_grid`
    rows = [
        torch.stack([angle.cos() * wide, slant - angle.sin() * high, within(0.6 * pixel)], 1),
        torch.stack([angle.sin() * wide, angle.cos() * high, within(0.6 * pixel)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    bend = torch.randn(count, 2, 3, 3, generator=generator) * (0.35 * pixel)
    bend = F.interpolate(bend, size=SIDE, mode="bicubic", align_corners=False)
    return F.grid_sample(x, grid + bend.permute(0, 2, 3, 1), align_corners=False).clamp(0, 1)


def disagreement(a: Tensor, b: Tensor) -> Tensor:
    """How far the codes (B, D) of two distortions of the same digits are from agreeing and from being worth something.

    The mean squared difference; and for each of the two how far the deviations of its D numbers are below 1, and 0.04
    times the sum of their squared covariances over D. Without these all codes could be the same. (Bardes, Ponce and
    LeCun, "VICReg", 2022, with its weights 25, 25 and 1 but for a common factor.)
    """
    total = F.mse_loss(a, b)
    for code in (a, b):
        centred = code - code.mean(0)
        deviation = (centred.var(0) + 1e-4).sqrt()
        covariance = centred.T @ centred / (len(code) - 1)
        beside = covariance - torch.diag(covariance.diagonal())
        total = total + F.relu(1 - deviation).mean() + 0.04 * beside.square().sum() / code.shape[1]
    return total


def train(pictures: Floats, cost: Cost, code: int, steps: int, seed: int) -> Autoencoder:
    """An autoencoder of `pictures` (N, 8, 8), with a code of `code` numbers; the same for the same seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net, x = Autoencoder(code), torch.from_numpy(pictures)[:, None]
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on a CPU
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(steps):
        clean = x[torch.randint(len(x), (BATCH,), generator=generator)]
        z = net.encoder(distorted(clean, generator) if cost.distort else clean)
        noise = torch.randn(z.shape, generator=generator) * cost.noise
        loss = squared_error(clean, net.decoder(z + noise)).mean()
        if cost.energy:
            loss = loss + cost.energy * z.square().sum(1).mean()
        if cost.consistency:
            other = net.encoder(distorted(clean, generator))
            loss = loss + cost.consistency * disagreement(z.flatten(1), other.flatten(1))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return net.eval()


class Head(nn.Module):
    """A fully connected classifier of codes (N, D): one hidden layer, the logits of the classes (N, 10)."""

    def __init__(self, code: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, CLASSES))

    def forward(self, codes: Tensor) -> Tensor:
        logits: Tensor = self.layers(codes)
        return logits


Classifier: TypeAlias = Callable[[Floats, Labels, int], Callable[[Floats], Labels]]
"""Features (N, D) with their labels (N,), and a seed, to a function from features to labels."""


def linear(features: Floats, labels: Labels, seed: int) -> Callable[[Floats], Labels]:
    """Logistic regression; its regularisation is chosen by five-fold cross-validation on these labels alone.

    With fewer than five of a class there are fewer folds. Features are divided by one number, their overall deviation,
    so that the choice is among the same strengths for each kind. (Dividing each feature by its own does raw pixels
    harm: a pixel at the edge that is almost always 0 is then as loud as any.)
    """
    scale = features.std()
    folds = StratifiedKFold(min(5, int(np.bincount(labels).min())), shuffle=True, random_state=seed)
    search = GridSearchCV(LogisticRegression(max_iter=2000, tol=1e-3), {"C": [0.001, 0.01, 0.1, 1, 10]}, cv=folds)
    search.fit(features / scale, labels)
    return lambda others: np.asarray(search.predict(others / scale), np.int64)


def connected(features: Floats, labels: Labels, seed: int) -> Callable[[Floats], Labels]:
    """A `Head` trained on all of the labels at once."""
    torch.manual_seed(seed)
    middle, scale = features.mean(0), features.std()
    x, y = torch.from_numpy((features - middle) / scale), torch.from_numpy(labels)
    head = Head(x.shape[1])
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        F.cross_entropy(head(x), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    head.eval()

    def predict(others: Floats) -> Labels:
        with torch.no_grad():
            found: Labels = head(torch.from_numpy((others - middle) / scale)).argmax(1).numpy()
        return found

    return predict


def flat(pictures: Floats) -> Floats:
    """(N, 8, 8) -> (N, 64)."""
    return pictures.reshape(len(pictures), -1)


def accuracy(
    digits: Digits, learn: Floats, test: Floats, count: int, seeds: list[int], classifier: Classifier = linear
) -> list[float]:
    """For each seed the share of the test split that is recognised with `count` labels.

    learn, test: features (N, D) of the two parts. A seed draws the digits that get their labels: with the same one
    each kind of features gets the same.
    """
    shares = []
    for seed in seeds:
        places = digits.drawn(count, seed)
        predict = classifier(learn[places], digits.labels[places], seed)
        shares.append(float((predict(test) == digits.test_labels).mean()))
    return shares


def purity(found: NDArray[Any], labels: Labels) -> float:
    """The share of digits that are of their cluster's most frequent class. Clusters and labels (N,)."""
    return sum(int(np.bincount(labels[found == cluster]).max()) for cluster in np.unique(found)) / len(labels)


def clusters(features: Floats, seed: int) -> tuple[Labels, Floats]:
    """k-means with ten clusters, the best of ten starts: the cluster of each of (N, D), and the centres (10, D)."""
    means = KMeans(CLASSES, n_init=10, random_state=seed).fit(features)
    return means.labels_.astype(np.int64), means.cluster_centers_.astype(np.float32)


def mixture(codes: Floats, parts: int, seed: int) -> GaussianMixture:
    """A mixture of `parts` Gaussians fitted to codes (N, D), in double precision: covariances have no room to spare."""
    return GaussianMixture(parts, reg_covar=float(1e-3 * codes.var()), random_state=seed).fit(codes.astype(np.float64))


def frechet(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """The squared Fréchet distance of two Gaussians with the mean and covariance of features (N, D) and (M, D).

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)). (Heusel et al., "GANs trained by a two time-scale update rule",
    2017, equation 6, where the features are those of a classifier.)
    """
    covariances = [np.cov(part.T.astype(np.float64)) for part in (a, b)]
    # The eigenvalues of a product of two covariances are not negative, but for rounding.
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0))
    apart = np.square(a.mean(0, np.float64) - b.mean(0, np.float64)).sum()
    return float(apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots.sum())


def nearest(pictures: Floats, known: Floats) -> float:
    """Root mean squared difference of pictures (N, 8, 8) from the most similar of `known` (M, 8, 8) each, their mean.

    Samples much nearer to the digits that were learnt from than held-out digits are would be copies.
    """
    apart = torch.cdist(torch.from_numpy(flat(pictures)), torch.from_numpy(flat(known)))
    return float(apart.min(1).values.mean()) / SIDE


def interpolated(net: Autoencoder, start: Floats, end: Floats, count: int = 9) -> Floats:
    """Two pictures (8, 8) to `count` pictures (count, 8, 8), decoded from codes evenly on the line between theirs."""
    a, b = net.encode(np.stack([start, end]))
    part = np.linspace(0, 1, count, dtype=np.float32)[:, None]
    return net.decode(a + (b - a) * part)


def sheet(pictures: Floats, columns: int, enlarged: int = 6) -> NDArray[np.uint8]:
    """Pictures (N, 8, 8) in rows of `columns` as one grey picture (H, W), white on black with grey lines between."""
    pixels = (pictures * 255 + 0.5).astype(np.uint8).repeat(enlarged, 1).repeat(enlarged, 2)
    pixels = np.pad(pixels, ((0, -len(pixels) % columns), (1, 1), (1, 1)), constant_values=96)
    side = pixels.shape[1]
    return pixels.reshape(-1, columns, side, side).swapaxes(1, 2).reshape(-1, columns * side)


USES = {"plain": Cost(), "distorted": Cost(distort=True), "feature": FEATURE}
"""Costs whose codes are classified and clustered: the last step of each is what its addition gains."""


@dataclass(frozen=True)
class Settings:
    """Of a whole run of the command."""

    steps: int = 600  # of an autoencoder
    code: int = 32  # numbers in the code for classification and clustering
    sample_code: int = 16  # numbers in the code for generation
    networks: int = 3  # of each cost, with seeds 0, 1, ...
    draws: int = 18  # of labelled digits, with seeds 0, 1, ...; they take turns with the networks
    labels: tuple[int, ...] = (50, 100, 500)
    parts: int = 20  # Gaussians of the mixture
    samples: int = 1297  # codes that are sampled, as many as there are digits to learn from


Say: TypeAlias = Callable[[str], None]


def measure_classification(
    digits: Digits, networks: dict[str, list[Autoencoder]], settings: Settings, say: Say
) -> list[dict[str, Any]]:
    """Accuracy in percent, mean and spread over the draws, for each kind of features and number of labels."""
    pca = PCA(settings.code, random_state=0).fit(flat(digits.pictures))
    kinds: list[tuple[str, Classifier, list[tuple[Floats, Floats]]]] = [
        ("raw pixels", linear, [(flat(digits.pictures), flat(digits.test_pictures))]),
        ("PCA", linear, [(pca.transform(flat(digits.pictures)), pca.transform(flat(digits.test_pictures)))]),
    ]
    codes = {
        name: [(net.encode(digits.pictures), net.encode(digits.test_pictures)) for net in nets]
        for name, nets in networks.items()
    }
    kinds += [(name, linear, pairs) for name, pairs in codes.items()]
    kinds.append(("feature, fully connected head", connected, codes["feature"]))
    rows = []
    for name, classifier, pairs in kinds:
        for count in settings.labels:
            shares = []
            for number, (learn, test) in enumerate(pairs):
                seeds = list(range(number, settings.draws, len(pairs)))
                shares += accuracy(digits, learn, test, count, seeds, classifier)
            row = {"features": name, "numbers": pairs[0][0].shape[1], "labels": count}
            rows.append(row | _spread([100 * share for share in shares]))
            say(f"{name}, {count} labels: {rows[-1]['mean']:.1f} % ± {rows[-1]['deviation']:.1f}")
    return rows


def measure_clusters(
    digits: Digits, networks: dict[str, list[Autoencoder]], settings: Settings, say: Say
) -> tuple[list[dict[str, Any]], Floats]:
    """Agreement of ten clusters with the ten classes, and the decoded centres (10, 8, 8) of the first feature code.

    The digits are those of the test split, which no network has seen; k-means never sees a label.
    """
    kinds: dict[str, list[Floats]] = {"raw pixels": [flat(digits.test_pictures)]}
    kinds |= {name: [net.encode(digits.test_pictures) for net in nets] for name, nets in networks.items()}
    rows: list[dict[str, Any]] = []
    for name, parts in kinds.items():
        found = [clusters(features, seed)[0] for features in parts for seed in range(settings.networks)]
        information = [float(normalized_mutual_info_score(digits.test_labels, part)) for part in found]
        row = {"features": name, "nmi": _spread(information)}
        rows.append(row | {"purity": _spread([purity(part, digits.test_labels) for part in found])})
        say(f"clusters of {name}: NMI {rows[-1]['nmi']['mean']:.3f}, purity {rows[-1]['purity']['mean']:.3f}")
    net = networks["feature"][0]
    places, centres = clusters(net.encode(digits.test_pictures), 0)
    classes = [int(np.bincount(digits.test_labels[places == cluster]).argmax()) for cluster in range(CLASSES)]
    return rows, net.decode(centres)[np.argsort(classes, kind="stable")]


def measure_samples(
    digits: Digits, net: Autoencoder, judge: Autoencoder, settings: Settings, say: Say
) -> tuple[list[dict[str, Any]], dict[str, Floats]]:
    """Fréchet distance of decoded samples from the digits of the test split, in the codes of `judge`.

    judge: an autoencoder that had no part in the generation. Returns the rows, which also tell how near the samples are
    to digits that were learnt from, and the pictures (samples, 8, 8) of each.
    """
    codes, random = net.encode(digits.pictures), np.random.default_rng(0)
    drawn = mixture(codes, settings.parts, 0).sample(settings.samples)[0]
    noise = random.standard_normal((settings.samples, codes.shape[1]))
    pictures = {
        "training digits themselves": digits.pictures,
        "training digits, encoded and decoded": net.decode(codes),
        "codes from the mixture": net.decode(random.permutation(drawn).astype(np.float32)),
        "codes with mean and deviation of each number": net.decode(
            (codes.mean(0) + codes.std(0) * noise).astype(np.float32)
        ),
        "codes of white noise": net.decode(noise.astype(np.float32)),
    }
    target = judge.encode(digits.test_pictures)
    rows = []
    for name, part in pictures.items():
        distance = frechet(judge.encode(part), target)
        rows.append({"pictures": name, "frechet": distance, "nearest": nearest(part, digits.pictures)})
        say(f"{name}: Fréchet distance {distance:.2f}")
    return rows, pictures


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values)), "count": len(values)}


def measure(settings: Settings, say: Say) -> tuple[dict[str, Any], dict[str, NDArray[np.uint8]]]:
    """Everything, from scratch: the results as they stand in JSON, and the figures (H, W) by their names."""
    digits = load()
    for count in settings.labels:
        digits.drawn(count, 0)  # wrong numbers are found before the minute that training takes
    networks: dict[str, list[Autoencoder]] = {}
    for name, cost in USES.items():
        networks[name] = []
        for seed in range(settings.networks):
            networks[name].append(train(digits.pictures, cost, settings.code, settings.steps, seed))
            say(f"trained: {name}, seed {seed}")
    generator = train(digits.pictures, SAMPLE, settings.sample_code, settings.steps, 0)
    classification = measure_classification(digits, networks, settings, say)
    grouping, centres = measure_clusters(digits, networks, settings, say)
    generation, pictures = measure_samples(digits, generator, networks["feature"][0], settings, say)
    error = np.square(generator.decode(generator.encode(digits.test_pictures)) - digits.test_pictures).mean()
    results = {
        "settings": asdict(settings),
        "costs": {name: asdict(cost) for name, cost in (USES | {"sample": SAMPLE}).items()},
        "digits": {"learn": len(digits.labels), "test": len(digits.test_labels)},
        "classification": classification,
        "clusters": grouping,
        "generation": generation,
        "nearest_of_test_digits": nearest(digits.test_pictures, digits.pictures),
        "psnr_of_generator": float(-10 * np.log10(error)),
    }
    shown = [pictures[name][:40] for name in ("training digits themselves", "codes from the mixture")]
    shown.append(pictures["codes with mean and deviation of each number"][:40])
    steps = [
        interpolated(generator, *(digits.test_pictures[digits.test_labels == label][0] for label in pair))
        for pair in ((0, 1), (3, 8), (4, 9), (7, 2))
    ]
    figures = {
        "centres": sheet(centres, CLASSES),
        "samples": np.concatenate([sheet(part, 20) for part in shown]),
        "interpolation": sheet(np.concatenate(steps), len(steps[0])),
    }
    return results, figures


_DEFAULTS = Settings()


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON of the results.")
@click.option("--steps", type=click.IntRange(10), default=_DEFAULTS.steps, show_default=True)
@click.option("--networks", type=click.IntRange(1), default=_DEFAULTS.networks, show_default=True)
@click.option("--draws", type=click.IntRange(1), default=_DEFAULTS.draws, show_default=True)
@click.option(
    "--labels", type=int, multiple=True, default=_DEFAULTS.labels, show_default=True, help="Labelled digits; repeat it."
)
@click.option("--machine", default="", help="Description of the machine, for the JSON.")
def main(out: Path, steps: int, networks: int, draws: int, labels: tuple[int, ...], machine: str) -> None:
    """Train on the digits, measure the three uses of the code, and write the results and the figures beside them."""
    settings = replace(_DEFAULTS, steps=steps, networks=networks, draws=max(draws, networks), labels=labels)
    torch.set_num_threads(1)  # more do not pay for pictures this small
    with threadpool_limits(1):
        results, figures = measure(settings, lambda line: click.echo(f"{time.process_time():5.0f} s  {line}"))
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "core_seconds": round(time.process_time()),  # others may be at work on this machine
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
    }
    out.write_text(json.dumps(about | results, indent=1) + "\n")
    for name, pixels in figures.items():
        out.with_name(f"{out.stem}-{name}.png").write_bytes(image.write(pixels, "PNG"))


if __name__ == "__main__":
    run_command(main)
