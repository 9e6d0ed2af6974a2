"""Whether a run computes on GPUs or CPUs: decided once, stored with the run, and kept by later submissions.

What happens to be up when a job starts decides nothing, as responses from other devices are other responses: a job that is submitted
again while its GPU nodes are late would ask everything anew on CPUs.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from expo_ray.config.fields import Device
from expo_ray.errors import NotFound
from expo_ray.evaluation.paths import devices_key
from expo_ray.storage import Store

log = logging.getLogger("expo_ray")

SettledDevice = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Devices:
    """Where the engines and the reward models of a run compute."""

    engines: SettledDevice
    rewards: SettledDevice


def settle_devices(
    asked: Device, usual: Devices, store: Store | None = None, *, keep: bool = True
) -> Devices:
    """Decide where a run computes, and store it. What the job file asks for counts first, then what is stored.

    Args:
        asked: `device` of the job's engines.
        usual: what the installed packages and the cluster suggest.
        store: the job's output; None where there is none.
        keep: False to write nothing.

    Raises:
        StorageError: if the output cannot be read or written.
    """
    stored = _read_devices(store) if store else None
    devices = stored or usual
    if asked != "auto":
        devices = Devices(asked, devices.rewards)
    elif stored and stored != usual:
        log.info(
            "engines compute on %s and reward models on %s, as in earlier runs into this output",
            stored.engines, stored.rewards,
        )  # fmt: skip
    if store and keep and devices != stored:
        store.put(devices_key(), (json.dumps(asdict(devices)) + "\n").encode())
    return devices


def _read_devices(store: Store) -> Devices | None:
    """Read what earlier runs were decided to compute on; None if nothing is stored, or nothing that this version knows."""
    try:
        data = json.loads(store.read(devices_key()))
    except (NotFound, ValueError, RecursionError):
        return None
    known = isinstance(data, dict) and all(
        data.get(name) in get_args(SettledDevice) for name in ("engines", "rewards")
    )
    return Devices(data["engines"], data["rewards"]) if known else None
