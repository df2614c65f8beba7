"""`wmengine emmark`."""

from pathlib import Path
from typing import Annotated

import typer

from wmengine.cli.app import app
from wmengine.cli.options import JsonOption, PassphraseOption, unlock
from wmengine.cli.output import print_json


@app.command()
def emmark(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Your own quantised .onnx file (QDQ), which stays as it is.")
    ],
    key: Annotated[Path, typer.Option("--key", metavar="KEY", help="The owner's key file.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The model's name, part of its mark.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The marked file to write; never overwritten.")],
    watermark: Annotated[
        Path, typer.Option("--watermark-out", metavar="FILE", help="The .wm file to write; never overwritten.")
    ],
    message: Annotated[str | None, typer.Option(metavar="WHOM", help="Whom this copy is for.")] = None,
    bits: Annotated[int, typer.Option(min=1, metavar="T", help="How many bits it holds.")] = 256,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
) -> int:
    """Mark a quantised ONNX file without training: some of its integers are moved one step up or down."""
    from wmengine.marking.emmark import emmark as mark_file

    _, owner = unlock([], key, passphrase_file)
    assert owner is not None
    mark = mark_file(model, owner, name=name, out=out, bits=bits, message=message)
    try:
        mark.save(watermark)
    except BaseException:
        out.unlink()  # a marked copy whose mark nobody holds would go astray
        raise
    if as_json:
        print_json({"out": str(out), "watermark": str(watermark), "bits": mark.total, "commitment": mark.commitment})
        return 0
    print(f"{out}: marked with {mark.total} bits; {watermark}: its watermark, keep it and {model} secret.")
    print(f"commitment: {mark.commitment}")
    return 0
