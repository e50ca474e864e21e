#!/bin/sh
# Exits with 0 when what this container runs is well, with 1 otherwise; prints why.
#   serve   the server answers, and has a worker
#   api     it answers, and its database answers it; its workers are elsewhere, and have health checks of their own
#   worker  it has told the database of late that it lives
exec python3 -I -S -c '
import http.client
import os
import sys
import time

LONGEST_SILENCE_SECONDS = 10.0


def command():
    """What the entrypoint, in the first process, was told to run."""
    with open("/proc/1/cmdline", encoding="utf-8", errors="replace") as file:
        words = file.read().split("\0")
    after = [following for word, following in zip(words, words[1:]) if word.endswith("/entrypoint.sh")]
    return after[0] if after else ""


def check_beat(path):
    try:
        silence = time.time() - os.stat(path).st_mtime
    except OSError as error:
        sys.exit(f"the worker has not yet begun: {error}")
    print(f"the last beat was {silence:.1f} s ago")
    sys.exit(silence > LONGEST_SILENCE_SECONDS)


def check_answer(path):
    host = os.environ.get("SDFSERVER_HOST", "127.0.0.1")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(host, int(os.environ.get("SDFSERVER_PORT", "8000")), timeout=4)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(1000).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"{host}:{connection.port}: {error}")
    print(body if path != "/metrics" or answer.status != 200 else "the API and its database answer")
    sys.exit(answer.status != 200)


what = sys.argv[1] if len(sys.argv) > 1 else command()
if what == "worker":
    check_beat(os.environ.get("SDFSERVER_BEAT_FILE", "/tmp/sdfserver-beat"))
else:
    # For its figures, the API asks the database.
    check_answer("/metrics" if what == "api" else "/health/ready")
' "$@"
