"""``pykernels train | reproduce | table usrl``: representations of time series learned without labels."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import pykernels
from pykernels import _files
from pykernels._errors import InputError, require
from pykernels.backends import BACKENDS
from pykernels.cli._info import cpu_name
from pykernels.cli._job import Job, result_file
from pykernels.cli._options import (
    REQUIRED,
    Parser,
    add_run_options,
    package_version,
    positive,
)

if TYPE_CHECKING:
    from pykernels.data import Dataset
    from pykernels.models._compare import StepTimes
    from pykernels.models.usrl import USRLTransformer
    from pykernels.models.usrl_protocols import SparseLabels

DEFAULT_K = 5
LSTM_FEATURES = 160  # as published, where the causal network has 320
METRICS = ("seed", "encoder", "K", "step", "loss", "seconds")
PICTURED_CASES = 2000  # t-SNE of more takes longer than anyone waits for a picture


def add(systems: dict[str, Any]) -> None:
    """Add the system to the commands ``train``, ``reproduce`` and ``table``."""
    train = systems["train"].add_parser("usrl", help="an encoder of time series", description=_train.__doc__)
    _add_settings(train)
    train.set_defaults(run=_train)

    reproduce = systems["reproduce"].add_parser(
        "usrl", help="an encoder of time series, and an SVM on its features", description=_reproduce.__doc__
    )
    _add_settings(reproduce)
    reproduce.add_setting("--seeds", type=positive, default=1, metavar="N", help="seeds S to S+N-1 (default: 1)")
    reproduce.add_setting(
        "--source", default=None, metavar="NAME", help="learn the features from another data set, for example FordA"
    )
    reproduce.add_setting(
        "--labels",
        type=_labels,
        default=None,
        metavar="N,...",
        help="also accuracies with few labels: numbers of cases, fractions such as 0.1, or 'published'",
    )
    reproduce.add_setting(
        "--label-draws",
        type=positive,
        default=5,
        metavar="N",
        help="of the labelled cases, for each number (default: 5)",
    )
    reproduce.add_setting(
        "--compare", default=False, action="store_true", help="time some training steps beside plain PyTorch"
    )
    reproduce.add_setting("--picture", default=None, metavar="FILE", help="picture of the learned features to write")
    reproduce.set_defaults(run=_reproduce)

    table = systems["table"].add_parser("usrl", help="accuracies beside the published ones", description=_table.__doc__)
    table.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or a file of JSON results")
    table.set_defaults(run=_table)


def _add_settings(parser: Parser) -> None:
    parser.add_setting("--dataset", default=REQUIRED, metavar="NAME", help="for example GunPoint")
    parser.add_setting(
        "--folder",
        default=None,
        metavar="DIR",
        help="where NAME/NAME_TRAIN.ts and NAME/NAME_TEST.ts are, or .tsv (default: the data sets inside aeon)",
    )
    which = parser.add_mutually_exclusive_group()
    parser.add_setting(
        "--k", group=which, type=positive, default=None, metavar="K", help=f"negatives (default: {DEFAULT_K})"
    )
    parser.add_setting(
        "--combined",
        group=which,
        default=False,
        action="store_true",
        help="one encoder for each published K, features concatenated",
    )
    parser.add_setting(
        "--encoder", choices=["cnn", "lstm"], default="cnn", help="lstm is what the method is compared with"
    )
    parser.add_setting("--steps", type=positive, default=None, metavar="N", help="training steps (default: published)")
    parser.add_setting("--dtype", choices=["float32", "float64"], default="float32", help="default: float32")
    parser.add_setting("--backend", choices=BACKENDS, default=None, help="default: the best that runs")
    add_run_options(parser)


class _Job(Job):
    """A command on data sets, for one seed or several."""

    def load(self, *names: str) -> list[Dataset]:
        """Data sets, with the run folder made for them, or compared with those that it was made for."""
        from pykernels.data import load

        sets = [load(name, self.settings.folder) for name in names]
        self.begin({data.name: _digest(data) for data in sets})
        return sets

    def train_seeds(
        self,
        source: Dataset,
        data: Dataset,
        negatives: tuple[int, ...],
        seeds: Sequence[int],
        evaluate: Callable[[int, USRLTransformer], tuple[Any, dict[str, Any]]],
    ) -> list[dict[str, Any]]:
        """Train the encoders of each seed, from where the run was interrupted if it was.

        Args:
            source, data: what to train on, and what the features are for.
            negatives, seeds: K for each encoder, and the seeds.
            evaluate: from a seed and its transformer makes the model to keep, and what to report of it in JSON.

        Returns:
            The reports.
        """
        from pykernels.models._curves import losses_picture
        from pykernels.models._usrl_checkpoint import Normalisation, SavedTrainings, save, save_trainings
        from pykernels.models.usrl import USRLTransformer

        settings, folder = self.settings, self.folder
        training_file = self.training_file()
        saved = SavedTrainings(training_file) if training_file is not None and training_file.is_file() else None
        reports: list[dict[str, Any]] = list(saved.values["reports"]) if saved else []
        normalisation = None if data.mean is None or data.std is None else Normalisation(data.mean, data.std)
        with self.run(METRICS, saved.values["metrics"] if saved else None) as run:
            for seed in seeds[len(reports) :]:
                transformer = USRLTransformer(
                    negatives,
                    n_steps=settings.steps,
                    encoder=settings.encoder,
                    out_channels=LSTM_FEATURES if settings.encoder == "lstm" else 320,
                    dtype=settings.dtype,
                    backend=settings.backend,
                    device=settings.device,
                    random_state=seed,
                )
                trainings = transformer.trainings(source.X_train)
                if saved is not None:
                    saved.restore(trainings)
                    saved = None

                def row(index: int, training: Any, loss: float, seed: int = seed) -> tuple[Any, ...]:
                    return seed, index, training.n_negatives, training.steps_done, loss, f"{training.seconds:.6f}"

                def keep(size: int, trainings: Any = trainings) -> None:
                    assert training_file is not None
                    save_trainings(trainings, training_file, {"reports": reports, "metrics": size})

                run.train(trainings, [f"training, K={k}" for k in negatives], row, keep)
                transformer.finish(trainings)
                model, report = evaluate(seed, transformer)
                reports.append(report)
                if folder is not None:
                    about = {"dataset": data.name, "source": source.name, "seed": seed}
                    path = folder.path / self.name("model.safetensors", seed)
                    save(model, path, normalisation=normalisation, about=about)
                    losses = {f"K = {k}": values for k, values in zip(negatives, transformer.losses_, strict=True)}
                    self.picture(self.name("loss.png", seed), partial(losses_picture, losses))
        return reports

    def name(self, name: str, seed: int) -> str:
        """The name of a file of one seed: as it is if there is one seed only."""
        stem, _, suffix = name.partition(".")
        return name if getattr(self.settings, "seeds", 1) == 1 else f"{stem}-seed{seed}.{suffix}"


def _train(args: argparse.Namespace) -> int:
    """Train encoders on the training series, without labels, and keep them in a run folder."""
    job = _Job(args, needs_out=True)
    if job.finished():
        return 0
    (data,) = job.load(job.settings.dataset)
    negatives = _negatives(job.settings, data)

    def evaluate(seed: int, transformer: USRLTransformer) -> tuple[Any, dict[str, Any]]:
        return transformer, {
            "seed": seed,
            "steps": [len(losses) for losses in transformer.losses_],
            "last_loss": [float(losses[-1]) for losses in transformer.losses_],
            "step_seconds": transformer.step_seconds_,
        }

    (report,) = job.train_seeds(data, data, negatives, [job.settings.seed], evaluate)
    for k, steps, loss, seconds in zip(
        negatives, report["steps"], report["last_loss"], report["step_seconds"], strict=True
    ):
        job.say(f"{data.name}: K={k}, {steps} steps of {1e3 * seconds:.1f} ms, last loss {loss:.3f}")
    return job.finish({**_what(job, data, negatives), **report})


def _reproduce(args: argparse.Namespace) -> int:
    """Train encoders without labels, an SVM on their features, and print the accuracy beside the published one."""
    job = _Job(args)
    if job.finished():
        return 0
    settings = job.settings
    picture = None if settings.picture is None else Path(settings.picture)
    if picture is not None:
        from pykernels.models._picture import check_format

        _files.check_output(picture, "--picture")
        check_format(picture.suffix)
    if settings.compare and settings.encoder == "lstm":
        raise InputError("--compare times the causal network; leave out --encoder lstm")
    source, data = job.load(settings.source or settings.dataset, settings.dataset)
    if source.n_channels != data.n_channels:
        raise InputError(f"--source {source.name} has {source.n_channels} channels, but {data.name} {data.n_channels}")
    from pykernels.models.usrl import USRLClassifier
    from pykernels.models.usrl_protocols import (
        accuracies,
        accuracy_table,
        archive_of,
        method_name,
        sparse_label_table,
        sparse_labels,
    )

    negatives = _negatives(settings, data)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    method = method_name(negatives, archive_of(data), encoder=settings.encoder, source=settings.source)
    what = _what(job, data, negatives)
    shortest, longest = data.lengths
    length = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    job.say(
        f"{data.name}: {len(data.X_train)} training and {len(data.X_test)} test series, {len(set(data.y_train))} "
        f"classes, {data.n_channels} channel{'s' * (data.n_channels > 1)}, {length} samples"
    )
    note = " (not the published number)" * bool(settings.steps)
    learned = f", learned from {source.name}" if settings.source else ""
    job.say(f"K={_join(negatives)}, {_join(what['steps'])} training steps{note}{learned}")

    def evaluate(seed: int, transformer: USRLTransformer) -> tuple[Any, dict[str, Any]]:
        parameters = transformer.get_params()
        model = USRLClassifier(**parameters).finish(transformer, data.X_train, data.y_train)
        accuracy = float(model.score(data.X_test, data.y_test))
        seconds = transformer.step_seconds_
        job.say(
            f"seed {seed}: test accuracy {accuracy:.3f} "
            f"(training step {_join(f'{1e3 * s:.1f}' for s in seconds)} ms, SVM with C={model.svm_.C:g})"
        )
        found = [vars(a) | {"seed": seed} for a in accuracies(transformer, data, source=settings.source)]
        few: list[SparseLabels] = []
        if settings.labels is not None:
            counts = settings.labels or None  # an empty list stands for the published numbers
            few = sparse_labels(transformer, data, labels=counts, runs=settings.label_draws, seed=seed)
        if seed == seeds[0]:
            _picture_features(job, data, transformer, f"K={_join(negatives)}", accuracy, picture)
        return model, {
            "seed": seed,
            "accuracy": accuracy,
            "C": str(model.svm_.C),
            "step_seconds": seconds,
            "results": found,
            "sparse_labels": [vars(row) for row in few],
        }

    reports = job.train_seeds(source, data, negatives, seeds, evaluate)
    results = [result for report in reports for result in report.pop("results")]
    few_labels = [result for report in reports for result in report.pop("sparse_labels")]
    mean = statistics.fmean(report["accuracy"] for report in reports)
    published = next(result["published"] for result in results if result["method"] == method)
    job.say(_verdict(mean, published, len(seeds), method))
    if settings.combined:
        job.say("\n" + accuracy_table(results))
    if few_labels:
        job.say("\n" + sparse_label_table(map(_sparse_labels, few_labels)))

    comparisons = _compare(source, negatives, settings) if settings.compare else []
    for times in comparisons:
        job.say(
            f"K={times.n_negatives}, median of {times.steps} training steps: pykernels {1e3 * times.seconds:.1f} ms "
            f"({_threads(times.threads)}), plain PyTorch {1e3 * times.plain_seconds:.1f} ms "
            f"({_threads(times.plain_threads)}, its fastest), ratio {times.ratio:.1f}"
        )
    if picture is not None:
        job.say(f"the picture of the features is in {picture}")
    return job.finish(
        {
            **what,
            "runs": reports,
            "accuracy": mean,
            "method": method,
            "published": published,
            "results": results,
            "sparse_labels": few_labels,
            "comparisons": [vars(times) for times in comparisons],
        }
    )


def _table(args: argparse.Namespace) -> int:
    """Print the accuracies of runs of ``reproduce usrl`` beside the published ones, as tables in Markdown."""
    require("sklearn", "scikit-learn", "models", "pykernels table usrl")
    from pykernels.models.usrl_protocols import accuracy_table, read_results, sparse_label_table

    files = [result_file(path) for path in args.runs]
    print(accuracy_table(read_results(files)), end="")
    few = [row for path in files for row in _few_labels(path)]
    if few:
        print()
        print(sparse_label_table(few), end="")
    return 0


def _few_labels(path: Path) -> list[SparseLabels]:
    """The accuracies with few labels in a result of a run; other files have none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # one document per line
        return []
    return [_sparse_labels(row) for row in document.get("sparse_labels", [])] if isinstance(document, dict) else []


