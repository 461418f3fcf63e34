# Set-up, stock kernel, guest initramfs, host image and testbed disks. Everything lands in build/ and is made again only when
# something it is made from has changed. Included by the top Makefile; STERNA_BIN etc. may be set there.

TARGET_DIR ?= $(or $(CARGO_TARGET_DIR),target)/x86_64-unknown-linux-gnu/release
STERNA_BIN ?= $(TARGET_DIR)/sterna
AGENT_BIN  := $(TARGET_DIR)/host-agent
TOOL_BIN   := $(TARGET_DIR)/guest-tool

KERNEL    := build/kernel/version
INITRAMFS := build/guest/initramfs.cpio
IMAGE     := build/image/host.cpio
NFS       := build/testbed/nfs.cpio
TOOLS     := build/testbed/tools.img

.PHONY: setup kernel initramfs image testbed testbed-files testbed-binaries

setup:
	@resources/setup.sh

kernel: $(KERNEL)
initramfs: $(INITRAMFS)
image: $(IMAGE)
testbed-files: $(IMAGE) $(NFS) $(TOOLS)

# A prompt in either of two hosts; leave with Ctrl-].
testbed: testbed-files
	@$(TARGET_DIR)/testbed up

# cargo knows best whether a binary is up to date; it leaves the file alone when it is.
testbed-binaries: | setup
	@cargo build --release --quiet -p sterna -p sterna-testbed
$(STERNA_BIN) $(AGENT_BIN) $(TOOL_BIN): testbed-binaries ;

$(KERNEL): resources/kernel.sh | setup
	@resources/kernel.sh build/kernel

$(INITRAMFS): $(KERNEL) $(TOOL_BIN) resources/guest.sh resources/lib.sh $(wildcard resources/guest/*)
	@resources/guest.sh build/kernel $(TOOL_BIN) $@

$(IMAGE): $(KERNEL) $(STERNA_BIN) $(AGENT_BIN) $(TOOL_BIN) resources/host.sh resources/lib.sh $(wildcard resources/host/*)
	@resources/host.sh build/kernel $(STERNA_BIN) $(AGENT_BIN) $(TOOL_BIN) $@

$(NFS): $(KERNEL) resources/nfs.sh resources/lib.sh resources/host/nfs-server
	@mkdir -p $(@D)
	@resources/nfs.sh build/kernel $@

$(TOOLS): $(KERNEL) $(INITRAMFS) resources/tools.sh resources/lib.sh resources/tools-wrapper
	@mkdir -p $(@D)
	@resources/tools.sh build/kernel $(INITRAMFS) $@
