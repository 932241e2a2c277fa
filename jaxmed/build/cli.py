"""The command line: flags, and mistakes told without a traceback, with exit code 2."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxmed.build import launch
from jaxmed.build.config import base_config, config_of_run, flatten, nearest, read_run
from jaxmed.training.faults import disk_fault, memory_fault
from jaxmed.types import UserError

DEBUG = flags.DEFINE_boolean("debug", False, "Show the traceback of every error.")


_WANTED: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "numbers with commas between, as in 64,64",
}
"""What the value of a key can be, by the type of its default."""


def define_config() -> flags.FlagHolder:
    """`--config=configs/NAME.py[:PRESET]` with overrides `--config.KEY=VALUE`."""
    return config_flags.DEFINE_config_file("config", None, "Experiment: configs/NAME.py[:PRESET].")


def define_workdir_config() -> None:
    """`--config.KEY=VALUE` overrides of the config in `--workdir`, for scripts that use a run.

    The flags must exist before the command line is parsed, so the workdir is looked up by hand.
    """
    flags.DEFINE_string("workdir", None, "Folder of the run, as train.py wrote it.")
    workdir = _look_up("workdir", sys.argv[1:])
    if workdir is None or not (Path(workdir) / "config.json").is_file():
        return
    try:
        config_flags.DEFINE_config_dict("config", config_of_run(read_run(Path(workdir))))
    except UserError as error:
        _fail(str(error))


def workdir_config() -> ConfigDict | None:
    """The run's config with the overrides of the command line; None where there is no run."""
    return flags.FLAGS["config"].value if "config" in flags.FLAGS else None


def refuse(positional: Sequence[str]) -> None:
    """Refuse arguments that are no flags, such as `config.seed 3` without its dashes."""
    if positional:
        raise UserError(f"command line: {positional[0]!r} is not a flag; flags begin with --")


def _look_up(name: str, arguments: Sequence[str]) -> str | None:
    for i, argument in enumerate(arguments):
        match = re.fullmatch(rf"--?{name}(?:=(.*))?", argument)
        if match:
            following = arguments[i + 1] if i + 1 < len(arguments) else None
            return match.group(1) if match.group(1) is not None else following
    return None


def run(
    main: Callable[[list[str]], None],
    *,
    required: Sequence[str] = (),
    one_of: Sequence[str] = (),
) -> None:
    """Parse the command line and call `main(positional arguments)`.

    `required` flags must be given, and one at least of `one_of`. Mistakes of the user end with what
    is wrong on standard error, a line a problem, and exit code 2; a traceback is for bugs, or for
    `--debug`. Ctrl-C or SIGTERM outside training ends with 130, once what is done is written.
    """
    launch.use_huge_pages()
    sys.stdout = cast(TextIO, _Unread(sys.stdout))
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        positional = _parse(required, one_of)
        launch.keep_compiled()
        launch.start()
        main(positional)
    except UserError as error:
        if debug:
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        if debug:
            raise
        _leave("stopped before its end; the same command goes on, or begins again", 130)
    except Exception as error:
        fault = None if debug else explain_fault(error)
        if fault is None:
            raise
        _fail(fault)


def explain_fault(error: Exception) -> str | None:
    """What is wrong with the machine and what to do; None where the error may be a bug."""
    if fault := disk_fault(error):
        return (
            f"{fault}; make room, or use another folder, and give the same command again. The last "
            "checkpoint of a training is kept, and it goes on from there"
        )
    if fault := memory_fault(error):
        return (
            f"{fault}; use a smaller data.batch_size, data.size or data.patch, "
            "evaluation.batch_size where it was evaluating, model.remat=true, "
            "data.on_device=false, or sharding.fsdp=true on several devices. The last checkpoint "
            "is kept"
        )
    return None


def _parse(required: Sequence[str], one_of: Sequence[str]) -> list[str]:
    parser = flags.FLAGS
    if any(help_flag in sys.argv for help_flag in ("--help", "-h", "--helpfull")):
        print(_help())
        sys.exit(0)
    _check_config_file()
    try:
        positional = parser(sys.argv)[1:]
    # Values are parsed by Python's own parser too, which raises errors of many types.
    except Exception as error:
        raise _user_error_within(error) or UserError(_explain(error, sys.argv[1:])) from error
    for name in required:
        if not getattr(parser, name):
            raise UserError(f"--{name} is missing; see --help")
    if one_of and not any(getattr(parser, name) for name in one_of):
        raise UserError(f"--{one_of[0]} is missing; see --help")
    return positional


