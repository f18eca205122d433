"""``pykernels train | reproduce | table gantk``: what runs leave, and that interrupted ones go on bit for bit."""

import json
import re
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("scipy")
import pykernels
from pykernels.backends import Answer
from pykernels.cli import main
from pykernels.data import eight_gaussians
from pykernels.models import _gantk_picture, gantk, gantk_protocols
from pykernels.models.gantk import Generator, InfiniteDiscriminator, ParticleDescent, descend, load_particles

from .command_line import interrupt, names, refused, rows, without

SIZES = ["--points", "20", "--quiet"]
STEPS = 6


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """One thread, short animations, and no Sinkhorn divergence, which takes a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_gantk_picture, "SHOWN_FRAMES", 2)
        patch.setattr(_gantk_picture, "STILL", 1)
        patch.setattr(gantk_protocols, "sinkhorn_divergence", lambda x, y: 0.125)
        yield
    torch.set_num_threads(threads)


def reproduce(out=None, *options):
    steps = ["--iterations", str(STEPS), "--step", "40", "--evaluate-every", "2"]
    return ["reproduce", "gantk", *SIZES, *steps, *(["--out", str(out)] if out else []), *options]


def test_reproduce_fills_a_run_folder(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    assert main(reproduce(out, "--seeds", "2", "--seed", "3", "--loss", "lsgan", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    files = [
        f"{stem}-seed{seed}.{end}"
        for stem, end in (("particles", "safetensors"), ("descent", "png"), ("descent", "gif"))
        for seed in (3, 4)
    ]
    assert names(out) == sorted(["config.json", "metrics.csv", "result.json", *files])
    for run, seed in zip(result["runs"], (3, 4), strict=True):
        data = eight_gaussians(20, seed=seed)
        expected = descend(
            ParticleDescent(
                data.fake,
                data.real,
                InfiniteDiscriminator("relu", "lsgan"),
                n_steps=STEPS,
                step_size=40.0,
                evaluate_every=2,
            )
        )
        loaded = load_particles(out / f"particles-seed{seed}.safetensors")
        np.testing.assert_array_equal(loaded["particles"], expected.particles)
        assert run["half_w2"] == expected.distances[-1][1]
        assert run["distances"] == [list(pair) for pair in expected.distances]
        assert run["sinkhorn"] == 0.125
        metrics = [row for row in rows(out) if row[0] == str(seed)]
        assert [row[1] for row in metrics] == [str(step) for step in range(1, STEPS + 1)]
        assert [float(row[3]) for row in metrics if row[3]] == [distance for _, distance in expected.distances]
        assert (out / f"descent-seed{seed}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"descent-seed{seed}.gif").read_bytes().startswith(b"GIF89a")
    config = json.loads((out / "config.json").read_text())
    assert config["settings"].items() >= {"loss": "lsgan", "kernel": "relu", "iterations": STEPS, "seeds": 2}.items()


def test_the_published_distance_is_beside(tmp_path, capsys):
    assert main(reproduce(tmp_path / "0")) == 0
    printed = capsys.readouterr().out
    assert "8gaussians, IPM, ReLU, infinite width: 6 steps of 20 particles to 20 targets, eta 40" in printed
    assert re.search(r"^seed 0: half squared W2 from \d\S* to \S+, Sinkhorn divergence 0\.125; \d s$", printed, re.M)
    row = r"^\| 8gaussians, 20 points \| IPM \| infinite \| ReLU \| 6 x 40 \| 1 \| .* \| 1\.25e-01 \| 9\.40e-07 .* \|$"
    assert re.search(row, printed, re.M)
    assert main(reproduce(tmp_path / "5", "--seed", "5")) == 0
    capsys.readouterr()
    assert main(["table", "gantk", str(tmp_path / "0"), str(tmp_path / "5" / "result.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3
    assert re.match(r"\| 8gaussians, 20 points \| IPM \| infinite \| ReLU \| 6 x 40 \| 2 \| \d\.\d\de.* ± ", table[2])
    (tmp_path / "other.json").write_text('{"runs": []}')
    message = "is no result of pykernels reproduce gantk"
    assert message in refused(capsys, ["table", "gantk", str(tmp_path / "other.json")])


@pytest.mark.parametrize(
    ("options", "title", "published"),
    [
        (["--kernel", "sigmoid", "--loss", "vanilla"], "vanilla GAN, sigmoid-like, infinite width", None),
        (["--kernel", "relu+sin", "--generator", "relu"], "IPM, ReLU + sine without bias, infinite width", None),
        (["--width", "128"], "IPM, ReLU, width 128", "1.21e-01"),
        (["--width", "16", "--reset", "--learning-rate", "0.05"], "IPM, ReLU, width 16, reset", None),
        (["--time", "3", "--loss", "lsgan", "--solver", "eigenvalues"], "LSGAN, ReLU, infinite width", "7.56e-02"),
        (["--data", "digits"], "digits, IPM, ReLU, infinite width", None),
        (["--data", "density", "--source", "{a}", "--target", "{b}"], "density, IPM, ReLU", "3.34e-09"),
        (["--dtype", "float32", "--kernel", "rbf", "--backend", "reference"], "IPM, RBF", "2.60e-02"),
    ],
)
def test_other_descents(options, title, published, tmp_path, capsys):
    pillow = pytest.importorskip("PIL.Image")
    paths = {}
    for name in ("a", "b"):
        paths[name] = str(tmp_path / f"{name}.png")
        grey = np.random.default_rng(len(paths)).integers(0, 255, (8, 9)).astype(np.uint8)
        pillow.fromarray(grey).save(paths[name])
    options = [option.format(**paths) for option in options]
    assert main(reproduce(tmp_path / "run", *options)) == 0
    printed = capsys.readouterr().out
    assert title in printed
    assert (published or "|  |\n") in printed
    assert {"descent.png", "descent.gif", "particles.safetensors"} < set(names(tmp_path / "run"))


def test_train_leaves_a_generator(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "gantk", *SIZES, "--steps", "4", "--validate-every", "2", "--batch-size", "10", "--width", "8"]
    assert main([*command, "--out", str(out), "--dtype", "float64"]) == 0
    assert re.match(
        r"4 steps of .* ms; squared discrepancy .* at step \d, whose weights are kept; half", capsys.readouterr().out
    )
    assert names(out) == ["config.json", "generated.png", "metrics.csv", "model.safetensors", "result.json"]
    generator = Generator.load(out / "model.safetensors")
    result = json.loads((out / "result.json").read_text())
    points = generator.sample(20)
    assert result["half_w2"] == gantk.half_squared_w2(points, eight_gaussians(20).real)
    assert [row[2] != "" for row in rows(out)[1:]] == [False, True, False, True]
    assert "the following arguments are required: --out" in refused(capsys, command)


@pytest.mark.parametrize("options", [(), ("--width", "8", "--reset")])
def test_an_interrupted_run_goes_on_bit_for_bit(options, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "a run"
    assert main(reproduce(whole, "--seeds", "2", *options)) == 0
    for picture in ("descent_picture", "descent_animation"):
        monkeypatch.setattr(_gantk_picture, picture, lambda *args, **options: b"drawn elsewhere")
    interrupt(monkeypatch, ParticleDescent, (2, STEPS + 2), signal.SIGTERM)
    command = reproduce(out, "--seeds", "2", *options)
    for step in (2, STEPS + 2):
        capsys.readouterr()
        assert main(command) == 130
        end = f"pykernels: interrupted; to go on: pykernels reproduce gantk --resume '{out}'\n"
        assert capsys.readouterr().err.endswith(end)
        assert len(rows(out)) == 1 + step
        command = ["reproduce", "gantk", "--resume", str(out), "--quiet"]
    assert main(command) == 0
    assert names(out) == names(whole)
    assert rows(out) == rows(whole)
    for seed in (0, 1):
        file = f"particles-seed{seed}.safetensors"
        assert (out / file).read_bytes() == (whole / file).read_bytes()
    ours, theirs = (json.loads((path / "result.json").read_text()) for path in (out, whole))
    for run in (*ours["runs"], *theirs["runs"]):
        run.pop("seconds")
    assert ours == theirs
    assert main([*command, "--json"]) == 0  # finished: its result is printed again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mnist"], "argument --data: invalid choice: 'mnist'"),
        (["--step", "0"], "argument --step: must be a positive number, got '0'"),
        (["--points", "0"], "argument --points: must be an integer from 1"),
        (["--source", "a.png"], "--source and --target are images; they need --data images"),
        (["--data", "ab", "--source", "a.png"], "--data ab needs --source and --target"),
        (["--data", "images", "--source", "none.png", "--target", "none.png"], "none.png: No such file"),
        (["--reset"], "--reset and --learning-rate are of discriminators of finite width; give --width"),
        (["--width", "8", "--time", "2"], "--time and --solver are of infinitely wide discriminators"),
        (["--width", "8", "--kernel", "rbf"], "kernel 'rbf' is not that of a network that is trained"),
        (["--solver", "lanczos"], "solver of ipm must be one of closed, ode"),
    ],
)
def test_bad_arguments_are_named(options, message, capsys):
    command = reproduce(None, *options)
    if options[0] in ("--step", "--points"):
        at = command.index(options[0])
        del command[at : at + 2]
    assert message in refused(capsys, command)


def test_a_descent_that_diverges_takes_one_line(capsys):
    command = reproduce(None, "--loss", "lsgan")
    command[command.index("--step") + 1] = "1e300"
    error = refused(capsys, [*command, "--json"])
    assert error.startswith("pykernels: the descent diverges at step 2: the kernel is not finite")


def test_backend_that_cannot_run_here(monkeypatch, capsys):
    answers = {"ntk_witness": {"cpu": Answer(False, "it did not load")}}
    monkeypatch.setattr(pykernels, "available_backends", lambda: answers)
    assert "--backend cpu: it did not load" in refused(capsys, reproduce(None, "--backend", "cpu"))


def test_geomloss_and_matplotlib_are_not_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(gantk_protocols, "sinkhorn_divergence", gantk.sinkhorn_divergence)
    without(monkeypatch, "geomloss", "matplotlib")
    assert main([option for option in reproduce(tmp_path / "run") if option != "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "the run goes without descent.png" in captured.err
    assert "there is no Sinkhorn divergence without geomloss" in captured.err
    assert re.search(r"\| \d\.\d\de\S+ \| \d\.\d\de\S+ \|  \| 9\.40e-07", captured.out)
    assert names(tmp_path / "run") == ["config.json", "metrics.csv", "particles.safetensors", "result.json"]
