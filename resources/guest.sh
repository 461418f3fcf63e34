#!/bin/bash
# guest.sh KERNEL TOOL OUT: the guest's initramfs: busybox, the virtio drivers, the tests' guest-tool and resources/guest/init.
here=$(dirname "$0")
# shellcheck source=resources/lib.sh
. "$here/lib.sh"
kernel=$1 tool=$2 out=$3

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
stage_busybox "$root"
stage_modules "$root" "$kernel" virtio_pci virtio_blk virtio_net virtio_balloon virtio-rng vmw_vsock_virtio_transport \
    button evdev pvpanic-mmio
strip -o "$root/bin/guest-tool" "$tool"
install -m 755 "$here/guest/init" "$root/init"
install -D -m 755 "$here/guest/power-button" "$root/etc/acpi/PWRF/00000080"
mkdir -p "$(dirname "$out")"
pack "$root" "$out"
echo "initramfs: $out, $(($(stat -c %s "$out") / 1024)) KiB"
