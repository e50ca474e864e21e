#!/usr/bin/env bash
# Sets sdfserver up in a fresh Debian, as root: install.sh [tools|dependencies|package|system]..., all if none is named.
# The image's build stage runs the first three, one by one, so that a new version of sdfserver does not fetch torch
# again; its last stage takes /opt/sdfserver from there and runs the fourth, and so has neither pip nor sources.
#
# From the environment:
#   DEVICE       cpu or cuda: which build of torch (cuda)
#   TORCH_INDEX  the package index that has it; "pip" stands for wherever pip is set up to look
#   PIP_...      what pip itself understands, such as PIP_INDEX_URL
set -euo pipefail
cd "$(dirname "$0")/.."

# The environment that is served from has no pip of its own: another one, which is only built with, fills it.
tools=/opt/sdfserver-tools prefix=/opt/sdfserver
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_PROGRESS_BAR=off PIP_NO_INPUT=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
pip() { "$tools/bin/pip" "$@"; }
into() { pip --python "$prefix/bin/python" "$@"; }

debian_packages() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    apt-get install -q -y --no-install-recommends "$@"
    apt-get clean
    rm -rf /var/lib/apt/lists/*
}

# What is built with, and an empty environment.
tools() {
    debian_packages python3 python3-venv
    python3 -m venv "$tools"
    pip install --require-hashes --only-binary :all: -r docker/build.lock
    python3 -m venv --without-pip "$prefix"
}

# The lock file's entries, without those that come with torch's build, or those alone: torch and what only it brings.
locked() {
    awk -v which="$1" '
        /^[a-z0-9]/ { mine = /^(torch|triton|cuda-[a-z-]*|nvidia-[a-z0-9-]*)==/ ? "torch" : "others" }
        mine == which' docker/requirements.lock
}

# Every package in its locked version, and only if its hash is the locked one. Other builds of torch than the default
# one, such as those for the processor alone or an older CUDA, have files of their own, whose hashes nobody has listed:
# of these the version is held, and theirs are the CUDA libraries that come with them.
dependencies() {
    local index
    case ${DEVICE:-cuda} in
        cpu) index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu} ;;
        cuda) index=${TORCH_INDEX:-} ;;
        *)
            echo "install.sh: DEVICE is '$DEVICE'; it can be cpu or cuda" >&2
            exit 2
            ;;
    esac
    locked others >"$scratch/others"
    locked torch >"$scratch/torch"
    into install --no-deps --require-hashes --only-binary :all: -r "$scratch/others"
    if [ -z "$index" ]; then
        into install --no-deps --require-hashes --only-binary :all: -r "$scratch/torch"
    else
        local version from=()
        version=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$scratch/torch")
        [ "$index" = pip ] || from=(--index-url "$index")
        into install --only-binary :all: "${from[@]}" "torch==$version"
    fi
}

package() {
    pip wheel --no-deps --no-build-isolation --wheel-dir "$scratch" .
    into install --no-deps --no-index "$scratch"/*.whl
    into check
    # What torch has for those who compile against it, or change it.
    local torch
    torch=$(echo "$prefix"/lib/python3*/site-packages/torch)
    rm -rf "$torch/include" "$torch/share/cmake" "$torch/test" "$torch"/lib/*.a
    [ ! -d "$torch/bin" ] || find "$torch/bin" -mindepth 1 ! -name torch_shm_manager -delete
    "$prefix/bin/sdfserver" --version
}

# What it runs on: Debian's packages, the user, its folder.
system() {
    debian_packages ca-certificates python3 tini
    # A fixed number, for those who bind a folder of theirs to /data.
    id sdfserver >/dev/null 2>&1 ||
        useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin sdfserver
    install -d -o sdfserver -g sdfserver -m 0700 /data
}

[ $# -gt 0 ] || set -- tools dependencies package system
for step in "$@"; do
    case $step in
        tools | dependencies | package | system) "$step" ;;
        *)
            echo "install.sh: there is no step '$step'; there are tools, dependencies, package and system" >&2
            exit 2
            ;;
    esac
done
