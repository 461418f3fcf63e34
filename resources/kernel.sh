#!/bin/bash
# kernel.sh OUT: fetches Debian's stock cloud kernel and leaves it in OUT: vmlinuz (as shipped), vmlinux (its payload, for
# the ELF and PVH boot paths), lib/modules, version. Nothing is patched or rebuilt.
# shellcheck source=resources/lib.sh
. "$(dirname "$0")/lib.sh"
out=$1

package=$(apt-cache depends linux-image-cloud-amd64 | awk '$1 == "Depends:" { print $2; exit }')
if [ -z "$package" ]; then
    apt-get update -q >/dev/null </dev/null
    package=$(apt-cache depends linux-image-cloud-amd64 | awk '$1 == "Depends:" { print $2; exit }')
fi
[ -n "$package" ] || { echo "kernel: apt knows no linux-image-cloud-amd64" >&2; exit 1; }

echo "kernel: fetching $package"
rm -rf "$out" "$out.tmp"
fetch "$out.tmp" "$package"
version=${package#linux-image-}
mv "$out.tmp/boot/vmlinuz-$version" "$out.tmp/vmlinuz"
echo "$version" >"$out.tmp/version"
rm -rf "$out.tmp"/{boot,usr}
depmod -b "$out.tmp" "$version"

# The payload's place is in the setup header (Linux x86 boot protocol 2.08: payload_offset, payload_length); it is an LZ4
# stream followed by its unpacked size.
le32() { od -An -tu4 -j "$1" -N 4 "$out.tmp/vmlinuz" | tr -d ' '; }
sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$out.tmp/vmlinuz" | tr -d ' ')
start=$(((sectors + 1) * 512 + $(le32 $((0x248)))))
length=$(le32 $((0x24c)))
head -c $((start + length - 4)) "$out.tmp/vmlinuz" | tail -c +$((start + 1)) | lz4 -dcq >"$out.tmp/vmlinux"
[ "$(head -c 4 "$out.tmp/vmlinux" | tail -c 3)" = ELF ] || { echo "kernel: payload of $version is not an ELF file" >&2; exit 1; }
mv "$out.tmp" "$out"
touch "$out/version"
echo "kernel: $version in $out"
