//! What a VM does all its life goes on inside.

use super::{Place, sys};
use kvm_ioctls::Kvm;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

pub fn threads_run(place: &Place) {
    place.enter();
    let threads: Vec<_> =
        (0..4).map(|index| thread::Builder::new().name(format!("vcpu{index}")).spawn(move || index).unwrap()).collect();
    let sum: u32 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    assert_eq!(sum, 6);
}

pub fn a_ring_reads_a_file(place: &Place) {
    place.enter();
    let file = File::open(place.path("storage", "file")).unwrap();
    assert_eq!(sys::read_with_ring(&file).unwrap(), b"what was there");
}

/// As a receiver does: it listens, accepts and reads, and takes descriptors from a process beside it.
pub fn a_stream_goes_over_tcp_with_descriptors_beside_it(place: &Place) {
    use rustix::net::{
        AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    };
    use std::io::{IoSlice, IoSliceMut};
    use std::os::fd::AsFd;
    place.enter();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let source = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        assert_eq!(stream.write_vectored(&[IoSlice::new(b"a "), IoSlice::new(b"page")]).unwrap(), 6);
    });
    let mut text = String::new();
    listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
    source.join().unwrap();
    assert_eq!(text, "a page");

    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let fds = [near.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&near, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&far, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    assert_eq!(control.drain().count(), 1);
}

pub fn a_vcpu_is_made(place: &Place) {
    place.enter();
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.get_regs().unwrap();
}

/// Printed and not asserted but for its effect: a VM is to be at its guest's first instruction within 5 ms.
pub fn entering_is_quick(place: &Place) {
    let started = Instant::now();
    let report = place.enter();
    println!("entering the sandbox took {} us: {report:?}", started.elapsed().as_micros());
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
}
