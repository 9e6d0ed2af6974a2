"""The only importer of Ray and vLLM. Both read their settings once, on import, so these are set here.

The keepalive settings of the manifests under cluster/ are not among them: they must be the same in every process of a cluster.
Nodes cut a driver off that pings them more often than they expect, again and again, each time after half a minute.
"""

import os

from expo_ray.home import prepare_home

prepare_home()
os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # job logs are files
# Its warnings are about settings that are chosen in this package, and that a user cannot change.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
