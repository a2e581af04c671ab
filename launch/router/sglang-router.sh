#!/usr/bin/env bash
# sglang-router in front of replicas, whose addresses are the arguments. Install it in an environment
# of its own: pip install 'sglang-router>=0.3.2'
#
#   launch/router/sglang-router.sh http://10.0.0.1:8000 http://10.0.0.2:8000
set -euo pipefail

# POLICY=cache_aware suits replicas with --enable-prefix-caching: it sends prompts that begin alike to
# the same replica, and to others only when that one has 8 requests more.
#
# A replica is left out after one failed check of /health, and comes back after two good ones. Until
# the check, retries go to the same replica again, as it has the fewest requests: the circuit breaker
# leaves it out after two failures, for five seconds.
exec python -m sglang_router.launch_router \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8080}" \
    --prometheus-host "${HOST:-127.0.0.1}" --prometheus-port "${PROMETHEUS_PORT:-29000}" \
    --policy "${POLICY:-power_of_two}" --balance-abs-threshold 8 \
    --health-check-endpoint /health --health-check-interval-secs 1 \
    --health-failure-threshold 1 --health-success-threshold 2 \
    --cb-failure-threshold 2 --cb-success-threshold 1 --cb-timeout-duration-secs 5 \
    --worker-startup-check-interval 2 --request-timeout-secs 3600 \
    --worker-urls "$@"
