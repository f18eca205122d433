"""Run folders of the command line: what is in them, and that an interrupted run goes on as if nothing had happened."""

import csv
import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from pykernels.cli import main
from pykernels.data import load
from pykernels.models import _run, _usrl_checkpoint
from pykernels.models.usrl import EncoderTraining, USRLClassifier, USRLTransformer

from .command_line import Crash, crash, interrupt, names, refused, rows, without

STEPS = 3


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_series(path, cases):
    rows = (":".join(",".join(map(str, channel)) for channel in case) + f":{label}\n" for case, label in cases)
    path.write_text("@classLabel true a b\n@data\n" + "".join(rows))


def cases(n, channels, lengths, seed):
    rng = np.random.default_rng(seed)
    for i, length in zip(range(n), itertools.cycle(lengths)):
        phase = rng.uniform(0, 6, (channels, 1))
        yield 5 + np.round(np.sin((1 + i % 2) * 0.6 * np.arange(length) + phase), 3), "ab"[i % 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data sets of one and of two channels, and one of two channels with unequal lengths."""
    root = tmp_path_factory.mktemp("data")
    for name, channels, lengths in (("Mine", 1, [12]), ("Two", 2, [12]), ("Ragged", 2, [9, 12, 10])):
        (root / name).mkdir()
        for seed, part in enumerate(("TRAIN", "TEST")):
            write_series(root / name / f"{name}_{part}.ts", cases(12 + seed, channels, lengths, seed))
    return root


@pytest.fixture
def arguments(folder):
    """Of a command on one of these data sets."""

    def make(command, out, *options, dataset="Mine"):
        fixed = ["--dataset", dataset, "--folder", str(folder), "--steps", str(STEPS), "--quiet"]
        return [command, "usrl", *fixed, *(["--out", str(out)] if out else []), *options]

    return make


def same_runs(path, expected):
    """Assert that two runs have found the same, bit for bit."""
    assert names(path) == names(expected)
    assert rows(path) == rows(expected)
    for file in expected.glob("model*.safetensors"):
        ours, theirs = (_usrl_checkpoint._checkpoint.load(p / file.name, "usrl.model") for p in (path, expected))
        assert set(ours.tensors) == set(theirs.tensors)
        assert all(torch.equal(ours.tensors[name], value) for name, value in theirs.tensors.items())
        assert ours.values["transformer"]["losses"] == theirs.values["transformer"]["losses"]
    ours, theirs = (json.loads((p / "result.json").read_text()) for p in (path, expected))
    for result in (ours, theirs):
        result.pop("step_seconds", None)
        for run in result.get("runs", []):
            run.pop("step_seconds")
    assert ours == theirs


def test_train_fills_a_run_folder(arguments, folder, tmp_path, capsys):
    out = tmp_path / "new" / "run"
    assert main(arguments("train", out, "--k", "2", "--seed", "3", "--dtype", "float64")) == 0
    printed = capsys.readouterr()
    assert "Mine: K=2, 3 steps of" in printed.out
    assert printed.err == ""
    assert names(out) == ["config.json", "loss.png", "metrics.csv", "model.safetensors", "result.json"]
    model = USRLTransformer.load(out / "model.safetensors")
    expected = USRLTransformer(2, n_steps=STEPS, random_state=3, dtype="float64").fit(load("Mine", folder).X_train)
    X = load("Mine", folder).X_test
    np.testing.assert_array_equal(model.transform(X), expected.transform(X))
    with (out / "metrics.csv").open() as file:
        metrics = list(csv.DictReader(file))
    assert [(m["seed"], m["encoder"], m["K"], m["step"]) for m in metrics] == [
        ("3", "0", "2", str(i)) for i in (1, 2, 3)
    ]
    assert [float(m["loss"]) for m in metrics] == expected.losses_[0].tolist()
    seconds = [float(m["seconds"]) for m in metrics]
    assert sorted(seconds) == seconds
    config = json.loads((out / "config.json").read_text())
    assert config["command"] == "train usrl"
    assert config["settings"].items() >= {"dataset": "Mine", "k": 2, "seed": 3, "device": "cpu"}.items()
    assert config["environment"]["threads"] == 1
    result = json.loads((out / "result.json").read_text())
    assert result["last_loss"] == [expected.losses_[0][-1]]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_reproduce_fills_a_run_folder(arguments, folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments("reproduce", out, "--k", "1", "--seeds", "2", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert [r["method"] for r in result["results"]] == ["ours_K1", "ours_K1_1NN"] * 2
    files = [
        f"{stem}-seed{seed}.{suffix}" for stem, suffix in (("loss", "png"), ("model", "safetensors")) for seed in (0, 1)
    ]
    fixed = ["config.json", "features.png", "metrics.csv", "result.json"]
    assert names(out) == sorted(files + fixed)
    data = load("Mine", folder)
    for run in result["runs"]:
        model = USRLClassifier.load(out / f"model-seed{run['seed']}.safetensors")
        assert model.score(data.X_test, data.y_test) == run["accuracy"]
    assert len(rows(out)) == 1 + 2 * STEPS


@pytest.fixture
def no_pictures(monkeypatch):
    """Quick ones: t-SNE takes longer than all the rest."""
    import pykernels.models._curves as curves
    import pykernels.models._picture as picture

    monkeypatch.setattr(picture, "features_picture", lambda *args: b"picture")
    monkeypatch.setattr(curves, "losses_picture", lambda *args: b"picture")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The folder of a run of two seeds with four encoders each, which was not interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run"
    options = ["--folder", str(folder), "--combined", "--seeds", "2", "--steps", str(STEPS), "--quiet"]
    assert main(["reproduce", "usrl", "--dataset", "Mine", *options, "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize("steps", [(1,), (STEPS,), (STEPS + 1,), (5, 9), (4 * STEPS,), (4 * STEPS + 1, 20), (24,)])
@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_run_goes_on_bit_for_bit(steps, arguments, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a run"
    number = signal.SIGTERM if len(steps) > 1 else signal.SIGINT
    interrupt(monkeypatch, EncoderTraining, steps, number)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    command = arguments("reproduce", out, "--combined", "--seeds", "2")
    for step in steps:
        assert main(command) == 130
        captured = capsys.readouterr()
        assert captured.err.endswith(f"pykernels: interrupted; to go on: pykernels reproduce usrl --resume '{out}'\n")
        assert len(rows(out)) == 1 + step  # the step was finished
        assert not (out / "result.json").exists()
        command = ["reproduce", "usrl", "--resume", str(out), "--quiet"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert main(command) == 0
    assert "mean test accuracy of 2 seeds" in capsys.readouterr().out
    same_runs(out, whole)


@pytest.mark.parametrize(("step", "save_every"), [(2, "0"), (2, "60"), (5, "0"), (14, "0"), (14, "60")])
def test_a_crashed_run_goes_on_from_the_last_save(
    step, save_every, arguments, whole, no_pictures, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    crash(monkeypatch, EncoderTraining, step)
    with pytest.raises(Crash):
        main(arguments("reproduce", out, "--combined", "--seeds", "2", "--save-every", save_every))
    assert (out / _run.TRAINING).exists() == (step > 12 or save_every == "0")
    (out / ".training.safetensors.123.tmp").write_bytes(b"half")
    assert main(["reproduce", "usrl", "--resume", str(out), "--quiet"]) == 0
    same_runs(out, whole)


@pytest.mark.parametrize("where", ["fit", "save"])
@pytest.mark.usefixtures("no_pictures")
def test_interrupted_outside_the_training(where, arguments, whole, tmp_path, monkeypatch, capsys):
    """In the SVM's fit, and while a model is written."""
    out = tmp_path / "run"

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    with monkeypatch.context() as patched:
        if where == "save":
            patched.setattr(_usrl_checkpoint, "save", interrupted)
        else:
            patched.setattr(USRLClassifier, "finish", interrupted)
        assert main(arguments("reproduce", out, "--combined", "--seeds", "2")) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(["reproduce", "usrl", "--resume", str(out), "--quiet"]) == 0
    same_runs(out, whole)


def test_the_second_signal_stops_at_once(arguments, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    interrupt(monkeypatch, EncoderTraining, [2], signal.SIGINT, signal.SIGINT)
    assert main(arguments("train", out)) == 130
    error = capfd.readouterr().err
    assert "finishing this step and saving; interrupt again to stop at once" in error
    assert "to go on: pykernels train usrl --resume" in error
    assert len(rows(out)) == 2  # not finished
    assert main(["train", "usrl", "--resume", str(out), "--quiet"]) == 0
    assert len(rows(out)) == 1 + STEPS


def test_without_a_folder_the_first_signal_stops_at_once(arguments, monkeypatch, capfd):
    interrupt(monkeypatch, EncoderTraining, [2])
    assert main(arguments("reproduce", None)) == 130
    assert capfd.readouterr().err == "pykernels: interrupted\n"


def test_a_process_that_is_interrupted(arguments, tmp_path):
    """With its progress bar, and signals from outside."""
    out = tmp_path / "run"
    command = [a for a in arguments("train", out, "--save-every", "0.1") if a != "--quiet"]
    command[command.index("--steps") + 1] = "100000"
    with subprocess.Popen(
        [sys.executable, "-m", "pykernels", *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 300
        while not (out / "training.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert output == ""
    assert "Traceback" not in error
    assert error.splitlines()[-1] == f"pykernels: interrupted; to go on: pykernels train usrl --resume {out}"
    assert "training, K=5" in error
    saved = _usrl_checkpoint.SavedTrainings(out / "training.safetensors")
    assert saved.values["metrics"] == (out / "metrics.csv").stat().st_size


@pytest.fixture
def interrupted(arguments, tmp_path, monkeypatch, capsys):
    """The folder of an interrupted run of ``train``."""
    out = tmp_path / "interrupted"
    with monkeypatch.context() as patched:
        interrupt(patched, EncoderTraining, [2])
        assert main(arguments("train", out)) == 130
    capsys.readouterr()
    return out


def test_what_cannot_be_resumed(interrupted, arguments, tmp_path, capsys):
    resume = ["train", "usrl", "--resume", str(interrupted), "--quiet"]
    assert "takes its settings from the run; leave out --k, --seed" in refused(
        capsys, [*resume, "--k", "5", "--seed", "1"]
    )
    assert "--out: not allowed with argument --resume" in refused(capsys, [*resume, "--out", "x"])
    assert "is a run of pykernels train usrl" in refused(capsys, ["reproduce", *resume[1:]])
    assert "there is no run in" in refused(capsys, ["train", "usrl", "--resume", str(tmp_path), "--quiet"])
    error = refused(capsys, arguments("train", interrupted))
    assert f"is not empty; give a new one, or continue the run in it with --resume {interrupted}" in error
    descriptor = os.open(interrupted, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert "another process is at work in" in refused(capsys, resume)
    os.close(descriptor)
    assert main(resume) == 0


DAMAGES = {
    "config": ("config.json", lambda content: content[:40], "config.json is damaged"),
    "settings": ("config.json", lambda content: content.replace(b'"k"', b'"kk"'), "which had other settings"),
    "training": ("training.safetensors", lambda content: content[:-10], "cut off or damaged"),
    "metrics": ("metrics.csv", lambda content: content[:-1], "is shorter than when the training was saved"),
    "data": ("config.json", lambda content: content.replace(b'"Mine": "', b'"Mine": "0'), "have changed since"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_runs_are_refused(name, damage, message, interrupted, capsys):
    file = interrupted / name
    file.write_bytes(damage(file.read_bytes()))
    assert message in refused(capsys, ["train", "usrl", "--resume", str(interrupted), "--quiet"])


def test_resuming_elsewhere_is_told(interrupted, capsys):
    torch.set_num_threads(2)
    assert main(["train", "usrl", "--resume", str(interrupted), "--quiet"]) == 0
    assert "the result may differ in rounding: threads was 1 and is 2" in capsys.readouterr().err


def test_resuming_a_finished_run_shows_its_result(whole, capsys):
    assert main(["reproduce", "usrl", "--resume", str(whole), "--quiet"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["reproduce", "usrl", "--resume", str(whole), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((whole / "result.json").read_text())


def test_a_run_without_matplotlib_has_no_pictures(arguments, tmp_path, monkeypatch, capsys):
    without(monkeypatch, "matplotlib")
    assert main(arguments("reproduce", tmp_path / "run")) == 0
    assert "the run goes without features.png: a picture needs matplotlib" in capsys.readouterr().err
    assert list((tmp_path / "run").glob("*.png")) == []


@pytest.mark.usefixtures("no_pictures")
def test_experiments(arguments, tmp_path, monkeypatch, capsys):
    """Transfer, few labels and the LSTM, and the table of them all."""
    import pykernels.models._compare as compare

    monkeypatch.setattr(compare, "compare_step_times", partial(compare.compare_step_times, steps=1))
    runs = [tmp_path / name for name in ("combined", "transfer", "lstm")]
    few = ["--labels", "4,0.5", "--label-draws", "2"]
    assert main(arguments("reproduce", runs[0], "--combined", "--compare", *few, dataset="Ragged")) == 0
    printed = capsys.readouterr().out
    assert "| Ragged   | ours_combined_1NN " in printed
    assert "| Ragged   | 6      |" in printed
    assert printed.count("median of 1 training steps") == 3
    assert main(arguments("reproduce", runs[1], "--source", "Two", "--k", "2", dataset="Ragged")) == 0
    assert "training steps (not the published number), learned from Two" in capsys.readouterr().out
    assert main(arguments("reproduce", runs[2], "--encoder", "lstm")) == 0
    model = USRLClassifier.load(runs[2] / "model.safetensors")
    assert model.transformer_.encoders_[0].linear.out_features == 160
    capsys.readouterr()
    export = ["export", str(runs[2]), "--out", str(tmp_path / "lstm.pt2")]
    assert "is an LSTM, which cannot be exported" in refused(capsys, export)
    assert main(["table", "usrl", *map(str, runs)]) == 0
    table = capsys.readouterr().out
    for method in ("ours_K5", "ours_combined", "ours_Two_K2_transfer", "LSTM_K5", "LSTM_K5_1NN"):
        assert f" {method} " in table
    assert "| data set | labels |" in table
    results = tmp_path / "results.jsonl"
    results.write_text('{"dataset": "GunPoint", "method": "ours_combined", "accuracy": 0.98}\n' * 2)
    assert main(["table", "usrl", str(results)]) == 0
    assert (
        "| GunPoint | ours_combined | 2    | 0.980 ± 0.000 | 0.993     | -0.013     | yes (0.02) |"
        in capsys.readouterr().out
    )


def test_experiments_that_do_not_go_together(arguments, tmp_path, interrupted, capsys):
    assert "has 1 channels, but Two 2" in refused(
        capsys, arguments("reproduce", None, "--source", "Mine", dataset="Two")
    )
    lstm = ["--encoder", "lstm", "--compare"]
    assert "leave out --encoder lstm" in refused(capsys, arguments("reproduce", None, *lstm))
    assert "has no result.json; finish it with --resume" in refused(capsys, ["table", "usrl", str(interrupted)])
    assert "has no result.json" in refused(capsys, ["table", "usrl", str(tmp_path)])


@pytest.mark.parametrize("dataset", ["Mine", "Two", "Ragged"])
def test_encode(dataset, arguments, folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments("train", out, "--k", "1", dataset=dataset)) == 0
    capsys.readouterr()
    file = str(folder / dataset / f"{dataset}_TEST.ts")
    assert main(["encode", str(out), file]) == 0
    lines = list(csv.reader(capsys.readouterr().out.splitlines()))
    data = load(dataset, folder)  # the multivariate ones are normalised
    expected = USRLTransformer.load(out / "model.safetensors").transform(data.X_test)
    assert lines[0] == ["label", *(f"feature_{i}" for i in range(320))]
    assert [line[0] for line in lines[1:]] == list(data.y_test)
    np.testing.assert_array_equal(np.array([line[1:] for line in lines[1:]], dtype=np.float32), expected)
    for name in ("features.csv", "features.npy"):
        assert main(["encode", str(out / "model.safetensors"), file, "--out", str(tmp_path / name)]) == 0
    assert list(csv.reader((tmp_path / "features.csv").read_text().splitlines())) == lines
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), expected)
    assert capsys.readouterr().out == ""


def test_encode_tsv_without_labels(whole, tmp_path, capsys):
    file = tmp_path / "series.tsv"
    file.write_text("1\t2\t3\n4\t5\tNaN\n")
    model = str(whole / "model-seed1.safetensors")
    assert main(["encode", model, str(file), "--no-labels"]) == 0
    lines = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert len(lines) == 3
    assert len(lines[0]) == 4 * 320
    assert lines[0][0] == "feature_0"


def test_encode_and_export_refuse(whole, interrupted, folder, tmp_path, capsys):
    file = str(folder / "Mine" / "Mine_TEST.ts")
    model = str(whole / "model-seed0.safetensors")
    assert "has several models; give the file of one of them" in refused(capsys, ["encode", str(whole), file])
    assert "has no model yet; finish it with --resume" in refused(capsys, ["encode", str(interrupted), file])
    assert "holds a 'usrl.training'" in refused(capsys, ["encode", str(interrupted / "training.safetensors"), file])
    assert "X has 2 channels" in refused(capsys, ["encode", model, str(folder / "Two" / "Two_TEST.ts")])
    assert "must be a .ts or .tsv file" in refused(capsys, ["encode", model, model])
    assert "must end in .csv or .npy" in refused(capsys, ["encode", model, file, "--out", str(tmp_path / "a.txt")])
    assert "no such" in refused(capsys, ["encode", str(tmp_path / "nothing"), file]).lower()
    assert "format must be one of pt2, onnx" in refused(capsys, ["export", model, "--out", str(tmp_path / "a.tar")])
    assert "required: --out" in refused(capsys, ["export", model])


def test_export(arguments, folder, tmp_path, capsys):
    """Also what normalises the series is in the program."""
    out, program = tmp_path / "run", tmp_path / "model.pt2"
    assert main(arguments("train", out, dataset="Two")) == 0
    capsys.readouterr()
    assert main(["export", str(out), "--out", str(program)]) == 0
    assert capsys.readouterr().out.startswith(f"{program} maps series (batch, 2, time) to features (batch, ")
    model = USRLTransformer.load(out / "model.safetensors")
    run = torch.export.load(program).module()
    raw = np.array([case for case, _ in cases(13, 2, [12], 1)])
    expected = torch.from_numpy(model.transform(load("Two", folder).X_test))
    torch.testing.assert_close(run(torch.tensor(raw, dtype=torch.float32)), expected, rtol=1e-4, atol=1e-5)
    assert run(torch.zeros(1, 2, 1)).shape == (1, expected.shape[1])


def test_long_series(tmp_path, monkeypatch, capsys):
    """Interrupted and continued, it finds the same; its model encodes and is a checkpoint as any other."""
    sizes = ["--samples", "12000", "--train-samples", "6000", "--periods", "day", "--day-stride", "480"]
    command = ["reproduce", "usrl-long-series", *sizes, "--longest-window", "60", "--steps", "3", "--quiet"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main([*command, "--out", str(whole)]) == 0
    assert re.search(r"^\| day \| features \| ", capsys.readouterr().out, re.M)
    files = ["config.json", "days.png", "loss.png", "metrics.csv", "model.safetensors", "result.json"]
    assert names(whole) == files
    with monkeypatch.context() as patched:
        interrupt(patched, EncoderTraining, [2])
        assert main([*command, "--out", str(out)]) == 130
    assert "pykernels reproduce usrl-long-series --resume" in capsys.readouterr().err
    resume = ["reproduce", "usrl-long-series", "--resume", str(out), "--quiet", "--json"]
    assert main(resume) == 0
    result, expected = json.loads(capsys.readouterr().out), json.loads((whole / "result.json").read_text())
    assert result["losses"] == expected["losses"]
    for one, other in zip(result["periods"], expected["periods"], strict=True):
        assert one["features"]["test_mse"] == other["features"]["test_mse"]
    models = [USRLTransformer.load(path / "model.safetensors") for path in (whole, out)]
    X = np.random.default_rng(0).normal(size=(2, 1, 40))
    np.testing.assert_array_equal(*(model.transform(X) for model in models))


def test_long_series_of_a_file(tmp_path, capsys):
    command = ["reproduce", "usrl-long-series", "--periods", "day", "--quiet"]
    file = tmp_path / "series.npy"
    np.save(file, np.arange(100.0))
    assert "n_train must leave two periods" in refused(capsys, [*command, "--series", str(file)])
    assert "leave it out beside --series" in refused(capsys, [*command, "--series", str(file), "--samples", "9"])
    file.write_text("no numbers")
    assert "is not a .npy file of numbers" in refused(capsys, [*command, "--series", str(file)])
    assert "No such file" in refused(capsys, [*command, "--series", str(tmp_path / "nothing.npy")])
