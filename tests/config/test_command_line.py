"""What ``monet-train`` reads from its command line, and what it refuses there."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

from monet_train.config.command_line import Command, read_command
from monet_train.config.compose import compose
from monet_train.errors import UserError

OPTIONS = {  # what is given, and what the line says
    "an unknown option": (["--foo"], "unrecognized arguments: --foo", "monet-train --help"),
    "an unknown choice": (["--cfg", "run"], "invalid choice: 'run'", "job"),
    "another primary configuration": (["--config-name", "mine"], "--config-dir FOLDER experiment=NAME"),
    "another folder of configurations": (["--config-path", "mine"], "--config-dir FOLDER experiment=NAME"),
    "to show a sweep": (["-m", "--cfg", "job"], "--cfg and --multirun cannot be given together"),
    "to show two things": (["--info", "--cfg", "job"], "--cfg and --info cannot be given together"),
    "to resolve nothing": (["--resolve"], "--resolve goes with --cfg"),
    "to show an unknown package": (["--cfg", "job", "-p", "trian"], "unknown key trian", "did you mean train?"),
    "to show a bad value": (["--cfg", "job", "train.seed=x"], "train.seed=x is not a whole number"),
    "a folder that is not there": (["--cfg", "job", "--config-dir", "nowhere"], "--config-dir nowhere is not a folder"),
    "half a completion": (["--shell-completion"], "install"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be(case: str) -> None:
    arguments, *fragments = OPTIONS[case]
    with pytest.raises(UserError) as refusal:
        read_command(arguments)
    for fragment in fragments:
        assert fragment in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_options_may_stand_between_overrides() -> None:
    command = Command(["train.seed=1,2", "data.path=x"], Path("mine"), sweep=True)
    assert read_command(["train.seed=1,2", "-m", "data.path=x", "--config-dir", "mine"]) == command


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--shell-completion", "install"]])
def test_what_shows_leaves_its_process_as_it_was(arguments: list[str]) -> None:
    """With SIGPIPE at its default, the next closed pipe of any kind would end a Python process silently."""

    def process() -> list[object]:
        return [signal.getsignal(signal.SIGPIPE), list(sys.argv), dict(os.environ)]

    before = process()
    with contextlib.suppress(UserError):  # the completion lacks its shell
        read_command(arguments)
    assert process() == before


def test_the_version_is_the_packages_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_command(["--version"]) is None
    assert capsys.readouterr().out.startswith("monet-train ")


@pytest.fixture
def own_experiments(tmp_path: Path) -> Path:
    """A folder of a user's own experiments."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    files = {
        "mine": "train: {seed: 5}",
        "misspelt": "train: {sed: 5}",
        "text": "train: {seed: five}",
        "model": "defaults: [{override /model: 2b}]",
        "broken": "train: [",
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    return tmp_path


def test_own_experiments(own_experiments: Path) -> None:
    assert compose(["data.path=x", "experiment=mine"], own_experiments).train.seed == 5
    assert compose(["data.path=x", "experiment=quickstart"], own_experiments).run.name == "quickstart"
    assert compose(["data.path=x"]).train.seed == 0  # nothing of it stays behind


@pytest.mark.parametrize(
    ("experiment", "fragments"),
    [
        ("misspelt", ["unknown key train.sed", "did you mean train.seed?"]),
        ("text", ["train.seed", "'five'"]),
        ("model", ["model/2b does not exist", "850m"]),
        ("broken", ["not valid YAML", "broken.yaml", "line 3"]),
        ("absent", ["experiment/absent does not exist", "misspelt"]),
    ],
)
def test_own_experiments_that_cannot_be(experiment: str, fragments: list[str], own_experiments: Path) -> None:
    with pytest.raises(UserError) as refusal:
        compose(["data.path=x", f"experiment={experiment}"], own_experiments)
    for fragment in fragments:
        assert fragment in str(refusal.value)
