#!/bin/sh
# Exits with 0 when the server answers and has a worker, with 1 otherwise; prints why.
exec python3 -I -S -c '
import http.client
import os
import sys

host = os.environ.get("SDFSERVER_HOST", "127.0.0.1")
host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
connection = http.client.HTTPConnection(host, int(os.environ.get("SDFSERVER_PORT", "8000")), timeout=4)
try:
    connection.request("GET", "/health/ready")
    answer = connection.getresponse()
    print(answer.read(1000).decode(errors="replace").strip())
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"{host}:{connection.port}: {error}")
sys.exit(answer.status != 200)
'
