"""The command line: quick to answer, and what is wrong is said in one line."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError

import adamac
from adamac import cli
from adamac.bakeoff.device import find_device
from adamac.bakeoff.errors import BadInput
from adamac.extras import EXTRAS

# What a wheel without extras lacks; jinja2 and filelock come with torch.
BARE = [
    "diffusers",
    "transformers",
    "numpy",
    "av",
    "cv2",
    "matplotlib",
    "skimage",
    "safetensors",
    "tokenizers",
]
MODULES = {"opencv-python-headless": "cv2", "pillow": "PIL", "scikit-image": "skimage"}


def test_help_answers_without_torch():
    program = (
        "import sys, adamac.cli; code = adamac.cli.main(['--help']); sys.exit(code or 'torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    for command in ("bakeoff", "report", "doctor", "bench", "version"):
        assert command in answer.stdout


def test_version_is_the_packages(capsys):
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.strip() == adamac.__version__


@pytest.mark.parametrize(
    ("missing", "arguments", "line"),
    [
        (BARE, ["doctor"], "diffusers is not installed; install it with pip install 'adamac[diffusers]'"),
        (BARE, ["report", "."], "is not installed; install it with pip install 'adamac[bakeoff]'"),
        (BARE, ["bakeoff"], "is not installed; install it with pip install 'adamac[bakeoff]'"),
        (["matplotlib"], ["bakeoff"], "matplotlib is not installed"),
        (["av"], ["bakeoff"], "av is not installed"),
        (BARE, ["moe", "train"], "is not installed; install it with pip install 'adamac[moe]'"),
        (["torch"], ["doctor"], None),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it_before_anything_is_made(
    tmp_path, missing, arguments, line
):
    program = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); sys.argv[1:] = {arguments!r}; from adamac import cli; cli.entry()"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    if line is None:  # no extra brings it: a fault of ours or of the installation, and its traceback helps
        assert "Traceback" in answer.stderr
        return
    assert answer.returncode == 2, answer.stderr
    assert line in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_enable_without_diffusers_says_what_to_install():
    program = "import sys; sys.modules['diffusers'] = None; import adamac; adamac.enable"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = answer.stderr.strip().splitlines()[-1]
    assert last == (
        "ModuleNotFoundError: adamac.enable: diffusers is not installed; "
        "install it with pip install 'adamac[diffusers]'"
    )


def test_extras_are_those_of_the_package():
    file = Path(__file__).parents[1] / "pyproject.toml"
    declared = tomllib.loads(file.read_text())["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        wanted = [name for name in declared[extra] if not name.startswith("adamac[")]
        names = {re.split("[<>=]", name)[0] for name in wanted}
        inherited = EXTRAS["diffusers"] if len(wanted) < len(declared[extra]) else set()
        assert modules == {MODULES.get(name, name) for name in names} | inherited


def test_version_is_an_option_too(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == adamac.__version__


@pytest.mark.parametrize("options", [["--dtype", "float3"], ["--device", "abacus"], ["--device", "cuda:9"]])
def test_a_wrong_device_or_dtype_is_refused_before_a_model_is_looked_for(capsys, tmp_path, options):
    command = ["bakeoff", "--model", "owner/name", "--out", str(tmp_path / "run"), *options]
    assert cli.main(command) == 2
    said = capsys.readouterr()
    assert options[1] in said.err
    assert "loading" not in said.out


def test_a_gpu_that_is_not_there_is_refused_by_its_number(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(find_device("cuda:1")) == "cuda:1"
    with pytest.raises(BadInput, match="cuda:2 was asked for, but GPUs here are cuda:0 to cuda:1"):
        find_device("cuda:2")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with the things that commands are given, and its state before and after."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    (tmp_path / "no-model").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    return tmp_path


def files(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["bakeoff", "--arms", "dense", "sage"], "unknown arm 'sage'"),
        (["bakeoff", "--arms", "svg2", "svg2"], "twice"),
        (["bench", "attention", "--shapes", "wan-99b"], "unknown shape 'wan-99b'; known are tiny, "),
        (["bench", "attention", "--densities", "1.5"], "a density must be over 0 and at most 1, got 1.5"),
        (["bench", "attention", "--shapes"], "shapes: expected one or more, got none"),
        (["bench", "attention", "--densities"], "densities: expected one or more, got none"),
        (["bench", "attention", "--heads", "3"], "heads must be at most 2 for tiny, got 3"),
        (["bench", "attention", "--out", "full"], "out: rows cannot be appended to full (it is a directory)"),
        (["bench", "attention", "--out", "empty.txt/a"], "out: rows cannot be appended to empty.txt/a"),
        (["bakeoff", "--prompts", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["bakeoff", "--prompts", "empty.txt"], "holds no prompt"),
        (["bakeoff", "--prompts", "no-model"], "cannot read no-model"),
        (["bakeoff", "--prompts", "prompts.txt", "--model", "no-model"], "no model_index.json"),
        (["bakeoff", "--prompts", "prompts.txt", "--model", "empty.txt"], "no model_index.json"),
        (["bakeoff", "--prompts", "prompts.txt", "--model", "./nowhere"], "neither a directory nor a hub id"),
        (["bakeoff", "--prompts", "prompts.txt", "--model", "nowhere"], "neither a directory nor a hub id"),
        (["bakeoff", "--prompts", "prompts.txt", "--out", "empty.txt"], "cannot be written"),
        (["bakeoff", "--prompts", "prompts.txt", "--out", "empty.txt/run"], "cannot be written"),
        (["bakeoff", "--prompts", "prompts.txt", "--out", "full"], "not empty"),
        (["bakeoff", "--prompts", "prompts.txt", "--keep", "1.5"], "keep"),
        (["bakeoff", "--prompts", "prompts.txt", "--dense-first", "1.5"], "Schedule.first must be"),
        (["bakeoff", "--prompts", "prompts.txt", "--min-tokens", "-1"], "min_tokens must be 0 or more"),
        (["bakeoff", "--prompts", "prompts.txt", "--keep", "0"], "keep"),
        (["bakeoff", "--prompts", "prompts.txt", "--keep", "nan"], "keep"),
        (["bakeoff", "--prompts", "prompts.txt", "--guidance", "nan"], "guidance must be a finite number"),
        (["bakeoff", "--prompts", "prompts.txt", "--steps", "0"], "steps must be at least 1"),
        (["bakeoff", "--prompts", "prompts.txt", "--height", "-16"], "height must be at least 16"),
        (["bakeoff", "--prompts", "prompts.txt", "--frames", "0"], "frames must be at least 1"),
        (["bakeoff", "--prompts", "prompts.txt", "--seeds", "1", "1"], "seeds must differ"),
        (["bakeoff", "--prompts", "prompts.txt", "--device", "abacus"], "no device 'abacus'"),
        (["bakeoff", "--prompts", "prompts.txt", "--dtype", "float3"], "dtype must be"),
        (["bakeoff", "--prompts", "prompts.txt", "--dtype", "float8_e4m3fn"], "dtype must be"),
        (["bakeoff", "--prompts", "prompts.txt", "--device", "meta"], "on meta nothing is computed"),
        (["bakeoff", "--prompts", "prompts.txt", "--device", "hpu"], "torch cannot use it here"),
        (["doctor", "--device", "abacus"], "no device 'abacus'; expected auto, cpu, cuda or cuda:1"),
        (["bench", "attention", "--device", "abacus"], "no device 'abacus'"),
        (["bench", "attention", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["bench", "attention", "--heads", "0"], "heads must be at least 1, got 0"),
        (["report", "nowhere"], "holds no run"),
        (["report", "full"], "holds no run"),
        (["doctor", "no-model"], "no model_index.json"),
        (["doctor", "../no/such/place"], "neither a directory nor a hub id"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_changes_nothing(
    world, capsys, monkeypatch, arguments, problem
):
    monkeypatch.setattr("adamac.bench.run.compare", lambda *_, **__: pytest.fail("something was timed"))
    before = files(world)
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert "Traceback" not in said.out + said.err
    assert files(world) == before
    assert not (world / "out").exists()


@pytest.mark.parametrize("command", [["doctor", "owner/name"], ["bakeoff", "--model", "owner/name"]])
def test_a_hub_that_cannot_be_reached_is_one_line_with_the_remedy(world, capsys, monkeypatch, command):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(command) == 2
    line = "model: owner/name is not in the local cache and the hub cannot be reached; download it first, or give"
    assert line in capsys.readouterr().err
    assert not (world / "out").exists()


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (404, "the hub refuses it (Answer: 404 of it); check the name"),
        (503, "the hub cannot be reached; download it first"),
    ],
)
def test_a_hub_that_has_no_such_model_is_told_from_one_that_cannot_be_reached(
    world, capsys, monkeypatch, code, line
):
    class Answer(HfHubHTTPError):
        def __init__(self):
            Exception.__init__(self, f"{code} of it\nfor url")
            self.response = SimpleNamespace(status_code=code, headers={})

    def asked(*_, **__):
        raise Answer

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", asked)
    assert cli.main(["doctor", "owner/name"]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["cook"], ["bakeoff", "--stepz", "3"], ["bakeoff", "--steps", "many"], []]
)
def test_usage_errors_exit_with_2(arguments, capsys):
    assert cli.main(arguments) == 2
