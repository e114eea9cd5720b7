"""The operator token that the gateway generates, in a file of the state folder that only its own user can read."""

import logging
import secrets
import stat
from pathlib import Path

from api_gateway.system.state_folder import create_once, own_folder

logger = logging.getLogger(__name__)

FILE = "operator-token"
MIN_LENGTH = 16  # characters


def token_file(state_dir: Path) -> Path:
    """Return the path of the token file."""
    return own_folder(state_dir) / FILE


def operator_token(state_dir: Path) -> str | None:
    """Return the token, generated if there is none yet; None if it is unusable or cannot be written.

    Several processes may call this at once: the file is created atomically, and all return the same token.
    """
    path = token_file(state_dir)
    try:
        token = create_once(path, secrets.token_urlsafe(32))
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, ValueError) as error:
        logger.warning("%s: no operator token generated: %s", path, error)
        return None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s: other users can access the operator token: permissions are %04o, must be 0600", path, mode)
    if len(token) < MIN_LENGTH:
        logger.warning("%s: operator token ignored: it has fewer than %d characters", path, MIN_LENGTH)
        return None
    return token
