#!/bin/bash
# tools.sh KERNEL INITRAMFS OUT: a read-only disk (ext4) for the testbed's hosts and their guests: guest/ holds the guest's
# kernel (vmlinuz, vmlinux) and initramfs, bin/ fio and QEMU as the control, lib/ their libraries. A disk and not part of the
# image: what is not read costs no start-up time.
here=$(dirname "$0")
# shellcheck source=resources/lib.sh
. "$here/lib.sh"
kernel=$1 initramfs=$2 out=$3

root=$(mktemp -d)
trap 'rm -rf "$root" "$out.tmp"' EXIT
stage_programs "$root" "" "$(command -v fio)" "$(command -v qemu-system-x86_64)"
mkdir -p "$root/guest" "$root/share"
cp "$kernel/vmlinuz" "$kernel/vmlinux" "$root/guest"
cp "$initramfs" "$root/guest/initramfs.cpio"
for file in bios-microvm.bin bios-256k.bin qboot.rom linuxboot_dma.bin pvh.bin kvmvapic.bin; do
    find -L /usr/share/qemu /usr/share/seabios -name "$file" -print -quit | while read -r found; do cp -L "$found" "$root/share"; done
done
# Started through the disk's own loader, so that the libraries are found wherever it is mounted.
for program in fio qemu-system-x86_64; do
    mv "$root/bin/$program" "$root/lib/$program.bin"
    cp "$here/tools-wrapper" "$root/bin/$program"
done
find "$root" -exec touch -h -d "$EPOCH" {} +
size_kib=$(du -sk "$root" | cut -f1)
rm -f "$out.tmp"
truncate -s $((size_kib * 110 / 100 + 4096))k "$out.tmp"
mke2fs -q -F -t ext4 -O ^has_journal -m 0 -L tools -E lazy_itable_init=1 -d "$root" "$out.tmp"
mv "$out.tmp" "$out"
echo "tools: $out, $((size_kib / 1024)) MiB"
