"""What commands tell a person: standard output stays free for results."""

import sys


def say(message: str) -> None:
    """One line on standard error, whatever is in `message`."""
    line = " ".join(message.split())
    sys.stderr.write(f"sdfserver: {line}\n")
    sys.stderr.flush()
