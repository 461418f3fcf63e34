//! The host's door: clients of the listening socket until they have said which guest port they want.
//!
//! A client sends `CONNECT <port>\n`; what follows the newline is left in its socket for the guest. It refuses to
//! know connections and packets.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

/// Longest line a client may send: `CONNECT 4294967295\n`.
const LINE_BYTES: usize = 19;

/// What a client has said.
pub enum Said {
    /// Not all yet.
    Waiting,
    /// The guest port it wants.
    Port(u32),
    /// Nothing that makes sense, or it has left.
    Nonsense,
}

/// A client whose line is not complete.
pub struct Client {
    pub stream: UnixStream,
    line: Vec<u8>,
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new() }
    }

    /// Reads on, byte by byte so as to take nothing that is for the guest.
    pub fn read(&mut self) -> Said {
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(1) => match byte {
                    [b'\n'] => return parse(&self.line).map_or(Said::Nonsense, Said::Port),
                    [byte] => self.line.push(byte),
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Said::Waiting,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return Said::Nonsense,
            }
            if self.line.len() >= LINE_BYTES {
                return Said::Nonsense;
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    // `parse` alone takes a sign.
    port.bytes().all(|digit| digit.is_ascii_digit()).then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn only_the_line_is_read() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut client = Client::new(ours);
        theirs.write_all(b"CONNE").unwrap();
        assert!(matches!(client.read(), Said::Waiting));
        theirs.write_all(b"CT 4294967295\nfor the guest").unwrap();
        assert!(matches!(client.read(), Said::Port(u32::MAX)));
        let mut rest = [0; 32];
        assert_eq!(client.stream.read(&mut rest).unwrap(), 13);
    }

    #[test]
    fn nonsense_is_bounded() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "GET / HTTP/1.1\n",
        ] {
            assert_eq!(parse(line.trim_end_matches('\n').as_bytes()), None, "{line}");
        }
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(&[b'x'; 100]).unwrap();
        assert!(matches!(Client::new(ours).read(), Said::Nonsense));
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(matches!(Client::new(ours).read(), Said::Nonsense));
    }
}
