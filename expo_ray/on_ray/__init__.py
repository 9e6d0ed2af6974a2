"""The only importer of Ray, which reads its settings once, when it is imported; so they are set here."""

import os

# Ray notices a node that vanished without a word after 7 minutes; with these in every process of the cluster (the manifests
# under cluster/ give them to the nodes), after about half a minute.
KEEPALIVE = {
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "RAY_grpc_keepalive_time_ms": "10000",
    "RAY_grpc_keepalive_timeout_ms": "5000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_health_check_timeout_ms": "5000",
}

# Job logs are files.
PLAIN = {"RAY_COLOR_PREFIX": "0"}

for _name, _value in {**KEEPALIVE, **PLAIN}.items():
    os.environ.setdefault(_name, _value)
