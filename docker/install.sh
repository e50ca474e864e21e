#!/usr/bin/env bash
# Sets sdfserver up in a fresh Debian, as root: install.sh [system|dependencies|package]..., all three if none is named.
# The image runs them one by one, so that a new version of sdfserver does not fetch torch again.
#
# From the environment:
#   DEVICE       cpu or cuda: which build of torch (cuda)
#   TORCH_INDEX  the package index that has it; "pip" stands for wherever pip is set up to look
#   EXTRAS       extras of the package to install ("las e57")
#   PIP_...      what pip itself understands, such as PIP_INDEX_URL
set -euo pipefail
cd "$(dirname "$0")/.."

prefix=/opt/sdfserver
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_PROGRESS_BAR=off PIP_NO_INPUT=1

# Debian's packages, the user, its folder, and an empty environment.
system() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends python3 python3-venv tini
    apt-get clean
    rm -rf /var/lib/apt/lists/*
    # A fixed number, for those who bind a folder of theirs to /data.
    id sdfserver >/dev/null 2>&1 ||
        useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin sdfserver
    install -d -o sdfserver -g sdfserver -m 0700 /data
    python3 -m venv "$prefix"
}

# The requirements of pyproject.toml: torch alone, or the others and those of the extras named.
requirements() {
    "$prefix/bin/python" - "$@" <<'PYTHON'
import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
what, *extras = sys.argv[1:]
wanted = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
print(*(line for line in wanted if (re.match(r"[\w.-]+", line)[0] == "torch") == (what == "torch")), sep="\n")
PYTHON
}

# torch first: the other packages would bring the default build.
dependencies() {
    local index
    case ${DEVICE:-cuda} in
        cpu) index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu} ;;
        cuda) index=${TORCH_INDEX:-pip} ;;
        *)
            echo "install.sh: DEVICE is '$DEVICE'; it can be cpu or cuda" >&2
            exit 2
            ;;
    esac
    local from=()
    [ "$index" = pip ] || from=(--index-url "$index")
    local extras lines torch others
    read -r -a extras <<<"${EXTRAS-las e57}"
    lines=$(requirements torch)
    mapfile -t torch <<<"$lines"
    lines=$(requirements others "${extras[@]}")
    mapfile -t others <<<"$lines"
    "$prefix/bin/pip" install "${from[@]}" "${torch[@]}"
    "$prefix/bin/pip" install --only-binary :all: "${others[@]}"
}

package() {
    "$prefix/bin/pip" install --no-deps .
    "$prefix/bin/pip" check
    "$prefix/bin/sdfserver" --version
}

[ $# -gt 0 ] || set -- system dependencies package
for step in "$@"; do
    case $step in
        system | dependencies | package) "$step" ;;
        *)
            echo "install.sh: there is no step '$step'; there are system, dependencies and package" >&2
            exit 2
            ;;
    esac
done
