#!/bin/bash
# nfs.sh KERNEL OUT: what turns a host image into the testbed's NFSv4 server: nfsd and Debian's own tools for it, taken from
# their packages without installing them here. An archive to append to the host image.
here=$(dirname "$0")
# shellcheck source=resources/lib.sh
. "$here/lib.sh"
kernel=$1 out=$2

root=$(mktemp -d) packages=$(mktemp -d)
trap 'rm -rf "$root" "$packages"' EXIT
fetch "$packages" nfs-kernel-server nfs-common netbase libtirpc-common libtirpc3 libevent-core-2.1-7 libsqlite3-0 \
    libwrap0 libnfsidmap1 libkeyutils1 libdevmapper1.02.1 libgssapi-krb5-2 libkrb5-3 libk5crypto3 libkrb5support0 \
    libcom-err2 libmount1 libblkid1 libuuid1 libcap2 libnl-3-200 libwrap0
stage_programs "$root" "$packages" /usr/sbin/{exportfs,rpc.mountd,rpc.nfsd}
stage_modules "$root" "$kernel" nfsd
mkdir -p "$root/etc"
cp "$packages"/etc/{services,protocols,netconfig} "$root/etc"
install -m 755 "$here/host/nfs-server" "$root/etc/role"
pack "$root" "$out"
