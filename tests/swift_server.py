"""One of Swift's servers, by a configuration that is not in /etc: swift_server.py SWIFT_CONF SERVER SERVER_CONF."""

import sys
from typing import Any

from swift.common import utils

utils.SWIFT_CONF_FILE = sys.argv[1]  # before what reads it

from swift.common.wsgi import run_wsgi  # noqa: E402

more: dict[str, Any] = {} if sys.argv[2] == "proxy-server" else {"allow_modify_pipeline": False}
if sys.argv[2] == "object-server":
    from swift.obj.server import global_conf_callback

    more["global_conf_callback"] = global_conf_callback
sys.exit(run_wsgi(sys.argv[3], sys.argv[2], **more))
