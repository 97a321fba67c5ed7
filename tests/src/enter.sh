#!/bin/sh
# Runs a program on a host of this lab: enter HOST UNIT PROGRAM [ARG...]
# In the host's network namespace, in the cgroup of UNIT, with the host's own resolv.conf. Needs root.
set -eu
lab=$(cd "$(dirname "$0")" && pwd)
host=$1 unit=$2
shift 2
# The root of the host's cgroup namespace: units of other hosts, often of the same name, are outside of it.
slice="@SLICE@/$(echo "$host" | tr -d -).slice"
if [ -n "@SLICE@" ]; then
    mkdir -p "$slice/$unit"
    echo $$ >"$slice/cgroup.procs"
fi
limit=$(ulimit -H -n)
if [ "$limit" = unlimited ] || [ "$limit" -gt 65536 ]; then limit=65536; fi
ulimit -S -n "$limit"
exec nsenter "--net=/run/netns/@LAB@.$host" unshare --mount --cgroup --propagation private sh -euc '
    if [ -n "@SLICE@" ]; then
        mount --bind "$1" "@CGROUPS@"
        echo $$ >"@CGROUPS@/$2/cgroup.procs"
    fi
    shift 2
    for file in "$0"/*; do
        name=/etc/${file##*/}
        if [ -e "$name" ]; then mount --bind "$file" "$name"; fi
    done
    if [ -e "@DIRECTORY@/tun" ]; then mount --bind "@DIRECTORY@/tun" /dev/net/tun; fi
    mount --bind "@PROGRAMS@" "@DIRECTORY@/bin"
    exec "$@"' "$lab/$host/etc" "$slice" "$unit" "$@"
