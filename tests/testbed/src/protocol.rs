//! Frames between the testbed and `host-agent`: one TCP connection a command.
//!
//! ```text
//! agent   -> testbed   Hello
//! testbed -> agent     Exec(shell command)
//! both                 Stdin, StdinEnd -> ;  <- Stdout, Stderr   in any order
//! agent   -> testbed   Exit(status), then the connection closes
//! ```
//! A connection that closes early kills the command's process group. A frame is a kind byte, a little-endian u32 length of at
//! most [`MAX_PAYLOAD_BYTES`], and the payload.

use std::io::{self, Read, Write};

/// Largest payload of a frame.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The agent is there.
    Hello,
    /// Run this with `/bin/sh -c`.
    Exec(String),
    /// Bytes for the command's standard input.
    Stdin(Vec<u8>),
    /// End of the command's standard input.
    StdinEnd,
    /// Bytes from the command's standard output.
    Stdout(Vec<u8>),
    /// Bytes from the command's standard error.
    Stderr(Vec<u8>),
    /// The command's exit status; 128 + the signal's number if one ended it.
    Exit(i32),
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Self::Hello => 0,
            Self::Exec(_) => 1,
            Self::Stdin(_) => 2,
            Self::StdinEnd => 3,
            Self::Stdout(_) => 4,
            Self::Stderr(_) => 5,
            Self::Exit(_) => 6,
        }
    }

    /// Writes the frame; the payload has at most [`MAX_PAYLOAD_BYTES`].
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let status;
        let payload: &[u8] = match self {
            Self::Hello | Self::StdinEnd => &[],
            Self::Exec(command) => command.as_bytes(),
            Self::Stdin(bytes) | Self::Stdout(bytes) | Self::Stderr(bytes) => bytes,
            Self::Exit(code) => {
                status = code.to_le_bytes();
                &status
            }
        };
        let length = u32::try_from(payload.len()).ok().filter(|n| *n as usize <= MAX_PAYLOAD_BYTES);
        let length = length.ok_or_else(|| invalid("frame too long"))?;
        let mut bytes = Vec::with_capacity(5 + payload.len());
        bytes.push(self.kind());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(payload);
        to.write_all(&bytes)
    }

    /// Reads one frame.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let (mut kind, mut length) = ([0u8; 1], [0u8; 4]);
        from.read_exact(&mut kind)?;
        from.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_PAYLOAD_BYTES {
            return Err(invalid("frame too long"));
        }
        let mut payload = vec![0u8; length];
        from.read_exact(&mut payload)?;
        match (kind, length) {
            ([0], 0) => Ok(Self::Hello),
            ([1], _) => String::from_utf8(payload).map(Self::Exec).map_err(|_| invalid("command is not UTF-8")),
            ([2], _) => Ok(Self::Stdin(payload)),
            ([3], 0) => Ok(Self::StdinEnd),
            ([4], _) => Ok(Self::Stdout(payload)),
            ([5], _) => Ok(Self::Stderr(payload)),
            ([6], _) => match payload.try_into() {
                Ok(code) => Ok(Self::Exit(i32::from_le_bytes(code))),
                Err(_) => Err(invalid("exit frame of the wrong length")),
            },
            _ => Err(invalid("unknown frame")),
        }
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_round_trip() {
        let frames = [
            Frame::Hello,
            Frame::Exec("echo é".into()),
            Frame::Stdin(vec![0, 255]),
            Frame::StdinEnd,
            Frame::Stdout(vec![7; 70_000]),
            Frame::Stderr(Vec::new()),
            Frame::Exit(-1),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut rest).unwrap(), frame);
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn bad_frames_are_refused_by_name() {
        let reading = |bytes: &[u8]| Frame::read(&mut &*bytes).unwrap_err().to_string();
        assert_eq!(reading(&[4, 1, 0, 16, 0]), "frame too long");
        assert_eq!(reading(&[9, 0, 0, 0, 0]), "unknown frame");
        assert_eq!(reading(&[6, 1, 0, 0, 0, 1]), "exit frame of the wrong length");
        assert_eq!(reading(&[1, 1, 0, 0, 0, 255]), "command is not UTF-8");
        let too_long = Frame::Stdin(vec![0; MAX_PAYLOAD_BYTES + 1]).write(&mut Vec::new()).unwrap_err();
        assert_eq!(too_long.to_string(), "frame too long");
    }
}
