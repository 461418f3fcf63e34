//! Where a peer is: `tcp:HOST:PORT` or `unix:PATH`.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Longest path of a Unix socket, bytes: what `sun_path` holds, its last byte being 0.
const MAX_PATH_BYTES: usize = 107;

/// See the module. As text in JSON too.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A host and a port.
    Tcp {
        /// Name or number; an IPv6 number stands without its brackets here.
        host: String,
        /// Port; 0, where one listens, is any that is free.
        port: u16,
    },
    /// A socket in the file system.
    Unix(PathBuf),
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither of the two forms.
    #[error("'{0}' is not an address; write it like tcp:host:7300, tcp:[::1]:7300 or unix:/run/move.sock")]
    Form(String),
    /// Longer than the kernel takes.
    #[error("'{0}' is too long for the path of a socket, {MAX_PATH_BYTES} bytes at most")]
    Path(String),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let form = || AddressError::Form(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty() && !path.contains('\0')) {
            let fits = path.len() <= MAX_PATH_BYTES;
            return if fits { Ok(Self::Unix(path.into())) } else { Err(AddressError::Path(text.to_owned())) };
        }
        let (host, port) = text.strip_prefix("tcp:").and_then(|rest| rest.rsplit_once(':')).ok_or_else(form)?;
        let port = port.parse().ok().filter(|_| port.starts_with(|c: char| c.is_ascii_digit())).ok_or_else(form)?;
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(number) if number.contains(':') => number,
            Some(_) => return Err(form()),
            None if host.contains([':', '[', ']']) => return Err(form()),
            None => host,
        };
        let printable = !host.is_empty() && host.chars().all(|c| c.is_ascii_graphic());
        if printable { Ok(Self::Tcp { host: host.to_owned(), port }) } else { Err(form()) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_alike() {
        for text in
            ["tcp:host-b:7300", "tcp:10.0.0.2:0", "tcp:[::1]:7300", "tcp:[fe80::1%eth0]:65535", "unix:/run/a b.sock"]
        {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
        assert_eq!("tcp:[::1]:1".parse(), Ok(Address::Tcp { host: "::1".to_owned(), port: 1 }));
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        let texts =
            ["", "host:1", "tcp:", "tcp:host", "tcp::1", "tcp:host:", "tcp:host:65536", "tcp:host:+1", "tcp:::1:1"];
        for text in texts.into_iter().chain(["tcp:[host]:1", "tcp:[::1:1", "tcp:a b:1", "unix:", "unix:\0", "udp:a:1"])
        {
            assert_eq!(text.parse::<Address>(), Err(AddressError::Form(text.to_owned())), "{text}");
        }
        let long = format!("unix:/{}", "a".repeat(MAX_PATH_BYTES));
        assert_eq!(long.parse::<Address>(), Err(AddressError::Path(long.clone())));
    }
}
