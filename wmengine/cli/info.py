"""`wmengine info`."""

from wmengine.cli.app import app
from wmengine.cli.options import JsonOption
from wmengine.cli.output import print_json


@app.command()
def info(as_json: JsonOption = False) -> int:
    """Print versions, instruction set, threads, GPU, ONNX providers, and anything wrong with the installation."""
    from wmengine.info import describe, installation

    found = installation()
    if as_json:
        print_json(found)
    else:
        print(describe(found))
    return 0