def _sparse_labels(row: dict[str, Any]) -> SparseLabels:
    from pykernels.models.usrl_protocols import SparseLabels

    published = row["published"]
    return SparseLabels(
        row["dataset"], row["labels"], tuple(row["accuracies"]), None if published is None else tuple(published)
    )


def _labels(text: str) -> list[int | float]:
    """Numbers of labelled cases (int) or fractions (float); the empty list for ``published``."""
    if text == "published":
        return []
    try:
        counts = [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if not all(count >= 1 if isinstance(count, int) else 0 < count <= 1 for count in counts):
        raise argparse.ArgumentTypeError(f"must be numbers of cases, fractions up to 1.0, or 'published', got {text!r}")
    return counts


def _negatives(settings: argparse.Namespace, data: Dataset) -> tuple[int, ...]:
    from pykernels.models.usrl_protocols import COMBINATIONS, archive_of

    return COMBINATIONS[archive_of(data)] if settings.combined else (settings.k or DEFAULT_K,)


def _what(job: _Job, data: Dataset, negatives: Sequence[int]) -> dict[str, Any]:
    """What was run, and where, for the result."""
    from pykernels.models.usrl import published_steps

    settings = job.settings
    return {
        "dataset": data.name,
        "encoder": settings.encoder,
        "n_negatives": list(negatives),
        "steps": [settings.steps or published_steps(k) for k in negatives],
        "dtype": settings.dtype,
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "cpu_capability": pykernels.cpu_capability(),
        "versions": {name: package_version(name) for name in ("pykernels", "torch", "numpy", "scikit-learn")},
    }


def _picture_features(
    job: _Job, data: Dataset, transformer: USRLTransformer, kind: str, accuracy: float, picture: Path | None
) -> None:
    """The picture that was asked for, and the one in the run folder, unless there are too many cases for it."""
    in_folder = job.folder is not None and len(data.X_train) + len(data.X_test) <= PICTURED_CASES
    if picture is None and not in_folder:
        return
    from pykernels.models._picture import features_picture

    subtitle = f"encoder {kind}, trained without labels; test accuracy {accuracy:.3f}"
    features = [transformer.transform(X) for X in (data.X_train, data.X_test)]

    def draw(suffix: str) -> bytes:
        return features_picture(data, features[0], features[1], suffix, subtitle)

    if picture is not None:
        _files.write(picture, draw(picture.suffix))
    if in_folder:
        job.picture("features.png", lambda: draw(".png"))


def _digest(data: Dataset) -> str:
    """A fingerprint of the series and the labels."""
    digest = hashlib.sha256()
    for series in (*data.X_train, *data.X_test):
        digest.update(repr(series.shape).encode() + np.ascontiguousarray(series).tobytes())
    digest.update(json.dumps([data.y_train.tolist(), data.y_test.tolist()]).encode())
    return digest.hexdigest()


def _verdict(mean: float, published: float | None, seeds: int, method: str) -> str:
    text = f"mean test accuracy of {seeds} seed{'s' * (seeds > 1)}: {mean:.3f}"
    if published is None:
        return f"{text}; none is published for {method.removeprefix('ours_')} on this data set"
    difference = round(mean, 3) - published + 0.0  # published with three decimals; + 0.0 makes of -0 a 0
    return f"{text}, published: {published:.3f}, difference: {difference:+.3f}"


def _compare(data: Dataset, negatives: Sequence[int], settings: argparse.Namespace) -> list[StepTimes]:
    from pykernels.models._compare import compare_step_times
    from pykernels.models.usrl import Ragged

    dtype = getattr(torch, settings.dtype)
    cases = [torch.tensor(series, dtype=dtype) for series in data.X_train]
    series = torch.stack(cases) if data.lengths[0] == data.lengths[1] else Ragged.of(cases)
    return [compare_step_times(series, k, backend=settings.backend) for k in negatives]


def _join(values: Any) -> str:
    return ", ".join(map(str, values))


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
