"""The only importer of Ray and vLLM, which read these settings once, when they are imported; so they are set here.

Not among them: the keepalive settings of the manifests under cluster/. They must be the same in every process of a cluster; a
driver that pings nodes which do not expect it is cut off by them after half a minute, again and again.
"""

import os

from expo_ray.home import prepare_home

prepare_home()
os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # job logs are files
# Its warnings are about settings that are chosen here, and that a user cannot mend.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
