"""The command line: each command is a few lines around one function of the library, which is imported only then.

Answers go to stdout, as aligned text or with --json as JSON objects, one a line. Errors are one line on stderr, and
with --json an object with `error` as well. `verify` exits 0 when the suspect is owned by any watermark, 1 when that is
not proven by one that it could be judged with, 2 when it could be judged with none; every other command exits 0 or 2.
After Ctrl-C the status is 130, and 141 where nobody reads the answer (`| head`).
"""

import contextlib
import difflib
import gc
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from wmengine._version import __version__
from wmengine.cli.output import fail, print_json

app = typer.Typer(
    help="Mark neural networks while they train, and prove with an exact p-value whose copy a suspect is.",
    epilog="Exit status: verify 0 owned, 1 not proven, 2 could not be judged; the rest 0 or 2; Ctrl-C 130.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


INTERRUPTED, NOBODY_READS = 130, 141  # what shells make of SIGINT and SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    status = _run(arguments)
    if status == INTERRUPTED and arguments is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said, and the process ends: once more changes nothing
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # said already; what is still buffered must not raise once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if arguments is None:
        gc.freeze()  # the last collection would look through all that was imported
    return status


def _run(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # --debug is taken out here so that it may stand behind the command as well as before it.
    end = given.index("--") if "--" in given else len(given)
    debug = "--debug" in given[:end]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    given = [argument for argument in given[:end] if argument != "--debug"] + given[end:]
    try:
        status = app(given, prog_name="wmengine", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        if status == INTERRUPTED:  # typer makes a status of Ctrl-C
            raise KeyboardInterrupt
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "wmengine"
        return _mistake(f"{_usage(error.format_message(), context)}: see {command} --help", given[:end])
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", INTERRUPTED)
    except SystemExit as ended:  # a shell's completion is done, or 1, which typer makes of a reader that has gone
        return NOBODY_READS if ended.code else 0
    except BrokenPipeError:  # `| head`
        return NOBODY_READS
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _mistake(_sentence(error), given[:end])
    return status if isinstance(status, int) else 0


def _usage(said: str, context: Any) -> str:
    """What typer says, its suggestions left out but the one that is near enough to be meant."""
    said = re.split(r" \(Possible options|\. Did you mean", said)[0].rstrip(".")
    if context is None:
        return said
    if "extra argument" in said and any(each.multiple for each in context.command.params):
        return f"{said}, and an option is named before each of its values"
    if not said.startswith("No such "):
        return said
    options = [name for parameter in context.command.params for name in parameter.opts]
    known = [*getattr(context.command, "commands", ()), *options, *context.help_option_names]
    near = difflib.get_close_matches(said.split()[-1].strip("'"), known, 1, 0.75)
    return f"{said} (did you mean {near[0]}?)" if near else said


def _mistake(said: str, options: Sequence[str]) -> int:
    if "--json" in options:
        with contextlib.suppress(OSError):  # where nobody reads the answer, this is it
            print_json({"error": said})
    return fail(said)


def _sentence(error: Exception) -> str:
    """What to say about an error: the engine's own and the system's speak for themselves, others are our mistake."""
    from wmengine.errors import WmengineError

    if isinstance(error, WmengineError | ValueError | ImportError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return f"unexpected {type(error).__name__}: {error} (run again with --debug and report what it prints)"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"wmengine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass
