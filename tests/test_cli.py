"""The command line: what it prints, its exit status, and that bad input takes one line."""

import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch

import pykernels
from pykernels.backends import OPERATORS, Answer, Check, Implementation, Operator
from pykernels.cli import main

from .command_line import refused, without

QUICK = ["--steps", "2", "--quiet"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pykernels", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def needs(*modules):
    for module in modules:
        pytest.importorskip(module)


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name, value in (
        ("pykernels", pykernels.__version__),
        ("torch", torch.__version__),
        ("CPU capability", str(pykernels.cpu_capability())),
        ("threads", "1 of "),
        ("GPU", ""),
    ):
        assert re.search(rf"^{name} +{re.escape(value)}", printed, re.M)
    for operator, answers in pykernels.available_backends().items():
        for backend, (ok, _) in answers.items():
            assert re.search(rf"^{operator} +{backend} +{'yes' if ok else 'no'}", printed, re.M)


def fake_operator(error, available=Answer(True)):  # noqa: B008  (immutable)
    def check(backend):
        if error is None:
            raise OSError("no such device")
        return Check({"forward": error}, {"forward": 1e-5})

    implementation = Implementation(lambda: None, lambda: available, lambda: available)
    return Operator("fake_op", {"cpu": implementation}, check)


@pytest.mark.parametrize(
    ("operator", "status", "line"),
    [
        (fake_operator(1e-7), 0, r"fake_op +cpu +forward +1.0e-07 +1e-05 +ok"),
        (fake_operator(1e-3), 1, r"fake_op +cpu +forward +1.0e-03 +1e-05 +FAILED"),
        (fake_operator(float("nan")), 1, r"fake_op +cpu +forward +nan +1e-05 +FAILED"),
        (fake_operator(None), 1, r"fake_op +cpu +OSError: no such device +FAILED"),
        (fake_operator(1e-3, Answer(False, "it is switched off")), 0, r"fake_op +cpu +no +it is switched off"),
    ],
    ids=["passes", "fails", "nan", "raises", "not here"],
)
def test_info_check(operator, status, line, monkeypatch, capsys):
    monkeypatch.setitem(OPERATORS, "fake_op", operator)
    assert main(["info", "--check"]) == status
    printed = capsys.readouterr().out
    assert re.search(line, printed)
    assert re.search(r"^causal_conv1d +reference +float64 gradients .* ok$", printed, re.M)
    assert ("every operator agrees" in printed) == (status == 0)


def test_info_as_json(monkeypatch, capsys):
    monkeypatch.setitem(OPERATORS, "fake_op", fake_operator(1e-3))
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["torch"] == torch.__version__
    assert info["threads"] == 1
    assert info["cpu_capability"] == pykernels.cpu_capability()
    assert info["backends"]["fake_op"] == {"cpu": {"ok": True, "reason": ""}}
    assert "checks" not in info
    assert main(["info", "--json", "--check"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["operator"] for check in checks if not check["ok"]] == ["fake_op"]
    assert len(checks) > 5


def test_python_dash_m():
    result = run("info", PYKERNELS_BACKEND="reference")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"^PYKERNELS_BACKEND +reference$", result.stdout, re.M)
    assert run("--version").stdout == f"pykernels {pykernels.__version__}\n"


def test_output_that_no_one_reads_is_no_error():
    with subprocess.Popen(
        [sys.executable, "-m", "pykernels", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def train(path, *options):
    return ["train", "usrl", "--dataset", "GunPoint", "--out", str(path), *QUICK, *options]


def reproduce(*options):
    return ["reproduce", "usrl", "--dataset", "GunPoint", *options, *QUICK]


def test_reproduce(tmp_path, monkeypatch, capsys):
    needs("sklearn", "aeon", "matplotlib")
    import pykernels.models._compare as compare

    monkeypatch.setattr(compare, "compare_step_times", partial(compare.compare_step_times, steps=3))
    picture = tmp_path / "features.png"
    assert main(reproduce("--k", "1", "--seeds", "2", "--compare", "--picture", str(picture))) == 0
    printed = capsys.readouterr().out
    assert "50 training and 150 test series, 2 classes, 1 channel, 150 samples" in printed
    assert "K=1, 2 training steps (not the published number)" in printed
    accuracies = [float(a) for a in re.findall(r"^seed \d: test accuracy (\d\.\d{3})", printed, re.M)]
    assert len(accuracies) == 2
    mean, difference = re.search(
        r"^mean test accuracy of 2 seeds: (\S+), published: 0.953, difference: (\S+)$", printed, re.M
    ).groups()
    assert float(mean) == pytest.approx(sum(accuracies) / 2, abs=1e-3)
    assert float(difference) == pytest.approx(float(mean) - 0.953, abs=1e-3)
    assert re.search(r"^K=1, median of 3 training steps: pykernels \S+ ms .*, plain PyTorch \S+ ms", printed, re.M)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["features.png"]


def test_reproduce_combined_as_json(capsys):
    needs("sklearn", "aeon")
    assert main(reproduce("--combined", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n_negatives"] == [1, 2, 5, 10]
    assert result["published"] == 0.993
    assert result["accuracy"] == result["runs"][0]["accuracy"]
    assert len(result["runs"][0]["step_seconds"]) == 4
    assert result["versions"]["torch"] == torch.__version__


def test_reproduce_without_a_published_figure(capsys):
    needs("sklearn", "aeon")
    assert main(reproduce("--k", "3")) == 0
    assert "none is published for K3 on this data set" in capsys.readouterr().out


def test_progress_goes_to_stderr(capsys):
    needs("sklearn", "aeon", "tqdm")
    assert main(["reproduce", "usrl", "--dataset", "GunPoint", "--k", "1", "--steps", "2"]) == 0
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert "2/2" not in captured.out
    assert main([*reproduce("--json")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out)["n_negatives"] == [5]


BAD_ARGUMENTS = [
    ([], r"arguments are required: COMMAND"),
    (["fly"], r"invalid choice: 'fly'"),
    (["train", "usrl", "--dataset", "GunPoint"], r"required: --out \(see pykernels train usrl --help\)"),
    (["train", "usrl"], r"required: --dataset, --out"),
    (["table", "usrl"], r"required: RUN"),
    (["reproduce", "usrl"], r"required: --dataset"),
    (["reproduce", "nothing", "--dataset", "GunPoint"], r"SYSTEM: invalid choice: 'nothing'"),
    (reproduce("--k", "0"), r"--k: must be an integer from 1 to \d+, got '0'"),
    (reproduce("--k", "five"), r"--k: must be an integer .* got 'five'"),
    (reproduce("--k", "5", "--combined"), r"not allowed with"),
    (reproduce("--seeds", "-1"), r"--seeds: must be"),
    (reproduce("--backend", "abacus"), r"--backend: invalid choice: 'abacus'"),
    (["train", "usrl", "--dataset", "GunPoint", "--out", "x", "--seed", str(2**32)], r"--seed: must be"),
    (reproduce("--device", "tpu"), r"--device: must be cpu, cuda or cuda:N, got 'tpu'"),
    (reproduce("--save-every", "-1"), r"--save-every: must be a number of seconds, got '-1'"),
    (reproduce("--labels", "12,0.5,many"), r"--labels: must be numbers of cases, fractions.*got '12,0.5,many'"),
    (reproduce("--labels", "0"), r"--labels: must be"),
    (reproduce("--labels", "1.5"), r"--labels: must be"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments, message, capsys):
    assert re.search(message, refused(capsys, arguments))


def test_unknown_data_set(capsys):
    needs("sklearn", "aeon")
    error = refused(capsys, ["reproduce", "usrl", "--dataset", "GunPiont", "--quiet"])
    assert error.startswith("pykernels: no data set 'GunPiont' in the installed aeon; it has ")
    assert "GunPoint" in error


BAD_DATA = {
    "NaN": ("1,2:a\n1,nan:b\n", "1,2:a\n", "missing values"),
    "empty series": (":a\n:b\n", "1,2:a\n", "empty series"),
    "wrong number of channels": ("1,2:3,4:a\n1,2:3,4:b\n", "1,2:a\n", "2 channels for training, but 1 for testing"),
    "one class": ("1,2:a\n3,4:a\n", "1,2:a\n", "one class only"),
}


@pytest.mark.parametrize(("train_cases", "test_cases", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data(train_cases, test_cases, message, tmp_path, capsys):
    needs("sklearn")
    folder = tmp_path / "Mine"
    folder.mkdir()
    for part, cases in (("TRAIN", train_cases), ("TEST", test_cases)):
        (folder / f"Mine_{part}.ts").write_text(f"@classLabel true a b\n@data\n{cases}")
    arguments = ["reproduce", "usrl", "--dataset", "Mine", "--folder", str(tmp_path), *QUICK, "--json"]
    assert message in refused(capsys, arguments)


def test_bad_outputs_are_found_before_the_training(tmp_path, monkeypatch, capsys):
    needs("sklearn", "aeon", "safetensors", "matplotlib")
    from pykernels.models.usrl import EncoderTraining

    monkeypatch.setattr(EncoderTraining, "step", lambda self: pytest.fail("it trained"))
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is not empty; give a new one" in refused(capsys, train(tmp_path))
    assert "is not a folder; give the name of a new one" in refused(capsys, reproduce("--out", str(file)))
    assert "is a folder" in refused(capsys, reproduce("--picture", str(tmp_path)))
    missing = tmp_path / "no" / "a.png"
    assert f"there is no folder {missing.parent}" in refused(capsys, reproduce("--picture", str(missing)))
    assert "'.xyz'; use .png" in refused(capsys, reproduce("--picture", str(tmp_path / "a.xyz")))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "mine")]


def test_device_that_is_not_there(monkeypatch, capsys):
    needs("sklearn", "tqdm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: PyTorch sees no GPU here" in refused(capsys, reproduce("--device", "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--device cuda:2: the GPUs here are cuda:0 to cuda:1" in refused(capsys, reproduce("--device", "cuda:2"))


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("sklearn", reproduce(), "models"),
        ("tqdm", ["reproduce", "usrl", "--dataset", "GunPoint"], "models"),
        ("safetensors", train("run"), "models"),
        ("matplotlib", reproduce("--picture", "features.png"), "plot"),
    ],
)
def test_missing_extra(module, arguments, extra, monkeypatch, capsys):
    if module != "sklearn":
        needs("sklearn")
    without(monkeypatch, module)
    error = refused(capsys, arguments)
    assert f"run pip install '.[{extra}]'" in error
    assert "pip install " + "pykernels" not in error


def test_missing_aeon(monkeypatch, capsys):
    needs("sklearn")
    import pykernels.data.ucr as ucr

    monkeypatch.setattr(ucr, "find_spec", lambda name: None)
    assert "needs aeon: run pip install '.[data]'" in refused(capsys, reproduce())


def test_backend_that_cannot_run_here(monkeypatch, capsys):
    needs("sklearn")
    monkeypatch.setattr(
        pykernels, "available_backends", lambda: {"causal_conv1d": {"cpu": Answer(False, "it did not load")}}
    )
    assert "--backend cpu: it did not load" in refused(capsys, reproduce("--backend", "cpu"))


def test_bad_input_of_the_installed_program_shows_no_traceback():
    needs("sklearn", "aeon")
    result = run("reproduce", "usrl", "--dataset", "Nowhere")
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"pykernels: no data set 'Nowhere' .*\n", result.stderr)


def test_only_the_models_need_scikit_learn():
    script = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "sklearn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled())
import pykernels, pykernels.cli, pykernels.data
assert not {"aeon", "matplotlib", "safetensors", "scipy"} & set(sys.modules)
try:
    import pykernels.models.usrl
except ModuleNotFoundError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.startswith("pykernels.models.usrl needs scikit-learn: run pip install '.[models]'")
