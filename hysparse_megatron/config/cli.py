"""The command line of `hysparse train`, with the flags users of Hydra expect."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from hysparse_megatron.command import CommandParser, make_parser
from hysparse_megatron.config.compose import GROUPS, compose, group_options
from hysparse_megatron.config.describe import all_keys, keys_like
from hysparse_megatron.config.frozen import load_frozen
from hysparse_megatron.config.own_presets import OPTION
from hysparse_megatron.config.schema import Config
from hysparse_megatron.errors import ConfigError, did_you_mean

_EXIT_CODES = """\
exit codes:
  0  finished
  2  bad configuration
  3  pre-empted; a checkpoint was saved, start again to go on
  4  numerical stop: too many bad steps in a row
  5  bad data
  6  no valid checkpoint
  130  Ctrl-C before there was anything to save; later it ends with 3
  any other code is a crash"""

_EXAMPLES = """\
examples:
  hysparse train train.steps=50 run_dir=/tmp/first
  hysparse train 'model.layout=2*(F 3*S) F' --cfg job
  torchrun --nproc-per-node 4 -m hysparse_megatron experiment=quickstart
  hysparse train --config runs/quickstart/config.yaml"""


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for. `show` prints the configuration instead of training.

    `overrides` are as `compose` takes them: with the folders of own presets.
    """

    overrides: list[str]
    config_file: Path | None
    show: bool

    @property
    def words(self) -> list[str]:
        """A command line that asks for the same."""
        file = [] if self.config_file is None else ["--config", str(self.config_file)]
        return [*self.overrides, *file, *(["--cfg", "job"] if self.show else [])]


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line of a rank. `--help` prints and leaves with 0."""
    text = "Train, in this process group: alone, under torchrun or under srun."
    parser = run_parser("hysparse train", text)
    return arguments_of(parser.parse_intermixed_args(list(argv)))


def run_parser(program: str, description: str) -> CommandParser:
    """The parser of a command that trains. `arguments_of` takes what it has read."""
    parser = settings_parser(program, description)
    parser.epilog = _epilog()
    parser.add_argument("--cfg", choices=["job"], help="print the configuration and leave")
    parser.add_argument("--resolve", action="store_true", help="with --cfg; it always resolves")
    parser.add_argument("-m", "--multirun", action="store_true", help=argparse.SUPPRESS)
    return parser


def settings_parser(program: str, description: str | None) -> CommandParser:
    """The parser of a command that takes the settings of a run."""
    parser = make_parser(program, description)
    parser.no_option = settings_like
    parser.add_argument("overrides", nargs="*", help="group=option, key=value, ~group")
    parser.add_argument("--config", type=Path, metavar="FILE", help="load this file as it is")
    parser.add_argument(
        OPTION, action="append", default=[], metavar="DIR", help="also take presets from here"
    )
    return parser


def arguments_of(found: argparse.Namespace, is_sweep: bool = False) -> Arguments:
    """What `settings_parser` has read. Raises ConfigError for what cannot be together.

    `is_sweep`: overrides may list values.
    """
    if getattr(found, "multirun", False) and not is_sweep:
        raise ConfigError(
            "-m: one command trains one run; hysparse submit -m submits one job per point"
        )
    for override in found.overrides:
        if "=" not in override and not override.startswith("~"):
            meant = did_you_mean(settings_like(override))
            raise ConfigError(f"{override}: not an override; write key=value{meant} (see --help)")
    overrides = [*(f"{OPTION}={folder}" for folder in found.config_dir), *found.overrides]
    if found.config is not None and overrides:
        given = " ".join(overrides)
        raise ConfigError(f"--config takes its file as it is: leave out {given}, or the file")
    return Arguments(overrides, found.config, getattr(found, "cfg", None) is not None)


def settings_like(word: str) -> list[str]:
    """Overrides that somebody may mean who writes `word`: `--train.steps=3`, `quickstrt`."""
    name, equals, value = word.lstrip("-").partition("=")
    value = value or "..."
    key = name.replace("-", "_")
    if name in GROUPS or key in all_keys():
        return [f"{name if name in GROUPS else key}={value}"]
    options = [(option, group) for group in GROUPS for option in group_options(group)]
    close = get_close_matches(name, [option for option, _ in options], n=1)
    if close and not equals:
        return [f"{group}={option}" for option, group in options if option == close[0]]
    return [f"{known}={value}" for known in keys_like(key)]


def load(arguments: Arguments) -> Config:
    """The configuration the command line names; not validated yet."""
    if arguments.config_file is not None:
        return load_frozen(arguments.config_file)
    return compose(arguments.overrides)


def _epilog() -> str:
    """The groups, examples and exit codes below the options."""
    groups = [f"  {group:<11}{', '.join(group_options(group))}" for group in GROUPS]
    keys = "keys are dotted names of settings; --cfg job prints all of them"
    listing = "\n".join(["config groups and their options:", *groups, keys])
    return f"{listing}\n\n{_EXAMPLES}\n\n{_EXIT_CODES}"
