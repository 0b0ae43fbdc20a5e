"""What a stamp and a list of files must hold, whoever wrote them.

A CRC-32 shows what chance has changed. It says nothing of a file that was made by hand
or by another program: there what is missing is named.
"""

from typing import Any

from jaxsparse.checkpoint._types import type_of

# Leaves that are in the stamp itself.
_VALUES = {"bool": bool, "int": int, "float": float, "str": str}


def check_content(stamp: dict[str, Any]) -> None:
    """Raises unless a stamp has what `restore` reads of it."""
    leaves = _dictionary(stamp, "leaves")
    if "params" not in leaves:
        raise ValueError("it has no leaves of params")
    for item in leaves:
        for name, record in _dictionary(leaves, item).items():
            _check_record(f"{item} {name}", record)
    if type(stamp.get("opt_state_has_masks")) is not bool:
        raise ValueError("it does not say whether the opt_state has masks")
    _dictionary(stamp, "extra")
    if "checksums" in stamp:
        checksums = _dictionary(stamp, "checksums")
        for item in checksums:
            for name, crc in _dictionary(checksums, item).items():
                if type(crc) is not int:
                    raise ValueError(f"the CRC-32 of {item} {name} is {crc!r}")


def check_list(content: dict[str, Any]) -> None:
    """Raises unless a list of files says of each its size and its CRC-32."""
    for name, entry in _dictionary(content, "files").items():
        known = isinstance(entry, list) and len(entry) == 2 and is_size(entry[0])
        if not known or not (entry[1] is None or is_size(entry[1])):
            raise ValueError(f"of the file {name} it says {entry!r}")
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"the file {name} is not one of the checkpoint")


def _check_record(name: str, record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"of {name} it says {record!r}")
    shape, dtype = record.get("shape"), record.get("dtype")
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise ValueError(f"the shape of {name} is {shape!r}")
    if not isinstance(dtype, str):
        raise ValueError(f"the type of {name} is {dtype!r}")
    if "value" in record:
        if shape or type(record["value"]) is not _VALUES.get(dtype):
            raise ValueError(f"the value of {name} is {record['value']!r}, no {dtype}")
        return
    if "impl" in record:
        if not isinstance(record["impl"], str):
            raise ValueError(f"the generator of {name} is {record['impl']!r}")
        return
    try:
        type_of(dtype)
    except ValueError as error:
        raise ValueError(f"of {name}, {error}") from None
    if not is_size(record.get("packed_axis", 0)):
        axis = record["packed_axis"]
        raise ValueError(f"the axis along which {name} is packed is {axis!r}")


def _dictionary(content: dict[str, Any], key: str) -> dict[str, Any]:
    found = content.get(key)
    if not isinstance(found, dict):
        raise ValueError(f"its {key} is no dictionary")
    return found


def is_size(x: Any) -> bool:
    """Whether JSON gave an integer of at least 0."""
    return type(x) is int and x >= 0
