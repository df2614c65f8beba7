"""The columns of a scan's table, told from the fields of a verdict."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from wmengine.facts import Fact
from wmengine.judging.verdict import Verdict

EMPTY, OTHERS = "empty files left out", "other files left out"  # in the table's metadata
_AS_JSON = "settings"  # a column of JSON text, as what it holds differs from suspect to suspect


def schema_of(left_out: Mapping[str, str]) -> Any:
    """The Arrow schema; its metadata say how many files were left out. `notes` are the sentences of `facts`."""
    import pyarrow

    columns = [(name, _arrow(kind)) for name, kind in get_type_hints(Verdict).items()]
    return pyarrow.schema([*columns, ("notes", pyarrow.list_(pyarrow.string()))], left_out)


def batch_of_rows(rows: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> Any:
    """Rows as `Verdict.to_dict` gives them → pyarrow.RecordBatch. Raises an ArrowException for what are none."""
    import pyarrow

    found = []
    for row in rows:
        facts = [{"code": each["code"], "values": json.dumps(each["values"])} for each in row["facts"]]
        found.append({**row, _AS_JSON: json.dumps(row[_AS_JSON]), "facts": facts})
    return pyarrow.RecordBatch.from_pylist(found, schema=schema_of(left_out))


def _arrow(kind: Any) -> Any:
    """The Arrow type of a field's: plain ones, dataclasses as structs, tuples as lists, mappings as JSON text."""
    import pyarrow

    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    if kind is Fact:
        return pyarrow.struct([("code", pyarrow.string()), ("values", pyarrow.string())])
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return pyarrow.struct([(each.name, _arrow(hints[each.name])) for each in fields(kind)])
    if get_origin(kind) is tuple:
        return pyarrow.list_(_arrow(get_args(kind)[0]))
    if get_origin(kind) is not None:
        return pyarrow.string()
    return {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}[kind]
