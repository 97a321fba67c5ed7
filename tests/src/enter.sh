#!/bin/sh
# Runs a program on a host of this lab: enter HOST UNIT PROGRAM [ARG...]
# In the host's network namespace, in the cgroup of UNIT, with the host's own resolv.conf. Needs root.
set -eu
lab=$(cd "$(dirname "$0")" && pwd)
host=$1 unit=$2
shift 2
if [ -n "@SLICE@" ]; then
    cgroup="@SLICE@/$(echo "$host" | tr -d -).slice/$unit"
    mkdir -p "$cgroup"
    echo $$ >"$cgroup/cgroup.procs"
fi
limit=$(ulimit -H -n)
if [ "$limit" = unlimited ] || [ "$limit" -gt 65536 ]; then limit=65536; fi
ulimit -S -n "$limit"
exec nsenter "--net=/run/netns/@LAB@.$host" unshare --mount --propagation private sh -euc '
    for file in "$0"/*; do
        name=/etc/${file##*/}
        if [ -e "$name" ]; then mount --bind "$file" "$name"; fi
    done
    if [ -e "@DIRECTORY@/tun" ]; then mount --bind "@DIRECTORY@/tun" /dev/net/tun; fi
    mount --bind "@PROGRAMS@" "@DIRECTORY@/bin"
    exec "$@"' "$lab/$host/etc" "$@"
