"""``pykernels train | reproduce | table neural-ode``: what runs leave, and that interrupted ones go on bit for bit."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
import pykernels
from pykernels.backends import Answer
from pykernels.cli import main
from pykernels.data import damped_pendulum, pendulum
from pykernels.models import _checkpoint
from pykernels.models.neural_ode import NeuralODE, NeuralODETraining, log_mse, train_neural_ode

from .command_line import Crash, crash, interrupt, names, refused, rows, without

STEPS = 4
SIZES = ["--hidden", "9", "--trajectories", "3", "--steps", str(STEPS), "--quiet"]


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """One thread, and a coarse simulation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pendulum, "STEPS_PER_UNIT", 10)
        patch.setattr(pendulum, "STEPS_PER_PERIOD", 30)
        yield
    torch.set_num_threads(threads)


def arguments(command, out=None, *options):
    return [command, "neural-ode", *SIZES, *(["--out", str(out)] if out else []), *options]


def test_train_fills_a_run_folder(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    options = ["--seed", "3", "--dtype", "float64", "--t0", "5", "--noise", "0.1", "--damping", "0"]
    assert main(arguments("train", out, *options, "--method", "euler", "--learning-rate", "0.01")) == 0
    printed = capsys.readouterr()
    assert re.match(
        r"4 steps of \d+\.\d ms, last loss .* validation error .* at step 4, whose weights are kept", printed.out
    )
    assert printed.err == ""
    assert names(out) == ["config.json", "metrics.csv", "model.safetensors", "pendulum.png", "result.json"]

    data = damped_pendulum(3, period=5.0, damping=0.0, noise=0.1, seed=3)
    expected = NeuralODE(hidden=(9, 9), method="euler", dtype="float64", seed=3)
    training = train_neural_ode(expected, data.times, data.train, data.validation, n_steps=STEPS, learning_rate=0.01)
    model = NeuralODE.load(out / "model.safetensors")
    assert model.options == expected.options
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    metrics = rows(out)
    assert metrics[0] == ["seed", "step", "loss", "validation_loss"]
    assert [float(row[2]) for row in metrics[1:]] == training.losses.tolist()
    assert [row[:2] + row[3:] for row in metrics[1:]] == [
        ["3", str(step), str(training.validation_loss) if step == STEPS else ""] for step in range(1, STEPS + 1)
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["command"] == "train neural-ode"
    assert config["settings"].items() >= {"t0": 5.0, "method": "euler", "seed": 3, "hidden": 9, "layers": 2}.items()
    result = json.loads((out / "result.json").read_text())
    assert result["last_loss"] == training.losses[-1]
    assert result["validation_loss"] == training.validation_loss
    assert result["system"] == data.describe()
    assert (out / "pendulum.png").read_bytes().startswith(b"\x89PNG")


def test_reproduce_scores_fresh_trajectories(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments("reproduce", out, "--seeds", "2", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    files = [
        f"{stem}-seed{seed}.{end}" for stem, end in (("model", "safetensors"), ("pendulum", "png")) for seed in (0, 1)
    ]
    assert names(out) == sorted(["config.json", "metrics.csv", "result.json", *files])
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    for run in result["runs"]:
        data = damped_pendulum(3, period=result["system"]["period"], seed=run["seed"])
        model = NeuralODE.load(out / f"model-seed{run['seed']}.safetensors")
        assert run["log_mse"] == log_mse(model.predict(data.test[:, 0], data.times), data.test)
        assert run["true_log_mse"] < run["log_mse"]
    assert result["log_mse"] == pytest.approx(np.mean([run["log_mse"] for run in result["runs"]]))
    assert result["published"] == {"log_mse": -2.84, "std": 0.70}
    assert len(rows(out)) == 1 + 2 * STEPS


def test_reproduce_prints_the_published_error_beside(capsys):
    assert main(arguments("reproduce")) == 0
    printed = capsys.readouterr().out
    assert "3 trajectories each to train, validate and test, 40 observations" in printed
    assert re.search(r"^mean test log MSE \(natural\) of 1 seed: -?\d\.\d\d, published: -2\.84 ± 0\.70$", printed, re.M)
    assert re.search(r"^\| Neural ODE \| .* \| 1 \| -?\d\.\d\d \| -2\.84 ± 0\.70 \|$", printed, re.M)
    assert re.search(r"^\| true ODE \| .* \| 1 \| -\d\.\d\d \| -8\.58 ± 0\.20 \|$", printed, re.M)


def test_table(tmp_path, capsys):
    for seed in ("0", "5"):
        assert main(arguments("reproduce", tmp_path / seed, "--seed", seed)) == 0
    capsys.readouterr()
    assert main(["table", "neural-ode", str(tmp_path / "0"), str(tmp_path / "5" / "result.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert re.match(r"\| Neural ODE \| .* \| 2 \| -?\d\.\d\d ± \d\.\d\d \| -2\.84 ± 0\.70 \|$", table[2])
    other = tmp_path / "other.json"
    for content in ("no JSON", "[]", '{"runs": []}'):
        other.write_text(content)
        assert "is no result of pykernels reproduce neural-ode" in refused(capsys, ["table", "neural-ode", str(other)])
    assert "has no result.json" in refused(capsys, ["table", "neural-ode", str(tmp_path)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two seeds that was not interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments("reproduce", path, "--seeds", "2")) == 0
    return path


def same_runs(path, expected):
    """Assert that two runs have found the same, bit for bit."""
    assert names(path) == names(expected)
    assert rows(path) == rows(expected)
    for file in expected.glob("model*.safetensors"):
        assert (path / file.name).read_bytes() == file.read_bytes()
    ours, theirs = (json.loads((p / "result.json").read_text()) for p in (path, expected))
    for run in (*ours["runs"], *theirs["runs"]):
        run.pop("step_seconds")
    assert ours == theirs


@pytest.mark.parametrize("steps", [(1,), (STEPS,), (STEPS + 1,), (2, 3, 7), (2 * STEPS,)])
def test_an_interrupted_run_goes_on_bit_for_bit(steps, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a run"
    interrupt(monkeypatch, NeuralODETraining, steps, signal.SIGTERM if len(steps) > 1 else signal.SIGINT)
    command = arguments("reproduce", out, "--seeds", "2")
    for step in steps:
        assert main(command) == 130
        error = capsys.readouterr().err
        assert error.endswith(f"pykernels: interrupted; to go on: pykernels reproduce neural-ode --resume '{out}'\n")
        assert len(rows(out)) == 1 + step
        assert not (out / "result.json").exists()
        command = ["reproduce", "neural-ode", "--resume", str(out), "--quiet"]
    assert main(command) == 0
    assert "published: -2.84" in capsys.readouterr().out
    same_runs(out, whole)


@pytest.mark.parametrize(("step", "save_every"), [(2, "0"), (2, "60"), (STEPS + 2, "0"), (STEPS + 2, "60")])
def test_a_crashed_run_goes_on_from_the_last_save(step, save_every, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    crash(monkeypatch, NeuralODETraining, step)
    with pytest.raises(Crash):
        main(arguments("reproduce", out, "--seeds", "2", "--save-every", save_every))
    assert main(["reproduce", "neural-ode", "--resume", str(out), "--quiet"]) == 0
    same_runs(out, whole)


def test_a_process_that_is_interrupted(tmp_path):
    """With its progress bar, and signals from outside."""
    out = tmp_path / "run"
    command = [a for a in arguments("train", out, "--save-every", "0.1", "--patience", "100000") if a != "--quiet"]
    command[command.index("--steps") + 1] = "1000000"
    with subprocess.Popen(
        [sys.executable, "-m", "pykernels", *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 300
        while not (out / "training.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert output == ""
    assert "Traceback" not in error
    assert error.splitlines()[-1] == f"pykernels: interrupted; to go on: pykernels train neural-ode --resume {out}"
    assert "training, seed 0" in error
    saved = _checkpoint.SavedTrainings(out / "training.safetensors", "neural_ode.training")
    assert saved.values["metrics"] == (out / "metrics.csv").stat().st_size


def test_resuming_a_finished_run_shows_its_result(whole, capsys):
    assert main(["reproduce", "neural-ode", "--resume", str(whole), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((whole / "result.json").read_text())


def test_what_cannot_be_resumed(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        interrupt(patched, NeuralODETraining, [2])
        assert main(arguments("train", out)) == 130
    capsys.readouterr()
    resume = ["neural-ode", "--resume", str(out), "--quiet"]
    assert "leave out --hidden, --seed" in refused(capsys, ["train", *resume, "--seed", "1", "--hidden", "3"])
    assert "is a run of pykernels train neural-ode" in refused(capsys, ["reproduce", *resume])
    assert "is not empty" in refused(capsys, arguments("train", out))
    (out / "training.safetensors").write_bytes(b"half")
    assert "cut off or damaged" in refused(capsys, ["train", *resume])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--t0", "0"], "argument --t0: must be a positive number, got '0'"),
        (["--t0", "long"], "argument --t0: must be a positive number, got 'long'"),
        (["--noise", "-1"], "argument --noise: must be a number from 0 on, got '-1'"),
        (["--damping", "inf"], "argument --damping: must be a number from 0 on, got 'inf'"),
        (["--learning-rate", "nan"], "argument --learning-rate: must be a positive number, got 'nan'"),
        (["--trajectories", "0"], "argument --trajectories: must be an integer from 1"),
        (["--method", "dopri5"], "argument --method: invalid choice: 'dopri5'"),
        (["--data", "waves"], "argument --data: invalid choice: 'waves'"),
        (["--device", "tpu"], "argument --device: must be cpu, cuda or cuda:N"),
    ],
)
def test_bad_arguments_are_named(options, message, capsys):
    assert message in refused(capsys, arguments("reproduce", None, *options))


def test_backend_that_cannot_run_here(monkeypatch, capsys):
    answers = {"mlp_odeint": {"cpu": Answer(False, "it did not load")}}
    monkeypatch.setattr(pykernels, "available_backends", lambda: answers)
    assert "--backend cpu: it did not load" in refused(capsys, arguments("reproduce", None, "--backend", "cpu"))


def test_backends_agree(tmp_path, capsys):
    for backend in ("cpu", "reference"):
        out = tmp_path / backend
        assert main(arguments("train", out, "--backend", backend, "--dtype", "float64")) == 0
    ours, theirs = ([float(row[2]) for row in rows(tmp_path / name)[1:]] for name in ("cpu", "reference"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_a_training_that_diverges_takes_one_line(tmp_path, capsys):
    error = refused(capsys, arguments("train", tmp_path / "run", "--learning-rate", "1e30"))
    assert re.match(r"pykernels: the training diverges at step \d: .*; use a smaller learning_rate\n", error)


def test_scikit_learn_and_matplotlib_are_not_needed(tmp_path, monkeypatch, capsys):
    without(monkeypatch, "sklearn", "matplotlib")
    assert main(arguments("train", tmp_path / "run")) == 0
    assert "the run goes without pendulum.png" in capsys.readouterr().err
    assert names(tmp_path / "run") == ["config.json", "metrics.csv", "model.safetensors", "result.json"]
