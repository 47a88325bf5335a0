"""Build the environment of the documentation site (`make docs`): .venv-docs, with neither torch nor vLLM.

python3 tools/make_docs_env.py    # by the user's uv, else by venv and pip; quick if nothing changed
"""

from __future__ import annotations

import shutil
import sys

from make_env import ROOT, BuildError
from side_env import bring_up_to_date

if __name__ == "__main__":
    try:
        bring_up_to_date(
            ROOT / ".venv-docs", ROOT / "docs/requirements.txt", "the documentation site", shutil.which("uv")
        )
    except BuildError as error:
        sys.exit(f"make_docs_env: error: {error}")
