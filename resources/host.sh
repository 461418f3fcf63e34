#!/bin/bash
# host.sh KERNEL STERNA AGENT TOOL OUT: the host image: an initramfs in which the stock kernel is a Sterna host.
here=$(dirname "$0")
# shellcheck source=resources/lib.sh
. "$here/lib.sh"
kernel=$1 sterna=$2 agent=$3 tool=$4 out=$5
limit_kib=$((40 * 1024))

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
stage_busybox "$root"
# busybox has both, but they do not know enough; see host/profile.
rm "$root"/bin/{ip,tc}
stage_programs "$root" "" "$(command -v ip)" "$(command -v tc)"
stage_modules "$root" "$kernel" kvm-amd kvm-intel tun bridge vhost_net loop \
    virtio_pci virtio_blk virtio_net virtio-rng virtio_scsi nvme ena vmxnet3 button evdev nfsv4 sch_tbf sch_netem
strip -o "$root/bin/sterna" "$sterna"
strip -o "$root/bin/host-agent" "$agent"
strip -o "$root/bin/guest-tool" "$tool"
install -m 755 "$here/host/init" "$root/init"
install -m 644 "$here/host/inittab" "$root/etc/inittab"
install -m 644 "$here/host/profile" "$root/etc/profile"
install -m 755 "$here/host/agent" "$root/etc/agent"
install -D -m 755 "$here/host/power-button" "$root/etc/acpi/PWRF/00000080"
echo "root:x:0:0:root:/root:/bin/sh" >"$root/etc/passwd"
echo "root:x:0:" >"$root/etc/group"
mkdir -p "$(dirname "$out")"
pack "$root" "$out"
size_kib=$(($(stat -c %s "$out") / 1024))
[ $size_kib -lt $limit_kib ] || { echo "image: $out has $size_kib KiB, over the limit of $limit_kib" >&2; exit 1; }
echo "image: $out, $size_kib KiB"
