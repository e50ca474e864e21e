#!/bin/sh
# Runs sdfserver with the given arguments, in this very process. Before the first start that others could reach, it
# creates an API key and prints it, once, however many start at the same time: with no key the server would refuse to
# start.
set -eu

needs_key() {
    case ${1-} in serve | api) ;; *) return 1 ;; esac
    case " $* " in *" --help "*) return 1 ;; esac
    case ${SDFSERVER_ALLOW_PUBLIC_WITHOUT_KEYS-} in 1 | [Tt] | [Tt][Rr][Uu][Ee] | [Yy] | [Yy][Ee][Ss] | [Oo][Nn]) return 1 ;; esac
    case ${SDFSERVER_HOST-127.0.0.1} in localhost | 127.* | ::1) return 1 ;; esac
}

if needs_key "$@"; then
    sdfserver keys create first --if-none >&2
fi
# Nobody can ask a worker how it is: it touches a file, at which healthcheck.sh looks.
if [ "${1-}" = worker ]; then
    export SDFSERVER_BEAT_FILE="${SDFSERVER_BEAT_FILE-/tmp/sdfserver-beat}"
fi
exec sdfserver "$@"
