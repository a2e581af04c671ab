#!/usr/bin/env bash
# Runs the server on this host and restarts it after a failure. Arguments are passed to the server.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
wait_s=1
server=

# SIGTERM and SIGINT are forwarded to the server, which finishes its requests and is not restarted.
stopping=false
stop() {
    stopping=true
    [[ -z "$server" ]] || kill -TERM "$server" 2>/dev/null
}
trap stop TERM INT

until $stopping; do
    began=$SECONDS
    "$python" -m fairkv_jax.serve "$@" &
    server=$!
    wait "$server"
    status=$?
    while kill -0 "$server" 2>/dev/null; do # A signal interrupts `wait`.
        wait "$server"
        status=$?
    done
    ((status == 0)) && exit 0
    $stopping && exit "$status"
    ((SECONDS - began > 300)) && wait_s=1
    echo "the server exited with status $status: restarting in $wait_s s" >&2
    sleep "$wait_s"
    wait_s=$((wait_s < 60 ? wait_s * 2 : 60))
done
