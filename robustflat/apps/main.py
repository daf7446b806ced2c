"""The command line: `robustflat <application> ...`, and how every application starts and fails."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from importlib import metadata
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustflat import __version__
from robustflat.apps.config import config_folder, register
from robustflat.apps.messages import complain, explained
from robustflat.errors import UserError

APPLICATIONS = {
    "train": "train, evaluate and measure one network, or a sweep of them (-m)",
    "evaluate": "evaluate a trained network: errors and losses under attack, flatness, early stopping",
    "landscape": "draw clean or robust loss along directions in weight space, on a plane, between two networks",
    "hessian": "curvature of the loss: eigenvalues, trace, spectral density",
    "measure": "sharpness by the measures of the literature, on clean, frozen-adversarial or re-attacked loss",
    "rescale": "scale weights without changing the function, and measure again: the paper's x0.5 / x2 study",
    "audit": "which sharpness measures move under function-preserving transformations",
    "study": "train, evaluate and report all networks of a study",
    "report": "page and tables of any run folders",
    "runs": "list, compare and clean up run folders",
    "doctor": "check this installation and say what to do",
    "show_batch": "draw what the network sees: original, augmented and attacked images",
}

SHARED = ("train", "evaluate", "landscape")
"""Applications that `torchrun` may start in several processes."""


def main() -> None:
    """Entry point of the installed command `robustflat`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0 if arguments else 2)
    if arguments[0] in ("-V", "--version"):
        print(f"robustflat {__version__}")
        sys.exit(0)
    completing = {"-sc", "--shell-completion"} & {*arguments}
    if completing:
        arguments = _completed(arguments)
    name = arguments[0]
    if name not in APPLICATIONS:
        close = get_close_matches(name, APPLICATIONS, n=1)
        complain(f"There is no command '{name}'.{f' Did you mean {close[0]}?' if close else ''}\n\n{_overview()}")
        sys.exit(2)
    sys.argv = [sys.argv[0] if completing else f"{sys.argv[0]} {name}", *arguments[1:]]
    run_application(name)


def _completed(arguments: list[str]) -> list[str]:
    """Arguments of a request for shell completion, with the application first.

    For `robustflat train attack=p` the shell calls `robustflat -sc query=bash`: the application is only in the line to
    be completed, from which it is taken out, as Hydra expects one word before the overrides. An application that is
    not written to its end is completed here.
    """
    line = os.environ.get("COMP_LINE", "")
    if arguments[0] in APPLICATIONS or not line:
        return arguments if arguments[0] in APPLICATIONS else ["train", *arguments]  # installed once for all of them
    executable, typed, *rest = [*line.split(maxsplit=2), "", ""]
    if typed in APPLICATIONS and line.split(typed, 1)[1]:
        os.environ["COMP_LINE"] = f"{executable} {rest[0]}"
        return [typed, *arguments]
    print("\n".join(name for name in APPLICATIONS if name.startswith(typed)))
    sys.exit(0)


def _overview() -> str:
    lines = "\n".join(f"  {name:<10} {text}" for name, text in APPLICATIONS.items())
    return (
        f"Usage: robustflat COMMAND [GROUP=CHOICE ...] [KEY=VALUE ...]\n\n{lines}\n\n"
        "robustflat COMMAND --help explains it."
    )


def run_application(name: str) -> None:
    """Run an application; what a user can cause ends in a message and exit code 1, never in a traceback.

    The application is the function `job` of the module `robustflat.apps.<name>`; it is called once, or once for
    each combination of a sweep, with the configuration that `conf/<name>.yaml` composes.
    """
    register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here; Hydra would print part of them and exit
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # Hydra: before all values
    try:
        job = importlib.import_module(f"robustflat.apps.{name}").job
        _require_one_process(name)
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)(job)()
    except BrokenPipeError:  # the reader of our output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        complain("Interrupted. The same command goes on from the last checkpoint.")
        sys.exit(130)
    except Exception as error:
        message = _message(error, name)
        if message is None:
            raise
        complain(message)
        sys.exit(1)


def _require_one_process(name: str) -> None:
    """Refuse applications that torchrun has started in several processes, but for those that share their work."""
    from robustflat.ranks import started  # not before: torch may be what is broken

    if name not in SHARED and started() > 1:
        raise UserError(
            f"robustflat {name} works in one process, but torchrun started {started()}: leave torchrun out. "
            f"{', '.join(SHARED[:-1])} and {SHARED[-1]} share their work among several."
        )


def _message(error: Exception, config_name: str) -> str | None:
    """Sentence for an error that a user can cause; None for a bug of ours."""
    message = explained(error)
    if message is not None:
        return message
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _hydra_message(error) + _suggest_key(str(error), config_name)
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, ImportError | RuntimeError) and "torchvision" in str(error):
        return (
            f"torch {metadata.version('torch')} and torchvision {metadata.version('torchvision')} do not work together "
            f"({str(error).splitlines()[0]}). Install them as a pair: pip install --upgrade torch torchvision"
        )
    return None


def _hydra_message(error: Exception) -> str:
    """What Hydra says, with the cause that it keeps back, and without advice that ends in the next error."""
    cause = str(error.__cause__ or "").partition("\n")[0]
    text = re.sub(r"\nTo append to your config use .*", "", str(error))
    return f"{text}: {cause}" if "Error merging override" in text and cause else text


def _suggest_key(message: str, config_name: str) -> str:
    """What to write instead: quotes around brackets; for a misspelt key, the keys that look most like it."""
    if "input '['" in message:
        return "\nA value with brackets needs quotes of its own: 'dataset.train=\"train[:2000]\"'"
    if missing := re.search("Could not find '(.+?)'", message):
        group = config_folder() / missing[1].partition("/")[0]
        files = [p.relative_to(config_folder()).with_suffix("").as_posix() for p in group.rglob("*.yaml")]
        close = get_close_matches(missing[1], files, n=3)
        return f"\nDid you mean {' or '.join(close)}?" if close else ""
    if "Could not override" not in message:
        return ""
    wrong = message.split("'")[1]
    keys = _keys_near(wrong, config_name)
    last = wrong.rsplit(".", 1)[-1]
    close = [k for k in keys if k.rsplit(".", 1)[-1] == last] or get_close_matches(wrong, keys, n=3)
    close = close or [k for k in keys if get_close_matches(last, [k.rsplit(".", 1)[-1]], n=1)]
    return f"\nDid you mean {' or '.join(close[:3])}?" if close else ""


def _keys_near(wrong: str, config_name: str) -> list[str]:
    """Keys of the configuration without the override of `wrong`; where that does not compose, of the default one."""
    others = [a for a in sys.argv[1:] if not a.startswith("-") and wrong not in a.partition("=")[0]]
    for overrides in (others, []):
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"), suppress(HydraException):
            return _leaves(hydra.compose(config_name, overrides))
    return []


def _leaves(node: DictConfig) -> list[str]:
    """Dotted paths of all keys of a configuration, nested ones included."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for key, child in values.items():
            yield f"{prefix}{key}"
            if isinstance(child, dict):
                yield from walk(child, f"{prefix}{key}.")

    values = OmegaConf.to_container(node, resolve=False)
    assert isinstance(values, dict)
    return list(walk({str(k): v for k, v in values.items()}, ""))
