"""Files that hold one JSON object: the same words for what is wrong with them at the start and from doctor."""

from __future__ import annotations

import json
from typing import Any


def object_in(content: bytes, name: str) -> dict[str, Any] | str:
    """The object, or what is wrong with the file.

    Args:
        content: of the file, in UTF-8.
        name: of the file.
    """
    try:
        found = json.loads(content.decode())
    except RecursionError:
        return f"{name} cannot be read: it is nested too deeply"
    except ValueError as error:
        return f"{name} cannot be read: {error}"
    return found if isinstance(found, dict) else f"{name} is not a JSON object"
