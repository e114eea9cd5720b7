"""Raises the limit of open files of this process."""

import logging
import sys

logger = logging.getLogger(__name__)

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

MAX_DESCRIPTORS = 1_048_576  # the kernel's default maximum for one process (fs.nr_open)


def raise_descriptor_limit(maximum: int = MAX_DESCRIPTORS) -> int:
    """Raise the soft limit of open files to the hard limit, or to `most` if that is lower; return the resulting limit.

    Child processes inherit it. `sys.maxsize` stands for no limit.
    """
    if resource is None:
        return sys.maxsize
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = maximum if hard == resource.RLIM_INFINITY else min(hard, maximum)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return sys.maxsize if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        logger.debug("the limit of open files stays at %d: %s", soft, error)
        return soft
    logger.debug("the limit of open files is raised from %d to %d", soft, wanted)
    return wanted
