//! Connections over loopback and in a scratch directory: what is waited for has an end, and says what it was.

use super::*;
use std::error::Error;

const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(20);

fn cause(error: &StreamError) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// A listener of each kind, and the directory that must stay for one of them.
fn listeners() -> (Vec<Listener>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let unix = Address::Unix(dir.path().join("s"));
    let addresses = ["tcp:127.0.0.1:0".parse().unwrap(), unix];
    (addresses.iter().map(|address| Listener::bind(address).unwrap()).collect(), dir)
}

#[test]
fn bytes_go_both_ways() {
    let (listeners, _dir) = listeners();
    for listener in listeners {
        let mut here = connect(listener.address(), LONG).unwrap();
        let mut there = listener.accept(Some(LONG)).unwrap();
        let mut bytes = [0; 4];
        here.write_all(b"ping").unwrap();
        there.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ping");
        there.write_all(b"pong").unwrap();
        here.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"pong");
        drop(there);
        let error = here.read_exact(&mut bytes).unwrap_err();
        assert_eq!(error.to_string(), "the peer closed the connection");
    }
}

#[test]
fn a_tcp_connection_is_tuned() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let here = connect(listener.address(), LONG).unwrap();
    let there = listener.accept(Some(LONG)).unwrap();
    let offered = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control").unwrap();
    for socket in [here, there] {
        assert!(sockopt::tcp_nodelay(&socket).unwrap());
        assert!(sockopt::socket_keepalive(&socket).unwrap());
        assert_eq!(sockopt::tcp_user_timeout(&socket).unwrap(), 10_000);
        if offered.split_whitespace().any(|name| name == CONGESTION) {
            assert_eq!(sockopt::tcp_congestion(&socket).unwrap(), CONGESTION);
        }
    }
}

#[test]
fn a_receiver_that_is_not_there_yet_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("late"));
    let error = connect(&address, SHORT).unwrap_err();
    assert!(cause(&error).starts_with("nobody accepted for 100ms: "), "{}", cause(&error));
    thread::scope(|scope| {
        let early = scope.spawn(|| connect(&address, LONG));
        let listener = Listener::bind(&address).unwrap();
        listener.accept(Some(LONG)).unwrap();
        early.join().unwrap().unwrap();
    });
    // A port that was free a moment ago.
    let free = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap().address().clone();
    let error = connect(&free, SHORT).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot connect to {free}"));
    assert!(cause(&error).starts_with("nobody accepted for 100ms: "), "{}", cause(&error));
}

#[test]
fn a_stale_socket_file_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let address = Address::Unix(path.clone());
    let listener = Listener::bind(&address).unwrap();
    assert_eq!(Listener::bind(&address).unwrap_err().to_string(), format!("cannot accept connections on {address}"));
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn silence_has_an_end_that_says_so() {
    let (listeners, _dir) = listeners();
    for listener in listeners {
        let error = listener.accept(Some(SHORT)).unwrap_err();
        assert_eq!(cause(&error), "nobody connected for 100ms");
        let mut here = connect(listener.address(), LONG).unwrap();
        let _there = listener.accept(Some(LONG)).unwrap();
        here.set_timeout(SHORT).unwrap();
        assert_eq!(here.read(&mut [0]).unwrap_err().to_string(), "the peer sent nothing for 100ms");
        let error = here.write_all(&vec![0; 64 << 20]).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (io::ErrorKind::TimedOut, "the peer took nothing for 100ms")
        );
    }
}
