"""`wmengine keygen`."""

from pathlib import Path
from typing import Annotated

import typer

from wmengine.cli.app import app
from wmengine.cli.options import JsonOption, PassphraseOption, ask_passphrase, read_passphrase
from wmengine.cli.output import print_json


@app.command()
def keygen(
    owner: Annotated[str, typer.Argument(metavar="OWNER", help='Who the key belongs to, such as "ACME Vision".')],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The key file to write; never overwritten.")],
    seal: Annotated[
        bool, typer.Option("--seal", help="Ask for a passphrase on the terminal and seal the file.")
    ] = False,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
) -> int:
    """Make an owner's secret key and print its commitment, which tells keys apart."""
    from wmengine.identity.key import Key

    passphrase = None
    if passphrase_file is not None:
        passphrase = read_passphrase(passphrase_file)
    elif seal:
        passphrase = ask_passphrase(f"Passphrase to seal {out}: ", twice=True)
    key = Key.generate(owner)
    key.save(out, passphrase)
    if as_json:
        print_json(
            {"owner": key.owner, "commitment": key.commitment, "path": str(out), "sealed": passphrase is not None}
        )
        return 0
    print(f"{out}: the key of {key.owner}, {'sealed' if passphrase is not None else 'not sealed'}; keep it secret.")
    print(f"commitment: {key.commitment}")
    print("It tells keys apart and dates no mark: publish the commitment of each watermark, once it is made, for that.")
    return 0
