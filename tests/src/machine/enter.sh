#!/bin/sh
# Runs a program on a booted machine: enter HOST UNIT PROGRAM [ARG...]
# As a transient unit of its systemd, or in no unit at all when UNIT is the harness's own.
set -eu
unit=$2
shift 2
leader=$(head -n 1 "@CGROUP@/payload/init.scope/cgroup.procs")
if [ "$unit" != harness.service ]; then
    set -- systemd-run --quiet --wait --pipe --collect --service-type=exec --unit="$unit" -- "$@"
fi
exec nsenter --target "$leader" --all -- "$@"
