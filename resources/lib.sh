# shellcheck shell=bash
# What the image scripts share: staging programs, modules and busybox into a directory and packing it.
set -euo pipefail
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin

# The whole tree is packed with this time, so that the same inputs give the same bytes.
EPOCH=2024-01-01T00:00:00Z

# fetch DIR PACKAGE...: downloads Debian packages, which apt verifies, and unpacks them below DIR without installing them.
fetch() {
    local dir debs
    dir=$(realpath -m "$1"); debs=$(mktemp -d); shift
    ( cd "$debs" && { apt-get download -q "$@" || { apt-get update -q && apt-get download -q "$@"; }; } ) \
        >"$debs/log" 2>&1 </dev/null || { cat "$debs/log" >&2; echo "cannot fetch $*" >&2; return 1; }
    mkdir -p "$dir"
    for deb in "$debs"/*.deb; do dpkg -x "$deb" "$dir"; done
    rm -rf "$debs"
}

# stage_busybox DIR: the usual directories, busybox and a link for each of its applets.
stage_busybox() {
    local dir=$1 applet
    mkdir -p "$dir"/{bin,dev,etc,lib,lib64,proc,run,sys,tmp,root,mnt,usr}
    ln -sfn ../bin "$dir/usr/bin"; ln -sfn ../bin "$dir/usr/sbin"; ln -sfn bin "$dir/sbin"; ln -sfn ../lib "$dir/usr/lib"
    cp "$(command -v busybox)" "$dir/bin/busybox"
    for applet in $("$dir/bin/busybox" --list); do [ "$applet" = busybox ] || ln -sfn busybox "$dir/bin/$applet"; done
}

# stage_modules DIR KERNEL MODULE...: kernel modules with what they depend on, and modprobe's index of all of the kernel's, so
# that archives can be laid one over another. KERNEL is what kernel.sh made.
stage_modules() {
    local dir=$1 kernel version module path
    kernel=$(realpath "$2")
    shift 2
    version=$(basename "$kernel"/lib/modules/*)
    local from=$kernel/lib/modules/$version to=$dir/lib/modules/$version
    mkdir -p "$to"
    cp "$from"/modules.{dep,alias,builtin} "$to"
    for module in "$@"; do
        modprobe -d "$kernel" -S "$version" --show-depends "$module" || echo "missing $module"
    done | sort -u | while read -r verb path _; do
        case $verb in
            insmod) path=${path#"$kernel"/}; install -D -m 644 "$kernel/$path" "$dir/$path" ;;
            builtin) ;;
            *) echo "module $path is not in kernel $version" >&2; return 1 ;;
        esac
    done
}

# stage_programs DIR ROOT PROGRAM...: programs with their shared libraries, found below ROOT first ("" for this machine's own).
stage_programs() {
    local dir=$1 root=$2 program library
    shift 2
    for program in "$@"; do
        install -D -m 755 "$root$program" "$dir/bin/$(basename "$program")"
        LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu ldd "$root$program" |
            awk '/not found/ { print "missing"; exit } $2 == "=>" { print $3 } $1 ~ /^\// { print $1 }'
    done | sort -u | while read -r library; do
        case $library in
            missing) echo "a library that $* need is not on this machine" >&2; return 1 ;;
            */ld-linux-x86-64.so.2) install -D -m 755 "$library" "$dir/lib64/ld-linux-x86-64.so.2" ;;
            *) install -D -m 644 "$library" "$dir/lib/$(basename "$library")" ;;
        esac
    done
}

# pack DIR OUT: an uncompressed cpio archive (newc), the same bytes for the same tree.
pack() {
    local dir=$1 out=$2
    find "$dir" -exec touch -h -d "$EPOCH" {} +
    ( cd "$dir" && find . | sort | cpio -o -H newc --reproducible -R 0:0 --quiet ) >"$out.tmp"
    mv "$out.tmp" "$out"
}
