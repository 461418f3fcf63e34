#!/bin/bash
# Installs, by package name, what the build, the tests and the demo need and this machine does not have.
# Does nothing, quickly, when everything is there.
set -euo pipefail

# command (or file) that shows that it is there : Debian package
needs="
cc:gcc
/usr/include/stdio.h:libc6-dev
make:make
strip:binutils
qemu-system-x86_64:qemu-system-x86
busybox:busybox-static
cpio:cpio
depmod:kmod
ip:iproute2
fio:fio
mke2fs:e2fsprogs
lz4:lz4
setpriv:util-linux
ldd:libc-bin
/etc/ssl/certs/ca-certificates.crt:ca-certificates
"

PATH=$PATH:/usr/sbin:/sbin
missing=()
for need in $needs; do
    what=${need%%:*} package=${need#*:}
    [ -e "$what" ] || command -v "$what" >/dev/null || missing+=("$package")
done
# busybox without -static would not run in an initramfs.
! command -v busybox >/dev/null || ! ldd "$(command -v busybox)" >/dev/null 2>&1 || missing+=(busybox-static)

command -v cargo >/dev/null || { echo "setup: no Rust toolchain (cargo) in PATH: install one first" >&2; exit 1; }
[ ${#missing[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] || { echo "setup: not root; as root: apt-get install ${missing[*]}" >&2; exit 1; }

echo "setup: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt-get update -q && apt-get install -y -q --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null || {
    cat "$log" >&2
    echo "setup: apt-get failed, see above" >&2
    exit 1
}
echo "setup: done"
