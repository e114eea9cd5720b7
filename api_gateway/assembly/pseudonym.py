"""The pseudonym of a deployment in `Via`, by which a gateway recognises requests that return to it."""

import asyncio
import logging
import re
import secrets

from api_gateway.assembly.stores import shared_store
from api_gateway.config import GatewayConfig
from api_gateway.http1.via import DEFAULT_PSEUDONYM
from api_gateway.settings.setting_types import PSEUDONYM
from api_gateway.system.state_folder import create_once, own_folder

logger = logging.getLogger(__name__)

PSEUDONYM_FILE = "via"


async def pseudonym_of(config: GatewayConfig) -> str:
    """Return the pseudonym of the deployment: random, the same after a restart and on all machines with one store.

    It is kept in `state_dir`. In a shared store the first gateway sets it for all; a machine that starts while the
    store is unavailable uses its own. If nothing can be written, it is that of this process only.
    """
    own = await asyncio.to_thread(_kept, config)
    if not config.store.is_shared:
        return own
    agreed = await shared_store().agreed_value(config, f"{config.store.prefix}:via", own)
    return _checked(agreed or own) or own


def _kept(config: GatewayConfig) -> str:
    made = f"{DEFAULT_PSEUDONYM}-{secrets.token_hex(6)}"
    try:
        return _checked(create_once(own_folder(config.state_dir) / PSEUDONYM_FILE, made)) or made
    except (OSError, ValueError) as error:
        logger.debug("the pseudonym is not kept: %s", error)
        return made


def _checked(text: str) -> str | None:
    return text if re.fullmatch(PSEUDONYM, text) else None
