"""Build hook: writes the commit into the package, for `api-gateway version`. The source folder stays as it is."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILE = "api_gateway/commit.txt"  # see `api_gateway/system/build.py`
VARIABLE = "API_GATEWAY_COMMIT"  # set by the Makefile, which builds from a copy without the folder of Git


class CommitHook(BuildHookInterface[Any]):
    """Adds `FILE` to source distributions and wheels, if the commit is known."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the file; not to an editable installation, whose commit changes."""
        commit = unpacked(self.root) or os.environ.get(VARIABLE) or described(self.root)
        if version == "editable" or not commit:
            return
        self._folder = tempfile.mkdtemp()
        file = Path(self._folder, Path(FILE).name)
        file.write_text(f"{commit}\n", "ascii")
        build_data["force_include"][str(file)] = FILE

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - the hook's signature
        """Remove the temporary file."""
        shutil.rmtree(getattr(self, "_folder", ""), ignore_errors=True)


def unpacked(root: str) -> str | None:
    """Return the commit that an unpacked source distribution names. Its file is excluded, so that it is added last."""
    file = Path(root, FILE)
    return file.read_text("ascii").strip() if file.is_file() else None


def described(root: str) -> str | None:
    """Return the commit that a clone has checked out, `-modified` if tracked files differ; None if it is no clone."""
    if not Path(root, ".git").exists():
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=-modified"]
    try:
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)  # noqa: S603 - Git of the PATH
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip() or None
