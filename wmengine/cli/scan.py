"""`wmengine scan`."""

import gc
from pathlib import Path
from typing import Annotated

import typer

from wmengine.cli.app import app
from wmengine.cli.options import (
    ClassesOption,
    DeviceOption,
    IsolationOption,
    KeyOption,
    MemoryOption,
    PassphraseOption,
    SecondsOption,
    TestOption,
    limits,
    unlock,
)


@app.command()
def scan(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATHS...", help="ONNX files, checkpoints, folders, patterns, or URLs."),
    ],
    watermarks: Annotated[
        list[Path],
        typer.Option("--watermarks", metavar="DIR", help="Watermarks to look for: a folder of .wm files, or a file."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE.parquet", help="The table to write; an interrupted scan is resumed beside it."
        ),
    ],
    jobs: Annotated[int | None, typer.Option(metavar="N", help="Suspects at a time (default: the cores).")] = None,
    alpha: Annotated[float, typer.Option(help="Owned when p times the number of pairs is at most this.")] = 1e-9,
    test: TestOption = "sequential",
    key: KeyOption = None,
    adapters: Annotated[
        str,
        typer.Option(metavar="WAYS", help='"likely" ways to put triggers, or "all" known scales for every suspect.'),
    ] = "likely",
    classes: ClassesOption = "same",
    isolation: IsolationOption = "persistent",
    device: DeviceOption = "cpu",
    seconds: SecondsOption = 120.0,
    memory: MemoryOption = 4.0,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS|local", help="Judge on this Ray cluster; --jobs are then those of each node."),
    ] = None,
    passphrase_file: PassphraseOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a table that is finished.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line: every row when it is done, then the summary.")
    ] = False,
) -> int:
    """Judge many suspects with many watermarks, in sandboxes, on all cores; the same command resumes."""
    if classes == "any" and test != "fixed":
        raise ValueError("--classes any needs --test fixed: one order must fit all answers")
    beside = {mark.parent for mark in watermarks if mark.suffix == ".wm"}
    for path in map(Path, paths):
        if path.suffix == ".wm" and path.parent in beside:  # as a shell makes of --watermarks DIR/*.wm
            raise ValueError(f"{path} stands among the suspects: give --watermarks once, with the folder of the marks")
    if out.suffix != ".parquet":
        raise ValueError(f"--out must end in .parquet, and it is {out}")
    if isolation != "none" and ray is None:
        from wmengine.suspects.onnx_file import shared_supervisor

        shared_supervisor().start()  # while this process imports the rest
    from wmengine.scanning.listing import watermark_files
    from wmengine.scanning.progress import Report
    from wmengine.scanning.scanner import scan as scan_all

    gc.freeze()  # no collection need look at what was imported
    passphrase, owner = unlock(watermark_files(watermarks), key, passphrase_file)
    with Report(as_json) as report:  # whose bar comes when nothing is asked any more
        table = scan_all(
            paths,
            watermarks,
            out=out,
            jobs=jobs,
            alpha=alpha,
            test=test,
            key=owner,
            adapters=adapters,
            classes=classes,
            isolation=isolation,
            device=device,
            limits=limits(seconds, memory),
            passphrase=passphrase,
            progress=report.add,
            ray=ray,
            force=force,
        )
    report.summarise(table, out)
    return 0