def _check_config_file() -> None:
    """Look before the flag does, which reports a missing file only when it is first used."""
    given = _look_up("config", sys.argv[1:])
    if given is not None and not Path(given.split(":")[0]).is_file():
        raise UserError(
            f"--config={given}: no such file; give configs/NAME.py or configs/NAME.py:PRESET, from "
            "the folder that holds configs/"
        )


def _user_error_within(error: BaseException | None) -> UserError | None:
    """What a config file itself complained of: the innermost, as the flags wrap it in their own."""
    innermost = None
    while error is not None:
        if isinstance(error, UserError):
            innermost = error
        error = error.__cause__ or error.__context__
    return innermost


def _help() -> str:
    """What the script says of itself, and its flags."""
    shown = list(flags.FLAGS.get_key_flags_for_module(sys.argv[0]))
    shown += [flags.FLAGS[name] for name in ("workdir", "config") if name in flags.FLAGS]
    lines = [
        f"  --{flag.name}: {flag.help}" for flag in {flag.name: flag for flag in shown}.values()
    ]
    overrides = "  --config.KEY=VALUE: Another value for a key; train.py --dry_run lists them."
    debug = f"  --debug: {flags.FLAGS['debug'].help}"
    several = "  --coordinator, --processes, --process: Of several processes, see README.md."
    told = [f"{sys.modules['__main__'].__doc__}\nFlags:", *lines, overrides, several, debug]
    return "\n".join(told)


def _explain(error: Exception, arguments: Sequence[str]) -> str:
    """One line that names the flag and, where it can, the one that was meant."""
    defaults = flatten(base_config("classification"))
    keys = list(defaults)
    sections = {key.rsplit(".", 1)[0] for key in keys}
    given = [match.group(1) for a in arguments if (match := re.match(r"--?([^=]+)", a))]
    for name in given:
        key = name.removeprefix("config.")
        is_override = name.startswith("config.")
        if is_override and "config" not in flags.FLAGS:
            workdir = _look_up("workdir", arguments)
            if workdir is not None:
                read_run(Path(workdir))  # says what is wrong with it
            return f"--{name}: overrides need --workdir of a run"
        is_missing = _look_up("config", arguments) is None
        if is_override and is_missing and flags.FLAGS["config"].value is None:
            return f"--{name}: overrides need --config=configs/NAME.py"
        if (is_override and key not in sections.union(keys)) or (not is_override and key in keys):
            return f"--{name}: no such flag{_meant(key, keys, prefix='config.')}"
    unknown = getattr(error, "flagname", None)  # of absl's UnrecognizedFlagError
    if unknown:
        every = [*flags.FLAGS, *(f"config.{key}" for key in keys)]
        return f"--{unknown}: no such flag{_meant(unknown, every)}"
    flawed = [a for a in arguments if a.startswith("--config.") and "=" in a]
    said = " ".join(str(error).split())
    for argument in flawed:
        name, _, value = argument.partition("=")
        wanted = _WANTED.get(type(defaults.get(name.removeprefix("--config."))))
        if wanted and f"{name}=" in said:
            return f"{name} is {value!r}; expected {wanted}"
    named = any(a.split("=")[0] in said for a in flawed)
    return said if named or not flawed else f"{' or '.join(flawed)}: {said}"


def _meant(name: str, names: Sequence[str], *, prefix: str = "") -> str:
    """The flag that was probably meant, in words."""
    near = nearest(name, names)
    return f"; did you mean --{prefix}{near}?" if near else "; see --help"


class _Unread:
    """Standard output that may be closed, as by `... | head`: the work goes on, unread."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or do nothing once nobody reads."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._close()
            return len(text)

    def flush(self) -> None:
        """Flush, or do nothing once nobody reads."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._close()

    def _close(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _fail(message: str) -> None:
    lines = (" ".join(line.split()) for line in message.splitlines())
    _leave("error: " + "\n    ".join(lines), 2)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    # Reader threads of the data loader must not keep an ended program alive.
    os._exit(code)
