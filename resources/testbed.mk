# Set-up, stock kernel, guest initramfs, host image and testbed disks. Everything lands in build/ and is made again only when
# something it is made from has changed. Included by the top Makefile, which says where binaries are (RELEASE, STERNA).

AGENT := $(RELEASE)/host-agent
TOOL  := $(RELEASE)/guest-tool

KERNEL    := build/kernel/version
INITRAMFS := build/guest/initramfs.cpio
IMAGE     := build/image/host.cpio
NFS       := build/testbed/nfs.cpio
TOOLS     := build/testbed/tools.img

.PHONY: setup kernel initramfs image testbed testbed-files

setup: ## install, by package name, what is missing
	@resources/setup.sh

kernel: $(KERNEL) ## the stock kernel, as the distribution ships it
initramfs: $(INITRAMFS) ## the tests' guest
image: $(IMAGE) ## the host image: a stock kernel boots straight into a Sterna host
testbed-files: $(IMAGE) $(NFS) $(TOOLS)

testbed: testbed-files ## a prompt in either of two hosts with shared storage
	@$(RELEASE)/testbed up

# cargo knows best whether a binary is up to date; it leaves the file alone when it is.
$(STERNA) $(AGENT) $(TOOL): build ;

$(KERNEL): resources/kernel.sh | setup
	@resources/kernel.sh build/kernel

$(INITRAMFS): $(KERNEL) $(TOOL) resources/guest.sh resources/lib.sh $(wildcard resources/guest/*)
	@resources/guest.sh build/kernel $(TOOL) $@

$(IMAGE): $(KERNEL) $(STERNA) $(AGENT) $(TOOL) resources/host.sh resources/lib.sh $(wildcard resources/host/*)
	@resources/host.sh build/kernel $(STERNA) $(AGENT) $(TOOL) $@

$(NFS): $(KERNEL) resources/nfs.sh resources/lib.sh resources/host/nfs-server
	@mkdir -p $(@D)
	@resources/nfs.sh build/kernel $@

$(TOOLS): $(KERNEL) $(INITRAMFS) resources/tools.sh resources/lib.sh resources/tools-wrapper
	@mkdir -p $(@D)
	@resources/tools.sh build/kernel $(INITRAMFS) $@
