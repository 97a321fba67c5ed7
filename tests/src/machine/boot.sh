#!/bin/sh
# Boots a machine and keeps it booted: boot HOST UNIT SYSTEMD-NSPAWN [ARG...]
# In cgroups of its own and in a mount namespace of its own, so that killing it leaves no mount behind.
set -eu
shift 2
for cgroup in @CGROUPS@; do echo $$ >"$cgroup/cgroup.procs"; done
exec unshare --mount --propagation private sh -euc '
    cd "$0"
    mount -t tmpfs -o mode=755 machine files
    mkdir files/upper files/work files/root
    mount -t overlay machine -o "lowerdir=@TREE@,upperdir=$0/files/upper,workdir=$0/files/work" files/root
    cp -R seed/. files/root/
    export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_NSPAWN_LOCK=0 SYSTEMD_NSPAWN_API_VFS_WRITABLE=network
    while :; do
        ended=0
        "$@" || ended=$?
        # So it ends when the machine inside reboots.
        if [ $ended != 133 ]; then exit $ended; fi
    done' "@DIRECTORY@" "$@"
