#!/usr/bin/env bash
# Serve on this host, and start again after a failure. Arguments go to the server.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
wait_s=1
server=

# Once this script is told to stop, the server is: it finishes its requests, and no other is started.
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
    while kill -0 "$server" 2>/dev/null; do # a signal interrupts `wait`
        wait "$server"
        status=$?
    done
    ((status == 0)) && exit 0
    $stopping && exit "$status"
    ((SECONDS - began > 300)) && wait_s=1
    echo "the server ended with status $status: next start in $wait_s s" >&2
    sleep "$wait_s"
    wait_s=$((wait_s < 60 ? wait_s * 2 : 60))
done
